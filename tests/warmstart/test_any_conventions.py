"""What code does with its weights and no tensor shows: rotary pairs, norms of 1 + weight, scales, other settings."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from warmstart.random_stock_models import randomised
from warmstart.stock_families import GROUPED, SIZES, family

from mymodels import warm_start
from mymodels.warmstart.any_model.conventions import permutation, rotary_pairs

_GPTJ = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64, "rotary_dim": 4,
         "initializer_range": 0.2}  # fmt: skip
_IDS = torch.arange(3, 63).view(3, 20)


def stock(kind: str, **fields) -> nn.Module:
    config = transformers.AutoConfig.for_model(kind, **{"initializer_range": 0.2, **fields})
    return randomised(transformers.AutoModelForCausalLM.from_config(config))


def gap(a: nn.Module, b: nn.Module) -> float:
    with torch.no_grad():
        x, y = (out if isinstance(out := m(_IDS), torch.Tensor) else out[0] for m in (a, b))
    return ((x - y).abs().max() / y.abs().max()).item()


def turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary positions as in the paper: 2i with 2i + 1."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(3)


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq, self.wo = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.wk, self.wv = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x, angles):
        q, k, v = (w(x).view(*x.shape[:2], -1, 8) for w in (self.wq, self.wk, self.wv))
        q, k, v = turn(q, angles), turn(k, angles).repeat_interleave(2, 2), v.repeat_interleave(2, 2)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*s, bias=False) for s in ((32, 64), (64, 32), (32, 64)))

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        self.attention_norm, self.ffn_norm = RMSNorm(32), RMSNorm(32)

    def forward(self, x, angles):
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.feed_forward(self.ffn_norm(x))


class MetaLlama(nn.Module):
    """Llama with the names and the rotary pairs of its first publication."""

    def __init__(self):
        super().__init__()
        self.tok_embeddings, self.norm, self.output = nn.Embedding(97, 32), RMSNorm(32), nn.Linear(32, 97, bias=False)
        self.layers = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, ids):
        angles = torch.outer(torch.arange(ids.shape[1]), 10000.0 ** -(torch.arange(0, 8, 2) / 8))
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x, angles)
        return self.output(self.norm(x))


def test_gptj_pairs_neighbours_and_phi_halves() -> None:
    old = stock("gptj", **_GPTJ)
    new = family("phi", partial_rotary_factor=0.5, layer_norm_eps=1e-5)
    report = warm_start(new, old)
    assert gap(new, old) < 1e-5 and report.is_exact and report.checked.agrees
    row = next(row for row in report.rows if row.targets == ("model.layers.1.self_attn.q_proj.weight",))
    assert row.steps[row.targets[0]] == ("rotary pairs from interleaved to halves",)


def test_the_way_back_and_what_a_turned_share_leaves() -> None:
    assert permutation(6, 4, to="interleaved") == [0, 2, 1, 3, 4, 5]
    for dim, rotated in ((8, 8), (8, 4), (10, 6)):
        there, back = (torch.tensor(permutation(dim, rotated, to=to)) for to in ("interleaved", "halves"))
        assert torch.arange(dim)[there][back].equal(torch.arange(dim))


@pytest.mark.parametrize("given", ["model", "tensors"])
def test_llama_as_meta_publishes_it(given: str) -> None:
    old, new = randomised(MetaLlama()), family("llama", num_key_value_heads=2)
    report = warm_start(new, old if given == "model" else old.state_dict())
    assert gap(new, old) < 1e-5
    assert report.is_exact == (given == "model")  # bare tensors say nothing of heads and epsilon
    back = randomised(MetaLlama())
    assert warm_start(back, new).is_exact and gap(back, new) < 1e-5


def test_rotary_pairs_are_read_from_code() -> None:
    kinds = {"llama": "halves", "gpt_neox": "halves", "mistral": "halves", "gpt2": None, "opt": None, "bloom": None}
    assert {kind: rotary_pairs(family(kind)) for kind in kinds} == kinds
    for kind in ("cohere", "glm", "helium", "ernie4_5"):
        assert rotary_pairs(stock(kind, **{**GROUPED, "head_dim": 8})) == "interleaved", kind


def test_norms_that_add_one_and_embeddings_that_are_scaled() -> None:
    old = stock("gemma", **{**GROUPED, "head_dim": 8, "hidden_act": "silu", "hidden_activation": "silu",
                            "tie_word_embeddings": False})  # fmt: skip
    new = family("llama", num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
    report = warm_start(new, old)
    weight = old.model.layers[1].input_layernorm.weight
    assert torch.allclose(new.model.layers[1].input_layernorm.weight, weight + 1)
    assert torch.allclose(new.model.embed_tokens.weight, old.model.embed_tokens.weight * 32**0.5)
    assert report.is_exact and gap(new, old) < 1e-5


@pytest.mark.parametrize("old_tied", [True, False])
@pytest.mark.parametrize("new_tied", [True, False])
def test_the_factor_of_the_embeddings_with_tied_and_untied_heads(old_tied: bool, new_tied: bool) -> None:
    act = {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6}
    gemma = stock("gemma", **{**GROUPED, **act, "tie_word_embeddings": old_tied})
    llama = family("llama", **act, tie_word_embeddings=new_tied)
    report = warm_start(llama, gemma)
    expressible = old_tied or not new_tied
    assert report.is_exact == expressible and (gap(llama, gemma) < 1e-5) == expressible
    gemma = stock("gemma", **{**GROUPED, **act, "tie_word_embeddings": old_tied})
    llama = family("llama", **act, tie_word_embeddings=new_tied)
    report = warm_start(gemma, llama)
    expressible = new_tied or not old_tied
    assert report.is_exact == expressible and (gap(gemma, llama) < 1e-5) == expressible


def bart_of(auto: str = "AutoModelForSeq2SeqLM", **changes) -> nn.Module:
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder")
             for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
    config = {"vocab_size": 97, "d_model": 32, "max_position_embeddings": 64, "pad_token_id": 1, **sizes, **changes}
    return randomised(getattr(transformers, auto).from_config(transformers.AutoConfig.for_model("bart", **config)))


def test_tables_of_positions_that_begin_with_other_rows() -> None:
    for new in (
        family("gpt2", n_positions=66),
        family("gpt2", n_positions=64),
    ):  # as many rows as BART's table, and fewer
        old = bart_of("AutoModelForCausalLM")
        warm_start(new, old)
        theirs = old.model.decoder.embed_positions.weight[2:]
        assert torch.equal(new.transformer.wpe.weight[:64], theirs)
    old, new = bart_of(), bart_of(max_position_embeddings=80)  # one table each for encoder and decoder
    assert warm_start(new, old).is_exact
    for side in ("encoder", "decoder"):
        ours, theirs = (model.get_submodule(f"model.{side}.embed_positions").weight for model in (new, old))
        assert torch.equal(ours[2:66], theirs[2:])


@pytest.mark.parametrize("kind", ["opt", "roberta"])
def test_positions_of_bare_tensors(kind: str) -> None:
    old, new = family(kind), family(kind)
    report = warm_start(new, old.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), old.state_dict().values()))
    table = {"opt": "gpt2", "roberta": "bert"}[kind]
    other = family(table, **{"n_positions" if table == "gpt2" else "max_position_embeddings": 66})
    report = warm_start(other, old.state_dict())
    row = next(row for row in report.rows if any("wpe" in n or "position_embeddings" in n for n in row.targets))
    assert row.kind == "approximate" and any("nothing tells at which row" in note for note in report.notes)


def test_positions_of_ones_own_are_found_by_running() -> None:
    class Late(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids + 3)

    class Reader(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.tok_emb, self.pos_emb, self.lm_head = nn.Embedding(97, 8), table, nn.Linear(8, 97)

        def forward(self, ids):
            return self.lm_head(self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1])))

    old, new = randomised(Reader(Late(19, 8))), randomised(Reader(nn.Embedding(16, 8)))
    report = warm_start(new, old)
    assert torch.equal(new.pos_emb.weight, old.pos_emb.weight[3:]) and report.checked.agrees


def test_albert_into_bert() -> None:
    fields = {**SIZES, "embedding_size": 32, "inner_group_num": 1, "hidden_act": "gelu"}
    albert = randomised(transformers.AlbertForMaskedLM(transformers.AlbertConfig(**fields)))
    bert = family("bert")
    warm_start(bert, albert)
    theirs = albert.albert.encoder.albert_layer_groups[0].albert_layers[0]
    for layer in bert.bert.encoder.layer:
        assert torch.equal(layer.attention.self.value.weight, theirs.attention.value.weight)
        assert torch.equal(layer.attention.output.LayerNorm.weight, theirs.attention.LayerNorm.weight)
        assert torch.equal(layer.intermediate.dense.weight, theirs.ffn.weight)
        assert torch.equal(layer.output.dense.bias, theirs.ffn_output.bias)
        assert torch.equal(layer.output.LayerNorm.bias, theirs.full_layer_layer_norm.bias)
    assert torch.equal(bert.cls.predictions.transform.dense.weight, albert.predictions.dense.weight)


def test_another_scale_of_attention_goes_into_the_queries() -> None:
    layers = {"attention_types": [[["global"], 2]], "num_layers": 2, "num_heads": 4}
    old = stock("gpt_neo", **{**SIZES, **layers})
    new = family("gpt2")
    warm_start(new, old)
    assert gap(new, old) < 1e-5


class Net(nn.Module):
    def __init__(self, groups: int, act=F.gelu):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(8, 8, 3), nn.GroupNorm(groups, 8), act

    def forward(self, x, scale):  # no inputs can be made up for it
        return self.act(self.norm(self.conv(x))) * scale


@pytest.mark.parametrize(
    "old,new,words",
    [
        (lambda: Net(2), lambda: Net(4), "norm.num_groups: 2 in the source, 4 in the target"),
        (lambda: Net(2), lambda: Net(2, F.relu), "act: gelu in the source, relu in the target"),
        (lambda: Net(2), lambda: Net(2), None),
        (lambda: family("mixtral", num_experts_per_tok=1), lambda: family("mixtral"), "num_experts_per_tok: 1"),
        (
            lambda: family("llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
            lambda: family("llama"),
            "rope_parameters.factor: 4.0",
        ),
        (lambda: family("llama", attention_dropout=0.1), lambda: family("llama"), None),
    ],
)
def test_one_class_with_other_settings_is_not_exact_without_a_run(old, new, words, monkeypatch) -> None:
    monkeypatch.setattr("mymodels.warmstart.any_model.running.SMALL", 0)
    report = warm_start(new(), old())
    assert not report.checked.ran
    assert report.is_exact == (words is None)
    assert words is None or any(words in note for note in report.notes), report.notes


def test_mygpt2_by_name_takes_the_settings_of_another_family(tmp_path) -> None:
    old = family("qwen2")
    old.save_pretrained(tmp_path)
    report = warm_start("mygpt2", tmp_path)
    config = report.model.config
    assert report.is_exact and gap(report.model, old) < 1e-5
    assert (config.model_type, config.norm_type, config.mlp_type) == ("mygpt2", "rmsnorm", "gated")
    changed = warm_start("mygpt2", tmp_path, overrides={"num_key_value_heads": 1}).model.config
    assert (changed.num_key_value_heads, changed.hidden_size) == (1, 32)


def bart(**fields) -> nn.Module:
    sizes = {"vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}  # fmt: skip
    config = transformers.BartConfig(**{**sizes, "init_std": 0.2, **fields})
    return randomised(transformers.BartForConditionalGeneration(config))


def t5(**fields) -> nn.Module:
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**{**sizes, "decoder_start_token_id": 0, **fields})
    return randomised(transformers.T5ForConditionalGeneration(config))


@pytest.mark.parametrize(
    "old,new,same",
    [
        (bart, lambda: bart(encoder_ffn_dim=96), True),
        (bart, lambda: bart(decoder_layers=3), False),  # its norms come after the sum
        (bart, lambda: bart(decoder_attention_heads=2), False),
        (t5, lambda: t5(num_layers=3, num_decoder_layers=4, d_ff=80, vocab_size=101), True),
    ],
)
def test_each_stack_of_an_encoder_decoder_has_its_sizes(old, new, same: bool) -> None:
    old, new = old(), new()
    report = warm_start(new, old)
    with torch.no_grad():
        ours, theirs = (m(input_ids=_IDS, decoder_input_ids=_IDS.flip(1)).logits[..., :97] for m in (new, old))
    near = (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert report.checked.agrees == bool(near) == same, report.checked
    assert same or not report.is_exact
    assert not [
        row for row in report.rows if row.status == "new" and any("_proj" in n or "fc1" in n for n in row.targets)
    ]
