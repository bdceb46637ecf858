"""Static checks: every fault is found and named, alone; healthy folders raise no alarm; nothing ever raises."""

import ast
import contextlib
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from edits import Fault, config, module, replace
from faults_configs import CONFIGS
from faults_files import FILES
from faults_imports import IMPORTS
from faults_models import MODELS
from faults_reading import QUIET, READING, TWINS
from faults_side_effects import SIDE_EFFECTS
from faults_side_effects import TWINS as SIDE_EFFECTS_TWINS
from faults_stock_config import PAIRS as MORE_PAIRS
from faults_stock_config import STOCK
from faults_trust import TRUST
from faults_trust import TWINS as TRUST_TWINS
from faults_values import VALUES
from hub.healthy_folders import KINDS
from safetensors.torch import save_file
from transformers import PretrainedConfig
from transformers.dynamic_module_utils import get_imports
from versions.test_versions import CACHE, RELEASES

from mymodels.hub import verify
from mymodels.hub.config_attributes import DEFAULTS_OF_4
from mymodels.hub.releases import install
from mymodels.hub.static import CHECKS, repo_snapshot, static_checks
from mymodels.hub.static.api_availability import Span, find_releases, lacking
from mymodels.hub.static.check_config import config_keys
from mymodels.hub.static.library_modules import canonical
from mymodels.hub.static.symbols import GONE
from mymodels.hub.static.walking import walk

FAULTS = (
    FILES + CONFIGS + IMPORTS + MODELS + READING + TRUST + SIDE_EFFECTS + [fault for fault, _ in VALUES + MORE_PAIRS]
)
PAIRS = TWINS + VALUES + MORE_PAIRS
HEALTHY = SIDE_EFFECTS_TWINS | TRUST_TWINS
OURS = ("mygpt2", "mybert")


@pytest.fixture(scope="module", autouse=True)
def parsed_once():
    """Most files of a folder are the healthy one's: their trees, which no check changes, serve every test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repo_snapshot, "parse_text", functools.lru_cache(32)(repo_snapshot.parse_text))
        yield


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory):
    """The healthy folder of a kind, made once."""
    root, made = tmp_path_factory.mktemp("healthy"), {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = KINDS[kind](root / kind)
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_no_false_alarm(kind: str, healthy) -> None:
    checks = static_checks(healthy(kind))
    assert [check for check in checks if check.status == "failed"] == []
    assert kind not in OURS or {check.status for check in checks} == {"ok"}
    assert list(dict.fromkeys(check.name for check in checks)) == list(CHECKS)


def test_every_check_has_a_fault() -> None:
    assert {fault.check for fault in FAULTS} == set(CHECKS)
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_fault(fault: Fault, healthy, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy(fault.base), tmp_path / "folder"))
    fault.edit(folder)
    checks = static_checks(folder, releases=fault.releases)
    alarms = [check for check in checks if check.status in ("failed", "warning")]
    found = [check for check in alarms if check.name == fault.check and check.status == fault.status]
    assert any(fault.where in check.where and fault.what in check.what for check in found), alarms
    assert {check.name for check in alarms} - set(fault.also) == {fault.check}, alarms
    failed = {fault.check} if fault.status == "failed" else set()
    assert {check.name for check in alarms if check.status == "failed"} - set(fault.also) == failed, alarms
    for check in alarms:
        assert check.what and check.remedy and "\n" not in check.what and str(folder) not in check.what, check


@pytest.mark.parametrize("name", HEALTHY, ids=lambda name: name.replace(" ", "-"))
def test_what_differs_from_a_fault_in_one_thing_raises_no_alarm(name: str, healthy, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy("multi_file"), tmp_path / "folder"))
    HEALTHY[name](folder)
    assert [check for check in static_checks(folder) if check.status in ("failed", "warning")] == []


@pytest.mark.parametrize(("fault", "twin"), PAIRS, ids=[fault.name.replace(" ", "-") for fault, _ in PAIRS])
def test_healthy_twin(fault: Fault, twin, healthy, tmp_path: Path) -> None:
    """It differs from the fault in the one thing, and raises no alarm."""
    folder = Path(shutil.copytree(healthy(fault.base), tmp_path / "folder"))
    twin(folder)
    checks = static_checks(folder, releases=fault.releases)
    assert [check for check in checks if check.status == "failed"] == []
    before = {check.what for check in static_checks(healthy(fault.base), releases=fault.releases)}
    assert [c for c in checks if c.name == fault.check and c.status == "warning" and c.what not in before] == []


@pytest.mark.parametrize(("name", "edit", "check", "releases"), QUIET, ids=[row[0].replace(" ", "-") for row in QUIET])
def test_no_failure(name: str, edit, check: str, releases, healthy, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy("multi_file"), tmp_path / "folder"))
    edit(folder)
    assert [c for c in static_checks(folder, releases=releases) if c.status == "failed" and c.name == check] == []


@pytest.mark.parametrize(
    "test",
    [
        "if True:",
        "if os.environ:",
        "if is_scipy_available():",
        "if utils.is_scipy_available():",
        "if is_mine_available():",
        "if is_flash_attn_9_available():",
        "if not is_torch_available() and os:",
        "try:",
        "while True:",
        "def f():",
    ],
)
def test_imports_are_excused_as_transformers_does(test: str, tmp_path: Path) -> None:
    ends = "except ImportError:\n    pass\n" if test == "try:" else ""
    file = tmp_path / "modeling_x.py"
    file.write_text(f"{test}\n    import xformers\n{ends}")
    needed = "xformers" in get_imports(str(file))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "modeling_x.X"}}))
    found = [check for check in static_checks(tmp_path) if check.name == "other imports" and "xformers" in check.what]
    assert bool(found) is needed


def test_a_stock_config_class_is_found_but_loads_another_model_without_trust(healthy, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy("multi_file"), tmp_path / "folder"))
    STOCK(folder)
    alarms = [check for check in static_checks(folder) if check.name in ("config", "auto_map") and check.status != "ok"]
    (found,) = [check for check in alarms if check.status == "failed"]
    assert found.name == "config" and "loads the library's 'bert' instead of Tinymany" in found.what
    assert "derive a config class from BertConfig with a model_type of its own" in found.remedy
    replace("config.json", '"AutoModel": "modeling_tinymany.TinymanyModel", ', "")(folder)
    (found,) = [check for check in static_checks(folder) if check.name == "auto_map"]
    assert found.status == "warning" and "AutoModel loads transformers' own 'bert', not this code" in found.what
    config(model_type="no_such_family")(folder)
    assert any("no AutoConfig, so the model cannot be found" in check.what for check in static_checks(folder))


def test_a_break_in_another_release_is_a_warning(healthy, tmp_path: Path) -> None:
    """The same folder, judged by the releases that are asked for."""
    folder = Path(shutil.copytree(healthy("multi_file"), tmp_path / "folder"))
    module("from transformers.masking_utils import create_bidirectional_mask")(folder)
    statuses = {}
    for releases in (("4.57.6",), ("5.23.0",), ("5.0", "4.56")):
        checks = static_checks(folder, releases=releases)
        statuses[releases] = [check.status for check in checks if check.name == "transformers names"]
    assert statuses == {("4.57.6",): ["failed"], ("5.23.0",): ["warning"], ("5.0", "4.56"): ["failed"]}


def test_a_header_of_640_bytes_is_no_pickle(healthy, tmp_path: Path) -> None:
    """Its length is written in bytes that pickles begin with."""
    folder = Path(shutil.copytree(healthy("stock_gpt2"), tmp_path / "folder"))
    path, data = folder / "extra.safetensors", b""
    for filler in range(640):
        save_file({"a": torch.zeros(2)}, path, metadata={"filler": "x" * filler})
        data = path.read_bytes()
        if data.startswith(b"\x80\x02"):
            break
    assert data.startswith(b"\x80\x02")
    assert [check.status for check in static_checks(folder) if check.name == "pickles"] == ["ok"]


@pytest.mark.parametrize("new_format", [True, False])
def test_plain_torch_files_are_a_warning_pickled_modules_a_failure(new_format: bool, healthy, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy("stock_gpt2"), tmp_path / "folder"))
    state = {"a": torch.ones(3, dtype=torch.bfloat16), "step": 3, "b": torch.nn.Parameter(torch.zeros(2))}
    torch.save(state, folder / "extra.pt", _use_new_zipfile_serialization=new_format)
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt", _use_new_zipfile_serialization=new_format)
    found = {check.where: check for check in static_checks(folder) if check.name == "pickles"}
    assert found["extra.pt"].status == "warning"
    assert found["module.pt"].status == "failed" and "torch.nn.modules.linear.Linear" in found["module.pt"].what


@pytest.mark.versions
def test_the_table_of_names_is_what_the_releases_have() -> None:
    releases = find_releases([str(install(release, CACHE)) for release in RELEASES])
    for (place, name), span in GONE.items():
        failing, _ = lacking(place, name, releases)
        assert failing == [str(release) for release in releases if release.version in Span(*span)], (place, name)


@pytest.mark.versions
@pytest.mark.parametrize("kind", ["mygpt2", "mybert", "single_file", "multi_file"])
def test_no_false_alarm_in_any_release(kind: str, healthy) -> None:
    folders = [str(install(release, CACHE)) for release in RELEASES]
    assert [check for check in static_checks(healthy(kind), releases=folders) if check.status == "failed"] == []


@pytest.mark.parametrize(
    "text",
    [
        "HF_TOKEN=hf_" + "x" * 34,
        "https://user:password@example.com",
        "sk-proj-" + "x" * 30,
        "https://me:YOUR_PASSWORD@host",
    ],
)
def test_placeholders_are_no_secrets(text: str, healthy, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy("stock_gpt2"), tmp_path / "folder"))
    (folder / "README.md").write_text(f"# Use\n\n{text}\n")
    assert [check.status for check in static_checks(folder) if check.name == "secrets"] == ["ok"]


def test_a_stock_model_with_its_own_tokenizer_is_healthy(healthy, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy("stock_gpt2"), tmp_path / "folder"))
    code = (
        "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (folder / "tokenization_own.py").write_text(code)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
        )
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}})
    )
    assert [check for check in static_checks(folder) if check.status == "failed"] == []


def test_an_adapter_is_not_a_folder_without_a_config(tmp_path: Path) -> None:
    save_file(
        {"q_proj.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    assert [check.status for check in verify(tmp_path).static if check.name == "config"] == ["failed"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "me/x"}))
    found = verify(tmp_path)
    assert found.passed and not found.complete  # there is no model to run
    assert [check.what[:25] for check in found.static if check.name == "config"] == ["this is an adapter (PEFT)"]


def test_walk_gives_the_nodes_that_ast_gives() -> None:
    """In the same order, also the second time; a part of a file too."""
    for file in sorted((Path(__file__).parents[3] / "mymodels").rglob("*.py"))[::12]:
        tree = ast.parse(file.read_text())
        for node in (tree, tree, *tree.body):
            assert list(map(id, walk(node))) == list(map(id, ast.walk(node))), file


def test_a_private_module_of_the_standard_library_is_named_as_the_public_one() -> None:
    """CPython's `open` is at home in `io` or in `_io`, by the release."""
    import _io
    import _socket

    assert _io and _socket
    names = {
        "_socket.socket": "socket.socket",
        "_io.open": "io.open",
        "io.open": "io.open",
        "torch.os.getcwd": "os.getcwd",
    }
    assert {name: canonical(name) for name in names} == names


def test_the_settings_of_generation_are_those_that_transformers_refuses_to_save(tmp_path: Path) -> None:
    refused = set()
    for key in DEFAULTS_OF_4:
        with contextlib.suppress(AttributeError):  # of a property without a setter
            stock = PretrainedConfig()
            setattr(stock, key, 3)
            try:
                stock.save_pretrained(tmp_path)
            except ValueError:
                refused.add(key)
    folder = SimpleNamespace(values={"config.json": dict.fromkeys(DEFAULTS_OF_4, 3)}, auto_map={"AutoModel": "m.M"})
    found = [finding for finding in config_keys(folder) if "belongs to generation" in finding.what]  # type: ignore[arg-type]
    assert {finding.where.removeprefix("config.json: ") for finding in found} == refused and "top_k" in refused
