"""Packages of other people: the page write-your-own-optimizer.md, put into a fresh environment."""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from paths import ROOT, SUPPORT

PAGE = (ROOT / "docs" / "write-your-own-optimizer.md").read_text(encoding="utf-8")

BROKEN = """
[project]
name = "broken-optimizers"
version = "1.0"

[project.entry-points."kbtrain.optimizers"]
no_module = "module_that_is_not_there:Optimizer"
no_attribute = "broken:Missing"
no_optimizer = "broken:make_something_else"
"""
RIVAL = """
[project]
name = "rival-optimizers"
version = "1.0"

[project.entry-points."kbtrain.optimizers"]
signum = "rival:Signum"
"""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def programs():
    """First line (a comment) -> code, in the order of the page."""
    return {code.partition("\n")[0].removeprefix("# "): code for code in blocks("python")}


class Environment:
    """A virtual environment that sees what this one has, and has packages of its own."""

    def __init__(self, folder):
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        own = next(folder.glob("lib/python*/site-packages"))
        # `addsitedir` reads the .pth files there too (this package may be installed as editable).
        seen = [path for path in site.getsitepackages() if Path(path).is_dir()]
        lines = [f"import site; site.addsitedir({path!r})\n" for path in seen]
        (own / "the_tests_environment.pth").write_text("".join(lines))
        self.folder = folder

    def install(self, pyproject, modules):
        """Install a package made of these files, with pip and nothing else."""
        name = re.search(r'^name = "(.*)"', pyproject, re.MULTILINE)[1]
        package = self.folder / "sources" / name
        package.mkdir(parents=True)
        shutil.copy(SUPPORT / "helpers_plugin.py", package)
        # The page's own build tool may not be installed where tests run.
        project = re.sub(r"(?s)^\[build-system\].*?\n\n", "", pyproject.lstrip())
        build = '[build-system]\nrequires = []\nbuild-backend = "helpers_plugin"\n'
        build += 'backend-path = ["."]\n\n'
        (package / "pyproject.toml").write_text(build + project)
        for module, code in modules.items():
            (package / module).write_text(code)
        pip = [sys.executable, "-m", "pip", "--python", str(self.python)]
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*pip, "install", *options, str(package)], check=True, timeout=300)

    def run(self, code):
        """Run a program there; returns what it printed."""
        done = subprocess.run(
            [self.python, "-c", code],
            cwd=self.folder,
            env={**os.environ, "PYTHONWARNINGS": "default"},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


# For each name: what `optim.get` and a Trainer say about it.
ASK = """
import json, logging
import numpy as np, keras, optim
from kbtrain import ConfigurationError, Trainer, TrainingArguments

def train(name):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    args = TrainingArguments(output_dir="runs/ask", optim=name, max_steps=1, save_strategy="no",
                             disable_tqdm=True)
    x = np.ones((8, 1), "float32")
    Trainer(model, args, train_dataset=(x, x), loss="mse").fit()

answers = {"names": optim.names()}
for name in %r:
    answers[name] = []
    for ask in (optim.get, train):
        try:
            ask(name)
            answers[name].append("fine")
        except Exception as error:
            answers[name].append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


def test_every_block_of_the_page_is_run():
    assert list(programs()) == [
        *("signum.py", "plain Keras", "test", "by name", "schedule", "metric"),
    ]
    assert len(blocks("toml")) == 1


@pytest.mark.neutral  # what packages offer is looked up by Python alone
@pytest.mark.slow
def test_packages_of_other_people(tmp_path):
    environment = Environment(tmp_path / "environment")
    (page,) = blocks("toml")
    environment.install(page, {"signum.py": programs()["signum.py"]})

    # The page, from its top to its bottom; the class itself comes from the package.
    code = "import keras\nfrom keras import ops\nimport optim\n"
    code += "".join(block for name, block in programs().items() if name != "signum.py")
    assert environment.run(code + "print('done')").endswith("done\n")

    # An unusable entry is named with its package, and affects nothing else.
    broken = ("no_module", "no_attribute", "no_optimizer")
    environment.install(
        BROKEN, {"broken.py": "def make_something_else(learning_rate=0.1):\n    return 5\n"}
    )
    answers = json.loads(environment.run(ASK % (("adamw", "signum", *broken),)).splitlines()[-1])
    assert {"adamw", "signum", *broken} <= set(answers["names"])
    assert answers["adamw"] == answers["signum"] == ["fine", "fine"]
    for name in broken[:2]:
        optim_says, trainer_says = answers[name]
        assert optim_says.startswith("ImportError: ")
        assert trainer_says.startswith("ConfigurationError: ")
        for message in answers[name]:
            assert name in message
            assert "broken-optimizers" in message
    assert answers["no_optimizer"][0].startswith("TypeError: ")
    assert answers["no_optimizer"][1].startswith("ConfigurationError: ")
    for message in answers["no_optimizer"]:
        assert "no_optimizer" in message
        assert "Received: int" in message

    # Two packages with one name: both are named, and the other names go on working.
    environment.install(RIVAL, {"rival.py": "from signum import Signum\n"})
    answers = json.loads(environment.run(ASK % (("signum", "adamw"),)).splitlines()[-1])
    assert answers["adamw"] == ["fine", "fine"]
    for message in answers["signum"]:
        assert "signum-optimizer" in message
        assert "rival-optimizers" in message
