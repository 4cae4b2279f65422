"""What the recorder of PyTorch steps does without: kernels that run on zeros, and cuDNN's RNNs."""

import importlib
import types

import pytest

pytestmark = pytest.mark.cross  # needs PyTorch, whatever Keras runs on


@pytest.fixture(scope="module")
def torch():
    return importlib.import_module("torch")


@pytest.fixture(scope="module")
def capture():
    names = ("trace", "step", "guard", "keras_overrides")
    package = "kbtrain.backends.torch.capture"
    return types.SimpleNamespace(**{n: importlib.import_module(f"{package}.{n}") for n in names})


@pytest.mark.parametrize(("kind", "allowed"), [("cpu", True), ("cuda", False)])
def test_no_kernel_of_a_gpu_runs_while_recording(torch, capture, monkeypatch, kind, allowed):
    seen = {}

    class Stop(Exception):
        pass

    def mode(**options):
        seen.update(options)
        raise Stop

    monkeypatch.setattr(capture.trace, "FakeTensorMode", mode)
    with pytest.raises(Stop):
        capture.trace.record(list, [types.SimpleNamespace(device=torch.device(kind))])
    assert seen["allow_fallback_kernels"] is allowed


def test_a_step_runs_eagerly_whose_operation_would_have_to_run(torch, capture, monkeypatch):
    unsupported = capture.step.UnsupportedOperatorException(torch.ops.aten._cudnn_rnn.default)

    def record(step, examples):
        raise RuntimeError("a layer failed") from unsupported

    monkeypatch.setattr(capture.step, "record", record)
    example = types.SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(capture.guard.NotCapturable, match=r"no rule for tensors without data"):
        capture.step._recorded(list, [example])


def test_lstm_and_gru_are_recorded_step_by_step_where_cudnn_would_run_them(
    torch, capture, monkeypatch
):
    keras_rnn = importlib.import_module("keras.src.backend.torch.rnn")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    kinds = torch.tanh, torch.sigmoid, False
    assert keras_rnn.cudnn_ok(*kinds)
    with capture.keras_overrides.native_operations():
        assert not keras_rnn.cudnn_ok(*kinds)
    assert keras_rnn.cudnn_ok(*kinds)


# --- losses and normalization ---------------------------------------------------------------------


def targets_of(capture, torch, fn, *examples):
    """The operations of a function as it is recorded, and their inputs' dtypes."""
    with torch.no_grad(), capture.keras_overrides.native_operations():
        module = capture.trace.record(lambda *x: [fn(*x)], examples)
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    return module, {str(n.target): n for n in nodes}


@pytest.mark.parametrize("shape", [(4, 6, 9), (2, 3, 4, 5)])
@pytest.mark.parametrize("loss", ["cross_entropy", "nll_loss"])
def test_the_loss_of_classes_in_the_last_axis_is_that_of_a_matrix(torch, capture, shape, loss):
    torch.manual_seed(0)
    logits = torch.randn(shape).log_softmax(-1)
    labels = torch.randint(0, shape[-1], shape[:-1])
    labels.view(-1)[1] = -100  # is ignored
    function = getattr(torch.nn.functional, loss)

    def fn(x, y):
        return function(x.movedim(-1, 1), y, reduction="none")

    module, found = targets_of(capture, torch, fn, logits, labels)
    assert "aten.nll_loss_forward.default" in found
    assert "aten.nll_loss2d_forward.default" not in found
    program = importlib.import_module("kbtrain.backends.torch.capture.program")
    (result,) = program.make_program(module, [logits, labels], False, {}).run(logits, labels)
    expected = fn(logits.double(), labels).float()
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_the_loss_of_classes_in_the_second_axis_stays(torch, capture):
    labels = torch.zeros((2, 3, 4), dtype=torch.int64)

    def fn(x, y):
        return torch.nn.functional.cross_entropy(x, y, reduction="none")

    _, found = targets_of(capture, torch, fn, torch.randn(2, 5, 3, 4), labels)
    assert "aten.nll_loss2d_forward.default" in found
