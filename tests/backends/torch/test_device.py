"""PyTorch: precision switches, results of another GPU, lack of memory, without a GPU."""

import contextlib
import importlib
import logging
import types

import numpy as np
import pytest

from kbtrain.errors import ConfigurationError

pytestmark = pytest.mark.cross  # needs PyTorch, whatever Keras runs on


@pytest.fixture(scope="module")
def torch():
    return importlib.import_module("torch")


@pytest.fixture(scope="module")
def device():
    return importlib.import_module("kbtrain.backends.torch.device")


NEWER = {
    "one": [("cuda", "matmul", "tf32")],
    "all": [("generic", "all", "tf32")],
    "CUDA": [("cuda", "all", "tf32")],
    "strict": [("generic", "all", "ieee"), ("cuda", "conv", "ieee")],
}


@pytest.fixture(params=[*NEWER, "older"])
def switched(request, torch):
    """Precision set through one of PyTorch's two interfaces, which exclude each other."""
    names = [
        *(("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv")),
        *(("cuda", "rnn"), ("mkldnn", "all"), ("mkldnn", "matmul")),
    ]
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    before = {name: read(*name) for name in names}
    if request.param == "older":
        torch.set_float32_matmul_precision("medium")
    for *name, value in NEWER.get(request.param, []):
        write(*name, value)
    yield lambda: {name: read(*name) for name in names}
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for name in [*names[:2], names[5]]:
        write(*name, "none")
    for name, value in before.items():
        write(*name, value)


@pytest.mark.parametrize("tf32", [None, True, False])
def test_both_interfaces_for_the_precision_of_products_may_be_in_use(tf32, switched, device, torch):
    before = switched()
    with device.numerics(tf32, False):
        if tf32 is None:
            assert switched() == before
        else:
            assert torch.backends.cuda.matmul.allow_tf32 is tf32
            assert torch.backends.cudnn.allow_tf32 is tf32
            assert {switched()["cuda", op] for op in ("matmul", "conv", "rnn")} == {
                "tf32" if tf32 else "ieee"
            }
    assert switched() == before


def test_an_inherited_precision_is_inherited_again_afterwards(device, torch):
    backends = torch.backends
    backends.fp32_precision = "tf32"
    try:
        with device.numerics(False, False):
            pass
        backends.fp32_precision = "ieee"
        assert backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        backends.fp32_precision = "none"


class Events:
    """``torch.cuda`` of a machine with several GPUs: an event knows where it was recorded."""

    def __init__(self):
        self.current = 0
        self.log = []

    @contextlib.contextmanager
    def device(self, which):
        before, self.current = self.current, which.index
        yield
        self.current = before

    def current_stream(self, which=None):
        return "stream of", self.current if which is None else which.index

    def event(self):
        found = types.SimpleNamespace(
            record=lambda stream: self.log.append(("record", self.current, stream)),
            synchronize=lambda: self.log.append("wait"),
        )
        return found


def test_results_of_every_gpu_are_waited_for_on_their_own_streams(device, torch, monkeypatch):
    """Keras' ``device("cuda:1")`` leaves the current device of PyTorch at the first one."""
    events = Events()
    monkeypatch.setattr(torch.cuda, "device", events.device)
    monkeypatch.setattr(torch.cuda, "current_stream", events.current_stream)
    monkeypatch.setattr(torch.cuda, "Event", events.event)
    monkeypatch.setattr(device, "to_host", lambda tree: tree)
    leaves = []
    for index in (1, 2, 1):
        leaf = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
        leaf.detach = lambda leaf=leaf: leaf
        leaf.to = lambda *_, index=index, **__: events.log.append("copy") or index
        leaves.append(leaf)
    wait = device.start_to_host(leaves)
    recorded = [("record", i, ("stream of", i)) for i in (1, 2)]
    assert events.log == [*["copy"] * 3, *recorded]
    assert wait() == [1, 2, 1]
    assert events.log[-2:] == ["wait", "wait"]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...",
        "MPS backend out of memory (MPS allocated: 8 GiB)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ...",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Unable to find an engine to execute this computation",
        "NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp, please report a bug",
        "[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 4 bytes",
    ],
)
def test_libraries_of_cuda_have_their_own_words_for_a_lack_of_memory(message, device):
    assert device.is_oom(RuntimeError(message))
    assert not device.is_oom(ValueError(message))


def test_cublas_is_asked_for_determinism_before_it_starts_or_a_warning_says_how(
    device, torch, monkeypatch, caplog
):
    variable = device.CUBLAS_WORKSPACE
    monkeypatch.setenv(variable, ":16:8")
    with device.numerics(None, True):
        assert device.os.environ[variable] == ":16:8"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.delenv(variable)
    with caplog.at_level(logging.WARNING, "kbtrain"), device.numerics(None, True):
        assert device.os.environ[variable] == ":4096:8"
    (record,) = caplog.records
    assert f"start the program with {variable}=:4096:8 in its environment" in record.getMessage()


class Module:
    """A device module of PyTorch, such as ``torch.xpu``, whose generators are numbers."""

    def __init__(self, torch, count):
        self._torch = torch
        self.states = [torch.tensor([i], dtype=torch.uint8) for i in range(count)]
        self.device_count = lambda: count

    def get_rng_state(self, device):
        return self.states[device.index or 0]

    def set_rng_state(self, state, device):
        self.states[device.index or 0] = state


def test_a_run_goes_on_with_its_random_numbers_on_another_accelerator(device, torch, monkeypatch):
    module = Module(torch, 3)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    monkeypatch.setattr(device, "_kind", lambda: "xpu")
    assert device.devices() == ["gpu:0", "gpu:1", "gpu:2", "cpu:0"]
    monkeypatch.setattr(device, "_device", lambda: torch.device("xpu", 1))
    state = device.rng_state()
    assert state["device"].tolist() == [1]
    monkeypatch.setattr(device, "_device", lambda: torch.device("xpu", 2))
    device.set_rng_state(state)
    assert [int(s) for s in module.states] == [0, 1, 1]


def test_whether_tensorfloat_is_on_can_be_asked_whoever_has_set_it(switched, request):
    """PyTorch has switches of two kinds, and those of one kind raise after those of the other."""
    flops = importlib.import_module("kbtrain.backends.torch.flops")
    before = switched()
    assert flops.tf32_is_on() is (request.node.callspec.params["switched"] != "strict")
    assert switched() == before


def test_an_operation_that_cannot_be_deterministic_is_named(device, torch):
    functional = torch.nn.functional
    found = torch.zeros(1, 1, 2), torch.zeros(1, 1, 2, dtype=torch.int64)
    with (
        pytest.raises(ConfigurationError, match="kernel for max_unpool.*full_determinism=False"),
        device.numerics(None, True),
    ):
        functional.max_unpool1d(*found, 2)
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_stay_what_they_are(device):
    with pytest.raises(RuntimeError, match="another"), device.numerics(None, True):
        raise RuntimeError("another")


def test_a_run_on_the_cpu_does_not_start_a_gpu(device, torch, monkeypatch):
    """What a generator of a GPU would be asked for first takes hundreds of megabytes there."""
    started = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: started.append(1) or [])
    assert set(device.rng_state()) == {"cpu"}
    assert not started
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    device.rng_state()
    assert started


@pytest.mark.parametrize(("kind", "dtype"), [("mps", "float32"), ("cuda", "float64")])
def test_apples_gpus_get_no_float64(kind, dtype, device, torch, monkeypatch):
    class Tensor:
        def __init__(self, array):
            self.dtype = array.dtype.name

        def to(self, target, non_blocking):
            return target.type, self.dtype

    monkeypatch.setattr(torch, "from_numpy", Tensor)
    assert device.on_device(np.zeros(3), torch.device(kind)) == (kind, dtype)
    assert device.on_device(np.zeros(3, "int64"), torch.device(kind)) == (kind, "int64")


@pytest.mark.parametrize(
    ("place", "local_rank", "local_size", "gpus", "problem"),
    [
        ("cpu", 1, 2, 0, None),
        ("cuda:1", 1, 2, 2, None),
        ("cuda:0", 1, 2, 1, None),  # the launcher shows each process a GPU of its own
        ("cuda:1", 0, 1, 2, None),  # one process on each machine
        ("cuda:1", 0, 2, 2, "process 0 of them on GPU 1, of 2. Leave out devices"),
        ("cuda:0", 2, 3, 2, "Each of the 3 processes on this machine needs a GPU of its own"),
        ("mps:0", 0, 2, 0, "2 processes that train on 'mps'.*use_cpu=True"),
        ("xpu:0", 0, 2, 0, "2 processes that train on 'xpu'.*use_cpu=True"),
    ],
)
def test_processes_that_could_not_exchange_tensors_are_refused(
    place, local_rank, local_size, gpus, problem, torch, monkeypatch
):
    processes = importlib.import_module("kbtrain.backends.torch.processes")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    group = processes.ProcessGroup(
        rank=local_rank, size=2, local_rank=local_rank, local_size=local_size
    )
    expected = pytest.raises(ConfigurationError, match=problem) if problem else None
    with expected or contextlib.nullcontext():
        processes._check_place(torch.device(place), group)


@pytest.mark.parametrize(("kind", "expected"), [("mps", False), ("cuda", True), ("xpu", True)])
def test_half_precision_is_normalized_with_weights_in_float32_where_kernels_can(
    kind, expected, torch
):
    """Apple's end the process (https://github.com/pytorch/pytorch/issues/154887)."""
    overrides = importlib.import_module("kbtrain.backends.torch.capture.keras_overrides")
    fake = importlib.import_module("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode():
        x = torch.empty(3, device=kind, dtype=torch.bfloat16)
        assert overrides._is_half_on_gpu(x) is expected
        assert not overrides._is_half_on_gpu(x.float())
