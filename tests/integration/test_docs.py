"""The programs in docs/ run as they are printed; every page and example is listed.

Those of other pages run beside what they are about: test_plugins.py (write-your-own-optimizer.md),
test_docs_page.py (optim.md), test_ray.py (clusters.md) and test_examples.py (migrating.md).
"""

import ast
import contextlib
import re
import sqlite3
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from paths import ROOT

import kbtrain

PAGES = sorted((ROOT / "docs").rglob("*.md"))


def block(page: str) -> str:
    """The one program of a page."""
    (found,) = re.findall(
        r"^```python\n(.*?)^```$",
        (ROOT / "docs" / page).read_text("utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    return found


def execute(page: str, **names: object) -> dict:
    exec(compile(block(page), page, "exec"), names)
    return names


def trained(
    folder: Path, resume: bool = False, max_steps: int = 1, **options: object
) -> kbtrain.Trainer:
    """A run of one update that has saved."""
    x = np.ones((8, 4), "float32")
    trainer = kbtrain.Trainer(
        keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(2, name="dense")], name="sequential"
        ),
        kbtrain.TrainingArguments(
            output_dir=folder,
            max_steps=max_steps,
            save_steps=1,
            logging_steps=1,
            disable_tqdm=True,
            run_name="mine",
        ),
        train_dataset=(x, x[:, :2]),
        loss="mse",
        **options,
    )
    trainer.fit(resume_from_checkpoint=resume)
    return trainer


# Pages whose programs run one after the other, in one namespace.
GUIDES = (
    "checkpoints", "debugging-nan", "extending", "faq", "from-keras-fit", "index",
    "mixed-precision", "performance",
    # Its parts are tested on each backend where they are made.
    pytest.param("weights", marks=pytest.mark.neutral),
)  # fmt: skip


@pytest.mark.parametrize("page", GUIDES)
def test_programs_of_a_guide(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "guide"}
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    programs = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for program in programs:
        exec(compile(program, f"{page}.md", "exec"), names)
    printed = capsys.readouterr().out
    # What a comment after a print says is what it printed.
    for said in re.findall(r"^print\(.*\)  # (\S.*)$", "".join(programs), re.MULTILINE):
        assert "..." in said or f"{said}\n" in printed, said


def test_trackers(tmp_path):
    tracker = execute("trackers.md")["SqliteTracker"]
    trainer = trained(tmp_path, callbacks=[tracker()])
    trainer.evaluate(trainer.train_dataset)
    again = trained(tmp_path, callbacks=[tracker()], resume=True, max_steps=2)
    trained(tmp_path, callbacks=[tracker()])
    with contextlib.closing(sqlite3.connect(tmp_path / "runs.sqlite")) as database:
        runs = database.execute("SELECT run, settings FROM runs").fetchall()
        rows = database.execute("SELECT run, step, value FROM logs WHERE name = 'train/loss'")
        losses = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
        assert rows.fetchall()[:2] == [("1", 1, losses[0]), ("1", 2, losses[1])]
        assert database.execute("SELECT * FROM logs WHERE name = 'eval/loss'").fetchall()
    assert [run for run, _ in runs] == [1, 2]
    assert "'run_name': 'mine'" in runs[0][1]


def test_data():
    names = execute("data.md", kbtrain=kbtrain)
    assert names["collate"]([[5, 6, 7]])["input_ids"].shape == (1, 64)
    assert names["args"].train_sampling_strategy == "group_by_length"


def test_losses(tmp_path):
    names = execute("losses.md", kbtrain=kbtrain, folder=tmp_path)
    expected = {"eval_loss", "eval_price_loss", "eval_kind_loss", "eval_kind_accuracy"}
    assert expected <= names["metrics"].keys()


def test_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--width", "8", "--learning_rate", "1e-3"])
    monkeypatch.setitem(sys.modules, "train", type(sys)("train"))
    names = execute("command-line.md", __name__="train")
    assert (names["model_args"].width, names["args"].learning_rate) == (8, 1e-3)


def test_distributed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = execute("distributed.md")["trainer"]
    assert trainer.state.global_step == 189
    assert trainer.state.log_history[-1]["train_loss"] < 0.5
    assert (tmp_path / "runs" / "sums" / "checkpoint-150").is_dir()


def test_checkpoint_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = trained(tmp_path).model
    expected = model.get_weights()
    model.set_weights([np.zeros_like(value) for value in expected])
    (tmp_path / "checkpoint-1").rename("checkpoint-500")
    names = execute("checkpoint-format.md", model=model)
    np.testing.assert_array_equal(names["kernel"], expected[0])
    np.testing.assert_array_equal(model.get_weights()[0], expected[0])


def test_reliability_names_what_exists():
    (handler,) = [
        n for n in ast.walk(ast.parse(block("reliability.md"))) if isinstance(n, ast.ExceptHandler)
    ]
    assert issubclass(getattr(kbtrain, handler.type.id), SystemExit)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "docs").as_posix())
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        inside = re.match(r"https://github\.com/kbtrain/kbtrain/(?:blob|tree)/main/(.+)", target)
        if inside:
            assert (ROOT / inside[1]).exists(), target
        else:
            assert "://" in target or (page.parent / target).exists(), target


def test_every_page_and_example_is_listed():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    for page in PAGES:
        listing = page.parent / "index.md"
        # Decisions are reached through their index; all other pages are in the site's navigation.
        if page.parent.name == "decisions" and page != listing:
            assert f"({page.name})" in listing.read_text("utf-8")
        else:
            assert re.search(rf"[-:] {page.relative_to(ROOT / 'docs').as_posix()}\n", site), page
    for example in (ROOT / "examples").glob("*.py"):
        assert f"`{example.name}`" in index
        assert f"/examples/{example.name})" in readme


def test_decisions_are_numbered_without_gaps_and_have_all_sections():
    records = [page for page in PAGES if page.parent.name == "decisions" and page.stem != "index"]
    assert [page.name[:4] for page in records] == [f"{i:04d}" for i in range(1, len(records) + 1)]
    for page in records:
        headings = re.findall(r"^## (.+)$", page.read_text("utf-8"), re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequence", "Figures"], page.name


def test_every_test_that_the_page_on_reliability_names_is_there():
    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    sources = [path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    tests = {name for source in sources for name in re.findall(r"def (test_\w+)", source)}
    named = set(re.findall(r"(?:::|`)(test_\w+)`", page))
    assert len(named) > 30
    assert named <= tests
    for file in set(re.findall(r"[\w/]+/test_\w+\.py", page)):
        assert (ROOT / "tests" / file).exists(), file
    for file, name in re.findall(r"`([\w/]+\.py)::(test_\w+)`", page):
        assert f"def {name}(" in (ROOT / "tests" / file).read_text("utf-8"), name
