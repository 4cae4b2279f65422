"""A token that is given to ``kbtrain train`` is in no file, no output and no push."""

import logging

import pytest
from hub_server import TOKEN

from kbtrain.cli import main
from kbtrain.cli.train.settings import Settings

pytestmark = [
    pytest.mark.neutral,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

RUN = """
data: {train: data.csv, label: y, task: regression}
model: {layers: [Dense: {units: 1}]}
args:
  output_dir: run
  push_to_hub: true
  hub_model_id: ada/digits
  hub_strategy: checkpoint
  max_steps: 2
  save_steps: 1
  report_to: [html, csv]
  disable_tqdm: true
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    rows = "".join(f"{i},{i % 3},{i % 2}\n" for i in range(16))
    (tmp_path / "data.csv").write_text("a,b,y\n" + rows)
    (tmp_path / "plain.yaml").write_text(RUN)
    (tmp_path / "with_token.yaml").write_text(f"{RUN}  hub_token: {TOKEN}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["with_token.yaml"],
        ["plain.yaml", "--args.hub_token", TOKEN],
        ["plain.yaml", f"--args.hub-token={TOKEN}"],
    ],
)
def test_a_token_given_to_train_is_written_nowhere(hub, config, capsys, caplog, monkeypatch, words):
    monkeypatch.setattr("sys.argv", ["kbtrain", "train", *words])
    with caplog.at_level(logging.DEBUG, "kbtrain"):
        assert main(["train", *words, "--print-config"]) == 0
        assert main(["train", *words]) == 0
    shown = capsys.readouterr()
    assert "hub_token: <HUB_TOKEN>" in shown.out
    files = {path: path.read_bytes() for path in (config / "run").rglob("*") if path.is_file()}
    assert {"config.yaml", "run.json", "report.html"} <= {path.name for path in files}
    pushed = hub.files("ada/digits")
    assert "config.yaml" in pushed
    texts = [*files.values(), *pushed.values()]
    texts += [text.encode() for text in (shown.out, shown.err, caplog.text)]
    assert not any(TOKEN.encode() in text for text in texts)


def test_the_settings_that_a_run_leaves_take_the_token_from_elsewhere(config, monkeypatch):
    monkeypatch.setattr("sys.argv", ["kbtrain"])
    given = Settings(config / "with_token.yaml", {})
    assert given.args.hub_token == TOKEN
    (config / "config.yaml").write_text(given.shown())
    again = Settings(config / "config.yaml", {})
    assert again.args.hub_token is None
    assert again.args == given.args.replace(hub_token=None)
    assert Settings(config / "config.yaml", {("args", "hub_token"): TOKEN}).args == given.args
