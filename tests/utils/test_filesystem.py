"""Files and folders, seen while others change them."""

import errno
import os

import pytest

from kbtrain.utils.files import filesystem

pytestmark = pytest.mark.neutral


def test_what_is_removed_while_sizes_are_added_counts_nothing(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    for name, size in (("gone", 3), ("below/kept", 4)):
        (tmp_path / name).write_bytes(bytes(size))
    lstat = os.lstat

    def removes_first(path, **options):
        if str(path).endswith("gone"):
            os.unlink(path)
        return lstat(path, **options)

    monkeypatch.setattr(os, "lstat", removes_first)
    assert filesystem.tree_size(tmp_path) == 4
    assert filesystem.tree_size(tmp_path / "nothing") == 0


@pytest.mark.parametrize(
    ("place", "number", "said"),
    [
        (".", errno.EACCES, "writable for this user"),
        (".", errno.EROFS, "can only be read"),
        (".", errno.EIO, "a folder that this process can write to"),
        ("file", errno.EEXIST, "is not a folder"),
        ("file/run", errno.ENOTDIR, "is not a folder"),
        ("new/run", errno.ENOENT, "No folder can be made in "),
    ],
)
def test_what_to_do_about_a_folder_that_cannot_be_written(tmp_path, place, number, said):
    (tmp_path / "file").touch()
    advice = filesystem.what_to_do(tmp_path / place, OSError(number, os.strerror(number)))
    assert said in advice
    assert "hoose another output_dir" in advice
