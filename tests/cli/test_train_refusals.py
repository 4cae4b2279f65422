"""``kbtrain train``: mistakes that would train, and what a resumed run must have in common."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tokenizers

from kbtrain.checkpoint.storage.lock import RunLock
from kbtrain.cli import main
from kbtrain.cli.train import data as preparing
from kbtrain.cli.train.metrics import default_metrics, for_logits
from kbtrain.cli.train.model import image_preparation, make_list, make_loss
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


LOGITS, LABELS = np.array([[0.2], [-0.2], [0.4]]), np.array([[1.0], [0.0], [0.0]])


@pytest.mark.parametrize(
    ("given", "name", "expected"),
    [
        ("accuracy", "accuracy", 2 / 3),
        ("acc", "acc", 2 / 3),
        ("BinaryAccuracy", "BinaryAccuracy", 2 / 3),
        ("{BinaryAccuracy: {name: own}}", "own", 2 / 3),
        ("{BinaryAccuracy: {threshold: 0.3}}", "binary_accuracy", 1 / 3),
        ("{Precision: {name: p}}", "p", 1 / 2),
        ("recall", "recall", 1.0),
        ("{AUC: {name: auc}}", "auc", 0.5),
        # log(1 + e^-0.2), twice, and log(1 + e^0.4)
        ("{BinaryCrossentropy: {name: bce}}", "bce", 0.7031),
    ],
)
def test_binary_metrics_take_the_logits_that_the_loss_takes(here, given, name, expected):
    Path("c.yaml").write_text(CONFIG + f"metrics: [{given}]\n")
    settings = Settings(Path("c.yaml"), {})
    loss = keras.losses.BinaryCrossentropy(from_logits=True)

    def adapt(place, one):
        return for_logits(settings, place, one, loss)

    (metric,) = make_list(settings, "metrics", (keras.metrics,), [], adapt)
    metric.update_state(LABELS, LOGITS)
    assert metric.name == name
    assert float(metric.result()) == pytest.approx(expected, abs=1e-4)
    one = settings.get("metrics")[0]
    assert for_logits(settings, (), one, keras.losses.BinaryCrossentropy()) == one


def test_metrics_of_classes_take_logits_too_and_others_are_refused(here):
    settings, place = Settings(Path("c.yaml"), {}), ("metrics", 0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for same in ("accuracy", "AUC", {"TopKCategoricalAccuracy": {"k": 2}}):
        assert for_logits(settings, place, same, loss) == same
    assert for_logits(settings, place, {"SparseCategoricalCrossentropy": None}, loss) == {
        "SparseCategoricalCrossentropy": {"from_logits": True}
    }
    loss = keras.losses.BinaryFocalCrossentropy(from_logits=True)
    with pytest.raises(ValueError, match="F1Score compares probabilities with thresholds"):
        for_logits(settings, place, "F1Score", loss)


def test_a_dry_run_checks_the_output_folder_and_leaves_it(refusal):
    assert main(["train", "c.yaml", "--dry-run", "--args.output_dir", "new/run"]) == 0
    assert not Path("new").exists()
    Path("file").write_text("")
    assert "file" in refusal("--args.output_dir", "file/run")
    assert "fsspec" in refusal("--args.output_dir", "nothing://bucket/run")
    assert main(["train", "c.yaml"]) == 0
    before = sorted(Path("run").rglob("*"))
    assert main(["train", "c.yaml", "--dry-run"]) == 0
    assert "the features were u, v" in refusal(table="v,u,y\n" + ROWS)
    layers = "[Dense: {units: 2}, Dense: {units: 3}]"
    assert "The checkpoint does not fit this model" in refusal(
        "--model.layers", layers, table="u,v,y\n" + ROWS
    )
    lock = RunLock("run")
    lock.acquire()
    assert "Another run is writing to" in refusal()
    lock.release()
    assert sorted(Path("run").rglob("*")) == before


def test_a_run_resumes_only_with_the_tokenizer_of_its_preset(here):
    class Tokenizer:
        def __init__(self, lowercase, words):
            self.lowercase, self.words = lowercase, words

        def get_config(self):
            return {"name": f"tokenizer_{id(self)}", "lowercase": self.lowercase}

        def get_vocabulary(self):
            return self.words

    class Preprocessor:
        def __init__(self, *words, lowercase=True):
            self.tokenizer = Tokenizer(lowercase, words)

        def save_to_preset(self, folder):
            pass

    def data(*words, **options):
        preprocessor = Preprocessor(*words, **options)
        return preparing.Data(
            "classification", "tokens", (), {}, 2, preprocessor=preprocessor, classes=[0, 1]
        )

    data("a", "b").save_pretrained(".")
    data("a", "b").check_resumed(Path())
    for other in (data("b", "a"), data("a", "b", lowercase=False)):
        with pytest.raises(ValueError, match="the preset's tokenizer is another"):
            other.check_resumed(Path())


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
