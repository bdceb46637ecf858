"""How tensors are stored: transposed, fused, interleaved, as factors, as pairs, as experts. Outputs decide."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from warmstart.nanogpt import NanoGPT
from warmstart.random_stock_models import randomised
from warmstart.stock_families import family

from mymodels import warm_start
from mymodels.warmstart.warm_start_model import NotAllowedError


def outputs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


IDS = torch.randint(2, 97, (3, 11), generator=torch.Generator().manual_seed(4))


class Square(nn.Module):
    """Only square matrices, of either kind."""

    def __init__(self, kind: type):
        super().__init__()
        self.first, self.second = kind(8, 8), kind(8, 8)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize(
    "old,new", [(Conv1D, nn.Linear), (nn.Linear, Conv1D), (Conv1D, Conv1D), (nn.Linear, nn.Linear)]
)
def test_square_matrices_by_the_class_of_the_module(old: type, new: type) -> None:
    source, target = randomised(Square(old)), Square(new).eval()
    report = warm_start(target, source)
    x = torch.randn(5, 8)
    assert torch.allclose(target(x), source(x), atol=1e-6)
    assert report.is_exact and report.checked.agrees
    weight = next(row for row in report.rows if "first.weight" in row.targets)
    assert ("transposed" in weight.how) == (old is not new)


def test_square_matrices_of_bare_tensors() -> None:
    source = randomised(Square(Conv1D))
    target = Square(nn.Linear).eval()
    report = warm_start(target, source.state_dict())
    assert not report.is_exact and any("nothing shows how the square matrices" in note for note in report.notes)
    rename = {r"(first|second)\.weight": r"\1.kernel"}
    target = Square(nn.Linear).eval()
    report = warm_start(target, source.state_dict(), rename=rename)
    x = torch.randn(5, 8)
    assert torch.allclose(target(x), source(x), atol=1e-6)
    target = Square(Conv1D)
    before = copy.deepcopy(target.state_dict())
    report = warm_start(target, source.state_dict(), allow=".")
    assert sum("ambiguous, so not loaded" in note for note in report.notes) == 2
    assert torch.equal(target.first.weight, before["first.weight"])


class Block(nn.Module):
    """Names without a role; a square matrix beside others."""

    def __init__(self, kind: type):
        super().__init__()
        if kind is Conv1D:
            self.mix, self.wide, self.narrow = Conv1D(8, 8), Conv1D(20, 8), Conv1D(8, 20)
        else:
            self.mix, self.wide, self.narrow = nn.Linear(8, 8), nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x):
        return self.narrow(torch.relu(self.wide(self.mix(x))))


@pytest.mark.parametrize("old,new", [(Conv1D, nn.Linear), (nn.Linear, Conv1D)])
def test_square_matrices_follow_those_beside_them(old: type, new: type) -> None:
    source, target = randomised(Block(old)), Block(new).eval()
    warm_start(target, source.state_dict())
    x = torch.randn(4, 8)
    assert torch.allclose(target(x), source(x), atol=1e-5)


@pytest.mark.parametrize("source_as", ["model", "tensors", "folder"])
def test_gpt2_into_a_gpt_with_linears_and_back(source_as: str, tmp_path) -> None:
    stock = family("gpt2", n_inner=None, activation_function="gelu")
    stock.save_pretrained(tmp_path)
    source = {"model": stock, "tensors": stock.state_dict(), "folder": tmp_path}[source_as]
    target = NanoGPT(2, 4, 32, 64, True, 97, 0.0).eval()
    report = warm_start(target, source)
    assert torch.allclose(outputs(target, IDS), outputs(stock, IDS), atol=1e-4)
    square = next(row for row in report.rows if any("h.0.attn.c_proj.weight" in name for name in row.targets))
    assert "transposed" in square.how
    assert report.checked.agrees == (source_as != "tensors")
    back = family("gpt2", n_inner=None, activation_function="gelu")
    report = warm_start(back, target)
    assert torch.allclose(outputs(back, IDS), outputs(target, IDS), atol=1e-4) and report.checked.agrees


@pytest.mark.parametrize("kind", ["mistral", "phi3"])
def test_grouped_queries_fused_and_apart(kind: str) -> None:
    same = {"sliding_window": None, "rms_norm_eps": 1e-6}
    other = {"mistral": "phi3", "phi3": "mistral"}[kind]
    source, target = family(kind, **same), family(other, **same)
    report = warm_start(target, source)
    assert torch.allclose(outputs(target, IDS), outputs(source, IDS), atol=1e-4)
    assert report.is_exact and report.checked.agrees


class Separate(nn.Module):
    """BLOOM's attention with three matrices."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.self_attn = nn.ModuleDict({f"{part}_proj": nn.Linear(32, 32) for part in "qkvo"})


@pytest.mark.parametrize(
    "kind,path", [("bloom", "transformer.h.1.self_attention"), ("gpt_neox", "gpt_neox.layers.1.attention")]
)
def test_interleaved_by_head(kind: str, path: str) -> None:
    source = family(kind)
    target = nn.Module()
    target.layers = nn.ModuleList(Separate(source) for _ in range(2))
    warm_start(target, source, allow=".")
    fused = source.get_submodule(path).query_key_value
    parts = fused.weight.view(4, 3, 8, 32), fused.bias.view(4, 3, 8)
    for i, name in enumerate("qkv"):
        own = target.layers[1].self_attn[f"{name}_proj"]
        assert torch.equal(own.weight, parts[0][:, i].reshape(32, 32)) and torch.equal(
            own.bias, parts[1][:, i].flatten()
        )
    back = family(kind)
    report = warm_start(back, target, allow=".")
    again = back.get_submodule(path).query_key_value
    assert torch.equal(again.weight, fused.weight) and torch.equal(again.bias, fused.bias)
    assert any("3 fused, in each of 4 blocks" in row.how for row in report.rows)


def test_a_fused_matrix_of_unknown_order_is_not_guessed() -> None:
    tensors = {f"layers.{i}.attention.query_key_value.weight": torch.randn(96, 32) for i in range(2)}
    tensors |= {f"layers.{i}.attention.dense.weight": torch.randn(32, 32) for i in range(2)}
    target = nn.Module()
    target.layers = nn.ModuleList(Separate(target) for _ in range(2))
    report = warm_start(target, tensors, allow=".")
    note = next(note for note in report.notes if "query_key_value" in note)
    assert "ambiguous, so not loaded" in note and "interleaved by head" in note and "rename=" in note
    assert not any("q_proj.weight" in name for row in report.rows if row.sources for name in row.targets)
    with pytest.raises(NotAllowedError) as error:
        warm_start(target, tensors, strict=True)
    assert "interleaved by head" in str(error.value) and "qkv_by_head" in str(error.value)
    assert "rename={" in str(error.value) and error.value.report.notes
    for word, chosen in (
        ("qkv_proj", lambda w: w[:32]),
        ("qkv_by_head", lambda w: w.view(4, 3, 8, 32)[:, 0].reshape(32, 32)),
    ):
        config = {"num_attention_heads": 4}
        warm_start(target, tensors, allow=".", rename={"query_key_value": word}, config=config)
        assert torch.equal(
            target.layers[1].self_attn["q_proj"].weight, chosen(tensors["layers.1.attention.query_key_value.weight"])
        )


def test_gamma_and_beta() -> None:
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma, self.beta = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    source = nn.ModuleDict({"thing": Norm()})
    target = nn.ModuleDict({"thing": nn.LayerNorm(6)})
    warm_start(target, source)
    assert torch.equal(target["thing"].weight, source["thing"].gamma)
    assert torch.equal(target["thing"].bias, source["thing"].beta)


@pytest.mark.filterwarnings("ignore")
def test_weight_norm_in_every_form() -> None:
    def plain():
        return randomised(nn.Linear(8, 6))

    forms = {
        "plain": plain, "old": lambda: torch.nn.utils.weight_norm(plain()),
        "new": lambda: torch.nn.utils.parametrizations.weight_norm(plain()),
    }  # fmt: skip
    x = torch.randn(4, 8)
    for old in forms.values():
        for new in forms.values():
            source, target = nn.ModuleDict({"a": old()}), nn.ModuleDict({"a": new()})
            warm_start(target, source)
            assert torch.allclose(target["a"](x), source["a"](x), atol=1e-5)


class Factors(nn.Module):
    def __init__(self, rank: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, rank, bias=False), nn.Linear(rank, 12)) if rank else nn.Linear(16, 12)

    def forward(self, x):
        return self.body(x)


def test_low_rank_factors_and_their_product() -> None:
    source, target = randomised(Factors(0)), Factors(5)
    report = warm_start(target, source)
    left, kept, right = torch.linalg.svd(source.body.weight.double())
    best = left[:, :5] * kept[:5] @ right[:5]
    assert torch.allclose((target.body[1].weight @ target.body[0].weight).double(), best, atol=1e-5)
    row = next(row for row in report.rows if "body.0.weight" in row.targets)
    share = (kept[:5].square().sum() / kept.square().sum()).item()
    assert row.kind == "approximate" and f"keep {share:.2%} of the energy" in row.how and not report.is_exact
    back = Factors(0)
    report = warm_start(back, target)
    x = torch.randn(3, 16)
    assert torch.allclose(back(x), target(x), atol=1e-5) and report.is_exact and report.checked.agrees


def test_a_dense_mlp_into_experts_and_back() -> None:
    same = {
        "sliding_window": None,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    source, target = family("mistral", **same), family("mixtral", **same)
    report = warm_start(target, source)
    assert torch.allclose(outputs(target, IDS), outputs(source, IDS), atol=1e-4)
    assert report.is_exact and report.checked.agrees
    router = next(row for row in report.rows if any("mlp.gate" in name for name in row.targets))
    assert router.status == "new" and router.kind == "exact"
    with torch.no_grad():
        for block in target.model.layers:
            block.mlp.experts.down_proj.add_(torch.randn_like(block.mlp.experts.down_proj))
    back = family("mistral", **same)
    report = warm_start(back, target)
    mean = target.model.layers[1].mlp.experts.down_proj.mean(dim=0)
    assert torch.allclose(back.model.layers[1].mlp.down_proj.weight, mean, atol=1e-5) and not report.is_exact
    assert any("the mean of 4 experts" in row.how and row.kind == "approximate" for row in report.rows)


def test_deeper_shallower_wider_longer() -> None:
    source = family("llama")
    deep = family("llama", num_hidden_layers=4, intermediate_size=96)
    report = warm_start(deep, source)
    assert torch.allclose(outputs(deep, IDS), outputs(source, IDS), atol=1e-4) and report.checked.agrees
    shallow = family("llama", num_hidden_layers=1)
    report = warm_start(shallow, source, layers="last")
    theirs = source.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(shallow.model.layers[0].self_attn.q_proj.weight, theirs) and not report.is_exact
    long = family("opt", max_position_embeddings=100, vocab_size=120)
    old = family("opt")
    warm_start(long, old)
    assert torch.allclose(outputs(long, IDS)[..., :97], outputs(old, IDS), atol=1e-4)
    heads = family("llama", num_key_value_heads=1)
    report = warm_start(heads, source)
    assert any("4 key/value heads mean-pooled to 1" in row.how for row in report.rows) and not report.is_exact
