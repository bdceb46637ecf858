"""Hostile folders: whatever is in them, the static checks answer, run nothing, and do not take long."""

import json
import os
import pickle
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
from edits import CONFIGURATION, LAYERS, MODELING, append, config, module, write
from hub.healthy_folders import make_multi_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mymodels.hub.checks import STATUSES
from mymodels.hub.static import CHECKS, MAX_FINDINGS, static_checks


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_multi_file(tmp_path_factory.mktemp("healthy") / "multi_file")


def check(folder: Path) -> list:
    """Run the checks; each answers, and none of them gives up."""
    checks = static_checks(folder)
    assert {found.name for found in checks} == set(CHECKS)
    for found in checks:
        assert found.status in STATUSES
        assert "could not be finished" not in found.what, found
        assert len(found.what) < 600 and "\n" not in found.what, found
    return checks


NASTY = {
    "class that derives from itself": append(LAYERS, "\nclass A(A):\n    pass\n"),
    "classes that derive from each other": append(LAYERS, "\nclass A(B):\n    pass\n\n\nclass B(A):\n    pass\n"),
    "files that import each other": append(LAYERS, "\nfrom .modeling_tinymany import TinymanyModel\n"),
    "a name passed round in a circle": append(
        LAYERS, "\nfrom .layers_tinymany import Circle\n\n\nclass C(Circle):\n    pass\n"
    ),
    "a name that is itself": append(LAYERS, "\nclass C(C.C):\n    def _init_weights(self):\n        super().C\n"),
    "odd arguments": module(
        "def f(*, a, b=1, **k): ...\n\n\nopen()\nopen(*x)\ngetattr()\nimport_module()\nx.update(*a)"
    ),
    "odd classes": append(MODELING, "\nclass X(f(), *a, metaclass=m):\n    _tied_weights_keys: dict\n    (a, b) = c\n"),
    "odd methods": append(
        MODELING,
        "\nclass X(TinymanyPreTrainedModel):\n    def __init__():\n        self.register_buffer(persistent=False)\n"
        "        self.a = self.b = torch.ones\n    def _init_weights():\n        nn.init.zeros_()\n        x[0]()\n"
        "    def tie_weights(): ...\n    def forward(): ...\n",
    ),
    "long chain of attributes": module("x = a" + ".b" * 900),
    "long sum": module("x = 1" + " + 1" * 900),
    "many findings": module("\n".join(f"import requests as r{i}" for i in range(3000))),
    "long chain of classes": append(LAYERS, "\n\n" + "".join(f"class A{i}(A{i - 1}): pass\n" for i in range(900))),
    "wide code": append(LAYERS, "\n\nx = [" + "f(a.b(c.d))," * 10_000 + "]\n"),
    "enormous code": write(LAYERS, "x = 1\n" * 500_000),
    "numbers beyond limits": module("x = 1" + "0" * 3000),
    "auto_map is a list": config(auto_map=["a"]),
    "auto_map of lists": config(auto_map={"AutoModel": [[None, {"a": 1}], 3], "AutoConfig": {"a": 1}, "": ""}),
    "auto_map without a module": config(
        auto_map={"AutoConfig": ".", "AutoModel": "--.", "AutoModelForCausalLM": "a--b--c"}
    ),
    "numbers for names": config(architectures=[1, None], model_type=3, custom_pipelines={"a": {"impl": 3}, "b": 4}),
    "long texts": config(model_type="x" * 100_000, architectures=["y" * 100_000], _attn_implementation="z/" * 50_000),
    "deep config": config(a_config={"a_config": {"a_config": {"to_dict": [[[[]]]]}}}),
    "lone surrogate": write("config.json", '{"model_type": "\\ud800"}'),
    "weight map of numbers": write("model.safetensors.index.json", '{"weight_map": {"a": 1, "b": ["x"]}}'),
    "header beyond the file": write("model.safetensors", b"\xff" * 64),
    "manifest of nonsense": write("manifest.json", '{"files": {"../x": {}, "\\u0000": 3}}'),
    "templates of numbers": config("tokenizer_config.json", chat_template=[1, {"template": 3}], tokenizer_class=[1]),
    "not UTF-8 requirements": write("requirements.txt", b"\xff\xfe\x00torch"),
    "broken zip": write("a.zip", b"PK\x03\x04" + b"\0" * 100),
    "broken pickle": write("a.pkl", b"\x80\x04\x95" + b"\xff" * 100),
    "folder instead of a config": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
    "folder instead of code": lambda f: ((f / LAYERS).unlink(), (f / LAYERS).mkdir()),
    "nothing": lambda f: [p.unlink() for p in f.iterdir()],
    "links in a circle": lambda f: ((f / "a").symlink_to("b"), (f / "b").symlink_to("a")),
    "folder linked into itself": lambda f: (f / "sub").mkdir() or (f / "sub" / "up").symlink_to(f),
    "config is a pipe": lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
    "code is a device": lambda f: ((f / LAYERS).unlink(), (f / LAYERS).symlink_to("/dev/zero")),
    "deep folders": lambda f: (f / "/".join(["d"] * 200)).mkdir(parents=True),
    "name that is not text": lambda f: Path(os.fsdecode(os.fsencode(f) + b"/\xff\xfe.json")).write_text("{}"),
}


@pytest.mark.parametrize("name", NASTY)
def test_nasty_folders_are_answered(name: str, healthy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy, tmp_path / "folder"))
    NASTY[name](folder)
    started = time.monotonic()
    checks = check(folder)
    assert time.monotonic() - started < 30
    for check_name in CHECKS:
        assert len([found for found in checks if found.name == check_name]) <= MAX_FINDINGS + 1


class _Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_nothing_is_executed_imported_or_unpickled(healthy: Path, tmp_path: Path) -> None:
    folder, sign = Path(shutil.copytree(healthy, tmp_path / "folder")), tmp_path / "executed"
    for file in (MODELING, LAYERS, CONFIGURATION):
        write(file, f"import os\nos.mkdir({str(sign)!r})\n" + (folder / file).read_text())(folder)
    write("__init__.py", f"import os\nos.mkdir({str(sign)!r})\n")(folder)
    for file in ("pytorch_model.bin", "a.pkl", "training_args.bin", "sitecustomize.py"):
        write(file, pickle.dumps(_Touch(sign)))(folder)
    (folder / "model.safetensors").unlink()
    before = set(sys.modules)
    checks = check(folder)
    assert not sign.exists()
    assert not [name for name in set(sys.modules) - before if "tinymany" in name or "transformers_modules" in name]
    assert {"file access", "pickles", "weights"} <= {found.name for found in checks if found.status == "failed"}


def test_no_secret_is_shown(healthy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy, tmp_path / "folder"))
    token = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNmQwErTyUi"
    write("a.md", f"token: {token}")(folder)
    write("long.txt", "x" * 3_000_000 + "\n" + token)(folder)  # beyond one block, and across two
    write("across.txt", "y" * ((1 << 20) + 8192 - 10) + " " + token)(folder)
    write("windows.txt", token.encode("utf-16"))(folder)
    checks = [found for found in check(folder) if found.name == "secrets"]
    assert [found.where for found in checks] == ["a.md:1", "across.txt:1", "long.txt:2", "windows.txt:1"]
    assert token[4:] not in json.dumps(checks)


def test_links_of_the_hub_cache_are_files(healthy: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--me--x"
    snapshot, blobs = repo / "snapshots" / ("a" * 40), repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(healthy.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert [found for found in check(snapshot) if found.status in ("failed", "warning")] == []


def test_a_check_that_cannot_go_on_has_failed(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(folder):
        raise RecursionError("maximum recursion depth exceeded\nhere")
        yield

    monkeypatch.setitem(CHECKS, "attention", give_up)
    found = [found for found in static_checks(healthy) if found.status == "failed"]
    assert [one.name for one in found] == ["attention"]
    assert found[0].what == "this check could not be finished: RecursionError maximum recursion depth exceeded"


def test_more_classes_than_any_model_has_is_a_failure(healthy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy, tmp_path / "folder"))
    append(LAYERS, "\n" + "class A: pass\n" * 3000)(folder)
    failed = [found for found in static_checks(folder) if found.status == "failed"]
    assert failed and all("classes are more than any model has" in found.what for found in failed)


def test_too_many_files_are_not_looked_at(healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mymodels.hub.static.repo_snapshot.MAX_FILES", 5)
    found = [found for found in check(healthy) if found.name == "file sizes"]
    assert [one.status for one in found] == ["failed"] and "more than" in found[0].what


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        static_checks(tmp_path / "missing")
    with pytest.raises(ValueError, match="neither a transformers version nor a folder"):
        static_checks(tmp_path, releases=["latest"])


KEYS = [
    "auto_map",
    "AutoConfig",
    "AutoModel",
    "architectures",
    "model_type",
    "to_dict",
    "weight_map",
    "metadata",
    "tokenizer_class",
    "chat_template",
    "custom_pipelines",
    "impl",
    "text_config",
    "_attn_implementation",
    "files",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)
TARGETS = ["config.json", "model.safetensors.index.json", "tokenizer_config.json", "manifest.json", MODELING, LAYERS]
SETTINGS = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SETTINGS
@given(data=st.data(), file=st.sampled_from(TARGETS))
def test_random_content_never_raises(data, file: str, healthy: Path, tmp_path: Path) -> None:
    content = data.draw(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
    folder = Path(shutil.copytree(healthy, tmp_path / "folder", dirs_exist_ok=True))
    try:
        write(file, content)(folder)
        check(folder)
    finally:
        shutil.rmtree(folder)


@SETTINGS
@given(seed=st.integers(0, 10**6), file=st.sampled_from([MODELING, LAYERS, CONFIGURATION]))
def test_code_with_its_words_exchanged_never_raises(seed: int, file: str, healthy: Path, tmp_path: Path) -> None:
    """Most such files still parse, as code that nobody would write."""
    folder = Path(shutil.copytree(healthy, tmp_path / "folder", dirs_exist_ok=True))
    chance = random.Random(seed)
    text = (folder / file).read_text()
    names = ["self", "config", "nn", "init", "weight", "data", "super", "forward", "persistent", "torch", "kwargs"]
    for _ in range(chance.randint(1, 12)):
        old, new = chance.sample(names, 2)
        places = [i for i in range(len(text)) if text.startswith(old, i)]
        if places:
            place = chance.choice(places)
            text = text[:place] + new + text[place + len(old) :]
    lines = text.split("\n")
    for _ in range(chance.randint(0, 3)):
        del lines[chance.randrange(len(lines))]
    try:
        write(file, "\n".join(lines))(folder)
        check(folder)
    finally:
        shutil.rmtree(folder)
