"""A run on a server of S3 on this machine: killed, and resumed from the bucket elsewhere."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cross

PROGRAM = """
import json, os, signal, sys
import numpy as np
import keras
from helpers import arguments, linear_model, make_data
from kbtrain import Trainer, TrainerCallback

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            kwargs["trainer"].saver.settle()  # checkpoint-6 is in the bucket
            os.kill(os.getpid(), signal.SIGKILL)

output_dir, end = sys.argv[1:]
args = arguments(output_dir, per_device_train_batch_size=4, max_steps=12, save_strategy="steps",
                 save_steps=3, save_total_limit=2, report_to="json",
                 train_sampling_strategy="random", learning_rate=0.05)
trainer = Trainer(linear_model(), args, train_dataset=make_data(), loss="mse",
                  callbacks=[Kill()] if end == "killed" else [])
trainer.fit(resume_from_checkpoint=None if end == "whole" else "auto")
print(json.dumps([e["loss"] for e in trainer.state.log_history if "loss" in e]))
"""


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer  # where nothing marked cross runs, it is missing

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server,
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    return client


def run(folder, output_dir, backend, end):
    environment = os.environ | {"KERAS_BACKEND": backend, "XDG_CACHE_HOME": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, output_dir, end],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    expected = -signal.SIGKILL if end == "killed" else 0
    assert done.returncode == expected, done.stderr
    return None if end == "killed" else json.loads(done.stdout.splitlines()[-1])


def keys(bucket):
    return [entry["Key"] for entry in bucket.list_objects_v2(Bucket="bucket").get("Contents", [])]


def test_killed_and_resumed_on_another_backend_from_the_bucket(bucket, tmp_path):
    whole = run(tmp_path / "0", str(tmp_path / "run"), "jax", "whole")
    run(tmp_path / "1", "s3://bucket/run", "jax", "killed")
    folders = {key.split("/")[1] for key in keys(bucket)}
    assert {"checkpoint-3", "checkpoint-6"} <= folders
    resumed = run(tmp_path / "2", "s3://bucket/run", "torch", "resumed")  # another machine
    assert resumed == pytest.approx(whole, rel=1e-5)
    names = {key.split("/")[1] for key in keys(bucket)}
    assert names == {"checkpoint-9", "checkpoint-12", "log.jsonl", "run.json"}
    manifest = json.loads(
        bucket.get_object(Bucket="bucket", Key="run/checkpoint-12/manifest.json")["Body"].read()
    )
    for name, entry in manifest["files"].items():
        found = bucket.head_object(Bucket="bucket", Key=f"run/checkpoint-12/{name}")
        assert found["ContentLength"] == entry["size"]
    assert not any("uploading" in key or "write-test" in key for key in keys(bucket))
    log = bucket.get_object(Bucket="bucket", Key="run/log.jsonl")["Body"].read().splitlines()
    assert [e["loss"] for e in map(json.loads, log) if "loss" in e] == pytest.approx(
        whole, rel=1e-5
    )


def test_a_bucket_that_is_not_there_and_a_server_that_is_not(bucket, tmp_path, monkeypatch):
    from s3fs import S3FileSystem

    from kbtrain.checkpoint.remote import files
    from kbtrain.checkpoint.remote.store import RemoteStore
    from kbtrain.errors import CheckpointError, CheckpointUnreadableError

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(files, "_pause", lambda seconds: None)
    with pytest.raises(CheckpointError, match="Could not write to s3://nobucket/run"):
        RemoteStore("s3://nobucket/run").check_access()
    assert [b["Name"] for b in bucket.list_buckets()["Buckets"]] == ["bucket"]  # none was created
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(S3FileSystem, "retries", 1)
        store = RemoteStore("s3://bucket/away")
        with pytest.raises(CheckpointUnreadableError, match="training does not start over"):
            store.resolve("auto")
