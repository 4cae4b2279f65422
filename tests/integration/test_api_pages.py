"""The pages of the API name what exists, all of it, once."""

import importlib
import importlib.util
import re

import pytest
from paths import ROOT

import kbtrain
import optim

pytestmark = pytest.mark.neutral

PAGES = {page.stem: page.read_text("utf-8") for page in (ROOT / "docs" / "api").glob("*.md")}
NAMED = [
    (page, name)
    for page, text in PAGES.items()
    for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)
]


def test_every_public_name_is_on_one_page():
    public = {
        f"{package.__name__}.{name}" for package in (kbtrain, optim) for name in package.__all__
    }
    names = [name for _, name in NAMED]
    assert sorted(public - set(names)) == []
    assert sorted(name for name in names if names.count(name) > 1) == []
    assert len(names) > 90


def test_every_name_on_a_page_exists_and_says_what_it_is():
    for page, name in NAMED:
        module, _, last = name.rpartition(".")
        assert getattr(importlib.import_module(module), last).__doc__, (page, name)


def test_members_that_a_page_lists_exist():
    for page, text in PAGES.items():
        for name, options in re.findall(r"^::: (\S+)\n((?: +.*\n)+)", text, re.MULTILINE):
            module, _, last = name.rpartition(".")
            thing = getattr(importlib.import_module(module), last)
            for member in re.findall(r"^ +- (\w+)$", options, re.MULTILINE):
                assert hasattr(thing, member), (page, name, member)


def test_every_page_is_listed():
    listed = re.findall(r"\]\((\S+)\.md\)", PAGES["index"])
    assert sorted(listed) == sorted(set(PAGES) - {"index"})


def test_the_fields_of_the_arguments_are_as_in_the_code():
    path = ROOT / "docs" / "reference" / "make_arguments.py"
    spec = importlib.util.spec_from_file_location("make_arguments", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.PAGE.read_text("utf-8") == made.page(), (
        "run: python docs/reference/make_arguments.py"
    )
    assert "" not in made.topics(), "a field without a topic"
