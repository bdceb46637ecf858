"""Every fault of `pairs.py` is found by the check that names it, and its healthy twin stays quiet."""

import re
import shutil
from pathlib import Path

import pytest
import transformers
from families import family_repo
from family_pairs import FAMILY_PAIRS
from many import run_many
from pairs import PAIRS as TEXT_PAIRS
from repos_to_verify import tiny_repo

from mymodels.hub.checks import Check

PAIRS = TEXT_PAIRS | FAMILY_PAIRS
FAST = [
    "keys that do not match",
    "pooled otherwise",
    "beams on a cache that stays",
    "labels shifted twice",
    "pictures: other size",
    "loss doubled",
]


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The checks of each fault that was asked for, and of its twin."""
    names = [name for name in PAIRS if any(f"[{name}]" in item.nodeid for item in request.session.items)]
    home, scratch = tmp_path_factory.mktemp("pairs"), tmp_path_factory.mktemp("scratch")
    twins: dict[str, Path] = {}
    made: dict[tuple, Path] = {}  # pairs with the same base share a twin
    faulty = {}
    for number, name in enumerate(names):
        pair = PAIRS[name]
        base = (pair.kind, *map(id, pair.base), pair.golden)
        if base not in made:
            folder = home / f"twin_{number}"
            made[base] = tiny_repo(folder) if pair.kind == "text" else family_repo(folder, pair.kind)
            for step in pair.base:
                step(made[base])
        twins[name] = made[base]
    recorded = {twins[name]: ["record"] for name in names if PAIRS[name].golden}
    if recorded:
        run_many(recorded, scratch / "record")
    stages: dict[Path, list[str]] = {}
    for number, name in enumerate(names):
        faulty[name] = Path(shutil.copytree(twins[name], home / f"fault_{number}"))
        for step in PAIRS[name].fault:
            step(faulty[name])
        stages[faulty[name]] = PAIRS[name].stages
        known = stages.get(twins[name], [])
        stages[twins[name]] = known + [stage for stage in PAIRS[name].stages if stage not in known]
    found = run_many(stages, scratch / "all")
    return {name: (found[twins[name]], found[faulty[name]]) for name in names}


def bad(checks: list[Check], *statuses: str) -> list[Check]:
    return [check for check in checks if check.status in (statuses or ("failed", "skipped"))]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in PAIRS])
def test_a_fault_is_named_and_its_twin_is_quiet(name: str, outcomes: dict) -> None:
    pair, (healthy, faulty) = PAIRS[name], outcomes[name]
    assert not bad(healthy)
    assert [check.name for check in healthy if check.status == "ok"]
    found = bad(faulty, pair.status)
    assert {check.name for check in found} == {pair.check}, found
    assert any(re.search(pair.says, check.what) for check in found), found
    assert all(check.remedy for check in found) or pair.status != "failed"


@pytest.mark.slow
def test_what_stock_code_cannot_help_is_no_fault(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    sizes |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}
    stages = ["outputs", "other classes", "reload", "placement", "training", "workers"]
    for kind in ("Wav2Vec2", "Hubert"):
        made = getattr(transformers, f"{kind}ForCTC")(getattr(transformers, f"{kind}Config")(**sizes))
        made.save_pretrained(tmp_path / kind)
    for checks in run_many({tmp_path / kind: stages for kind in ("Wav2Vec2", "Hubert")}, tmp_path / "scratch").values():
        assert not bad(checks), bad(checks)
        found = {check.name: check for check in checks}
        assert found["meta"].status == "warning" and "the library's code creates it" in found["meta"].what
        assert found["pickle"].status == "n/a" and "torch cannot pickle parametrised modules" in found["pickle"].what
        assert found["forked worker"].status == found["device map"].status == found["reload"].status == "ok"
