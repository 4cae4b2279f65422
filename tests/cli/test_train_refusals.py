"""``kbtrain train``: mistakes that would train, and what a resumed run must have in common."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tokenizers

from kbtrain.cli import main
from kbtrain.cli.train import data as preparing
from kbtrain.cli.train.model import default_metrics, image_preparation, make_loss
from kbtrain.cli.train.settings import Settings

pytestmark = pytest.mark.neutral

ROWS = "".join(f"{n},{n % 3},{'abc'[n % 3]}\n" for n in range(30))
CONFIG = """
data: {train: t.csv, label: y, standardize: true, eval_fraction: 0.2}
model: {layers: [Dense: {units: 3}]}
args: {output_dir: run, disable_tqdm: true, save_strategy: epoch, num_train_epochs: 1}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("u,v,y\n" + ROWS)
    Path("c.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def refusal(here, capsys):
    def refusal(*words, table=None, dry=True):
        if table is not None:
            Path("t.csv").write_text(table)
        assert main(["train", "c.yaml", *["--dry-run"][: int(dry)], *words]) == 2
        return capsys.readouterr().err

    return refusal


def test_a_run_resumes_only_with_the_same_preparation(refusal):
    assert main(["train", "c.yaml"]) == 0
    before = Path("run/preprocessing.json").read_text()
    assert len(json.loads(before)["standardized"]["mean"]) == 2
    more = ("--args.num_train_epochs", "2")
    text = refusal(*more, table="u,v,y\n" + ROWS.replace("a", "z"), dry=False)
    assert "the classes were a, b, c, and are now b, c, z. Use another args.output_dir" in text
    text = refusal(*more, table="v,u,y\n" + ROWS, dry=False)
    assert "the features were u, v, and are now v, u" in text
    text = refusal(*more, table="u,v,y\n1" + ROWS, dry=False)
    assert "the mean and variance that data.standardize" in text
    text = refusal(*more, "--model.layers", "[Dense: {units: 2}, Dense: {units: 3}]",
                   table="u,v,y\n" + ROWS, dry=False)  # fmt: skip
    assert "For a new run use another args.output_dir." in text
    assert Path("run/preprocessing.json").read_text() == before


def test_tokens_are_the_same_in_every_run_and_compared(here):
    Path("t.csv").write_text("x,y\nthe unlearned words,a\nwords relearned there,b\n")
    text = "data: {train: t.csv, label: y, text: x, vocabulary: 40}\nmodel: {layers: []}"
    Path("c.yaml").write_text(text)
    settings = Settings(Path("c.yaml"), {})
    first, second = (preparing.read_data(settings, image_preparation) for _ in range(2))
    vocabulary = first.tokenizer.get_vocab()
    assert vocabulary == second.tokenizer.get_vocab()
    # Letters are numbered by alphabet, within and at the beginning of words.
    inner = [token for token in sorted(vocabulary, key=vocabulary.get) if len(token) == 3]
    assert inner[: len(set("thewordsunla"))] == sorted(inner[: len(set("thewordsunla"))])
    first.save_pretrained(".")
    second.check_resumed(Path())
    second.tokenizer.add_tokens(["another"])
    with pytest.raises(ValueError, match="the tokens learned from the texts are others"):
        second.check_resumed(Path())
    assert tokenizers.Tokenizer.from_file("tokenizer.json").encode("zzz").tokens[0] == "[UNK]"


def test_a_cross_entropy_takes_logits_unless_the_model_ends_in_probabilities(here):
    def made(loss, units, activation=None):
        Path("c.yaml").write_text(CONFIG + f"loss: {loss}\n")
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(units, activation)])
        data = preparing.Data("classification", "features", (2,), {}, 3 if units > 1 else 2)
        return make_loss(Settings(Path("c.yaml"), {}), data, model), data

    for name in (
        "sparse_categorical_crossentropy",
        "categorical_focal_crossentropy",
        "SparseCategoricalCrossentropy",
    ):
        assert made(name, 3)[0].from_logits
        assert not made(name, 3, "softmax")[0].from_logits
    assert not made("{SparseCategoricalCrossentropy: {from_logits: false}}", 3)[0].from_logits
    assert made("{CategoricalCrossentropy: {label_smoothing: 0.1}}", 3)[0].from_logits
    assert made("mse", 1)[0] == "mse"
    loss, data = made("bce", 1)
    assert loss.from_logits
    (accuracy,) = default_metrics(data, loss)
    accuracy.update_state(np.array([[1.0], [0.0]]), np.array([[0.2], [-0.2]]))
    assert float(accuracy.result()) == 1
    loss, data = made("binary_crossentropy", 1, "sigmoid")
    assert not loss.from_logits
    assert default_metrics(data, loss) == ["accuracy"]


def test_data_that_would_train_and_mean_nothing_are_refused(refusal):
    assert "column 'y' has only one value, 3" in refusal(table="u,y\n1,3\n2,3\n")
    assert "t.csv has no rows." in refusal(table="u,y\n")
    assert "separated by semicolons" in refusal(table="u;y\n1;2\n")
    table = "u,v,y\n" + ROWS
    assert "--data.features: has the column" in refusal("--data.features", "[u, y]", table=table)
    assert "--data.length: must be at least 1" in refusal("--data.length", "0")
    assert "--data.vocabulary: must be at least 3" in refusal("--data.vocabulary", "1")
    Path("t.jsonl").write_text('{"u": 1, "y": [1]}\n{"u": 2, "y": [2]}\n')
    text = refusal("--data.train", "t.jsonl")
    assert "data.label: column 'y' must have one label in each row" in text


def test_settings_that_fail_only_later_are_refused_at_once(refusal):
    text = refusal("--args.metric_for_best_model", "f1", "--args.eval_strategy", "epoch")
    assert "--args.metric_for_best_model: 'f1' is none of the results of an" in text
    text = refusal("--args.eval_strategy", "epoch", "--data.eval_fraction", "null")
    assert "--args.eval_strategy: epoch needs data to evaluate with: data.eval, or" in text
    assert "Did you mean --dry-run?" in refusal("--dryrun", dry=False)
    assert "--args.learning_rate needs a value" in refusal("--args.learning_rate")
    text = refusal("--model.layers", "[Dense: {unit: 3}]")
    assert "it has no argument 'unit'. Did you mean units?" in text
    Path("c.json").write_text('{"data": }')
    assert main(["train", "c.json"]) == 2
