"""Each way to bridge a difference: exact ones keep the stock model's logits, approximate ones do what they say."""

import pytest
import torch
from tiny import BERT, GPT2, batch, largest_difference, mybert_config, mygpt2_config
from transformers import GPT2LMHeadModel
from warmstart.random_stock_models import difference, stock_model

from mymodels import MyBertForMaskedLM, MyGPT2ForCausalLM, MyGPT2ForSequenceClassification, MyGPT2Model, warm_start
from mymodels.checkpoints import CheckpointError
from mymodels.warmstart.projections import regroup
from mymodels.warmstart.transforms import choose_layers, gather_rows

UNTIED = {"tie_word_embeddings": False}
EXACT = {  # name: overrides, options
    "stock": ({}, {}),
    "untied": (UNTIED, {}),
    "rmsnorm": ({**UNTIED, "norm_type": "rmsnorm", "lm_head_bias": True}, {}),
    "deeper": ({"num_hidden_layers": 5}, {}),
    "deeper-first": ({"num_hidden_layers": 5}, {"layers": "first"}),
    "deeper-last": ({"num_hidden_layers": 5}, {"layers": "last"}),
    "deeper-list": ({"num_hidden_layers": 5}, {"layers": [0, 0, 1, 2, 2]}),
    "wider-pad": ({"intermediate_size": 200}, {"widen": "pad"}),
    "wider-split": ({"intermediate_size": 200}, {"widen": "split"}),
    "wider-double": ({"intermediate_size": 256}, {"widen": "split"}),
    "gated": ({"mlp_type": "gated"}, {}),
    "longer": ({"max_position_embeddings": 200}, {}),
    "shorter": ({"max_position_embeddings": 20}, {}),
    "more-tokens": ({"vocab_size": 120}, {}),
    "untied-more-tokens": ({**UNTIED, "vocab_size": 120, "lm_head_bias": True}, {}),
    "all": (
        {
            **UNTIED,
            "norm_type": "rmsnorm",
            "lm_head_bias": True,
            "num_hidden_layers": 7,
            "intermediate_size": 200,
            "mlp_type": "gated",
            "max_position_embeddings": 100,
            "vocab_size": 100,
        },
        {},
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_exact_for_gpt2(case: str) -> None:
    overrides, options = EXACT[case]
    stock = stock_model("GPT2LMHeadModel")
    report = warm_start("mygpt2", stock, overrides=overrides, **options)
    assert isinstance(report.model, MyGPT2ForCausalLM) and not report.model.training
    assert report.is_exact, report
    for padding in ("none", "left"):
        assert difference(report.model, stock, padding) <= 1e-4
    for name, value in overrides.items():
        assert getattr(report.model.config, name) == value


@pytest.mark.parametrize("case", EXACT)
def test_exact_steps_train(case: str) -> None:
    """What starts as zeros must not stay there."""
    overrides, options = EXACT[case]
    model = warm_start("mygpt2", stock_model("GPT2LMHeadModel"), overrides=overrides, **options).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        inputs = batch(length=20)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):  # attention does not depend on it
            assert not torch.equal(parameter, before[name]), name


def test_back_from_mygpt2() -> None:
    """From one MyGPT2 to another: untied to tied, gated to dense, more key/value heads."""
    source = MyGPT2ForCausalLM(mygpt2_config(num_key_value_heads=2)).eval()
    repeated = warm_start("mygpt2", source, overrides={"num_key_value_heads": 4})
    assert repeated.is_exact and difference(repeated.model, source) <= 1e-5
    untied = MyGPT2ForCausalLM(mygpt2_config(tie_word_embeddings=False))
    tied = warm_start("mygpt2", untied, overrides={"tie_word_embeddings": True})
    assert not tied.is_exact
    assert [row.how for row in tied.rows if row.sources == ("lm_head.weight",)] == [
        "the target ties its head to the token embeddings"
    ]
    rms = MyGPT2ForCausalLM(mygpt2_config(norm_type="rmsnorm"))
    assert not warm_start("mygpt2", rms, overrides={"norm_type": "layernorm"}).is_exact


@pytest.mark.parametrize("model_class", [MyGPT2Model, MyGPT2ForSequenceClassification])
def test_rmsnorm_says_when_it_is_not_exact(model_class: type) -> None:
    report = warm_start(model_class(mygpt2_config(norm_type="rmsnorm")), stock_model("GPT2LMHeadModel"))
    assert not report.is_exact
    lost = [row for row in report.rows if "transformer.ln_f.bias" in row.sources]
    assert lost[0].status == "unused" and lost[0].how.startswith("RMSNorm has no bias")


def test_grouped_query_heads_are_means() -> None:
    stock = stock_model("GPT2LMHeadModel")
    for heads in (1, 2):
        report = warm_start("mygpt2", stock, overrides={"num_key_value_heads": heads})
        assert not report.is_exact
        _, key, _ = stock.transformer.h[1].attn.c_attn.weight.t().chunk(3)
        by_head = key.reshape(heads, 4 // heads, 8, 32)  # 4 heads of 8
        mine = report.model.model.layers[1].self_attn.k_proj.weight.view(heads, 8, 32)
        assert largest_difference(mine, by_head.mean(dim=1)) <= 1e-6


def test_equal_heads_may_be_pooled() -> None:
    """Where the heads of a group are the same, the mean is exact: an independent proof of the grouping."""
    stock = stock_model("GPT2LMHeadModel")
    with torch.no_grad():
        for block in stock.transformer.h:
            weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
            for part in (1, 2):
                view = weight[:, part * 32 : (part + 1) * 32].view(32, 2, 2, 8)
                view[:, :, 1] = view[:, :, 0]
                view = bias[part * 32 : (part + 1) * 32].view(2, 2, 8)
                view[:, 1] = view[:, 0]
    report = warm_start("mygpt2", stock, overrides={"num_key_value_heads": 2})
    assert difference(report.model, stock) <= 1e-5


def test_regroup_through_the_query_heads() -> None:
    heads = torch.arange(4.0).repeat_interleave(2)[:, None]  # 4 key/value heads of 2
    through = regroup(heads, 4, 6, 12)
    assert through.view(6, 2)[:, 0].tolist() == [0.0, 0.5, 1.0, 2.0, 2.5, 3.0]


def test_fewer_layers() -> None:
    stock = stock_model("GPT2LMHeadModel", n_layer=4)
    for layers, chosen in (("every", [0, 2]), ("first", [0, 1]), ("last", [2, 3]), ([3, 1], [3, 1])):
        report = warm_start("mygpt2", stock, overrides={"num_hidden_layers": 2}, layers=layers)
        kept = GPT2LMHeadModel(stock.config.__class__(**{**GPT2, "n_layer": 2})).eval()
        kept.transformer.h = torch.nn.ModuleList(stock.transformer.h[i] for i in chosen)
        kept.transformer.wte, kept.transformer.wpe, kept.transformer.ln_f = stock.transformer.wte, stock.transformer.wpe, stock.transformer.ln_f  # fmt: skip
        kept.lm_head = stock.lm_head
        for i, block in enumerate(kept.transformer.h):
            block.attn.layer_idx = i
        assert difference(report.model, kept) <= 1e-5
        assert not report.is_exact
        unused = {
            row.sources[0].split(".")[2] for row in report.rows if row.status == "unused" and ".h." in row.sources[0]
        }
        assert unused == {str(i) for i in range(4)} - {str(i) for i in chosen}


def test_choice_of_layers() -> None:
    assert choose_layers("every", 12, 6) == [0, 2, 4, 6, 8, 10]
    assert choose_layers("every", 3, 5) == [0, 0, 1, 1, 2]
    assert choose_layers("first", 3, 5) == [0, 1, 2, 2, 2]
    assert choose_layers("last", 3, 5) == [0, 0, 0, 1, 2]
    for wrong in ("best", [0], [0, 5]):
        with pytest.raises(CheckpointError, match=r"layers="):
            choose_layers(wrong, 3, 2)


def test_narrower_keeps_the_largest_units() -> None:
    stock = stock_model("GPT2LMHeadModel")
    with torch.no_grad():  # all but 40 units write next to nothing
        for block in stock.transformer.h:
            block.mlp.c_proj.weight[torch.randperm(128)[:88]] *= 1e-8
    report = warm_start("mygpt2", stock, overrides={"intermediate_size": 40})
    assert difference(report.model, stock) <= 1e-4
    assert not report.is_exact


def test_positions() -> None:
    stock = stock_model("GPT2LMHeadModel")
    table = stock.transformer.wpe.weight
    long = warm_start("mygpt2", stock, overrides={"max_position_embeddings": 127}, positions="interpolate")
    stretched = long.model.model.embed_positions.weight
    assert largest_difference(stretched[::2], table) <= 1e-6  # 127 = 2 * 64 - 1: every second is an old one
    assert largest_difference(stretched[1], (table[0] + table[1]) / 2) <= 1e-6
    tiled = warm_start("mygpt2", stock, overrides={"max_position_embeddings": 130}).model.model.embed_positions.weight
    assert torch.equal(tiled[64:128], table) and torch.equal(tiled[128:], table[:2])
    rope = warm_start("mygpt2", stock, overrides={"position_embedding_type": "rope"})
    assert [row.how for row in rope.rows if row.sources == ("transformer.wpe.weight",)] == [
        "position_embedding_type='rope' has no table"
    ]
    assert any("position_embedding_type was 'learned' and is 'rope'" in note for note in rope.notes)
    with pytest.raises(CheckpointError, match="positions='stretch' is none of"):
        warm_start("mygpt2", stock, overrides={"max_position_embeddings": 127}, positions="stretch")


def test_no_positions_to_learned_is_exact() -> None:
    source = MyGPT2ForCausalLM(mygpt2_config(position_embedding_type="none")).eval()
    report = warm_start("mygpt2", source, overrides={"position_embedding_type": "learned"})
    assert difference(report.model, source) <= 1e-5


@pytest.mark.parametrize(("old", "new"), [(97, 110), (97, 60)])
def test_vocabulary_by_size(old: int, new: int) -> None:
    stock = stock_model("GPT2LMHeadModel")
    table = warm_start("mygpt2", stock, overrides={"vocab_size": new}).model.lm_head.weight
    shared = min(old, new)
    assert torch.equal(table[:shared], stock.lm_head.weight[:shared])
    assert all(largest_difference(row, stock.lm_head.weight.mean(dim=0)) <= 1e-6 for row in table[shared:])


def test_gather_rows() -> None:
    table = torch.randn(5, 3)
    rows = gather_rows(table, [[4], [0, 1], [], [2]])
    assert torch.equal(rows[0], table[4]) and torch.equal(rows[3], table[2])
    assert largest_difference(rows[1], table[:2].mean(dim=0)) <= 1e-6
    assert largest_difference(rows[2], table.mean(dim=0)) <= 1e-6


def test_other_heads_of_the_same_width_are_not_called_exact() -> None:
    for source, kind in ((stock_model("GPT2LMHeadModel"), "mygpt2"), (stock_model("BertForMaskedLM"), "mybert")):
        report = warm_start(kind, source, overrides={"num_attention_heads": 2})
        assert not report.is_exact
        assert any("read as 2 heads of 16, was 4 of 8" in row.how for row in report.rows)


BERT_EXACT = {
    "stock": {},
    "wider": {"intermediate_size": 100},
    "longer": {"max_position_embeddings": 100},
    "shorter": {"max_position_embeddings": 20},
    "more-tokens": {"vocab_size": 120},
    "more-types": {"type_vocab_size": 5},
    "untied": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("case", BERT_EXACT)
@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertModel"])
def test_exact_for_bert(case: str, head: str) -> None:
    stock = stock_model(head)
    report = warm_start("mybert", stock, overrides=BERT_EXACT[case])
    assert type(report.model).__name__ == "My" + head
    assert report.is_exact, report
    assert difference(report.model, stock) <= 1e-4


def test_deeper_bert_is_stacked() -> None:
    stock = stock_model("BertModel")
    report = warm_start("mybert", stock, overrides={"num_hidden_layers": 6})
    assert not report.is_exact
    for i, layer in enumerate(report.model.encoder.layer):
        assert torch.equal(layer.output.dense.weight, stock.encoder.layer[i // 2].output.dense.weight)


def test_encoder_with_another_head() -> None:
    stock = stock_model("BertForSequenceClassification", num_labels=2)
    report = warm_start(
        "mybert", stock, head="ForSequenceClassification", overrides={"num_labels": 5, "pooling": "mean"}
    )
    rows = {row.targets: row for row in report.rows}
    assert rows[("classifier.weight",)].status == "new" and "shape 2×32 is not 5×32" in rows[("classifier.weight",)].how
    unused = {name for row in report.rows if row.status == "unused" for name in row.sources}
    assert unused == {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    stock.bert.pooler = None
    assert difference(report.model.bert, stock.bert) <= 1e-5
    stock = stock_model("BertForSequenceClassification", num_labels=2)
    same = warm_start("mybert", stock)
    assert same.is_exact and difference(same.model, stock) <= 1e-5


def test_first_layers_of_a_big_model() -> None:
    stock = stock_model("BertModel", num_hidden_layers=6)
    small = MyBertForMaskedLM(mybert_config(num_hidden_layers=2)).eval()
    warm_start(small, stock, layers="first")
    stock.encoder.layer = stock.encoder.layer[:2]
    assert difference(small.bert, stock) <= 1e-5
    assert BERT["num_hidden_layers"] == 3
