"""Every kind of damage is found, named and survived; whatever is altered, the errors are ours."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbtrain.checkpoint import MANIFEST_NAME, CheckpointStore
from kbtrain.checkpoint.storage.manifest import Manifest, read_manifest, write_manifest
from kbtrain.errors import CheckpointDamagedError, CheckpointError, CheckpointFormatError
from kbtrain.utils.files.filesystem import FileEntry

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)
FILES = (
    "model.weights.h5",
    "optimizer.h5",
    "trainer_state.json",
    "training_args.json",
    "assets/vocabulary.txt",
    MANIFEST_NAME,
)


def save(store, step):
    rng = np.random.default_rng(step)
    store.save(
        step,
        arrays={
            "model": {"net/dense/kernel": rng.normal(size=(40, 30))},
            "optimizer": {"iteration": np.int64(step)},
        },
        documents={
            "trainer_state": {"global_step": step, "log_history": [{"loss": 0.5}] * 20},
            "training_args": {"learning_rate": 1e-3},
        },
        info={"backend": "any"},
        other_files={"assets/vocabulary.txt": b"to be or not to be"},
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    directory = tmp_path_factory.mktemp("template")
    for step in (10, 20, 30):
        save(CheckpointStore(directory), step)
    return directory


@pytest.fixture
def store(tmp_path, template):
    shutil.copytree(template, tmp_path / "run")
    return CheckpointStore(tmp_path / "run")


def write(path, data):
    path.unlink()
    path.write_bytes(data)


def link(path):
    elsewhere = path.parent.parent / f"moved-{path.name}"
    os.rename(path, elsewhere)
    path.symlink_to(elsewhere)


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    write(path, data)


def garbage(path):
    data = path.read_bytes()
    noise = np.random.default_rng(0).bytes(4096)
    start = max(0, len(data) // 2 - 2048)
    write(path, (data[:start] + noise + data[start + 4096 :])[: len(data)])


DAMAGE = {
    "cut in half": lambda path: write(path, path.read_bytes()[: path.stat().st_size // 2]),
    "last byte lost": lambda path: write(path, path.read_bytes()[:-1]),
    "first byte flipped": lambda path: flip(path, 0.0),
    "a byte flipped in the middle": lambda path: flip(path, 0.5),
    "last byte flipped": lambda path: flip(path, 1.0),
    "4 KiB of garbage": garbage,
    "zeros": lambda path: write(path, bytes(path.stat().st_size)),
    "empty": lambda path: write(path, b""),
    "longer": lambda path: write(path, path.read_bytes() + b"\0"),
    "deleted": lambda path: path.unlink(),
    "a link": link,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


def assert_found_and_survived(store, path):
    """The newest checkpoint is damaged: found by verify and load, named, and passed over."""
    assert store.verify(path)
    with pytest.raises(CheckpointDamagedError):
        store.load(path)
    said = []
    checkpoint = store.latest_intact(said.append)
    assert checkpoint.step == 20
    np.testing.assert_array_equal(
        checkpoint.arrays["model"]["net/dense/kernel"],
        np.random.default_rng(20).normal(size=(40, 30)),
    )
    assert len(said) == 1
    assert path.name in said[0]
    return said[0]


def test_the_undamaged_one_is_used(store):
    said = []
    assert store.latest_intact(said.append).step == 30
    assert said == []


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_a_file(store, file, damage):
    path = store.directory / "checkpoint-30"
    DAMAGE[damage](path / file)
    assert file in assert_found_and_survived(store, path)


def test_an_empty_folder_is_damaged(store):
    path = store.directory / "checkpoint-30"
    shutil.rmtree(path)
    path.mkdir()
    assert "found: nothing" in assert_found_and_survived(store, path)


def test_the_manifest_of_another_checkpoint(store):
    path = store.directory / "checkpoint-30"
    write(path / MANIFEST_NAME, (store.directory / "checkpoint-20" / MANIFEST_NAME).read_bytes())
    assert_found_and_survived(store, path)


def test_a_renamed_checkpoint_is_damaged(store):
    path = store.directory / "checkpoint-40"
    os.rename(store.directory / "checkpoint-30", path)
    assert "step 30" in assert_found_and_survived(store, path)


def test_two_files_exchanged_are_noticed(store):
    path = store.directory / "checkpoint-30"
    data = (path / "model.weights.h5").read_bytes()
    write(path / "model.weights.h5", (path / "optimizer.h5").read_bytes())
    write(path / "optimizer.h5", data)
    assert_found_and_survived(store, path)


def test_a_folder_inside_that_leads_elsewhere(store):
    """Same bytes, but not those of this checkpoint."""
    path = store.directory / "checkpoint-30"
    link(path / "assets")
    assert "symbolic link" in assert_found_and_survived(store, path)


def test_all_problems_are_named(store):
    path = store.directory / "checkpoint-30"
    DAMAGE["deleted"](path / "model.weights.h5")
    DAMAGE["zeros"](path / "optimizer.h5")
    DAMAGE["last byte lost"](path / "training_args.json")
    problems = store.verify(path)
    assert [problem.partition(":")[0] for problem in problems] == [
        "model.weights.h5", "optimizer.h5", "training_args.json",
    ]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("mask", [1, 0x20, 0x80])
def test_any_single_flipped_byte_is_found(store, file, mask):
    path = store.directory / "checkpoint-30"
    data = (path / file).read_bytes()
    stride = 1 if (file, mask) == (MANIFEST_NAME, 1) else 1 + len(data) // 150
    for position in range(0, len(data), stride):
        damaged = bytearray(data)
        damaged[position] ^= mask
        (path / file).write_bytes(damaged)
        assert store.verify(path), position
    (path / file).write_bytes(data)
    assert store.verify(path) == []


def test_files_of_others_in_the_folder_do_no_harm(store):
    path = store.directory / "checkpoint-30"
    (path / "notes.txt").write_text("best so far")
    (path / "tokenizer").mkdir()
    assert store.verify(path) == []
    assert store.latest_intact().step == 30


# ---- manifests that are unaltered and yet cannot be

ENTRY = {"size": 3, "sha256": "0" * 64, "group": "model"}


def seal(folder, **fields):
    """Write a manifest with any fields and a checksum that is right."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    write_manifest(folder, Manifest(step=30, files={}))
    value = json.loads((folder / MANIFEST_NAME).read_text())
    value.update(fields, checksum="0" * 64)
    value = {key: item for key, item in value.items() if item is not ...}
    seal_bytes(folder, json.dumps(value, indent=2, sort_keys=True).encode())


def seal_bytes(folder, data):
    digest = hashlib.sha256(data).hexdigest().encode()
    (folder / MANIFEST_NAME).write_bytes(data.replace(b"0" * 64, digest, 1))


def test_a_sealed_manifest_is_read(tmp_path):
    seal(tmp_path, files={"model.weights.h5": ENTRY})
    assert read_manifest(tmp_path).files == {"model.weights.h5": FileEntry(3, "0" * 64, "model")}


OUTSIDE = (
    *(
        "../model.weights.h5",
        "/etc/passwd",
        "a/../../model.weights.h5",
        "sub/model.weights.h5",
        "..",
        "",
        ".h5",
    ),
    *(
        "..h5",
        "C:\\model.weights.h5",
        "model.weights.h5\0",
        "manifest.json",
        "MANIFEST.json",
        "x" * 200 + ".h5",
    ),
    *("model.pkl", "model.weights.h5 ", "mödel.h5", "~/model.weights.h5", "-rf.h5"),
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_cannot_name_files_elsewhere(store, name):
    path = store.directory / "checkpoint-30"
    seal(path, files={name: ENTRY})
    assert repr(name) in assert_found_and_survived(store, path)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/../../x",
        "..",
        "a/./x",
        "",
        "a//x",
        "C:x",
        "a\\x",
        "x\0",
        "y" * 1001,
    ],
)
def test_nor_further_files_elsewhere(store, name):
    path = store.directory / "checkpoint-30"
    seal(path, files={}, other_files={name: ENTRY})
    assert repr(name) in assert_found_and_survived(store, path)
    with pytest.raises(CheckpointError, match="plain relative path"):
        store.save(40, {}, {}, other_files={name: b""})
    assert not (store.directory / "checkpoint-40").exists()


WRONG = [
    *({"step": step} for step in (-1, 1.5, "30", None, True, 2**63, ...)),
    *(
        {"files": files}
        for files in (
            [],
            None,
            "model.weights.h5",
            {"model.weights.h5": 3},
            {"model.weights.h5": {}},
            ...,
        )
    ),
    *(
        {"files": {"model.weights.h5": {**ENTRY, "size": size}}}
        for size in (-1, 1.0, "3", None, 10**30)
    ),
    *(
        {"files": {"model.weights.h5": {**ENTRY, "sha256": digest}}}
        for digest in ("", "0" * 63, 7, "G" * 64)
    ),
    *(
        {"files": {"model.weights.h5": {**ENTRY, "group": group}}}
        for group in (None, 3, "", "../model")
    ),
    *({"format_version": version} for version in (0, -1, "1", 1.0, None, True, ...)),
    *({"info": info} for info in ([], None, "x", ...)),
    *(
        {"files": {}, "other_files": others}
        for others in ([], None, {"x": 3}, {"x": {"size": -1, "sha256": "0" * 64}})
    ),
    *({"format": name} for name in ("other", 1, ...)),
]


@pytest.mark.parametrize("fields", WRONG, ids=str)
def test_a_manifest_with_wrong_types(store, fields):
    path = store.directory / "checkpoint-30"
    seal(path, **fields)
    assert MANIFEST_NAME in assert_found_and_survived(store, path)


def test_absurd_sizes_are_not_believed(store):
    path = store.directory / "checkpoint-30"
    seal(path, files={"model.weights.h5": {**ENTRY, "size": 2**62}})
    assert "instead of 4611686018427387904" in assert_found_and_survived(store, path)


def test_an_absurdly_large_manifest_is_not_read(store):
    path = store.directory / "checkpoint-30"
    with (path / MANIFEST_NAME).open("r+b") as file:
        file.truncate(2**40)
    assert "more than it can have" in assert_found_and_survived(store, path)


def test_a_newer_format_is_no_damage_and_asks_for_an_update(store):
    path = store.directory / "checkpoint-30"
    seal(path, format_version=4, files="of another kind", more={})
    said = []
    for attempt in (
        lambda: store.load(path),
        lambda: store.latest_intact(said.append),
        lambda: store.resolve("auto", said.append),
    ):
        with pytest.raises(CheckpointFormatError, match=r"checkpoint-30.*version 4.*Update"):
            attempt()
    assert said == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "step": JSON,
        "files": JSON | st.dictionaries(st.sampled_from(FILES) | st.text(), JSON | st.just(ENTRY)),
        "format": JSON,
        "format_version": JSON | st.integers(),
        "info": JSON,
    },
)


def assert_only_documented_errors(directory):
    store, path = CheckpointStore(directory), directory / "checkpoint-30"
    try:
        problems = store.verify(path)
        store.load(path)
    except CheckpointError:
        pass  # any other error would end the test
    else:
        assert problems == []
    with contextlib.suppress(CheckpointFormatError):
        store.resolve("auto", lambda message: None)


@QUICK
@given(FIELDS)
def test_any_fields_in_a_manifest(template, fields):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "checkpoint-30"
        shutil.copytree(template / "checkpoint-30", path)
        seal(path, **fields)
        assert_only_documented_errors(Path(directory))


@QUICK
@given(JSON | st.binary(), st.booleans())
def test_any_json_or_bytes_for_a_manifest(template, value, sealed):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    if sealed:
        data = b'{"checksum": "' + b"0" * 64 + b'", "x": ' + data + b"}"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "checkpoint-30"
        shutil.copytree(template / "checkpoint-30", path)
        if sealed:
            seal_bytes(path, data)
        else:
            (path / MANIFEST_NAME).write_bytes(data)
        assert_only_documented_errors(Path(directory))


@QUICK
@given(st.sampled_from(FILES[:4]), st.binary(max_size=200))
def test_any_bytes_for_a_file_that_the_manifest_vouches_for(template, file, data):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "checkpoint-30"
        shutil.copytree(template / "checkpoint-30", path)
        (path / file).write_bytes(data)
        new = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest = json.loads((path / MANIFEST_NAME).read_text())
        entry = manifest["files"][file] | new
        seal(path, files={**manifest["files"], file: entry})
        assert_only_documented_errors(Path(directory))


# ---- killed in the middle of a write

# The child forks, so that the libraries are imported once; each fork writes until it is killed.
WRITER = """
import os, sys
import numpy as np
from kbtrain.checkpoint import CheckpointStore

def write_for_ever(directory):
    store = CheckpointStore(directory)
    store.clean_leftovers()
    newest = store.latest_intact()
    step = newest.step if newest else 0
    while True:
        step += 1
        for again in range(2):  # every step twice: the second time it replaces the first
            kernel = np.full((200, 1000), step, "float32")
            store.save(step, {"model": {"net/kernel": kernel}}, {"trainer_state": {"step": step}})
            print(step, flush=True)
        store.rotate(2)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        write_for_ever(line.strip())
    print("started", pid, flush=True)
    os.waitpid(pid, 0)
    print("ended", flush=True)
"""


def kill_while_writing(writer, directory, seconds):
    """Let a writer go, kill it (-9) some time after its first checkpoint, return its last word."""
    print(directory, file=writer.stdin, flush=True)
    last, pid, deadline = 0, None, None
    for line in writer.stdout:
        word, *rest = line.split()
        if word == "ended":
            return last
        if word == "started":
            pid = int(rest[0])
        else:
            last = int(word)
        if pid is not None and last and deadline is None:
            deadline = time.monotonic() + seconds
        if deadline is not None:
            time.sleep(max(0.0, deadline - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):  # dead, with lines left in the pipe
                os.kill(pid, signal.SIGKILL)
    pytest.fail("the writer ended by itself")


@pytest.mark.slow
def test_kill_minus_nine_at_random_moments(tmp_path):
    moments = np.random.default_rng(0).uniform(0.0, 0.12, size=12)
    unfinished = 0
    command = [sys.executable, "-c", WRITER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as writer:
        store = CheckpointStore(tmp_path)
        for seconds in moments:
            reported = kill_while_writing(writer, tmp_path, seconds)
            unfinished += any(path.name.startswith(".") for path in tmp_path.iterdir())
            said = []
            checkpoint = store.latest_intact(said.append)
            assert said == [], "a checkpoint was visible and not complete"
            assert [store.verify(path) for _, path in store.list()] == [[]] * len(store.list())
            assert checkpoint.step >= reported, "a finished checkpoint was lost"
            assert np.all(checkpoint.arrays["model"]["net/kernel"] == checkpoint.step)
            store.clean_leftovers()
            names = [path.name for path in tmp_path.iterdir()]
            assert all(name.startswith("checkpoint-") for name in names)
            assert store.latest_intact().step == checkpoint.step
        writer.stdin.close()
    assert unfinished > 0, "no kill met a write: the moments must be chosen anew"
