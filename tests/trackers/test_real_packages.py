"""The packages of trackers themselves, offline; in the environment that has all of them.

``test_trackers.py`` has the contract, with stand-ins for the packages. Here is shown that the
stand-ins take the calls the packages take, and that the packages can read what was written.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import SUPPORT

pytestmark = pytest.mark.cross

TRAIN = """
import json, sys
sys.path[:0] = {paths!r}
from helpers import StopAt
from test_trackers import expected, make_trainer
common = dict(report_to={name!r}, project="a-project", save_strategy="steps", save_steps=2)
make_trainer({folder!r}, callbacks=[StopAt(2)], **common).fit()
trainer = make_trainer({folder!r}, **common)
trainer.fit(resume_from_checkpoint=True)
trainer.evaluate()
logged = [[step, name, value] for (step, name), value in expected(trainer).items()]
trainer.callback_handler.close()
open({folder!r} + "/logged.json", "w").write(json.dumps(logged))
"""

LEVELDB = """
def records(raw):
    # LevelDB: blocks of 32 KiB; checksum, length and kind (whole, first, middle, last) of each
    position, parts = 7, []
    while position + 7 <= len(raw):
        length, kind = int.from_bytes(raw[position + 4 : position + 6], "little"), raw[position + 6]
        if kind:
            parts.append(raw[position + 7 : position + 7 + length])
            position += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []
        if kind == 0 or 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
"""

READ = {
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(folder + "/runs/a-run").Reload()
for tag in events.Tags()["scalars"]:
    for event in events.Scalars(tag):
        found.append([event.step, tag, event.value])
""",
    "wandb": LEVELDB
    + """
import glob
from wandb.proto import wandb_internal_pb2
for path in sorted(glob.glob(folder + "/wandb/offline-run-*/run-*.wandb"), key=os.path.getmtime):
    for raw in records(open(path, "rb").read()):
        record = wandb_internal_pb2.Record.FromString(raw)
        row = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
        found += [[row["train/global_step"], k, v] for k, v in row.items() if "/" in k]
""",
    "comet_ml": """
import glob, zipfile
for path in glob.glob(folder + "/*.zip"):
    archive = zipfile.ZipFile(path)
    experiment = json.loads(archive.read("experiment.json"))
    assert experiment["project_name"] == "a-project"
    for line in archive.read("messages.json").decode().splitlines():
        metric = json.loads(line)["payload"].get("metric")
        if metric and "/" in metric["metricName"]:
            found.append([metric["step"], metric["metricName"], metric["metricValue"]])
""",
    "swanlab": LEVELDB
    + """
import glob
from swanlab.proto.swanlab.record.v1 import record_pb2
runs = glob.glob(folder + "/swanlog/run-*/run-*.swanlab")
assert len({os.path.basename(path) for path in runs}) == 1
for path in sorted(runs, key=os.path.getmtime):
    for raw in records(open(path, "rb").read()):
        record = record_pb2.Record.FromString(raw)
        if record.HasField("scalar"):
            found.append([record.scalar.step, record.scalar.key, record.scalar.value.number])
""",
    "mlflow": """
import mlflow
client = mlflow.MlflowClient()
experiment = client.get_experiment_by_name("a-project")
(run,) = client.search_runs([experiment.experiment_id])
assert run.info.run_name == "a-run" and run.info.status == "FINISHED"
assert run.data.params["learning_rate"] == "0.01"
for name in run.data.metrics:
    for metric in client.get_metric_history(run.info.run_id, name):
        found.append([metric.step, name, metric.value])
""",
    "trackio": """
import trackio
(run,) = trackio.Api().runs("a-project")
assert run.name == "a-run"
from trackio.sqlite_storage import SQLiteStorage
for row in SQLiteStorage.get_logs("a-project", "a-run"):
    found += [[row["step"], k, v] for k, v in row.items() if "/" in k]
""",
}


def python(program, folder):
    """Run a program with every tracker told to stay on this machine."""
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"file:{folder}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "COMET_START_ONLINE": "0",
        "SWANLAB_MODE": "offline",
        "TRACKIO_DIR": f"{folder}/trackio",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", READ)
def test_the_package_reads_what_was_logged_before_and_after_a_resume(tmp_path, name):
    paths, folder = [str(SUPPORT), str(Path(__file__).parent)], str(tmp_path)
    python(TRAIN.format(paths=paths, name=name, folder=folder), tmp_path)
    printed = python(
        f"import json, os\nfolder, found = {folder!r}, []\n{READ[name]}\nprint(json.dumps(found))",
        tmp_path,
    )
    logged = json.loads((tmp_path / "logged.json").read_text())
    found = {(s, n): v for s, n, v in json.loads(printed.splitlines()[-1])}
    assert len([key for key in logged if key[1] == "train/loss"]) == 3
    for step, key, value in logged:
        np.testing.assert_allclose(found[step, key], value, rtol=1e-6)
