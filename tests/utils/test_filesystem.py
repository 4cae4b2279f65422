"""Files and folders, seen while others change them."""

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
