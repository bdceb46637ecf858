"""`verify` on folders whose code attacks: nothing of it reaches outside, it ends, and it does not pass."""

import json
import os
import re
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mymodels import sandbox
from mymodels.hub import verify

pytestmark = pytest.mark.skipif(not sandbox.available().confined, reason=str(sandbox.available()))
CODE = """
import ctypes, json, os, signal, socket, sys, time
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

def attack():
    ATTACK

class StrangeConfig(PretrainedConfig):
    model_type = "strange"
    def __init__(self, hidden_size=4, vocab_size=50, **kwargs):
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        super().__init__(**kwargs)

class StrangeModel(PreTrainedModel):
    config_class = StrangeConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()
    def _init_weights(self, module):
        pass
    def forward(self, input_ids=None, attention_mask=None, return_dict=None, **kwargs):
        attack() if "forward" == WHEN else None
        return BaseModelOutput(last_hidden_state=self.embed(input_ids))

attack() if "import" == WHEN else None
"""
EVENTS = "events = json.load(open(sys.argv[1]))['events']"
ATTACKS = {  # name: (when, code, what the report says)
    "reads a key": ("import", ["raise RuntimeError(open(KEY).read())"], r"No such file|Permission denied"),
    "reads tokens": ("import", ["raise RuntimeError(f'tokens: {sorted(k for k in os.environ if \"TOKEN\" in k)}')"], r"tokens: \['?(TOKENIZERS_PARALLELISM'?)?\]"),
    "connects": ("import", ["socket.socket().connect(('127.0.0.1', PORT))"], r"network|not permitted"),
    "leaves a daemon": ("import", ["if not os.fork():", "    os.setsid()", "    ctypes.CDLL(None).prctl(15, MARKER.encode(), 0, 0, 0)", "    time.sleep(60)", "raise RuntimeError('gone')"], "gone"),
    "fills the scratch folder": ("import", ["for number in range(10**6):", "    with open(f'fill{number}', 'wb') as file:", "        file.write(bytes(10**7))"], r"more than .* to its scratch folder|File too large|No space"),
    "kills its group": ("forward", ["os.killpg(0, signal.SIGKILL)"], r"killed|signal|reported nothing|exit code"),
    "stops everybody": ("forward", ["os.kill(os.getppid(), signal.SIGSTOP)", "os.kill(os.getpid(), signal.SIGSTOP)"], r"within|killed|ended"),
    "replaces the report by a link": ("import", [EVENTS, "os.unlink(events)", "os.symlink(KEY, events)"], r"reported nothing|report is invalid"),
    "replaces the report by a folder": ("import", [EVENTS, "os.unlink(events)", "os.mkdir(events)"], r"reported nothing|report is invalid"),
    "writes nonsense": ("import", [EVENTS, "with open(events, 'a') as file:", "    file.write('{\"check\": \"load\", \"status\": 5}\\n')"], "tampered|report is invalid"),
    "writes nested nonsense": ("import", [EVENTS, "with open(events, 'a') as file:", "    file.write('[' * 10**6 + '\\n')", "    file.write('{\"check\": ' * 90 + '1' + '}' * 90 + '\\n')", "raise RuntimeError('done')"], "done"),
    "writes terminal commands": ("import", ["raise RuntimeError('\\x1b[2J\\x1b]0;owned\\x07')"], r"\\x1b\[2J"),
    "says that all is well": ("import", [EVENTS, "with open(events, 'a') as file:", "    for name in ('load', 'forward', 'save'):", "        file.write(json.dumps({'check': name, 'status': 'ok', 'what': '', 'where': ''}) + '\\n')", "os._exit(0)"], r"ended|exit"),
    "says so and ends the whole run": ("import", [EVENTS, "with open(events, 'a') as file:", "    for name in ('load', 'forward', 'save'):", "        file.write(json.dumps({'check': name, 'status': 'ok', 'what': '', 'where': ''}) + '\\n')", "os.kill(os.getppid(), signal.SIGKILL)", "time.sleep(9)"], r"ended|exit|killed"),
}  # fmt: skip
QUICK = {"reads a key", "leaves a daemon", "says so and ends the whole run", "replaces the report by a link"}


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    folder = tmp_path / "strange"
    folder.mkdir()
    auto_map = {"AutoConfig": "modeling_strange.StrangeConfig", "AutoModel": "modeling_strange.StrangeModel"}
    config = {
        "model_type": "strange",
        "architectures": ["StrangeModel"],
        "auto_map": auto_map,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 4, "vocab_size": 50}))
    save_file({"embed.weight": torch.randn(50, 4)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def named(marker: str) -> list[str]:
    names = []
    for file in Path("/proc").glob("[0-9]*/comm"):
        try:
            names.append(file.read_text().strip())
        except OSError:
            continue
    return [name for name in names if name == marker]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ATTACKS])
def test_an_attack_reaches_nothing_and_does_not_pass(
    strange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("mymodels.hub.verifying.static_checks", lambda folder, releases: [])
    monkeypatch.setattr("mymodels.hub.clean_process._SCRATCH", 10**9)
    monkeypatch.setenv("HF_TOKEN", "canary")
    key = tmp_path / "home" / "id_rsa"
    key.parent.mkdir()
    key.write_text("canary: a key")
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    marker = f"mmv{os.getpid()}"
    when, lines, message = ATTACKS[name]
    known = {"KEY": str(key), "PORT": server.getsockname()[1], "MARKER": marker, "WHEN": when}
    code = CODE.replace("    ATTACK\n", "".join(f"    {line}\n" for line in lines))
    (strange / "modeling_strange.py").write_text("".join(f"{k} = {v!r}\n" for k, v in known.items()) + code)
    before = sorted(path.name for path in strange.iterdir())
    if name == "stops everybody":  # the process that would end a stage on time is stopped too: the whole run's limit
        monkeypatch.setattr("mymodels.hub.clean_process._STARTUP_LIMIT", 10.0)
        monkeypatch.setattr("mymodels.hub.verifying.QUICK", ["outputs"])
    found = verify(strange, quick=True, time_limit=20)
    assert not found.passed, found.rows
    said = [check.what for _, check in found.rows if check.status == "failed"]
    assert any(re.search(message, text) for text in said), said
    assert not any("canary" in text for text in said)
    assert all(check.what.isprintable() for _, check in found.rows)
    assert not named(marker)
    assert sorted(path.name for path in strange.iterdir()) == before
    with pytest.raises(BlockingIOError):
        server.accept()
    server.close()


def test_the_same_folder_without_an_attack_passes(strange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is the attack that fails."""
    monkeypatch.setattr("mymodels.hub.verifying.static_checks", lambda folder, releases: [])
    (strange / "modeling_strange.py").write_text("WHEN = ''\n" + CODE.replace("ATTACK", "pass"))
    found = verify(strange, quick=True)
    assert found.passed, [row for row in found.rows if row[1].status == "failed"]
    assert found.isolation == str(sandbox.available())
