"""The recipes of docs/cookbook run as they are printed, and print what the page says.

Those of a page run in one process, after the lines at its top. PyTorch, which compiles least, runs
all of them; the other backends those with code of their own in the step, and those about the
backend.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pytest
from paths import ROOT

PAGES = sorted(page for page in (ROOT / "docs" / "cookbook").glob("*.md") if page.stem != "index")
ON_EVERY_BACKEND = (
    "How do I write a metric?",
    "How do I write a loss that compares the samples of a batch?",
    "How do I write a `train_step`?",
    "How do I write a schedule?",
    "How do I continue on another backend?",
    "What does the time of an update go into?",
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+\.\d+")


@dataclass
class Recipe:
    title: str
    text: str

    @property
    def program(self) -> str:
        (program,) = (code for language, code in BLOCK.findall(self.text) if language == "python")
        return program

    @property
    def printed(self) -> list[str]:
        """What comments after prints, or else the box below, say."""
        boxes = [lines for language, lines in BLOCK.findall(self.text) if language == "text"]
        comments = re.findall(r"^ *print\(.*\)  # (\S.*)$", self.program, re.MULTILINE)
        return "".join(boxes).splitlines() or comments


def read(page: Path) -> tuple[str, list[Recipe]]:
    """The program at the top of a page, and its recipes."""
    top, *parts = re.split(r"^## (.+)$", page.read_text("utf-8"), flags=re.MULTILINE)
    recipes = [Recipe(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return Recipe("", top).program, recipes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipes_print_what_they_say(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "recipe"}
    start, recipes = read(page)
    if keras.backend.backend() != "torch":
        recipes = [recipe for recipe in recipes if recipe.title in ON_EVERY_BACKEND]
    exec(compile(start, page, "exec"), names)  # once: no recipe needs another one
    for recipe in recipes:
        capsys.readouterr()
        exec(compile(recipe.program, f"{page.name}: {recipe.title}", "exec"), names.copy())
        printed, said = capsys.readouterr().out.splitlines(), recipe.printed
        # Other versions draw other weights: decimals agree roughly, all else to the letter.
        assert [NUMBER.sub("", line) for line in printed] == [NUMBER.sub("", s) for s in said]
        found, expected = (NUMBER.findall(" ".join(lines)) for lines in (printed, said))
        np.testing.assert_allclose(
            [float(number) for number in found],
            [float(number) for number in expected],
            rtol=0.25,
            err_msg=recipe.title,
        )


@pytest.mark.neutral
def test_recipes_are_short_say_what_they_print_and_lead_on():
    recipes = [recipe for page in PAGES for recipe in read(page)[1]]
    assert len(recipes) >= 25
    assert set(ON_EVERY_BACKEND) <= {recipe.title for recipe in recipes}
    for recipe in recipes:
        assert recipe.title.endswith("?")
        assert 3 <= len(recipe.program.splitlines()) <= 26, recipe.title
        assert recipe.printed, recipe.title
        assert re.search(r"\]\((\.\./|https://github\.com/kbtrain)", recipe.text), recipe.title
