"""``kbtrain migrate``: scripts for the Trainer of Transformers, changed and explained."""

import ast
import math
import re
import subprocess
import sys

import pytest
from paths import GOLDEN, ROOT

from kbtrain import TrainingArguments
from kbtrain.cli import main
from kbtrain.cli.migrate.rules import migrate
from kbtrain.config.migration import DROPPED, RENAMED, rewritten
from kbtrain.utils.packages.import_hints import is_model

SCRIPTS = GOLDEN / "transformers_scripts"


MODEL_CLASS = "AutoModelForSequenceClassification"


def read(name):
    return (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")


def notes(done):
    return {(note.line, note.text.partition(" ")[0].rstrip(":")) for note in done.notes}


def line_of(text, part):
    return next(n for n, line in enumerate(text.splitlines(), 1) if part in line)


@pytest.mark.core
@pytest.mark.neutral
def test_a_script_with_its_arguments_by_name():
    before = read("text_classification")
    done = migrate(before)
    expected = before.replace("evaluation_strategy", "eval_strategy")
    expected = expected.replace("tokenizer=tokenizer,", "processing_class=tokenizer,")
    expected = expected.replace(
        "training_args.do_eval = False", "training_args = training_args.replace(do_eval=False)"
    )
    ours = re.search(r"( +DataCollatorWithPadding.*? +set_seed,\n)", before, re.DOTALL)[1]
    start = "from transformers import (\n"
    expected = expected.replace(ours, "").replace(start, f"from kbtrain import (\n{ours})\n{start}")
    assert done.text == expected
    assert done.changes == 4
    assert {
        (line_of(before, "training_args.device"), "training_args.device"),
        (line_of(before, "training_args.n_gpu"), "training_args.n_gpu"),
        (line_of(before, "AutoModelForSequenceClassification.fr"), MODEL_CLASS),
        (line_of(before, "trainer = Trainer("), "A"),  # the loss
        (line_of(before, "import get_last_checkpoint"), "get_last_checkpoint"),
    } <= notes(done)  # fmt: skip


@pytest.mark.neutral
def test_what_a_person_has_to_decide_is_listed_by_line():
    before = read("image_classification")
    done = migrate(before)
    found = notes(done)
    for part, about in (
        ("IntervalStrategy,", "IntervalStrategy"),
        ("def compute_loss", "WeightedTrainer.compute_loss"),
        ("def training_step", "WeightedTrainer.training_step"),
        ("transformers.ViTFor", "ViTForImageClassification"),
        ("paged_adamw_8bit", "optim='paged_adamw_8bit'"),
        ("dataloader_num_workers", "dataloader_num_workers"),
        ("use_mps_device", "use_mps_device"),
        ("**settings,", "The"),
        ("optimizers=(", "optimizers"),
        ("save_pretrained", "Save"),
        ('example["pixel_values"]', "pixel_values"),
        ("torch.stack", "torch"),
    ):
        assert (line_of(before, part), about) in found, (part, done.notes)
    (torch,) = [note.text for note in done.notes if note.text.startswith("torch ")]
    lines = [n for n, line in enumerate(before.splitlines(), 1) if re.search(r"\btorch\.", line)]
    assert f"lines {', '.join(map(str, lines))})" in torch
    # Classes through the module, and those that are one class here.
    assert "import kbtrain\nimport transformers\n" in done.text
    assert "class WeightedTrainer(kbtrain.Trainer)" in done.text
    assert "args = TrainingArguments(" in done.text
    assert 'hub_model_id="vit"' in done.text
    assert "push_to_hub_model_id" not in done.text
    assert "ddp_find_unused_parameters=False" in done.text  # asks for nothing, and is accepted


@pytest.mark.neutral
def test_a_migrated_script_runs(tmp_path):
    done = migrate(read("language_modeling"))
    assert "# every half" in done.text
    assert "# The groups differ in length." in done.text
    script = tmp_path / "script.py"
    # What is left to a person, as the notes say: the model, its loss, the next tokens.
    decided = re.sub(r"from transformers import.*\n|import transformers.*\n", "", done.text)
    decided = re.sub(r"model = GPT2.*\n", MODEL, decided)
    decided = decided.replace('result["input_ids"].copy()', "[row[1:] + [0] for row in blocks]")
    decided = decided.replace("callbacks=[", 'loss="sparse_categorical_crossentropy", callbacks=[')
    script.write_text(decided, encoding="utf-8")
    text = tmp_path / "text"
    text.write_bytes(b"the cat sat on the mat. " * 40)
    run = subprocess.run(
        [sys.executable, script, text, tmp_path / "run"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.splitlines()[-1]) < math.log(256)  # equal shares
    assert "4 [" in run.stdout


MODEL = """
import keras
model = keras.Sequential([
    keras.Input((None,), name="input_ids", dtype="int32"), keras.layers.Embedding(256, 16),
    keras.layers.Dense(256, activation="softmax"),
])
"""


@pytest.mark.neutral
def test_the_arguments_of_a_migrated_call_are_accepted():
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    before = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    done = migrate(before)
    calls = [node for node in ast.walk(ast.parse(done.text)) if isinstance(node, ast.Call)]
    call = next(node for node in calls if ast.unparse(node.func) == "TrainingArguments")
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    args = TrainingArguments(**given)
    assert (args.warmup_steps, args.jit_compile, str(args.eval_strategy)) == (0.1, True, "epoch")
    assert {"overwrite_output_dir", "logging_dir"} == {
        keyword.arg
        for node in ast.walk(ast.parse(before))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "TrainingArguments"
        for keyword in node.keywords
        if keyword.arg in DROPPED and keyword.arg not in given
    }
    assert migrate(done.text).changes == 0


@pytest.mark.neutral
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("warmup_ratio=r", "warmup_steps=r"),
        ("warmup_steps=5, warmup_ratio=0.1", "warmup_steps=5, warmup_ratio=0.1"),
        ("group_by_length=True", 'train_sampling_strategy="group_by_length"'),
        ("group_by_length=flag", "group_by_length=flag"),
        ("overwrite_output_dir=True", ""),
        ('"out", overwrite_output_dir=True', '"out"'),
        ('overwrite_output_dir=True, output_dir="out"', 'output_dir="out"'),
        ('"out", overwrite_output_dir=True, logging_dir="l",', '"out",'),
        ('logging_dir="l", seed=1, use_ipex=True', "seed=1"),
        ("overwrite_output_dir=a.evaluation_strategy, seed=2", "seed=2"),
        ("\n    seed=1,\n    use_ipex=True,  # fast\n    n=1,\n", "\n    seed=1,\n    n=1,\n"),
        ("\r\n    seed=1,\r\n    use_ipex=True)#é", "\r\n    seed=1,\r\n    )#é"),
    ],
)  # fmt: skip
def test_arguments(given, expected):
    head = "from transformers import TrainingArguments\na = TrainingArguments("
    end = "" if given.endswith("#é") else ")\n"
    text = migrate(head + given + end).text
    if "use_ipex=True)" in given:
        expected = "\r\n    seed=1)#é"
    assert text == head.replace("transformers", "kbtrain") + expected + end


@pytest.mark.neutral
def test_every_renamed_argument_of_transformers_is_rewritten_to_one_that_exists():
    fields = TrainingArguments.__dataclass_fields__
    for name in RENAMED:
        for value in (True, ..., "x"):
            new = rewritten(name, None if value is ... else value, "source")
            assert new is None or new[0] in fields
    assert rewritten("warmup_ratio", None, "ratio") == ("warmup_steps", "ratio")
    assert rewritten("no_cuda", None, "not gpu") == ("use_cpu", "not gpu")
    assert rewritten("fp16_backend", "apex", "'apex'") is None


@pytest.mark.neutral
def test_a_change_of_arguments_made_elsewhere_is_left_to_a_person():
    text = (
        "from transformers import TrainingArguments\n"
        "def lower(training_args):\n    training_args.learning_rate = 1e-5\n"
    )
    done = migrate(text)
    assert "training_args.learning_rate = 1e-5" in done.text
    assert [note.line for note in done.notes] == [3]


@pytest.mark.neutral
def test_a_name_that_also_holds_something_else_is_left_alone():
    text = (
        "from transformers import TrainingArguments\n"
        "def main(parser):\n    args = parser.parse_args()\n    return args.warmup_ratio\n"
        "def train():\n    args = TrainingArguments('a')\n    args.warmup_ratio\n"
    )
    assert migrate(text).text == text.replace("transformers", "kbtrain")
    only = text.replace("args = parser.parse_args()", "pass")
    assert migrate(only).text.count("args.warmup_steps") == 2


@pytest.mark.neutral
def test_the_call_of_the_base_class_is_one_of_the_trainer():
    text = (
        "import transformers\nclass Mine(transformers.Trainer):\n"
        "    def __init__(self, tokenizer):\n        super().__init__(tokenizer=tokenizer)\n"
        "class Other:\n"
        "    def __init__(self, tokenizer):\n        super().__init__(tokenizer=tokenizer)\n"
    )
    done = migrate(text)
    assert done.text.count("super().__init__(processing_class=tokenizer)") == 1
    assert done.notes == []


@pytest.mark.neutral
@pytest.mark.parametrize("name", ["text_classification", "image_classification"])
def test_what_is_undecided_is_listed_again_for_the_migrated_script(name):
    first = migrate(read(name))
    second = migrate(first.text)
    assert (second.changes, second.text) == (0, first.text)
    left_out = [note for note in first.notes if " is left out" in note.text]
    expected = [(note.new_line, note.text) for note in first.notes if note not in left_out]

    def without_lines(notes):
        return [(line, re.sub(r"used in lines.*?\)", "", text)) for line, text in notes]

    assert without_lines((note.line, note.text) for note in second.notes) == without_lines(expected)


@pytest.mark.neutral
def test_classes_of_models_are_known_by_their_names():
    models = ["AutoModel", "BertModel", "GPT2LMHeadModel", "T5ForConditionalGeneration"]
    assert all(map(is_model, models))
    others = ["DataCollatorForSeq2Seq", "Trainer", "AutoConfig", "BertTokenizer"]
    assert not any(map(is_model, others))


@pytest.mark.neutral
def test_the_file_changes_only_if_told_to(tmp_path, capsys):
    script = tmp_path / "train.py"
    before = "\ufeff# é\r\nfrom transformers import Trainer\r\nTrainer(tokenizer=None)\r\n"
    script.write_bytes(before.encode())
    script.chmod(0o755)
    assert main(["migrate", str(script)]) == 0
    diff, said = capsys.readouterr()
    assert script.read_bytes() == before.encode()
    assert "\r\n-Trainer(tokenizer=None)\r\n" in diff
    assert "\r\n+Trainer(processing_class=None)\r\n" in diff
    assert f"{script}:3: A model of Keras returns outputs" in said
    assert f"{script}: 2 places to change with --write, 1 to decide yourself" in said

    assert main(["migrate", str(script), "--write"]) == 0
    after = before.replace("transformers", "kbtrain").replace("tokenizer", "processing_class")
    assert script.read_bytes() == after.encode()
    assert script.stat().st_mode & 0o111
    assert capsys.readouterr().out == ""


@pytest.mark.neutral
@pytest.mark.parametrize("content", [b"if x:\n", b"\xff\xfe", b"a = '\x00'"])
def test_what_is_not_a_script_is_said_in_words(tmp_path, capsys, content):
    script = tmp_path / "train.py"
    script.write_bytes(content)
    assert main(["migrate", str(script)]) == 2
    assert f"kbtrain migrate: {script} is not a Python script" in capsys.readouterr().err
    assert main(["migrate", str(tmp_path / "none.py")]) == 2


@pytest.mark.neutral
def test_the_line_of_a_note_in_the_changed_script():
    text = (
        "from transformers import AutoModel, Trainer\n"
        "Trainer(\n    tokenizer=None,\n    optimizer=1,\n)\nAutoModel()\n"
    )
    done = migrate(text)
    for note in done.notes:
        old = text.splitlines()[note.line - 1]
        new = done.text.splitlines()[note.new_line - 1]
        assert old.replace("AutoModel, ", "") == new or old == new


@pytest.mark.neutral
def test_what_is_of_trainers_and_models_of_torch_is_listed():
    text = """
from transformers import AutoModel, Trainer, TrainingArguments

args = TrainingArguments("runs")
model = AutoModel.from_pretrained("bert").to("cuda")
trainer = Trainer(model, args, loss="mse")
trainer.args.learning_rate = 3
trainer.args.per_gpu_train_batch_size = 3
print(args.logging_dir)
trainer.lr_scheduler.step()
trainer.model.push_to_hub("me/model")
"""
    said = {note.line: note.text for note in migrate(text).notes}
    assert ".to is of Transformers" in " ".join(n.text for n in migrate(text).notes)
    assert "trainer.args.replace(learning_rate=...)" in said[7]
    assert "replace(per_gpu" not in said[8]
    assert "args.logging_dir: There is no separate directory" in said[9]
    assert "trainer.lr_scheduler is a schedule" in said[10]
    assert "trainer.push_to_hub()" in said[11]


@pytest.mark.neutral
def test_a_folder_or_a_missing_script_is_told(tmp_path, capsys):
    assert main(["migrate", str(tmp_path)]) == 2
    assert "is a folder. Name one script" in capsys.readouterr().err
    assert main(["migrate", str(tmp_path / "no.py")]) == 2
    assert "There is no script" in capsys.readouterr().err


@pytest.mark.neutral
def test_what_is_done_is_told_and_not_counted_as_to_be_decided(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\nfrom transformers import TrainingArguments\n"
        "args = TrainingArguments('runs', overwrite_output_dir=True)\n"
        "data = torch.ones(3)\ntrainer.train(resume_from_checkpoint=True)\n"
    )
    assert main(["migrate", str(script)]) == 0
    said = capsys.readouterr().err
    assert f"{script}:3: overwrite_output_dir is left out. " in said
    assert "torch (used in line 4) is for PyTorch alone, but for a Dataset" in said
    assert f"{script}:5: resume_from_checkpoint=True is an error where there is no" in said
    assert f"{script}: 2 places to change with --write, 2 to decide yourself" in said
