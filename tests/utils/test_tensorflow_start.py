"""The messages of TensorFlow's start are left out, and nothing else is."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

from kbtrain.utils.packages import tensorflow_start
from kbtrain.utils.packages.tensorflow_start import filtered_stderr

pytestmark = pytest.mark.neutral

NOISE = b"""\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1796046978.321145    3583 port.cc:153] oneDNN custom operations are on. You may
2025-01-01 10:00:00.123456: I tensorflow/core/util/port.cc:153] oneDNN custom operations
To enable the following instructions: AVX2 AVX512F, in other operations, rebuild TensorFlow
"""


def test_messages_of_the_start_are_left_out_and_errors_are_not(capfd):
    with filtered_stderr():
        os.write(2, NOISE + b"E0000 00:00:1796046987.5 1 cuda.cc:52] no driver\n")
        os.write(2, b"a line of Python\n")
    assert capfd.readouterr().err == (
        "E0000 00:00:1796046987.5 1 cuda.cc:52] no driver\na line of Python\n"
    )


def test_an_error_of_the_import_passes_through(capfd):
    def fail():
        with filtered_stderr():
            os.write(2, b"a reason\n")
            raise ImportError("no library")

    with pytest.raises(ImportError, match="no library"):
        fail()
    assert capfd.readouterr().err == "a reason\n"


def test_the_wish_of_the_user_stands(monkeypatch):
    monkeypatch.setenv(tensorflow_start.LEVEL, "0")
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    finders = list(sys.meta_path)
    tensorflow_start.quiet()
    assert sys.meta_path == finders
    assert os.environ[tensorflow_start.LEVEL] == "0"


def test_an_import_is_filtered_and_leaves_an_ordinary_module(tmp_path):
    package = tmp_path / "tensorflow"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"import os\nos.write(2, {NOISE!r})\nos.write(2, b'it matters\\n')\nvalue = 3\n"
    )
    (package / "part.py").write_text("value = 4\n")
    program = (
        "import importlib.util\n"
        "import kbtrain\n"
        "assert importlib.util.find_spec('tensorflow')\n"  # as Keras asks first
        "import tensorflow, tensorflow.part as part\n"
        "print(tensorflow.value, part.value, type(tensorflow.__loader__).__name__)\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    del environ[tensorflow_start.LEVEL]
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "3 4 SourceFileLoader\n"
    assert done.stderr == "it matters\n"
