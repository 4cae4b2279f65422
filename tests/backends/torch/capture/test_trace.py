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
