"""Rules about the tree: folders of one purpose and a readable size, tests where their module is."""

import ast

import pytest
from paths import ROOT, TESTS

pytestmark = pytest.mark.core

PACKAGES = ("kbtrain", "optim")
SOURCES = sorted(path for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py"))
FOLDERS = sorted({path.parent for path in SOURCES})
TEST_FILES = sorted(TESTS.rglob("test_*.py"))

# Folders of the tests that no folder of the source has.
OWN_FOLDERS = {"golden", "integration", "repository", "support"}

MOST_LINES = 450
MOST_LINES_OF_A_TEST = 600
# A folder is read from top to bottom: from 3 to 16 files.
SIZES = range(3, 17)
OTHER_SIZES = {
    "optim/algorithms": "one file an algorithm",
    "optim/kernels/tensorflow": "the rule is traced as it is; only XLA's order needs a file",
}


def relative(path):
    return path.relative_to(ROOT).as_posix()


def length(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_each_folder_of_tests_has_the_name_of_a_folder_of_the_source():
    source = {relative(folder).removeprefix("kbtrain/") for folder in FOLDERS}
    tested = {path.parent.relative_to(TESTS).as_posix() for path in TEST_FILES}
    assert tested - OWN_FOLDERS <= source


def test_each_folder_of_the_source_has_tests():
    tops = {relative(folder).split("/")[1] for folder in FOLDERS if relative(folder).count("/")}
    tested = {path.relative_to(TESTS).parts[0] for path in TEST_FILES}
    inside_optim = {path.parent.name for path in TEST_FILES if path.is_relative_to(TESTS / "optim")}
    assert tops - tested - inside_optim == set()


def test_helpers_are_in_support_and_all_else_is_a_test():
    others = {
        path.relative_to(TESTS).as_posix()
        for path in TESTS.rglob("*.py")
        if not path.name.startswith("test_")
        and path.name != "conftest.py"
        and path.relative_to(TESTS).parts[0] not in ("support", "golden")
    }
    assert others == set()


def test_no_file_of_tests_is_too_long():
    assert [relative(p) for p in TEST_FILES if length(p) > MOST_LINES_OF_A_TEST] == []


def test_no_file_of_the_source_is_too_long():
    assert [relative(p) for p in SOURCES if length(p) > MOST_LINES] == []


def test_folders_have_three_to_sixteen_files_but_those_with_a_reason():
    sizes = {relative(folder): len(list(folder.glob("*.py"))) for folder in FOLDERS}
    assert {name for name, size in sizes.items() if size not in SIZES} <= set(OTHER_SIZES)


@pytest.mark.parametrize("folder", FOLDERS, ids=relative)
def test_each_folder_says_its_purpose_in_a_line(folder):
    text = (folder / "__init__.py").read_text(encoding="utf-8")
    purpose, _, rest = (ast.get_docstring(ast.parse(text)) or "").partition("\n")
    assert len(purpose) > 20
    assert purpose.endswith("."), "the first line is a sentence"
    assert rest == "" or rest.startswith("\n"), "the first line is the summary"
