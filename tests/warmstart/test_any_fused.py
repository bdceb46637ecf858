"""Fused projections of any arrangement, into separate ones and back. The outputs of both models decide."""

import copy

import pytest
import torch
import transformers
from torch import nn
from warmstart.random_stock_models import randomised

from mymodels import warm_start
from mymodels.warmstart.any_model.layouts import known_arrangement
from mymodels.warmstart.any_model.probing import probed

IDS = torch.randint(0, 31, (3, 9), generator=torch.Generator().manual_seed(4))
HEADS, SIZE, KV = 4, 8, 2
# each as its author would write it: z [batch, tokens, rows] → query, key, value [batch, tokens, heads, size]
SPLITS = {
    "stacked": lambda z: (t.unflatten(-1, (-1, SIZE)) for t in z.chunk(3, dim=-1)),
    "stacked, grouped": lambda z: (t.unflatten(-1, (-1, SIZE)) for t in z.split([32, 16, 16], dim=-1)),
    "key first": lambda z: [z.view(*z.shape[:2], 3, HEADS, SIZE)[:, :, i] for i in (1, 0, 2)],
    "three by head": lambda z: z.view(*z.shape[:2], HEADS, 3, SIZE).unbind(3),
    "by head, chunked": lambda z: z.view(*z.shape[:2], HEADS, 3 * SIZE).chunk(3, dim=-1),
    "InternLM2": lambda z: (
        lambda g: (g[..., :2, :].flatten(2, 3), g[..., 2, :], g[..., 3, :])
    )(z.view(*z.shape[:2], KV, 4, SIZE)),
    "CodeGen": lambda z: (
        lambda q, v, k: (t.reshape(*z.shape[:2], HEADS, SIZE) for t in (q, k, v))
    )(*z.view(*z.shape[:2], 2, -1).split(16, dim=-1)),
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        rows = 32 + 2 * (16 if kind in ("stacked, grouped", "InternLM2") or kind.endswith("2 apart") else 32)
        if kind.endswith("apart"):
            side = (rows - 32) // 2
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 32), nn.Linear(32, side), nn.Linear(32, side)
        else:
            self.qkv = nn.Linear(32, rows)
        self.o_proj = nn.Linear(32, 32)

    def forward(self, x):
        if self.kind.endswith("apart"):
            q, k, v = (p(x).unflatten(-1, (-1, SIZE)) for p in (self.q_proj, self.k_proj, self.v_proj))
        else:
            q, k, v = SPLITS[self.kind](self.qkv(x))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


MLPS = {
    "gate first": lambda z: (lambda a, b: nn.functional.silu(a) * b)(*z.chunk(2, dim=-1)),
    "up first": lambda z: (lambda a, b: a * nn.functional.silu(b))(*z.chunk(2, dim=-1)),
    "alternating": lambda z: nn.functional.silu(z[..., ::2]) * z[..., 1::2],
}


class MLP(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        if kind == "apart":
            self.gate_proj, self.up_proj = nn.Linear(32, 48), nn.Linear(32, 48)
        else:
            self.fc1 = nn.Linear(32, 96)
        self.down_proj = nn.Linear(48, 32)

    def forward(self, x):
        inner = (
            nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
            if self.kind == "apart"
            else MLPS[self.kind](self.fc1(x))
        )
        return self.down_proj(inner)


class Block(nn.Module):
    def __init__(self, attention: str, mlp: str):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attn, self.mlp = Attention(attention), MLP(mlp)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Net(nn.Module):
    def __init__(self, attention: str, mlp: str = "gate first"):
        super().__init__()
        self.num_heads, self.num_kv_heads = (
            HEADS,
            KV if attention in ("stacked, grouped", "InternLM2", "2 apart") else HEADS,
        )
        self.tok_emb = nn.Embedding(31, 32)
        self.layers = nn.ModuleList(Block(attention, mlp) for _ in range(2))
        self.norm, self.lm_head = nn.LayerNorm(32), nn.Linear(32, 31)

    def forward(self, ids):
        x = self.tok_emb(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def expect_equal(source: nn.Module, target: nn.Module) -> None:
    report = warm_start(target, source)
    with torch.no_grad():
        assert torch.allclose(target.eval()(IDS), source(IDS), atol=1e-4), str(report)
    assert report.checked.agrees and all(row.kind == "exact" for row in report.rows), str(report)


@pytest.mark.parametrize("kind", SPLITS)
def test_how_code_divides_queries_keys_and_values(kind: str) -> None:
    apart = "2 apart" if kind in ("stacked, grouped", "InternLM2") else "apart"
    source = randomised(Net(kind))
    expect_equal(source, Net(apart))
    expect_equal(randomised(Net(apart)), Net(kind))
    other = {"stacked": "CodeGen", "CodeGen": "key first", "InternLM2": "stacked, grouped"}.get(kind)
    if other:
        expect_equal(source, Net(other))


@pytest.mark.parametrize("kind", MLPS)
def test_how_code_divides_gate_and_up(kind: str) -> None:
    source = randomised(Net("stacked", kind))
    expect_equal(source, Net("stacked", "apart"))
    expect_equal(randomised(Net("stacked", "apart")), Net("stacked", kind))


def test_what_cannot_be_run_is_left_to_the_reader() -> None:
    class Closed(Net):
        def forward(self, ids, secret):
            raise RuntimeError("needs a GPU")

    class Blind(Attention):
        def forward(self, x, secret):
            return x

    source = randomised(Closed("by head, chunked"))
    for layer in source.layers:
        layer.attn.__class__ = Blind
    target = Net("apart")
    before = target.layers[0].attn.q_proj.weight.clone()
    report = warm_start(target, source)
    note = next(note for note in report.notes if "qkv" in note)
    assert "ambiguous, so not loaded" in note and "qkv_by_head" in note and "rename=" in note
    assert torch.equal(target.layers[0].attn.q_proj.weight, before)


_SMALL = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
_GPT = {"vocab_size": 31, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
STOCK = {
    "gpt2": (_GPT, 4), "openai-gpt": (_GPT, 4), "gpt_bigcode": ({**_GPT, "multi_query": True}, 1),
    "gpt_bigcode, many heads": ({**_GPT, "multi_query": False}, 4),
    "codegen": ({**_GPT, "rotary_dim": 4}, 4), "codegen, 8 heads": ({**_GPT, "n_embd": 64, "n_head": 8, "rotary_dim": 4}, 8),
    "bloom": ({**_SMALL, "n_layer": 1, "n_head": 4}, 4), "mpt": ({"vocab_size": 31, "d_model": 32, "n_layers": 1, "n_heads": 4}, 4),
    "gpt_neox": (_SMALL, 4), "gpt_neox_japanese": (_SMALL, 4), "persimmon": (_SMALL, 4), "deberta": (_SMALL, 4),
    "phi3": ({**_SMALL, "num_key_value_heads": 2, "pad_token_id": 0}, 2),
    "modernbert": ({**_SMALL, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}, 4),
    "falcon": ({**_SMALL, "multi_query": True, "alibi": False}, 1),
    "falcon, many heads": ({**_SMALL, "multi_query": False, "alibi": False}, 4),
    "falcon, new": ({**_SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}, 2),
}  # fmt: skip
_FUSED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv", "in_proj")


@pytest.mark.parametrize("name", STOCK)
def test_the_table_of_stock_families_says_what_their_code_does(name: str) -> None:
    fields, kv_heads = STOCK[name]
    kind = name.partition(",")[0]
    model = randomised(transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **fields)))
    path = next(n for n, _ in model.named_modules() if n.rpartition(".")[2] in _FUSED)
    blocks, order = known_arrangement(kind, path.rpartition(".")[2], 3, kv_heads, name.endswith("new"))
    found = probed(model, path, 3)
    assert found is not None and found[1] == (order or (0, 1, 2))
    assert found[0] == (1 if kv_heads == 1 else blocks)


class Encoder(nn.Module):
    """PyTorch's own encoder, and a head whose name says nothing."""

    def __init__(self):
        super().__init__()
        self.tok, self.head = nn.Embedding(31, 32), nn.Linear(32, 31)
        layer = nn.TransformerEncoderLayer(32, HEADS, 64, 0.0, batch_first=True, norm_first=True)
        self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids):
        return self.head(self.enc(self.tok(ids)))


class Own(nn.Module):
    """The same with separate projections beside each other."""

    def __init__(self):
        super().__init__()
        self.tok_emb, self.lm_head = nn.Embedding(31, 32), nn.Linear(32, 31)
        parts = {name: nn.Linear(32, 32) for name in ("query", "key", "value", "out_proj")}
        parts |= {
            "norm1": nn.LayerNorm(32),
            "norm2": nn.LayerNorm(32),
            "fc1": nn.Linear(32, 64),
            "fc2": nn.Linear(64, 32),
        }
        self.blocks = nn.ModuleList(copy.deepcopy(nn.ModuleDict(parts)) for _ in range(2))

    def forward(self, ids):
        x = self.tok_emb(ids)
        for b in self.blocks:
            h = b["norm1"](x)
            q, k, v = (b[n](h).unflatten(-1, (-1, SIZE)).transpose(1, 2) for n in ("query", "key", "value"))
            x = x + b["out_proj"](nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + b["fc2"](torch.relu(b["fc1"](b["norm2"](x))))
        return self.lm_head(x)


def test_pytorchs_encoder_and_a_head_of_another_name() -> None:
    source, target = randomised(Encoder()), randomised(Own())
    before = target.lm_head.weight.clone()
    report = warm_start(target, source)
    assert torch.equal(target.blocks[1]["out_proj"].weight, source.enc.layers[1].self_attn.out_proj.weight)
    assert torch.equal(target.blocks[1]["key"].weight, source.enc.layers[1].self_attn.in_proj_weight[32:64])
    # the head is never the token embeddings, which have its shape: it is the source's head, or as it was
    head = target.lm_head.weight
    assert torch.equal(head, source.head.weight) or torch.equal(head, before)
    if report.is_exact:
        with torch.no_grad():
            assert torch.allclose(target(IDS), source(IDS), atol=1e-4)


def test_a_target_in_a_wrapper() -> None:
    source, inner = randomised(Encoder()), Encoder()
    report = warm_start(nn.DataParallel(inner), source)
    assert report.model is inner and torch.equal(inner.head.weight, source.head.weight)
