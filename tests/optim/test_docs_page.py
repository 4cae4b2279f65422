"""The tables of docs/optim.md are those of the code."""

import importlib.util

import keras
import pytest
from paths import ROOT

import optim

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def script():
    path = DOCS / "reference" / "make_optim_page.py"
    spec = importlib.util.spec_from_file_location("make_optim_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_as_the_code_is(script):
    assert script.page() == script.PAGE.read_text(encoding="utf-8"), (
        "run: python docs/reference/make_optim_page.py"
    )


def test_every_name_has_a_place(script):
    text = script.PAGE.read_text(encoding="utf-8")
    for group in ("kbtrain.optimizers", "kbtrain.schedules"):
        for names in script.offers(group).values():
            assert [name for name in names if f"`{name}`" not in text] == []


def test_the_groups_of_the_page_work(script):
    text = script.PAGE.read_text(encoding="utf-8")
    code = "groups = [" + text.partition("groups = [")[2].partition("```")[0]
    names = {}
    exec(compile(code, "optim.md", "exec"), names)
    backbone = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2), keras.layers.LayerNormalization()],
        name="backbone",
    )
    layers = [keras.Input((3,)), keras.layers.Embedding(4, 3), keras.layers.Flatten()]
    model = keras.Sequential([*layers, keras.layers.Dense(3), backbone])
    groups = optim.groups_for(model, names["groups"])
    optimizer = optim.AdamW(1e-3, parameter_groups=groups)
    optimizer.build(model.trainable_variables)
    assert "SGD" in optimizer.parameter_groups_table()
