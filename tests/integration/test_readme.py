"""The README's programs run as they are printed, and its commands are the ones CI runs."""

import re

import keras
import pytest
from paths import ROOT
from sklearn.datasets import load_digits

pytestmark = pytest.mark.core

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def execute(source: str) -> dict:
    keras.utils.set_random_seed(0)  # what the programs come to is no matter of luck here
    names: dict = {"__name__": "readme"}
    exec(compile(source, "README.md", "exec"), names)
    return names


def test_every_block_is_run_here():
    assert len(blocks("python")) == 2
    assert len(blocks("bash")) == 2


def test_trainer_program(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = execute(blocks("python")[0])

    assert names["metrics"]["eval_accuracy"] > 0.95
    printed = capsys.readouterr().out.split()
    assert int(printed[0]) == names["result"].global_step
    model = keras.models.load_model(tmp_path / "runs/digits/final.keras")
    right = model.predict(names["x_test"], verbose=0).argmax(-1) == names["y_test"]
    assert right.mean() == pytest.approx(names["metrics"]["eval_accuracy"], abs=1e-6)


def test_the_same_program_again_resumes_and_has_nothing_left_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Without early stopping, so that the first run reaches its end.
    program = blocks("python")[0].replace("num_train_epochs=10", "num_train_epochs=2")
    first, second = execute(program), execute(program)
    assert first["result"].global_step == second["result"].global_step == 2 * 47
    assert first["metrics"]["eval_loss"] == pytest.approx(second["metrics"]["eval_loss"], rel=1e-6)


# Keras' own `fit` describes int64 labels to JAX 0.12, which has none.
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64 requested in ShapeDtypeStruct")
def test_optim_program():
    names = execute(blocks("python")[1])
    assert names["history"].history["accuracy"][-1] > 0.95
    # The schedule spans the run that the program makes.
    updates = 10 * -(-len(load_digits().target) // 32)
    assert names["schedule"].get_config()["num_training_steps"] == updates


def test_commands_name_files_and_extras_that_exist():
    install, test = blocks("bash")
    for extra in re.search(r"\[(.*?)\]", install)[1].split(","):
        assert re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE), extra
    assert (ROOT / re.search(r"python (\S+)", install)[1]).exists()
    assert test.strip() in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_page_about_installing_has_every_extra():
    section = PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    rows = "".join(line for line in page.splitlines() if line.startswith("| `"))
    listed = set(re.findall(r"`([\w-]+)`", rows))
    assert set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)) <= listed


def test_links_lead_to_files_from_anywhere():
    """The README is also the page of the package, where a relative link leads nowhere."""
    (repository,) = re.findall(r'^Source = "(.*)"$', PYPROJECT, re.MULTILINE)
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    assert len(targets) > 20
    for target in targets:
        path = target.removeprefix(f"{repository}/blob/main/")
        assert path != target, target
        assert (ROOT / path).exists(), target
