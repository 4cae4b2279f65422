"""The page about Transformers' names matches the code, is complete, and refuses nothing wrongly."""

import importlib.util
import json
import re

import pytest
from paths import GOLDEN, ROOT, TESTS

from kbtrain import Trainer, TrainingArguments
from kbtrain.config.trainer_names import MEMBERS, PARAMETERS
from kbtrain.errors import ConfigurationError

FOLDER = ROOT / "docs" / "reference"
DATA = json.loads((FOLDER / "names.json").read_text(encoding="utf-8"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_table = load("make_table")
ROWS = make_table.rows()


def test_the_page_is_as_the_code_is():
    written = make_table.TABLE.read_text(encoding="utf-8")
    assert written == make_table.table(), "run: python docs/reference/make_table.py"


def test_the_lists_are_as_long_as_those_of_the_reference():
    assert len(DATA["sections"]["arguments"]) == 114
    assert len(DATA["sections"]["events"]) == 16
    assert len(DATA["may be refused"]) == 24


def test_no_argument_is_refused_that_a_keras_trainer_can_have():
    refused = {name for name, status, _ in ROWS["arguments"] if status == "refused"}
    assert refused <= set(DATA["may be refused"])


def test_what_is_refused_has_a_reason_and_what_differs_a_remark():
    for listed in ROWS.values():
        for name, status, remark in listed:
            assert bool(remark) or status in ("there", "not yet"), name


SHOWN = [(s, name, test) for s, tests in DATA["shown by"].items() for name, test in tests.items()]


@pytest.mark.parametrize("test", sorted({test for _, _, test in SHOWN}))
def test_what_is_called_the_same_is_shown_by_a_test_that_there_is(test):
    file, _, function = test.partition("::")
    text = (TESTS / f"{file}.py").read_text(encoding="utf-8")
    assert re.search(rf"^def {function}\(", text, re.MULTILINE), "renamed? names.json names it"
    golden = "".join(p.read_text() for p in GOLDEN.glob("*.json"))
    for section, name, other in SHOWN:
        if other == test:
            assert name in DATA["sections"][section], name
            word = name.removeprefix("on_")
            assert re.search(rf"\b(on_)?{word}\b", text + golden), name


def test_what_is_shown_to_be_the_same_is_not_said_to_be_adapted():
    statuses = {section: {name: s for name, s, _ in listed} for section, listed in ROWS.items()}
    assert {statuses[section][name] for section, name, _ in SHOWN} == {"same"}


def test_no_remark_is_about_a_name_that_is_not_there():
    for kind in ("adapted", "refused"):
        for section, remarks in DATA[kind].items():
            assert set(remarks) <= set(DATA["sections"][section]), section
    for section, remarks in DATA["refused"].items():
        assert not set(remarks) & make_table.existing()[section], section
    assert set(MEMBERS) <= set(DATA["sections"]["members of Trainer"])
    assert not set(MEMBERS) & make_table.existing()["members of Trainer"]


MISSING = [
    name
    for section, listed in ROWS.items()
    if section.startswith("arguments")
    for name, *_ in listed
    if name not in make_table.existing()["arguments"]
]


@pytest.mark.parametrize("name", MISSING)
def test_an_argument_that_does_not_exist_raises_with_what_to_do(name):
    with pytest.raises(ConfigurationError) as refusal:
        TrainingArguments(**{name: "given"})
    message = str(refusal.value)
    assert f"`{name}`" in message
    assert "has no argument" not in message, "the answer for an unknown name"
    assert re.search(r"Write|Drop|Remove|Save|Until|Choose|Use|It is now", message)


@pytest.mark.parametrize("name", sorted(set(PARAMETERS) - set(Trainer.__init__.__annotations__)))
def test_a_parameter_of_the_references_trainer_is_explained(name):
    with pytest.raises(ConfigurationError, match=f"Trainer has no parameter '{name}'"):
        Trainer(**{name: None})

    class Own(Trainer):
        def __init__(self, **kwargs):
            self.kwargs = kwargs

    assert Own(**{name: 1}).kwargs == {name: 1}
