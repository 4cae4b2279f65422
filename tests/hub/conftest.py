"""The server that stands for the Hub, and a ``huggingface_hub`` that talks to it without waits."""

import time
import types

import pytest
from hub_server import HubServer


@pytest.fixture(scope="session")
def _server():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def hub(_server, monkeypatch, tmp_path):
    """The server, empty."""
    import huggingface_hub.constants as constants
    import huggingface_hub.utils._http as requests

    clock = {**vars(time), "sleep": lambda seconds: None}
    _server.reset()
    monkeypatch.setattr(constants, "ENDPOINT", _server.url)
    files = _server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(requests, "time", types.SimpleNamespace(**clock))
    monkeypatch.setattr("kbtrain.hub.repository.WAITS", (0.0, 0.0))
    return _server
