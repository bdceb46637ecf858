"""A Hub for a test, and a client that reaches it: in this process, or in one of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import warm_python
from hub_server import Hub

TOKEN = "hf_writer_of_me_0123456789"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A server on 127.0.0.1, reached by `endpoint=hub.url`; the other tests' offline mode is lifted, nobody is logged in."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    with Hub() as server:
        yield server
    huggingface_hub.close_session()  # its connections to this server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between attempts are listed, not made."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


class Client(warm_python.Popen):
    """A Python process whose output, errors too, is collected in a file."""

    def __init__(self, code: str, log: Path, **how):
        self._log = log
        with log.open("wb") as out:
            super().__init__([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=out, stderr=out, **how)

    def communicate(self, timeout: float = 600.0) -> tuple[str, None]:
        self.wait(timeout)
        return self._log.read_text(), None


@pytest.fixture
def client(hub: Hub, tmp_path: Path):
    """Start `code` in a new Python process that knows the server by HF_ENDPOINT, with an empty cache."""

    def start(code: str, *, token: str | None = None, path: str | None = None) -> Client:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment.update(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_XET="1")
        environment.update({"HF_TOKEN": token} if token else {}, **({"PYTHONPATH": path} if path else {}))
        return Client(code, tmp_path / "client.log", env=environment, cwd=tmp_path)

    return start
