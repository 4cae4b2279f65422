"""The store: saving, listing, resuming, rotating, and failing without a trace."""

import errno
import logging
import os
import shutil

import h5py
import numpy as np
import pytest

from kbtrain.checkpoint import CheckpointStore
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    ConfigurationError,
)
from kbtrain.utils.files import filesystem

pytestmark = pytest.mark.core


def save(store, step, **more):
    return store.save(
        step,
        arrays={"model": {"w": np.full(3, step, "float32")}, "optimizer": {}},
        documents={"trainer_state": {"global_step": step}},
        **more,
    )


def damage(path):
    file = path / "model.weights.h5"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def steps(store):
    return [step for step, _ in store.list()]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "run")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    store = CheckpointStore(tmp_path_factory.mktemp("template"))
    for step in (5, 10, 15, 20, 25):
        save(store, step)
    return store.directory


@pytest.fixture
def full(store, template):
    """Five checkpoints of a run, to which the store adds."""
    shutil.copytree(template, store.directory)
    store.resolve(True)
    return store


def test_a_checkpoint_comes_back_whole(store):
    arrays = {
        "model": {"net/kernel": np.arange(6.0).reshape(2, 3), "net/scale": np.float16(2)},
        "optimizer": {},
    }
    documents = {"trainer_state": {"epoch": 0.5, "loss": float("inf")}, "empty": {}}
    path = store.save(7, arrays, documents, {"backend": "any", "versions": {"keras": "3"}})
    assert path == store.directory / "checkpoint-7"
    assert names(path) == [
        "empty.json", "manifest.json", "model.weights.h5", "optimizer.h5", "trainer_state.json",
    ]  # fmt: skip
    assert store.verify(path) == []
    loaded = store.load(path)
    assert (loaded.path, loaded.step, loaded.documents) == (path, 7, documents)
    assert loaded.manifest.info == {"backend": "any", "versions": {"keras": "3"}}
    assert loaded.arrays.keys() == arrays.keys()
    assert loaded.arrays["optimizer"] == {}
    for name, array in arrays["model"].items():
        read = loaded.arrays["model"][name]
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read, array)


def test_files_that_others_keep_in_a_checkpoint(store):
    """They lie where their reader looks, and are checked like all else; resuming ignores them."""
    others = {"vocab.txt": b"a b c", "assets/tokenizer/merges": b"", "assets/x.json": b"{}"}
    path = save(store, 7, other_files=others)
    assert {name: (path / name).read_bytes() for name in others} == others
    assert store.verify(path) == []
    assert store.load(path).documents.keys() == {"trainer_state"}
    assert filesystem.tree_size(path) == sum(
        f.stat().st_size for f in path.rglob("*") if f.is_file()
    )
    (path / "assets" / "x.json").write_bytes(b"[]")
    assert "assets/x.json" in store.verify(path)[0]
    save(store, 8, other_files=others)
    assert store.rotate(1) == [path]
    assert names(store.directory) == ["checkpoint-8"]


@pytest.mark.parametrize(
    "path", ["Manifest.json", "trainer_STATE.json", "optimizer.h5", "model.weights.json/x"]
)
def test_others_cannot_take_the_place_of_what_is_there_anyway(store, path):
    with pytest.raises(CheckpointError, match=f"Received: '{path}' beside .*trainer_state"):
        save(store, 7, other_files={path: b""})
    assert not store.directory.exists()


def test_building_a_store_touches_nothing(store):
    assert not store.directory.exists()
    assert store.list() == []
    assert store.latest_intact() is None
    assert store.clean_leftovers() == []


def test_steps_are_sorted_as_numbers_and_strangers_ignored(store):
    for step in (100, 9, 20, 0):
        save(store, step)
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-07", "checkpoint--1", "logs"):
        (store.directory / name).mkdir()
    (store.directory / "checkpoint-3").write_text("a file")
    assert steps(store) == [0, 9, 20, 100]


@pytest.mark.parametrize("step", [-1, 1.0, "1", True, None, 10**18])
def test_a_step_is_a_whole_number(store, step):
    with pytest.raises(ConfigurationError, match="Received: step="):
        save(store, step)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "ü", "manifest", "Manifest"])
def test_names_that_are_no_file_names_are_refused(store, name):
    with pytest.raises(CheckpointError, match="Received: "):
        store.save(1, {}, {name: {}})
    assert not store.directory.exists()


def test_names_that_differ_in_case_only_are_refused(store):
    with pytest.raises(CheckpointError, match="differ in more than case"):
        store.save(1, {"rng": {}, "Rng": {}})


def test_saving_a_step_again_replaces_it(store):
    save(store, 5)
    store.save(5, {"model": {"w": np.zeros(2)}}, {})
    assert names(store.directory) == ["checkpoint-5"]
    assert store.load(store.directory / "checkpoint-5").arrays["model"]["w"].shape == (2,)


def test_saving_replaces_a_damaged_or_foreign_folder_of_the_name(store):
    damage(save(store, 5))
    (store.directory / "checkpoint-6").mkdir()
    for step in (5, 6):
        save(store, step)
    assert [store.verify(path) for _, path in store.list()] == [[], []]


def test_there_is_an_intact_checkpoint_between_any_two_steps_of_a_replacement(store, monkeypatch):
    save(store, 5)
    seen = []
    rename = os.rename

    def watched(source, target):
        rename(source, target)
        seen.append([(step, store.verify(path)) for step, path in store.list()])

    monkeypatch.setattr(os, "rename", watched)
    save(store, 5)
    assert len(seen) == 3
    assert all(state == [(5, [])] for state in seen)


# ---- failing


def fail_at(monkeypatch, target, name, call):
    """Let the call number `call` of a function, and all after it, find the disk full."""
    original, count = getattr(target, name), [0]

    def failing(*args, **kwargs):
        count[0] += 1
        if count[0] >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, failing)
    return count


WRITING = [
    *((os, "fsync", call) for call in range(1, 9)),
    *((h5py.Group, "create_dataset", call) for call in (1, 2, 3)),
    (os, "rename", 1),
    (filesystem.Path, "mkdir", 2),
]


@pytest.mark.parametrize(("target", "name", "call"), WRITING)
@pytest.mark.parametrize("replacing", [False, True])
def test_a_failed_save_leaves_nothing_and_harms_nothing(
    store, monkeypatch, target, name, call, replacing
):
    save(store, 5)
    if replacing:
        save(store, 10)
    before = {path.name: store.load(path).arrays["model"] for _, path in store.list()}
    with monkeypatch.context() as patch:
        fail_at(patch, target, name, call)
        with pytest.raises(CheckpointError, match=r"write checkpoint-10 .*No space left") as caught:
            save(store, 10, other_files={"assets/vocabulary.txt": b"a"})
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert names(store.directory) == sorted(before)
    for _, path in store.list():
        np.testing.assert_array_equal(store.load(path).arrays["model"]["w"], before[path.name]["w"])
    save(store, 10)
    assert store.latest_intact().step == 10


@pytest.mark.parametrize(("files", "left", "said"), [(12, 0, True), (12, 1, False), (0, 0, False)])
def test_a_disk_that_takes_no_more_files(store, monkeypatch, files, left, said):
    """The system's error is that of a full disk, though there is room for bytes."""
    system = os.statvfs_result((4096, 4096, 100, 50, 50, files, left, left, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: system)
    fail_at(monkeypatch, os, "fsync", 1)
    with pytest.raises(CheckpointError, match="0 MB are free") as caught:
        save(store, 5)
    assert ("no inodes are left" in str(caught.value)) is said


def fail_once(monkeypatch, target, name, call):
    count = fail_at(monkeypatch, target, name, call)
    failing = getattr(target, name)

    def failing_once(*args, **kwargs):
        if count[0] >= call:
            count[0] = -100
        return failing(*args, **kwargs)

    monkeypatch.setattr(target, name, failing_once)


def test_a_failed_replacement_is_undone(store, monkeypatch):
    save(store, 5)
    with monkeypatch.context() as patch:
        fail_once(patch, os, "rename", 2)
        with pytest.raises(CheckpointError, match="No space left"):
            store.save(5, {"model": {}})
    assert names(store.directory) == ["checkpoint-5"]
    np.testing.assert_array_equal(store.latest_intact().arrays["model"]["w"], [5, 5, 5])


def test_a_failed_replacement_that_cannot_be_undone_loses_nothing(store, monkeypatch):
    save(store, 5)
    with monkeypatch.context() as patch:
        fail_at(patch, os, "rename", 2)
        with pytest.raises(CheckpointError, match="No space left"):
            store.save(5, {"model": {}})
    np.testing.assert_array_equal(store.latest_intact().arrays["model"]["w"], [5, 5, 5])
    store.clean_leftovers()
    assert names(store.directory) == ["checkpoint-5"]


def test_a_replaced_checkpoint_that_stays_behind_is_no_failure(store, monkeypatch, caplog):
    save(store, 5)
    with monkeypatch.context() as patch:
        fail_at(patch, os, "rename", 3)
        store.save(5, {"model": {}})
    assert "Could not delete" in caplog.text
    assert store.latest_intact().arrays["model"] == {}
    store.clean_leftovers()
    assert names(store.directory) == ["checkpoint-5"]


def test_an_unwritable_value_leaves_nothing(store):
    with pytest.raises(CheckpointError, match="'trainer_state' cannot be written as JSON"):
        store.save(5, {"model": {"w": np.ones(2)}}, {"trainer_state": {"x": object()}})
    assert names(store.directory) == []


def test_an_interrupt_leaves_nothing_and_comes_through(store, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(store, 5)
    assert names(store.directory) == []


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="choose another output_dir"):
        save(CheckpointStore(tmp_path / "file" / "run"), 5)


# ---- leftovers


@pytest.fixture
def dead_pid():
    """Linux gives no process a number above 2^22: that of one that ended may be given again."""
    return 2**31 - 1


def leftover(store, role, step, pid):
    folder = store.directory / f".{role}-checkpoint-{step}-{pid}-0a1b2c3d"
    folder.mkdir(parents=True)
    (folder / "model.weights.h5").write_bytes(b"half")
    return folder


def test_leftovers_of_dead_processes_and_of_this_one_are_removed(store, dead_pid):
    save(store, 5)
    gone = [
        leftover(store, "tmp", 10, dead_pid),
        leftover(store, "trash", 3, dead_pid),
        leftover(store, "tmp", 11, os.getpid()),
        leftover(store, "replaced", 5, dead_pid),
    ]
    stays = leftover(store, "tmp", 12, os.getppid())
    (store.directory / ".tmp-other").mkdir()
    assert sorted(store.clean_leftovers()) == sorted(gone)
    assert names(store.directory) == sorted([stays.name, ".tmp-other", "checkpoint-5"])


def test_files_that_a_dead_process_was_replacing_are_removed(store, dead_pid, monkeypatch):
    store.directory.mkdir()
    old = store.directory / f".tmp-{dead_pid}-0a1b2c3d-log.jsonl"
    others = [
        store.directory / f".tmp-{os.getppid()}-0a1b2c3d-log.jsonl",
        store.directory / f".tmp-{dead_pid}-notes",
    ]
    for path in (old, *others):
        path.write_bytes(b"half")
    monkeypatch.chdir(store.directory)
    with filesystem.replacing(filesystem.Path("results.json")) as temporary:
        temporary.write_bytes(b"{}")
        assert store.clean_leftovers() == [old]
    assert names(store.directory) == sorted([*(path.name for path in others), "results.json"])


def test_whoever_is_alone_removes_those_of_a_number_that_is_in_use_again(store):
    """In a container the program before was process 1, and somebody always is."""
    gone = leftover(store, "tmp", 12, os.getppid())
    assert store.clean_leftovers(alone=True) == [gone]


def test_a_folder_being_written_is_no_leftover(store, monkeypatch):
    fsync, cleaned = os.fsync, []

    def meanwhile(descriptor):
        cleaned.extend(CheckpointStore(store.directory).clean_leftovers())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    save(store, 5)
    assert cleaned == []
    assert store.latest_intact().step == 5


def test_a_checkpoint_set_aside_by_a_dead_process_is_found_and_put_back(store, dead_pid):
    aside = store.directory / f".replaced-checkpoint-5-{dead_pid}-0a1b2c3d"
    os.rename(save(store, 5), aside)
    assert store.list() == [(5, aside)]
    assert store.latest_intact().step == 5
    store.clean_leftovers()
    assert names(store.directory) == ["checkpoint-5"]
    assert store.latest_intact().step == 5


# ---- finding the one to resume from


def test_the_newest_intact_one_is_used_and_the_damaged_named(full, caplog):
    damage(full.directory / "checkpoint-25")
    damage(full.directory / "checkpoint-20")
    said = []
    assert full.latest_intact(said.append).step == 15
    assert ["checkpoint-25" in said[0], "checkpoint-20" in said[1], len(said)] == [True, True, 2]
    assert "model.weights.h5" in said[0]
    with caplog.at_level(logging.WARNING, logger="kbtrain"):
        full.latest_intact()
    assert [record.name for record in caplog.records] == ["kbtrain", "kbtrain"]


@pytest.mark.parametrize("resume", [None, False])
def test_no_resume_is_asked_for(full, resume):
    assert full.resolve(resume) is None


@pytest.mark.parametrize("resume", [True, "auto"])
def test_resume_takes_the_newest(full, resume):
    checkpoint = full.resolve(resume)
    assert checkpoint.step == 25
    np.testing.assert_array_equal(checkpoint.arrays["model"]["w"], [25, 25, 25])


def test_resuming_from_nothing_is_an_error_but_for_auto(store):
    assert store.resolve("auto") is None
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        store.resolve(True)
    store.directory.mkdir()
    with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint"):
        store.resolve(True)
    assert store.resolve("auto") is None


def test_resume_when_all_are_damaged(full):
    for _, path in full.list():
        damage(path)
    with pytest.raises(CheckpointNotFoundError, match="all 5 in .* are damaged") as caught:
        full.resolve(True)
    assert all(f"checkpoint-{step}" in str(caught.value) for step in (5, 10, 15, 20, 25))
    said = []
    assert full.resolve("auto", said.append) is None
    assert len(said) == 6
    assert said[-1].startswith("FRESH START: all 5")


def test_resume_from_a_checkpoint_folder(full, tmp_path):
    path = full.directory / "checkpoint-10"
    assert full.resolve(path).step == 10
    assert full.resolve(str(path)).step == 10
    assert CheckpointStore(tmp_path / "other").resolve(path).step == 10
    os.rename(path, tmp_path / "best")
    assert full.resolve(tmp_path / "best").step == 10


def test_resume_from_a_run_folder(full, tmp_path):
    damage(full.directory / "checkpoint-25")
    other = CheckpointStore(tmp_path / "other")
    said = []
    assert other.resolve(full.directory, said.append).step == 20
    assert len(said) == 1
    assert full.resolve(str(full.directory)).step == 20


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(full):
    path = full.directory / "checkpoint-10"
    damage(path)
    with pytest.raises(
        CheckpointDamagedError, match=r"checkpoint-10 is damaged: model\.weights\.h5"
    ):
        full.resolve(path)


def test_resume_from_what_is_not_there(full, tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="There is no .*checkpoint-7.*checkpoint-5"):
        full.resolve(full.directory / "checkpoint-7")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint"):
        full.resolve(tmp_path / "empty")
    with pytest.raises(CheckpointNotFoundError):
        full.load(tmp_path / "nowhere")


def test_resume_from_a_strangers_folder(full, tmp_path):
    stranger = tmp_path / "exported"
    stranger.mkdir()
    (stranger / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint.*manifest\.json.*model\.safe"):
        full.resolve(stranger)
    with pytest.raises(CheckpointError, match="a file"):
        full.resolve(stranger / "model.safetensors")
    hugging_face = tmp_path / "checkpoint-500"
    os.rename(stranger, hugging_face)
    with pytest.raises(CheckpointFormatError, match=r"Transformers' .*model\.safetensors"):
        full.resolve(hugging_face)
    (hugging_face / "manifest.json").write_text('{"name": "my web site"}')
    with pytest.raises(CheckpointFormatError, match="was not written by kbtrain"):
        full.resolve(hugging_face)


@pytest.mark.parametrize("resume", ["", 5, 1.0, ["checkpoint-5"]])
def test_other_values_are_refused(full, resume):
    with pytest.raises(ConfigurationError, match="Received: resume_from_checkpoint="):
        full.resolve(resume)


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(full, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(CheckpointError, match="Permission denied"):
        full.resolve("auto")


# ---- rotation

TABLE = [
    (2, [], {20, 25}),
    (2, [5], {5, 25}),
    (1, [25], {25}),
    (1, [5], {5, 25}),
    (1, [], {25}),
    (3, [5], {5, 20, 25}),
    (3, [5, 10], {5, 10, 25}),
    (2, [5, 10], {5, 10, 25}),
    (5, [], {5, 10, 15, 20, 25}),
    (9, [5], {5, 10, 15, 20, 25}),
    (None, [], {5, 10, 15, 20, 25}),
]


@pytest.mark.parametrize(("limit", "protect", "left"), TABLE)
@pytest.mark.parametrize("form", ["steps", "paths", "moved"])
def test_rotation_keeps_the_newest_and_the_protected(full, limit, protect, left, form):
    if form == "paths":
        protect = [full.directory / f"checkpoint-{step}" for step in protect]
    elif form == "moved":
        protect = [f"/before/the/move/checkpoint-{step}/" for step in protect]
    deleted = full.rotate(limit, protect)
    assert set(steps(full)) == left
    assert [path.name for path in deleted] == [
        f"checkpoint-{step}" for step in (5, 10, 15, 20, 25) if step not in left
    ]
    assert names(full.directory) == sorted(f"checkpoint-{step}" for step in left)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "2"])
def test_a_limit_is_a_whole_number(full, limit):
    with pytest.raises(ConfigurationError, match="Received: save_total_limit="):
        full.rotate(limit)


def test_what_is_to_be_protected_must_be_a_checkpoint(full):
    with pytest.raises(ConfigurationError, match="Received: 'best'"):
        full.rotate(1, ["best"])
    assert len(full.list()) == 5


def test_the_one_just_written_stays_even_if_a_later_step_lies_there(full):
    # A run that was resumed from step 5 by hand: 10 to 25 are of the abandoned branch.
    save(full, 7)
    full.rotate(2)
    assert steps(full) == [7, 25]
    full.rotate(1)
    assert steps(full) == [7, 25]


def test_damaged_ones_do_not_crowd_out_intact_ones(full):
    for step in (20, 25):
        damage(full.directory / f"checkpoint-{step}")
    assert full.latest_intact(lambda message: None).step == 15
    full.rotate(2)
    assert steps(full) == [10, 15]


@pytest.mark.parametrize("broken", ["rename", "rmtree"])
def test_what_cannot_be_deleted_is_reported_and_left(full, monkeypatch, caplog, broken):
    def refused(*args, **kwargs):
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr({"rename": os, "rmtree": shutil}[broken], broken, refused)
        with caplog.at_level(logging.WARNING, logger="kbtrain"):
            deleted = full.rotate(4)
    assert "resource busy" in caplog.text
    assert len(deleted) == {"rename": 0, "rmtree": 1}[broken]
    assert steps(full) == ([5] if broken == "rename" else []) + [10, 15, 20, 25]
    full.rotate(4)
    full.clean_leftovers()
    assert names(full.directory) == [f"checkpoint-{step}" for step in (10, 15, 20, 25)]


def test_a_linked_checkpoint_is_unlinked_not_emptied(full, tmp_path):
    target = tmp_path / "elsewhere"
    os.rename(full.directory / "checkpoint-5", target)
    (full.directory / "checkpoint-5").symlink_to(target)
    assert steps(full)[0] == 5
    full.rotate(4)
    assert steps(full) == [10, 15, 20, 25]
    assert full.verify(target) == []


def test_chosen_ones_can_be_deleted(full):
    full.delete([item for item in full.list() if item[0] != 15])
    assert names(full.directory) == ["checkpoint-15"]
