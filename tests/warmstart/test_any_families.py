"""A stock family into the class of another: where each tensor went, against mappings written by hand."""

import itertools

import pytest
import torch
from warmstart.stock_families import DECODERS, ENCODERS, RMS, family, matrices, norms, tokens

from mymodels import warm_start

ALL = [*itertools.permutations(DECODERS, 2), *itertools.permutations(ENCODERS, 2)]
# in the fast suite one pair for each of the layouts; the others are slow
FAST = {
    ("gpt2", "llama"), ("llama", "gpt_neox"), ("gpt_neox", "mistral"), ("opt", "gpt2"), ("phi", "qwen2"), ("mistral", "opt"),
    ("bert", "modernbert"), ("modernbert", "distilbert"), ("distilbert", "electra"), ("roberta", "bert"),
}  # fmt: skip
PAIRS = [pair if pair in FAST else pytest.param(*pair, marks=pytest.mark.slow) for pair in ALL]


def centred(matrix: torch.Tensor) -> torch.Tensor:
    """What LayerNorm → RMSNorm makes of what writes to the residual stream."""
    return matrix - matrix.mean(dim=0, keepdim=True)


def pooled(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """Key/value heads of 8 rows, as many as there are to be: the mean of each group, or copies."""
    heads, wanted = matrix.shape[0] // 8, rows // 8
    by_head = matrix.view(heads, 8, -1)
    if wanted < heads:
        return by_head.view(wanted, heads // wanted, 8, -1).mean(dim=1).flatten(0, 1)
    return by_head.repeat_interleave(wanted // heads, dim=0).flatten(0, 1)


@pytest.mark.parametrize("old,new", PAIRS)
def test_every_matrix_goes_where_the_known_mapping_says(old: str, new: str) -> None:
    source, target = family(old), family(new)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    report = warm_start(target, source)
    theirs, ours = source.state_dict(), target.state_dict()
    to_rms = new in RMS and old not in RMS and old != "phi"  # phi has parallel blocks: no step to RMSNorm there
    blocks_alike = {old, new} & {"phi", "gpt_neox"} == set() or {old, new} == {"phi", "gpt_neox"}
    change = centred if to_rms and blocks_alike else lambda matrix: matrix
    for i in range(2):
        origin, place = matrices(old, i), matrices(new, i)
        for role in "qkvo":
            expected = origin[role](theirs)
            expected = change(expected) if role == "o" else pooled(expected, place[role](ours).shape[0])
            assert torch.allclose(place[role](ours), expected, atol=1e-6), role
        assert torch.allclose(place["down"](ours), change(origin["down"](theirs)), atol=1e-6)
        if "gate" in origin and "gate" not in place:  # the gate alone: down(act(gate))
            pairs = [("gate", "up")]
        elif "gate" in place and "gate" not in origin:
            pairs = [("up", "gate")]
        else:
            pairs = [(role, role) for role in ("gate", "up") if role in place]
        for role, own in pairs:
            assert torch.equal(place[own](ours), origin[role](theirs)), role
        if norms(old, i) and norms(new, i):
            for a, b in zip(norms(old, i), norms(new, i)):
                assert torch.equal(ours[f"{b}.weight"], theirs[f"{a}.weight"]), b
    table = theirs[tokens(old)]
    expected = table - table.mean(dim=1, keepdim=True) if change is centred else table
    assert torch.allclose(ours[tokens(new)], expected, atol=1e-6)
    # what is called new is as it was, and every parameter is in one row
    named = [name for row in report.rows for name in row.targets]
    assert sorted(named) == sorted(name for name, _ in target.named_parameters(remove_duplicate=False))
    for row in report.rows:
        if row.status == "new" and row.kind == "new":
            assert all(torch.equal(ours[name], before[name]) for name in row.targets)
    assert report.checked.ran
    assert report.is_exact <= report.checked.agrees
    if old in ("bert", "electra", "roberta") and new in ("bert", "electra", "roberta"):
        assert report.is_exact
    elif not (old in RMS and new in RMS):
        assert not report.is_exact and not all(row.kind == "exact" for row in report.rows)


def test_one_architecture_under_two_names_is_proven_by_a_run() -> None:
    source = family("llama", num_key_value_heads=2)
    target = family("mistral", sliding_window=None)
    report = warm_start(target, source)
    ids = torch.randint(2, 97, (2, 9))
    with torch.no_grad():
        assert torch.equal(target(ids).logits, source(ids).logits)
    assert report.is_exact and report.checked.agrees and report.totals["loaded"]["percent"] == 100
    other = warm_start(family("mistral", sliding_window=None, rms_norm_eps=1e-3), source)
    assert not other.is_exact and any("epsilon" in note for note in other.notes)


def test_a_llama_folder_into_mygpt2(tmp_path) -> None:
    from mymodels import MyGPT2Config

    source = family("llama", num_key_value_heads=2)
    source.save_pretrained(tmp_path)
    config = MyGPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, position_embedding_type="rope", norm_type="rmsnorm",
        mlp_type="gated", activation_function="silu", num_key_value_heads=2, attention_bias=False, mlp_bias=False,
        intermediate_size=64, tie_word_embeddings=False, layer_norm_epsilon=1e-6,
    )  # fmt: skip
    report = warm_start(config, tmp_path)
    ids = torch.randint(2, 97, (2, 9))
    with torch.no_grad():
        assert torch.allclose(report.model(ids).logits, source(ids).logits, atol=1e-5)
    assert report.is_exact and type(report.model).__name__ == "MyGPT2ForCausalLM"
