"""`load(…, lock=…)` runs the code that was reviewed or none: code that leaves a mark where it ran proves it."""

import json
import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
import warm_python
from conftest import TOKEN
from hub_repos import Blob
from hub_server import Hub
from safetensors.torch import save_file

from mymodels.checkpoints import CheckpointError
from mymodels.hub.lock import LockError, load, read_lock, write_lock
from mymodels.hub.remote import HubError

ROOT = str(Path(__file__).parents[2])
MARK = "from pathlib import Path\nPath({mark!r}).touch()\n"
MODELING = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from .parts import scale

class LockedConfig(PretrainedConfig):
    model_type = "lockedmodel"

class LockedModel(PreTrainedModel):
    config_class = LockedConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(3, 3)
        self.post_init()

    def forward(self, x):
        return scale(self.linear(x))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "reviewed"
    folder.mkdir()
    auto_map = {"AutoConfig": "modeling.LockedConfig", "AutoModel": "modeling.LockedModel"}
    config = {"model_type": "lockedmodel", "auto_map": auto_map, "architectures": ["LockedModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text(MODELING)
    (folder / "parts.py").write_text("def scale(x):\n    return 2 * x\n")
    (folder / "tokenizer_config.json").write_text("{}")
    weights = {"linear.weight": torch.eye(3), "linear.bias": torch.ones(3)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch):
    """The test fails if transformers is asked to load anything."""

    def from_pretrained(*args, **kwargs):
        raise AssertionError(f"asked to load {args}")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", from_pretrained)


START = "from mymodels.hub.lock import load, write_lock\nimport torch\n"


def run_offline(tmp_path: Path, code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "HF_MODULES_CACHE"}
    how = {"cwd": ROOT, "env": environment | {"HF_HOME": str(tmp_path / "hf")}}
    done = warm_python.run([sys.executable, "-c", START + code], **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(client, code: str, token: str | None = None) -> str:
    process = client(START + code, token=token, path=ROOT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


# the reviewed code runs


def test_reviewed_code_loads_and_what_comes_after_the_check_does_not_run(folder, tmp_path, mark) -> None:
    """Neither a change between check and import, nor one in the cache of modules."""
    (folder / "parts.py").write_text(MARK.format(mark=str(mark)) + "def scale(x):\n    return 2 * x\n")
    lock = write_lock(folder, tmp_path / "lock")
    assert set(lock.files) == {"config.json", "modeling.py", "parts.py", "tokenizer_config.json"}
    evil = MARK.format(mark=str(tmp_path / "evil")) + "def scale(x):\n    return 0 * x\n"
    first = run_offline(
        tmp_path,
        f"""
from pathlib import Path
import mymodels.hub.lock as module
checked = module._checked_copy
def then_change(*arguments):
    copy = checked(*arguments)
    Path({str(folder)!r}, "parts.py").write_text({evil!r})
    Path({str(folder)!r}, "extra.py").write_text({evil!r})
    return copy
module._checked_copy = then_change
model, info = load({str(folder)!r}, lock={str(tmp_path / "lock")!r}, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
print(model.name_or_path, model(torch.zeros(3)).tolist(), type(model).__module__)
model.save_pretrained({str(tmp_path / "saved")!r})
print("evil ran:", Path({str(tmp_path / "evil")!r}).exists())
load({str(folder)!r}, trust_remote_code=True)  # without the lock it does, else this test proves nothing
print("without a lock:", Path({str(tmp_path / "evil")!r}).exists())
""",
    )
    assert "evil ran: False" in first and "without a lock: True" in first
    (tmp_path / "evil").unlink()
    assert f"{folder} [2.0, 2.0, 2.0] transformers_modules.locked_" in first
    assert mark.exists() and (tmp_path / "saved" / "parts.py").exists()
    (folder / "extra.py").unlink()
    shutil.copy(tmp_path / "saved" / "parts.py", folder / "parts.py")
    copies = list((tmp_path / "hf" / "modules").rglob("parts.py"))
    assert copies
    for copy in copies:
        copy.write_text(evil)
    second = run_offline(
        tmp_path, f"print(load({str(folder)!r}, lock={str(tmp_path / 'lock')!r})(torch.zeros(3)).tolist())"
    )
    assert "[2.0, 2.0, 2.0]" in second and not (tmp_path / "evil").exists()


def test_a_repo_loads_at_the_locked_commit_whatever_its_branch_and_the_cache_hold(
    hub: Hub, folder, tmp_path, client
) -> None:
    repo = hub.create("me/model")
    good = {path.name: Blob.regular(path.read_bytes()) for path in folder.iterdir()}
    commit = repo.commit("refs/heads/main", good, "reviewed")
    lock, evil = tmp_path / "lock", MARK.format(mark=str(tmp_path / "evil")) + MODELING
    repo.commit("refs/heads/main", {**good, "modeling.py": Blob.regular(evil.encode())}, "evil")
    code = f"write_lock('me/model@{commit}', {str(lock)!r}, token={TOKEN!r})\n"
    code += (
        f"print(load('me/model', lock={str(lock)!r}, revision={commit!r}, token={TOKEN!r})(torch.zeros(3)).tolist())"
    )
    assert "[2.0, 2.0, 2.0]" in run(client, code)
    assert read_lock(lock)[:2] == ("me/model", commit) and len(hub.asked("GET .*resolve.*model.safetensors")) == 1
    cache = tmp_path / "hf" / "hub"
    (cached,) = (cache / "models--me--model" / "snapshots" / commit).glob("modeling.py")
    cached.resolve().write_text(evil)
    refused = run(client, f"try: load('me/model', lock={str(lock)!r})\nexcept ValueError as error: print(error)", TOKEN)
    assert "modeling.py differs from the reviewed file" in refused and not (tmp_path / "evil").exists()


# anything else does not


def change_auto_map(folder: Path, code: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "someone/else--modeling.LockedModel"
    (folder / "config.json").write_text(json.dumps(config))


def add_link(folder: Path, code: str) -> None:
    (folder.parent / "outside.py").write_text(code)
    (folder / "parts.py").unlink()
    (folder / "parts.py").symlink_to(folder.parent / "outside.py")


def write(name: str, content: str | None = None):
    def change(folder: Path, code: str) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code if content is None else content)

    return change


CHANGES = {
    "changed code": (write("modeling.py"), r"modeling\.py differs from the reviewed file: [\d,]+ bytes with SHA-256"),
    "changed helper": (write("parts.py"), r"parts\.py differs from the reviewed file"),
    "extra code": (write("zzz.py"), r"zzz\.py was not reviewed"),
    "code in a folder": (write("custom_generate/generate.py"), r"custom_generate/generate\.py was not reviewed"),
    "code in capitals": (write("ZZZ.PY"), r"ZZZ\.PY was not reviewed"),
    "compiled code": (write("zzz.so"), r"zzz\.so was not reviewed"),
    "missing code": (lambda folder, code: (folder / "parts.py").unlink(), r"parts\.py was reviewed and is missing"),
    "auto_map": (change_auto_map, r"config\.json loads code from someone/else--modeling\.LockedModel"),
    "config": (write("config.json", '{"model_type": "gpt2"}'), r"config\.json differs from the reviewed file"),
    "tokenizer config": (
        write("tokenizer_config.json", '{"a": 1}'),
        r"tokenizer_config\.json differs from the reviewed",
    ),
    "other config": (write("processor_config.json", "{}"), r"processor_config\.json was not reviewed"),
    "versioned config": (write("config.5.0.0.json", "{}"), r"config\.5\.0\.0\.json was not reviewed"),
    "adapter": (write("adapter_config.json", '{"base_model_name_or_path": "a/b"}'), "the repo of its base model"),
    "kernel": (write("config.json", '{"attn_implementation": "a/kernel"}'), "loads code from a/kernel"),
    "no json": (write("config.json", "{"), r"config\.json: it is not valid JSON"),
    "duplicate keys": (write("config.json", '{"a": 1, "a": 2}'), "names 'a' twice"),
    "deep nesting": (write("config.json", '{"a":' * 400 + "1" + "}" * 400), "differs from the reviewed file"),
    "a pipe": (lambda folder, code: os.mkfifo(folder / "pipe.py"), r"pipe\.py is not a regular file"),
    "link out of the folder": (add_link, "leads out of the folder"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_before_anything_runs(folder, tmp_path, mark, never, change: str) -> None:
    write_lock(folder, tmp_path / "lock")
    apply, sentence = CHANGES[change]
    apply(folder, MARK.format(mark=str(mark)) + MODELING)
    with pytest.raises((LockError, CheckpointError), match=sentence) as refused:
        load(folder, lock=tmp_path / "lock")
    assert not mark.exists() and "\n" not in str(refused.value)


def test_caches_and_weights_are_no_code(folder, tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda path, **options: seen.append((path, options)))
    write_lock(folder, tmp_path / "lock")
    for name in ("__pycache__/parts.cpython-311.pyc", ".git/hooks.py", "model.safetensors", "notes.md"):
        write(name)(folder, "x")
    load(folder, lock=tmp_path / "lock", dtype="float32")
    ((copy, options),) = seen
    names = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert names == {"config.json", "modeling.py", "parts.py", "tokenizer_config.json", "model.safetensors", "notes.md"}
    assert options == {"trust_remote_code": True, "dtype": "float32"} and copy.parent.stat().st_mode & 0o077 == 0


# locks and options


@pytest.mark.parametrize("source", ["me/model", "me/model@main", "me/model@" + "a" * 39, "nowhere", "../x@" + "a" * 40])
def test_only_a_folder_or_a_commit_can_be_locked(tmp_path, source: str) -> None:
    with pytest.raises(ValueError, match="is neither a folder nor a commit: write user/name@SHA"):
        write_lock(source, tmp_path / "lock")
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("change", ["auto_map", "adapter", "kernel", "link out of the folder"])
def test_code_of_elsewhere_cannot_be_locked(folder, tmp_path, change: str) -> None:
    apply, sentence = CHANGES[change]
    apply(folder, "")
    with pytest.raises((LockError, CheckpointError), match=sentence):
        write_lock(folder, tmp_path / "lock")
    assert not (tmp_path / "lock").exists()


def test_nothing_to_lock(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LockError, match="nothing to lock"):
        write_lock(tmp_path / "empty", tmp_path / "lock")


def test_a_commit_that_cannot_be_read_is_one_sentence_without_the_token(hub, tmp_path, monkeypatch, waits) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    hub.fail("GET", 403, times=99, message=f"no {TOKEN}")
    with pytest.raises(HubError, match="the token has no permission for this on me/none") as refused:
        write_lock(f"me/none@{'a' * 40}", tmp_path / "lock", token=TOKEN)
    assert TOKEN not in str(refused.value) and not (tmp_path / "lock").exists()


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"repo_id": null, "commit": null, "files": {}}',
        '{"repo_id": null, "commit": null, "files": {"a.py": {"size": "1", "sha256": "00"}}}',
        '{"repo_id": "me/x", "commit": null, "files": {"a.py": {"size": 1, "sha256": "%s"}}}' % ("0" * 64),
        '{"repo_id": "me/x", "commit": "main", "files": {"a.py": {"size": 1, "sha256": "%s"}}}' % ("0" * 64),
        "[]",
        "no",
    ],
)
def test_a_damaged_lock_is_refused(folder, tmp_path, never, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    with pytest.raises((LockError, CheckpointError), match=r"is not a valid lock|not valid JSON|not an object"):
        load(folder, lock=tmp_path / "lock")


def test_options_that_would_lead_elsewhere_are_refused(folder, tmp_path, never) -> None:
    files = write_lock(folder, tmp_path / "lock").files
    with pytest.raises(LockError, match="config= is a path or repo"):
        load(folder, lock=tmp_path / "lock", config="someone/else")
    table = {name: {"size": size, "sha256": digest} for name, (size, digest) in files.items()}
    (tmp_path / "lock").write_text(json.dumps({"repo_id": "me/x", "commit": "a" * 40, "files": table}))
    for options, sentence in (
        ({"revision": "main"}, "revision='main' is not the commit of the lock"),
        ({"code_revision": "b" * 40}, "is not the commit of the lock"),
        ({}, "is for me/x, not for me/other"),
        ({"cache_dir": "x"}, "cache_dir has no effect with a lock"),
        ({"auto_class": "GPT2LMHeadModel"}, "GPT2LMHeadModel is not an Auto class"),
        ({"auto_class": "AutoNothing"}, "AutoNothing is not an Auto class"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load("me/other", lock=tmp_path / "lock", **options)
    with pytest.raises(FileNotFoundError, match="there is no lock"):
        load(folder, lock=tmp_path / "none")


def test_without_a_lock_it_is_from_pretrained(monkeypatch) -> None:
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *args, **kwargs: (args, kwargs))
    assert load("x/y", auto_class="AutoConfig", revision="v1") == (("x/y",), {"revision": "v1"})
