"""Tar files in WebDataset's layout: what a sample is, where it is read, what is refused."""

import copy
import gzip
import io
import json
import tarfile

import numpy as np
import PIL.Image
import pytest

from kbtrain import TarShards
from kbtrain.errors import DataError

pytestmark = pytest.mark.neutral


def write(path, files, kind=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def array_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def rows(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3)).astype("float32")


@pytest.fixture
def shards(tmp_path):
    """Twelve samples in three files, and the arrays in them."""
    x = rows(12)
    for shard in range(3):
        files = []
        for i in range(4 * shard, 4 * shard + 4):
            files += [(f"{i:04d}.npy", array_bytes(x[i])), (f"{i:04d}.cls", str(i).encode())]
        write(tmp_path / f"part-{shard:02d}.tar", files)
    return tmp_path, x


def test_samples_are_decoded_and_read_by_index(shards):
    folder, x = shards
    data = TarShards(str(folder / "part-{00..02}.tar"))
    assert len(data) == 12
    for index in (7, 0, 11, -1):
        np.testing.assert_array_equal(data[index]["npy"], x[index])
        assert data[index]["cls"] == index % 12
    with pytest.raises(IndexError):
        data[12]


@pytest.mark.parametrize("how", ["glob", "list", "path"])
def test_ways_to_name_the_files(shards, how):
    folder, _ = shards
    one, several = folder / "part-01.tar", sorted(folder.glob("*.tar"))
    given = {"glob": str(folder / "*.tar"), "list": several, "path": one}[how]
    assert len(TarShards(given)) == (4 if how == "path" else 12)


def test_files_of_a_sample(tmp_path):
    png = io.BytesIO()
    pixels = np.arange(24, dtype="uint8").reshape(2, 4, 3)
    PIL.Image.fromarray(pixels).save(png, "png")
    path = write(
        tmp_path / "a.tar",
        [
            ("./train/cat.1.input.PNG", png.getvalue()),
            ("./train/cat.json", json.dumps({"kind": "cat"}).encode()),
            ("./other/cat.txt", "Katze äöü".encode()),
            ("./other/README", b"no extension"),
            ("./other/.hidden.txt", b"hidden"),
            ("./other/dog.bin", b"\x00\x01"),
            ("./other/dog.seg.cls", b" 3\n"),
        ],
    )
    first, second, third = TarShards(path)
    assert list(first) == ["1.input.PNG", "json"]
    np.testing.assert_array_equal(first["1.input.PNG"], pixels)
    assert first["json"] == {"kind": "cat"}
    assert second == {"txt": "Katze äöü"}
    assert third == {"bin": b"\x00\x01", "seg.cls": 3}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_those_that_are_not_ascii(tmp_path, kind):
    long = "folder/" * 18
    files = [(f"{long}a.txt", b"one"), (f"{long}a.cls", b"1"), ("ü.txt", b"two")]
    data = TarShards(write(tmp_path / "a.tar", files, kind))
    assert list(data) == [{"txt": "one", "cls": 1}, {"txt": "two"}]


def test_a_file_that_ends_too_early_is_refused(tmp_path, shards):
    content = (tmp_path / "part-00.tar").read_bytes()
    (tmp_path / "part-00.tar").write_bytes(content[: 512 * 3 + 100])
    with pytest.raises(DataError, match=r"part-00.tar"):
        TarShards(tmp_path / "part-00.tar")
    damaged = bytearray(content)
    damaged[1024] ^= 255  # in the second header
    (tmp_path / "part-00.tar").write_bytes(damaged)
    with pytest.raises(DataError, match=r"part-00.tar"):
        TarShards(tmp_path / "part-00.tar")


def test_own_decoders_and_transform(shards):
    folder, x = shards
    data = TarShards(
        folder / "part-00.tar",
        transform=lambda sample: (sample["npy"], sample["cls"]),
        decoders={"cls": lambda content: float(content) / 2},
    )
    features, target = data[3]
    np.testing.assert_array_equal(features, x[3])
    assert target == 1.5


def test_a_copy_in_another_process_opens_the_files_itself(shards):
    folder, x = shards
    data = TarShards(folder / "part-00.tar")
    _ = data[0]
    other = copy.deepcopy(data)  # by the same methods as for another process
    data.close()
    np.testing.assert_array_equal(other[2]["npy"], x[2])
    np.testing.assert_array_equal(data[2]["npy"], x[2])


def test_what_is_refused(tmp_path, shards):
    with pytest.raises(DataError, match="There is no file .*none-00.tar"):
        TarShards(str(tmp_path / "none-{00..01}.tar"))
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress((tmp_path / "part-00.tar").read_bytes()))
    with pytest.raises(DataError, match="gunzip"):
        TarShards(packed)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        TarShards([tmp_path])
    with pytest.raises(DataError, match="at least one file"):
        TarShards([])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.txt", "a.txt"], "there are two files a.txt"),
        (["a.txt", "b.txt", "a.cls", "b.cls"], "a.cls comes after files of another sample"),
        (["README", ".hidden.txt"], "There is no sample"),
        ([], "There is no sample"),
    ],
)
def test_files_that_are_not_laid_out_as_samples_are_refused(tmp_path, names, message):
    path = write(tmp_path / "a.tar", [(name, b"1") for name in names])
    with pytest.raises(DataError, match=message):
        TarShards(path)


def test_a_decoders_error_names_the_file(tmp_path):
    path = write(tmp_path / "a.tar", [("x/0.id", b"007"), ("x/1.cls", b"cat"), ("x/2.png", b"?")])
    data = TarShards(path)
    assert data[0] == {"id": "007"}
    with pytest.raises(DataError, match=r"a.tar: x/1.cls cannot be decoded \(ValueError: .*'cat'"):
        data[1]
    with pytest.raises(DataError, match=r"x/2.png cannot .*decoders=\{'png': function\}"):
        data[2]


def test_a_file_that_is_changed_later_is_refused(tmp_path, shards):
    path = tmp_path / "part-01.tar"
    data, other, gone = (TarShards(path) for _ in range(3))
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=r"part-01.tar cannot be read: No such file"):
        gone[0]
    path.write_bytes(content)  # as long as before
    with pytest.raises(DataError, match=r"part-01.tar was changed since"):
        data[0]
    again = TarShards(path)
    _ = again[0]
    path.write_bytes(b"short")
    for each in (again, other):
        with pytest.raises(DataError, match=r"was changed since"):
            each[3]


def test_pickled_arrays_are_not_loaded(tmp_path):
    path = write(tmp_path / "a.tar", [("0.npy", array_bytes(np.array([{}], dtype=object)))])
    with pytest.raises(DataError, match="allow_pickle"):
        TarShards(path)[0]
