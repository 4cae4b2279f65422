"""What every test needs: quiet frameworks, examples that are the same every time, an order.

KERAS_BACKEND alone decides which framework is tested.
"""

import atexit
import contextlib
import logging
import os
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings

# The examples are a function of the test alone, and no clock decides whether they are quick enough.
settings.register_profile(
    "suite",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")

# Read by TensorFlow and by JAX's compiler when they are imported, here and in subprocesses. Only
# fatal messages remain; an error of consequence is a Python exception, which this does not touch.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Where TensorFlow (2.20 on) is loaded first, Triton's library finds TensorFlow's LLVM in place of
# its own and ends the process (tensorflow/tensorflow#124205). PyTorch imports it in some test.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

# The tests build the same small models again and again, and XLA takes most of their time on JAX. It
# keeps what it compiled in this folder, for the workers and subprocesses of one run of the suite
# (tox: of all its environments): half of the processor time. What is traced, and how often, stays
# the same.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="kbtrain-xla-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Programs that tests run find these modules, and start faster: see sitecustomize.py among them.
SUPPORT = os.path.join(os.path.dirname(__file__), "support")
inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
if SUPPORT not in inherited:
    os.environ["PYTHONPATH"] = os.pathsep.join([*inherited, SUPPORT])


def pytest_collection_modifyitems(items):
    """Files with slow tests first: where processes take whole files, none begins with one late."""
    for item in items:
        # The core runs where one framework is installed.
        if item.get_closest_marker("core") and item.get_closest_marker("cross"):
            raise pytest.UsageError(f"{item.nodeid} cannot be of the core: it is marked cross")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _log_level():
    """The logger as a program finds it: a Trainer sets its level for the rest of the process."""
    logging.getLogger("kbtrain").setLevel(logging.NOTSET)


@pytest.fixture
def kbtrain_logger():
    """The logger as it was before the test."""
    logger = logging.getLogger("kbtrain")
    level, handlers = logger.level, list(logger.handlers)
    yield logger
    logger.setLevel(level)
    logger.handlers[:] = handlers
