"""`load(isolated=True)`: a model in the box gives what it gives here, and can do no more than answer."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers

import mymodels
from mymodels import sandbox
from mymodels.checkpoints.checkpoint import CheckpointError
from mymodels.hub.isolated import exchange
from mymodels.hub.isolated_model import IsolatedModel, IsolatedOutput
from mymodels.hub.isolated_process import IsolatedError

HUB_REPO = Path(__file__).parents[2] / "hub_repo"
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])

pytestmark = pytest.mark.skipif(not sandbox.available().confined, reason=str(sandbox.available()))

STRANGE = """
import ctypes, json, os, signal, struct, sys, time
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class StrangeConfig(PretrainedConfig):
    model_type = "strange"
    attribute_map = {"width": "hidden_size"}
    def __init__(self, hidden_size=4, **kwargs):
        self.hidden_size = hidden_size
        super().__init__(**kwargs)

class StrangeModel(PreTrainedModel):
    config_class = StrangeConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()
    def forward(self, x, do="", path=""):
        if do == "exit":
            os._exit(3)
        if do == "loop":
            while True: time.sleep(0.01)
        if do == "read":
            return {"text": open(path).read()}
        if do == "stat":
            return {"exists": os.path.exists(path)}
        if do == "many":
            return {"big": torch.zeros(10**9, dtype=torch.uint8)}
        if do == "shape":
            return {"own": x * 2, "names": ["a", None, 1.5, float("nan")]}
        if do == "poison":
            text = path.encode()
            os.write(json.load(open(sys.argv[1]))["descriptors"][1], struct.pack("<Q", int(x.sum()) or len(text)) + text)
            time.sleep(60)
        if do == "shrink":
            for number in json.load(open(sys.argv[1]))["descriptors"][2:]:
                os.ftruncate(number, 0)
        if do == "link":
            os.environ["LINK"] = path
        if do == "compile":
            return torch.compile(lambda y: y.sin() + 1)(x)
        return BaseModelOutput(last_hidden_state=self.layer(x))
    def save_pretrained(self, folder, **kwargs):
        super().save_pretrained(folder, **kwargs)
        if "LINK" in os.environ:
            os.symlink(os.environ["LINK"], os.path.join(folder, "notes.txt"))
"""


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "strange-model"
    folder.mkdir()
    (folder / "modeling_strange.py").write_text(STRANGE)
    auto_map = {"AutoConfig": "modeling_strange.StrangeConfig", "AutoModel": "modeling_strange.StrangeModel"}
    config = {"model_type": "strange", "hidden_size": 4, "architectures": ["StrangeModel"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    weights = {"layer.weight": torch.eye(4), "layer.bias": torch.arange(4.0)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_it_gives_what_the_model_gives(tmp_path: Path) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(HUB_REPO / "mygpt2", trust_remote_code=True).eval()
    with mymodels.load(HUB_REPO / "mygpt2", isolated=True, auto_class="AutoModelForCausalLM") as model, torch.no_grad():
        assert isinstance(model, IsolatedModel) and str(sandbox.available()) in repr(model)
        expected, found = plain(input_ids=IDS), model(input_ids=IDS)
        assert type(found) is type(expected) and torch.equal(found.logits, expected.logits)
        following = {"input_ids": IDS[:, :1], "use_cache": True}
        again = model(**following, past_key_values=found.past_key_values)
        torch.testing.assert_close(
            again.logits, plain(**following, past_key_values=expected.past_key_values).logits, rtol=0, atol=0
        )
        for how in ({"do_sample": False}, {"do_sample": True, "top_k": 20}):
            torch.manual_seed(3)
            tokens = plain.generate(input_ids=IDS, max_new_tokens=9, pad_token_id=0, **how)
            torch.manual_seed(3)
            assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=9, pad_token_id=0, **how), tokens)
        state, expected_state = model.state_dict(), plain.state_dict()
        assert list(state) == list(expected_state)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected_state.items())
        assert model.num_parameters() == plain.num_parameters() and model.can_generate()
        assert model.config.to_dict().items() >= {"hidden_size": 128, "model_type": "mygpt2"}.items()
        assert model.config.n_embd == model.config.hidden_size  # by attribute_map
        model.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
        reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
        assert torch.equal(reloaded(input_ids=IDS).logits, expected.logits)
        with pytest.raises(TypeError, match="a function cannot be sent"):
            model.generate(input_ids=IDS, logits_processor=[lambda ids, scores: scores])
        with pytest.raises(IsolatedError, match=r"ValueError: give exactly one of input_ids .*\(base.py:\d+\)"):
            model(attention_mask=IDS)
        with pytest.raises(IsolatedError, match="cannot be trained"):
            model.train()
        with pytest.raises(AttributeError, match="a model in the box has no 'parameters'"):
            model.parameters()


def test_a_strange_model_answers_and_no_more(strange: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("token")
    x = torch.ones(1, 4)
    with mymodels.load(strange, isolated=True) as model:
        assert torch.equal(model(x).last_hidden_state, x + torch.arange(4.0)) and model.config.width == 4
        own = model(x, do="shape")
        assert (
            torch.equal(own["own"], x * 2)
            and own["names"][:3] == ["a", None, 1.5]
            and own["names"][3] != own["names"][3]
        )
        with pytest.raises(IsolatedError, match=r"(PermissionError|FileNotFoundError).*\(modeling_strange.py:\d+\)"):
            model(x, do="read", path=secret)
        assert model(x, do="stat", path=secret) == {"exists": not sandbox.available().namespaces}
        with pytest.raises(IsolatedError, match=r"OSError|PermissionError"):
            model(x, do="shrink")
        assert torch.equal(model(x).last_hidden_state, x + torch.arange(4.0))
        model(x, do="link", path=secret)
        with pytest.raises(IsolatedError, match=r"notes.txt cannot be read"):
            model.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        with pytest.raises(IsolatedError, match="has ended"):
            model(x)
    for message, why in {
        '{"tensor": [0, [100], "float32"]}': "its code sent a tensor that ends at byte",
        '{"mapping": [["number", 1]]}': "its code sent no answer",
        '{"list": []}': "its code sent no answer",
    }.items():
        with mymodels.load(strange, isolated=True) as model, pytest.raises(IsolatedError, match=why):
            model(x * 0, do="poison", path=message)
    assert "strange" not in " ".join(sys.modules)


@pytest.mark.parametrize(
    "text, size, why",
    [
        ("", 2**40, "a message of 1,099"),
        ('{"tensor": [0, [1000000], "float32"]}', 0, "a tensor that ends at byte 4,000,000 of 0"),
        ('{"tensor": [-8, [4], "float32"]}', 0, "impossible shape"),
        ('{"tensor": [0, [true], "float32"]}', 0, "impossible shape"),
        ('{"tensor": [0, [4611686018427387903, 4], "float32"]}', 0, "more than 1,000,000,000"),
        ('{"tensor": [0, [4], "object"]}', 0, "a damaged message"),
        ('{"mapping": [["x", {"list": 5}]]}', 0, "a damaged message"),
        ('{"mapping": [[["x"], 1]]}', 0, "a damaged message"),
        ('{"mapping": [["x", NaN]]}', 0, "the number NaN"),
        ('{"__reduce__": "os.system"}', 0, "a value of the kind '__reduce__'"),
        ("[" * 2000, 0, "a damaged message"),
        ('{"list": [' * 50 + "]}" * 50, 0, "nested deeper"),
    ],
)
def test_a_poisoned_message_is_refused(text: str, size: int, why: str) -> None:
    read, write = os.pipe()
    memories = exchange.shared_memory("x"), exchange.shared_memory("y")
    channel = exchange.Channel(read, write, *memories, largest=10**9)
    os.write(write, struct.pack("<Q", size or len(text)) + text.encode())
    with pytest.raises(exchange.InvalidMessage, match=why):
        channel.receive()
    for descriptor in (read, write, *memories):
        os.close(descriptor)


def test_how_the_process_ends(strange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, 4)
    model = mymodels.load(strange, isolated=True)
    with pytest.raises(IsolatedError, match="has ended: it ended with exit code 3"):
        model(x, do="exit")
    model = mymodels.load(strange, isolated=True, time_limit=20)
    process = model._process.process.pid
    threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        model(x, do="loop")
    assert torch.equal(model(x).last_hidden_state, x + torch.arange(4.0))  # it is still there
    model._process.time_limit = 0.5
    with pytest.raises(IsolatedError, match=r"did not answer within 0.5 s"):
        model(x, do="loop")
    assert model._process.process.poll() is not None and not Path(f"/proc/{process}").exists()
    assert not model._process.control.exists()
    broken = tmp_path / "broken-model"
    shutil.copytree(strange, broken)
    (broken / "modeling_strange.py").write_text("raise ValueError('no luck')\n" + STRANGE)
    with pytest.raises(IsolatedError, match=r"does not load in the box: ValueError: no luck \(modeling_strange.py:1\)"):
        mymodels.load(broken, isolated=True)
    (broken / "more.safetensors").symlink_to("/etc/hostname")
    opened = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="leads out of the folder"):
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        mymodels.load(broken, isolated=True)
    assert len(os.listdir("/proc/self/fd")) == opened and not list(tmp_path.glob("mymodels-isolated-*"))
    with pytest.raises(ValueError, match="isolated=True loads models"):
        mymodels.load(strange, isolated=True, auto_class="AutoTokenizer")


def test_without_a_box_nothing_is_loaded(strange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = sandbox.isolation.NONE._replace(why="it is too old")
    monkeypatch.setattr("mymodels.hub.isolated_process.available", lambda: nothing)
    with pytest.raises(sandbox.NotIsolated, match="this machine has none: it is too old"):
        mymodels.load(strange, isolated=True)


@pytest.mark.slow
def test_it_ends_with_its_parent(strange: Path) -> None:
    code = f"""
import os, mymodels
model = mymodels.load({str(strange)!r}, isolated=True)
print(model._process.process.pid, model._process.control, flush=True)
os.kill(os.getpid(), 9)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    process = int(run.stdout.split()[0])
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{process}").exists()


def test_other_outputs_are_named() -> None:
    output = IsolatedOutput({"a": 1, "b": 2})
    assert output.a == output["a"] == output[0] == 1 and output.to_tuple() == (1, 2)
    with pytest.raises(AttributeError, match="no 'c', but a, b"):
        output.c  # noqa: B018
