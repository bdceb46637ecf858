"""`upgrade` without a proof: what is refused, what is left alone, and that files stay as they were."""

import hashlib
import json
from pathlib import Path

import folders
import pytest

from mymodels.cli.command import main
from mymodels.hub.releases import nearest
from mymodels.hub.upgrading import upgrade
from mymodels.hub.upgrading.plan_releases import old_releases, target_releases
from mymodels.hub.upgrading.releases_block import put_in, take_out

ROOT = Path(__file__).parents[2]
OLD = """
from torch import nn
from transformers import PreTrainedModel, PretrainedConfig
from transformers.utils import is_torch_fx_available


class OldConfig(PretrainedConfig):
    model_type = "old"


class OldModel(PreTrainedModel):
    config_class = OldConfig

    def __init__(self, config):   #  odd   spacing stays
        super().__init__(config)
        self.embed = nn.Embedding(8, 4)
        assert is_torch_fx_available()

    def forward(self, input_ids):
        return self.embed(input_ids)
"""


def folder_of(path: Path, code: str) -> Path:
    path.mkdir()
    (path / "modeling_old.py").write_text(code)
    auto_map = {"AutoConfig": "modeling_old.OldConfig", "AutoModel": "modeling_old.OldModel"}
    (path / "config.json").write_text(json.dumps({"model_type": "old", "auto_map": auto_map}))
    return path


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_a_dry_run_shows_the_diff_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = folder_of(tmp_path / "old", OLD)
    before = hashes(folder)
    assert main(["upgrade", str(folder), "--dry-run"]) == 3
    shown = capsys.readouterr().out
    assert "+        self.post_init()" in shown and "-from transformers.utils import is_torch_fx_available" in shown
    assert "modeling_old.py:14" in shown and "not proven" in shown
    assert hashes(folder) == before and [path.name for path in tmp_path.iterdir()] == ["old"]


def test_only_the_repaired_lines_change(tmp_path: Path) -> None:
    result = upgrade(folder_of(tmp_path / "old", OLD), dry_run=True)
    removed = [line for line in result.diff.splitlines() if line.startswith("-") and not line.startswith("---")]
    assert removed == ["-from transformers.utils import is_torch_fx_available"]
    assert [(edit.rule, edit.line) for edit in result.edits] == [("imports", 4), ("post_init", 14)]


def test_files_that_are_needed_through_another_are_imported(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "old", OLD.replace("from torch import nn", "from torch import nn\nfrom .layers import A")
    )
    (folder / "layers.py").write_text("from .parts import B\n\n\nclass A(B):\n    pass\n")
    (folder / "parts.py").write_text("class B:\n    pass\n")
    diff = upgrade(folder, dry_run=True).diff
    assert "+from .parts import B  # noqa: F401" in diff and "b/layers.py" not in diff


@pytest.mark.parametrize(
    ("code", "where", "what"),
    [
        (OLD.replace("return self", "return return self"), "modeling_old.py:20", "cannot be read as Python"),
        ("import os\\nos.system('id')\\n".replace("\\n", "\n") + OLD, "modeling_old.py:2", "os.system"),
        (OLD + "\nexec(bytes.fromhex('00'))\n", "modeling_old.py:22", "exec"),
        (OLD.replace("is_torch_fx_available", "SquashedTensorThing"), "", ""),
    ],
)
def test_unreadable_and_hostile_code_is_refused(tmp_path: Path, code: str, where: str, what: str) -> None:
    folder = folder_of(tmp_path / "old", code)
    result = upgrade(folder, tmp_path / "new") if where else upgrade(folder, dry_run=True)
    if where:
        assert where in [place.where for place in result.refused], result.refused
        assert any(what in place.what for place in result.refused)
        assert result.proof is None
    assert not (tmp_path / "new").exists()


def test_deeply_nested_code_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "old", OLD + "\nx = " + "-" * 5000 + "1\n")
    result = upgrade(folder, dry_run=True)
    assert result.refused[0].where.startswith("modeling_old.py")


@pytest.mark.parametrize("name", ["mygpt2", "mybert"])
def test_a_healthy_folder_changes_nothing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = ROOT / "hub_repo" / name
    before = hashes(folder)
    assert main(["upgrade", str(folder), "--out", str(tmp_path / "new"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["edits"] == [] and report["diff"] == "" and "nothing" in report["verdict"]
    assert hashes(folder) == before and not (tmp_path / "new").exists()


def test_where_it_may_not_write(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = folder_of(tmp_path / "old", OLD)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    for out, what in ((full, "not empty"), (folder / "inside", "never changed")):
        assert main(["upgrade", str(folder), "--out", str(out)]) == 1
        assert what in capsys.readouterr().err
    assert main(["upgrade", str(folder)]) == 1
    assert "--out" in capsys.readouterr().err
    assert main(["upgrade", str(tmp_path / "none"), "--dry-run"]) == 1


def test_the_block_comes_out_as_it_was_put_in() -> None:
    text = '"""Doc."""\nimport torch\nfrom torch import nn\n\n\nclass A:\n    pass\n'
    entries = {"one": "def one():\n    return 1", "two": "two = 2"}
    made = put_in(text, entries)
    assert take_out(made) == (text, entries)
    assert put_in(*take_out(made)) == made
    compile(made, "made", "exec")


def test_releases() -> None:
    assert [r.transformers for r in target_releases("4.57-5.4")] == ["4.57.6", "5.0.0", "5.4.0"]
    assert [r.transformers for r in target_releases("5.2-5.3")] == ["5.2.0", "5.3.0"]
    with pytest.raises(ValueError, match="empty"):
        target_releases("5.4-4.57")
    with pytest.raises(ValueError, match="not a supported"):
        target_releases("4.12-5.0")
    assert old_releases("4.46", "4.36.0")[0].transformers == "4.46.3" and len(old_releases("4.46", None)) == 1
    assert old_releases(None, "4.36.0.dev0")[0].transformers == "4.36.2"
    assert nearest("4.29.1").transformers == "4.30.2"
    assert nearest("5.4.0").transformers == "5.4.0"


def test_every_folder_is_changed_and_none_holds_weights() -> None:
    assert len(folders.names()) >= 24
    for name in folders.names():
        assert not list((folders.FOLDERS / name).glob("*.safetensors"))


def test_the_counts_of_the_linter_are_reported(tmp_path: Path) -> None:
    pytest.importorskip("mlinter", reason="transformers-mlinter is not installed")
    result = upgrade(folder_of(tmp_path / "old", OLD), dry_run=True)
    assert result.mlinter["after"] < result.mlinter["before"]


def test_a_name_that_the_repair_needs_may_be_taken(tmp_path: Path) -> None:
    taken = OLD + "\n\ndef count(is_torch_fx_available=1):\n    return is_torch_fx_available\n"
    result = upgrade(folder_of(tmp_path / "old", taken), tmp_path / "new")
    assert "uses that name for something else" in result.refused[0].what and not (tmp_path / "new").exists()


def test_buffers_of_another_file_are_computed_again(tmp_path: Path) -> None:
    """Two classes in a file that comes before the model's: edited once, and called from the model's `_init_weights`."""
    lines = (
        "def __init__(self):",
        "    super().__init__()",
        "    self.register_buffer('t', torch.ones(2), persistent=False)",
    )
    classes = "".join(f"\n\nclass {name}(nn.Module):\n    " + "\n    ".join(lines) + "\n" for name in "AB")
    starts = "    def _init_weights(self, module):\n        pass\n\n    def forward"
    code = OLD.replace("import nn", "import nn\nfrom .layers import A, B").replace("    def forward", starts)
    folder = folder_of(tmp_path / "old", code)
    (folder / "layers.py").write_text("import torch\nfrom torch import nn\n" + classes)
    diff = upgrade(folder, dry_run=True).diff
    assert diff.count("+    @keep_arguments") == 2
    assert "+        if isinstance(module, (A, B)):\n+            refill_buffers(module)" in diff


@pytest.mark.parametrize("part", ["", "from transformers import LlamaModel\n"])
def test_checkpointing_is_denied_only_where_no_part_may_have_it(part: str, tmp_path: Path) -> None:
    claims = OLD.replace("    config_class", "    supports_gradient_checkpointing = True\n    config_class")
    code = part + (claims.replace("nn.Embedding(8, 4)", "LlamaModel(config)") if part else claims)
    edits = upgrade(folder_of(tmp_path / "old", code), dry_run=True).edits
    assert any(edit.rule == "checkpointing claim" for edit in edits) == (not part)
