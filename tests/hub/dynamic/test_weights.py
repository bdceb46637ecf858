"""Weights that were loaded, compared with the files: every way in which they can differ, told apart."""

from pathlib import Path

import pytest
import torch
from repos_to_verify import tiny_repo, weights

from mymodels.checkpoints import open_checkpoint
from mymodels.hub.isolated.load_repo import digest
from mymodels.hub.weights import Files, compare_weights


def event(**changes) -> dict:
    """What the clean process reports of the tied tiny decoder, loaded as it should be."""
    held = weights() | {"lm_head.weight": weights()["model.embed_tokens.weight"]}
    tensors = {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "meta": False,
            "digest": digest(tensor),
            "parameter": True,
            "persistent": True,
        }
        for name, tensor in (held | changes.pop("replaced", {})).items()
    }
    tensors |= changes.pop("more", {})
    tie = {"wanted": True, "tied": True, "head": ["lm_head.weight"]}
    standard = {"loaded": "AutoModelForCausalLM", "prefix": "model", "tensors": tensors, "tie": tie}
    return {**standard, "missing": [], "unexpected": [], "mismatched": [], "kept_wide": [], **changes}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(open_checkpoint(tiny_repo(tmp_path_factory.mktemp("weights") / "repo")))


NORM = "model.layers.0.norm.weight"
META = {"meta": True, "persistent": False, "parameter": False, "attribute": True}
BUFFER = {"meta": False, "persistent": False, "parameter": False, "digest": "a"}
TWO = {"wanted": True, "tied": False, "head": ["lm_head.weight"]}


@pytest.mark.parametrize(
    ("changes", "main", "check", "status", "says"),
    [
        ({}, True, "weights", "ok", "31 tensors equal those of the files bit for bit"),
        ({}, True, "tied", "ok", "head and embeddings are one tensor"),
        ({"replaced": {NORM: torch.zeros(32)}}, True, "weights", "failed", f"initialised after loading: {NORM}"),
        (
            {"replaced": {NORM: weights()[NORM].half()}},
            True,
            "weights",
            "failed",
            f"loaded as float16, but float32 in the files: {NORM}",
        ),
        ({"missing": [NORM]}, True, "weights", "failed", f"not in the files, so initialised at random: {NORM}"),
        ({"missing": [NORM]}, False, "weights", "warning", f"needs training first: {NORM}"),
        ({"missing": ["score.weight"]}, False, "weights", "ok", "needs training first: score.weight"),
        ({"unexpected": ["x"]}, True, "weights", "failed", "in the files but not in the model: x"),
        ({"unexpected": ["x"]}, False, "weights", "ok", "bit for bit"),
        ({"mismatched": [NORM]}, True, "weights", "failed", f"of another shape than in the files: {NORM}"),
        (
            {"more": {"model.table": META}},
            True,
            "weights",
            "failed",
            "left on the meta device, without data: model.table",
        ),
        (
            {"replaced": {"new.weight": torch.zeros(1)}},
            True,
            "weights",
            "failed",
            "so initialised at random: new.weight",
        ),
        ({"tie": TWO, "missing": ["lm_head.weight"]}, True, "tied", "failed", "they are two tensors"),
        ({"tie": TWO, "missing": ["lm_head.weight"]}, True, "weights", "ok", "bit for bit"),
        ({"tie": TWO | {"wanted": False, "tied": True}}, True, "tied", "failed", "they are one tensor"),
        ({"tie": TWO | {"wanted": False}}, True, "tied", "ok", "head is a tensor of its own"),
        ({"more": {"b": BUFFER}, "fresh_buffers": {"b": BUFFER}}, True, "buffers", "ok", "1 buffers"),
        (
            {"more": {"b": BUFFER}, "fresh_buffers": {"b": BUFFER | {"digest": "c"}}},
            True,
            "buffers",
            "failed",
            "different from what __init__ computes: b",
        ),
        ({"fresh_error": "TypeError: x"}, True, "buffers", "failed", "no new model can be built: TypeError: x"),
    ],
)
def test_differences_are_reported(changes: dict, main: bool, check: str, status: str, says: str, files: Files) -> None:
    checks = {found.name: found for found in compare_weights(event(**changes), files, main)}
    assert checks[check].status == status and says in checks[check].what, checks[check]
    if status == "failed":
        assert checks[check].remedy and checks[check].where == "AutoModelForCausalLM"
        assert [name for name, found in checks.items() if found.status == "failed"] == [check]


def test_converted_tensors_are_shown_to_come_from_the_files(files: Files) -> None:
    loaded = event(more={"model.fused": event()["tensors"][NORM] | {"digest": "f"}})
    del loaded["tensors"][NORM]  # it went into the fused one
    (first, *_) = compare_weights(loaded, files, True)
    assert first.status == "failed" and "not found to come from the files: model.fused" in first.what
    assert f"while {NORM} of the files are not used" in first.what and "strict=False" in first.remedy
    shown = {"random": [], "unmoved": []}  # loaded again it follows the files, and not the seed
    (first, *_) = compare_weights(loaded | {"origins": shown}, files, True)
    assert (
        first.status == "warning"
        and "converted from tensors of the files, so not compared bit for bit: model.fused" in first.what
    )
    for wrong in ({"random": ["model.fused"]}, {"unmoved": ["model.fused"]}, {"error": "too large"}):
        (first, *_) = compare_weights(loaded | {"origins": wrong if "error" in wrong else shown | wrong}, files, True)
        assert first.status == "failed" and "not found to come from the files" in first.what


def test_weights_ignored_by_a_custom_loader_are_reported(files: Files) -> None:
    loaded = event(accounted=False)
    assert compare_weights(loaded, files, True)[0].status == "ok"
    del loaded["tensors"][NORM]
    (first, *_) = compare_weights(loaded, files, True)
    assert first.status == "failed" and first.what == f"in the files but not in the model: {NORM}"


def test_tensors_that_the_library_renames_are_found_by_their_bytes(files: Files) -> None:
    loaded = event(more={"model.first_norm": event()["tensors"][NORM]})
    del loaded["tensors"][NORM]
    assert compare_weights(loaded, files, True)[0].status == "ok"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.float8_e4m3fn])
def test_a_digest_is_of_the_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    assert digest(tensor) == digest(tensor.clone()) == digest(tensor.t().contiguous().t())
    changed = tensor.clone()
    changed[0, 0] = 1
    assert digest(changed) != digest(tensor) and digest(tensor[:0]) == ""
    assert digest(torch.tensor(0).to(dtype))  # of no dimension
