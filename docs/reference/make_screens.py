"""Make the pictures of docs/screens.md: runs programs on a terminal of 80 columns and draws it.

    KERAS_BACKEND=torch python docs/reference/make_screens.py [NAME ...]

It needs pyte, scikit-learn, matplotlib and Optuna. Durations and speeds are those of the machine.
"""

import io
import itertools
import re
import shutil
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from pseudo_terminal import record  # noqa: E402

COLUMNS = 80

PROGRAM = """\
import sys

import keras
import numpy as np
from sklearn.datasets import load_digits

from kbtrain import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments


class Spoil(TrainerCallback):
    def on_epoch_begin(self, args, state, control, **kwargs):
        if broken and state.epoch >= 2:
            x[700] = np.nan


epochs, rate, broken = int(sys.argv[1]), float(sys.argv[2]), "broken" in sys.argv
sys.argv[1:] = []  # the command in the pictures is short
keras.utils.set_random_seed(1)
digits = load_digits()
x, y = (digits.data / 16).astype("float32"), digits.target
model = keras.Sequential([
    keras.Input((64,)),
    keras.layers.Dense(256, activation="relu"),
    keras.layers.Dropout(0.3),
    keras.layers.Dense(10),
], name="digits")
args = TrainingArguments(
    output_dir="runs/digits",
    num_train_epochs=epochs,
    per_device_train_batch_size=32,
    learning_rate=rate,
    logging_strategy="epoch",
    eval_strategy="epoch",
    save_strategy="epoch",
    save_total_limit=2,
    load_best_model_at_end=True,
    metric_for_best_model="accuracy",
)
trainer = Trainer(
    model,
    args,
    train_dataset=(x[:1400], y[:1400]),
    eval_dataset=(x[1400:], y[1400:]),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    callbacks=[EarlyStoppingCallback(early_stopping_patience=3), Spoil()],
)
trainer.fit(resume_from_checkpoint="auto")
"""

# Colours as in the light and dark themes of terminals; the background is that of the picture.
THEME = TerminalTheme(
    (24, 26, 31),
    (220, 223, 228),
    [(40, 44, 52), (224, 108, 117), (152, 195, 121), (229, 192, 123),
     (97, 175, 239), (198, 120, 221), (86, 182, 194), (220, 223, 228)],
)  # fmt: skip


def main() -> None:
    """Make all pictures, or those that are named."""
    wanted = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="", dir=tempfile.gettempdir()) as folder:
        place = Path(folder)
        (place / "train.py").write_text(PROGRAM, encoding="utf-8")
        shutil.copytree(ROOT / "examples", place / "examples")
        for name, (title, command, keys) in SCREENS.items():
            if wanted and name not in wanted:
                continue
            if name in ("early-stopping", "ctrl-c", "failing"):
                _remove(place / "runs")
            shown = record([sys.executable, *command], COLUMNS, keys, cwd=place, timeout=600)
            draw(shown.display, len(shown.screen), name, title, (f"{place}/", f"{ROOT}/"))
            print(f"{name}: status {shown.status}, longest silence {shown.longest_silence:.1f} s")


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def draw(display, height: int, name: str, title: str, folders: tuple[str, ...]) -> None:
    """Write a terminal as an SVG picture.

    Args:
        display: The terminal of pyte.
        height: Its lines that are not empty.
        name: Name of the file.
        title: What was typed.
        folders: Folders of this machine, which are left out.
    """
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="standard"
    )
    for row in range(height):
        line = Text()
        cells = (display.buffer[row][column] for column in range(COLUMNS))
        for (colour, bold), run in itertools.groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
            colour = {"default": None, "brown": "yellow"}.get(colour, colour)
            shown = "".join(cell.data for cell in run)
            for folder in folders:
                shown = shown.replace(folder, "")
            line.append(shown, Style(color=colour, bold=bold))
        line.rstrip()
        console.print(line, no_wrap=True, overflow="crop", soft_wrap=True)
    # No font is fetched from anywhere.
    form = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    form = form.replace("Fira Code, monospace", "Menlo, Consolas, DejaVu Sans Mono, monospace")
    picture = console.export_svg(title=title, theme=THEME, code_format=form, unique_id=name)
    target = ROOT / "docs" / "images" / f"screen-{name}.svg"
    target.parent.mkdir(exist_ok=True)
    target.write_text(picture + "\n", encoding="utf-8")


SCREENS = {
    "quickstart": (
        "python examples/quickstart.py",
        ["examples/quickstart.py", "--epochs", "10"],
        [],
    ),
    "early-stopping": ("python train.py", ["train.py", "30", "0.003"], []),
    "ctrl-c": (
        "python train.py, and Ctrl-C in epoch 4",
        ["train.py", "400", "0.0003"],
        [("     132      3", b"\x03")],
    ),
    "resume": (
        "python train.py, once more, and Ctrl-C in epoch 9",
        ["train.py", "400", "0.0003"],
        [("     352      8", b"\x03")],
    ),
    "failing": ("python train.py", ["train.py", "6", "0.003", "broken"], []),
    "search": (
        "python examples/hyperparameter_search.py",
        ["examples/hyperparameter_search.py", "--n-trials", "6", "--epochs", "2"],
        [],
    ),
}
"""Name -> title, arguments of Python, keys to type."""


if __name__ == "__main__":
    main()
