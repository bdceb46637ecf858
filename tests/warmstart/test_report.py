"""The account is complete for random pairs of configurations, and every loaded value is what it is said to be."""

import json
import re
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tiny import mybert_config, mygpt2_config
from warmstart.random_stock_models import stock_model

import mymodels
from mymodels import MyGPT2ForCausalLM, warm_start
from mymodels.warmstart import NotAllowedError, WarmStartReport

WIDTH = 8
GPT2 = {
    "vocab_size": st.sampled_from([11, 13]),
    "n_layer": st.integers(1, 4),
    "num_key_value_heads": st.sampled_from([1, 2, 4]),
    "head_dim": st.sampled_from([2, 4]),
    "intermediate_size": st.sampled_from([12, 16, 20]),
    "n_positions": st.sampled_from([6, 9]),
    "position_embedding_type": st.sampled_from(["learned", "rope", "none"]),
    "norm_type": st.sampled_from(["layernorm", "rmsnorm"]),
    "mlp_type": st.sampled_from(["dense", "gated"]),
    "qk_norm": st.booleans(),
    "attention_bias": st.booleans(),
    "mlp_bias": st.booleans(),
    "tie_word_embeddings": st.booleans(),
    "lm_head_bias": st.booleans(),
}
BERT = {
    "vocab_size": st.sampled_from([11, 13]),
    "num_hidden_layers": st.integers(1, 4),
    "num_attention_heads": st.sampled_from([2, 4]),
    "intermediate_size": st.sampled_from([12, 16, 20]),
    "max_position_embeddings": st.sampled_from([6, 9]),
    "type_vocab_size": st.sampled_from([1, 2, 3]),
    "pooling": st.sampled_from(["pooler", "mean", "attention"]),
    "layer_mix": st.sampled_from([None, 1]),
    "num_labels": st.sampled_from([2, 3]),
    "tie_word_embeddings": st.booleans(),
}
FIXED = {"n_embd": WIDTH, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
GPT2_CLASSES = ["MyGPT2Model", "MyGPT2ForCausalLM", "MyGPT2ForSequenceClassification"]
BERT_CLASSES = ["MyBertModel", "MyBertForMaskedLM", "MyBertForSequenceClassification", "MyBertForTokenClassification", "MyBertForQuestionAnswering"]  # fmt: skip


def models(classes: list[str], fields: dict, make_config):
    fixed = FIXED if classes is GPT2_CLASSES else {"hidden_size": WIDTH}
    return st.tuples(st.sampled_from(classes), st.fixed_dictionaries({}, optional=fields)).map(
        lambda drawn: getattr(mymodels, drawn[0])(make_config(**{**SMALL[make_config], **fixed, **drawn[1]}))
    )


SMALL = {
    mygpt2_config: {"vocab_size": 11, "n_layer": 2, "intermediate_size": 16, "n_positions": 6},
    mybert_config: {"vocab_size": 11, "num_hidden_layers": 2, "intermediate_size": 16, "max_position_embeddings": 6},
}  # fmt: skip
PAIRS = st.one_of(
    st.tuples(*[models(GPT2_CLASSES, GPT2, mygpt2_config)] * 2),
    st.tuples(*[models(BERT_CLASSES, BERT, mybert_config)] * 2),
)
redone: set[str] = set()
compared: set[str] = set()
exact_stock: list[dict] = []
HOW = st.fixed_dictionaries(
    {
        "layers": st.sampled_from(["every", "first", "last"]),
        "widen": st.sampled_from(["pad", "split"]),
        "positions": st.sampled_from(["tile", "interpolate"]),
    }
)


def check_account(report: WarmStartReport, target, source: dict[str, torch.Tensor]) -> None:
    """Every parameter and every tensor in exactly one row; the numbers add up."""
    targets = [name for row in report.rows for name in row.targets]
    sources = [name for row in report.rows for name in row.sources]
    assert sorted(targets) == sorted(name for name, _ in target.named_parameters(remove_duplicate=False))
    assert sorted(sources) == sorted(source)
    totals = report.totals
    assert sum(total["parameters"] for status, total in totals.items() if status != "unused") == target.num_parameters()
    assert sum(total["tensors"] for status, total in totals.items() if status != "unused") == len(targets)
    assert sum(total["percent"] for status, total in totals.items() if status != "unused") == pytest.approx(
        100, abs=0.01
    )
    for row in report.rows:
        assert row.status in ("loaded", "transformed", "resized", "new", "unused")
        assert (row.status == "new") == (not row.sources) and (row.status == "unused") == (not row.targets)
        assert row.how or row.status == "loaded"
        assert set(row.steps) == set(row.targets)


def _heads(array: np.ndarray, old: int, new: int, heads: int = 4) -> np.ndarray:
    by_head = array.reshape(old, -1, *array.shape[1:])
    if new >= old and new % old == 0:
        return np.stack([by_head[i * old // new] for i in range(new)]).reshape(-1, *array.shape[1:])
    return np.stack([by_head[i * old // new : (i + 1) * old // new].mean(axis=0) for i in range(new)]).reshape(
        -1, *array.shape[1:]
    )


def _padded(array: np.ndarray, name: str, result: np.ndarray) -> np.ndarray:
    """Added units write zeros and have no bias; what they read with is new."""
    grown = result.copy()
    if name.endswith((".down_proj.weight", ".output.dense.weight")):
        grown[:, array.shape[1] :] = 0
        grown[:, : array.shape[1]] = array
    else:
        grown[: len(array)] = array
        if array.ndim == 1:
            grown[len(array) :] = 0
    return grown


def _units(array: np.ndarray, name: str, old: int, new: int) -> np.ndarray:
    index = [i * old // new for i in range(new)]
    if name.endswith((".down_proj.weight", ".output.dense.weight")):
        return np.stack([array[:, i] / index.count(i) for i in index], axis=1)
    return array[index]


def _stretched(array: np.ndarray, new: int) -> np.ndarray:
    places = np.linspace(0, len(array) - 1, new)
    return np.stack([np.interp(places, range(len(array)), column) for column in array.T], axis=1)


# step → what it does to an array, written again in numpy: (array, the step's numbers, parameter, its final value)
STEPS = {
    r"centred": lambda a, n, name, r: a - a.mean(axis=1 if "embed" in name else 0, keepdims=True),
    r"(\d+) key/value heads (?:mean-pooled|repeated) to (\d+)": lambda a, n, name, r: _heads(a, *n),
    r"\d+ units added with zero outputs": lambda a, n, name, r: _padded(a, name, r),
    r"(\d+) units split into (\d+)": lambda a, n, name, r: _units(a, name, *n),
    r"cut from \d+ to (\d+) (?:positions|tokens)": lambda a, n, name, r: a[: n[0]],
    r"(\d+) positions tiled to (\d+)": lambda a, n, name, r: a[[i % n[0] for i in range(n[1])]],
    r"\d+ positions interpolated to (\d+)": lambda a, n, name, r: _stretched(a, n[0]),
    r"(\d+) tokens added, each the mean of all": lambda a, n, name, r: np.concatenate(
        [a, *[a.mean(axis=0)[None]] * n[0]]
    ),
    r"(\d+) token types to (\d+).*": lambda a, n, name, r: a[[i if i < n[0] else 0 for i in range(n[1])]],
    r"copied, the target's head is untied|copied into an added block|a chosen layer|becomes the gate": lambda a, *_: a,
    r"the gate projection, without up_proj|.* centres?, .* did( not)?|read as .*": lambda a, *_: a,
}


def redo(steps: tuple[str, ...], tensor: torch.Tensor, name: str, result: torch.Tensor) -> None:
    """A parameter made of one tensor is what its stated steps make of it."""
    expected, wanted = tensor.double().numpy(), result.double().numpy()
    for step in steps:
        pattern = next(pattern for pattern in STEPS if re.fullmatch(pattern, step))
        numbers = [int(group) for group in re.fullmatch(pattern, step).groups() if group and group.isdigit()]
        expected = STEPS[pattern](expected, numbers, name, wanted)
    if any("centred" in step or "mean" in step or "split" in step or "interpolated" in step for step in steps):
        assert np.abs(wanted - expected).max() <= 1e-6, (name, steps)
    else:
        assert np.array_equal(wanted, expected), (name, steps)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(pair=PAIRS, how=HOW, given_model=st.booleans())
def test_random_pairs(pair, how: dict, given_model: bool) -> None:
    source, target = pair
    for model in pair:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    tensors = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    if source.config.tie_word_embeddings:  # as a file has it
        for alias in ("lm_head.weight", "cls.predictions.decoder.weight"):
            tensors.pop(alias, None)
    kept = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    chosen = target if given_model else target.config
    head = None if given_model else type(target).__name__.removeprefix("MyGPT2").removeprefix("MyBert")
    report = warm_start(chosen, tensors, config=source.config, **({} if given_model else {"head": head}), **how)
    check_account(report, report.model, tensors)
    assert type(report.model) is type(target)
    state = report.model.state_dict()
    for row in report.rows:
        for name in row.targets:
            assert torch.isfinite(state[name]).all()
            if row.status == "loaded":
                assert len(row.sources) == 1
                assert torch.equal(state[name], tensors[row.sources[0]]), row
            elif row.steps[name] == ("copied into an added block",) or row.steps[name] == ("a chosen layer",):
                assert any(torch.equal(state[name], tensors[s]) for s in row.sources), row
            elif row.status == "new" and given_model and row.kind == "new":
                assert torch.equal(state[name], kept[name]), row
            elif (
                row.status == "new"
                and len(row.steps[name]) == 1
                and row.how.split(":")[0].split(",")[0] in ("zeros", "ones")
            ):
                assert (state[name] == float(row.how.startswith("ones"))).all(), row
            elif len(row.sources) == 1 and name in row.targets[:1] and row.status in ("transformed", "resized"):
                redo(row.steps[name], tensors[row.sources[0]], name, state[name])
                redone.add(row.status)
    assert json.loads(report.to_json())["rows"]
    if report.is_exact:
        compared.add(type(target).__name__)
        same_outputs(report.model.eval(), source.eval())


@torch.no_grad()
def same_outputs(mine, source) -> None:
    """What is called exact computes the same on what both take: their tokens, positions and classes."""
    inputs = {"input_ids": torch.randint(2, 11, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    ours, theirs = mine(**inputs), source(**inputs)
    if type(mine) is not type(source):  # another head: the body is the same
        ours, theirs = mine.base_model(**inputs), source.base_model(**inputs)
    for name in ours.keys() & theirs.keys() - {"past_key_values"}:
        a, b = ours[name], theirs[name]
        assert (a[..., : b.shape[-1]] - b[..., : a.shape[-1]]).abs().max() <= 1e-4 * max(1.0, b.abs().max()), name


def test_the_random_pairs_met_every_kind_of_row() -> None:
    assert redone == {"transformed", "resized"} and len(compared) >= 6


STOCK = st.fixed_dictionaries(
    {
        "n_layer": st.integers(1, 3),
        "n_inner": st.sampled_from([None, 12, 40]),
        "n_positions": st.sampled_from([6, 9]),
        "activation_function": st.sampled_from(["gelu_new", "relu"]),
        "scale_attn_by_inverse_layer_idx": st.booleans(),
        "tie_word_embeddings": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(stock=STOCK, changes=st.fixed_dictionaries({}, optional=GPT2), how=HOW)
def test_random_changes_of_stock_gpt2(stock: dict, changes: dict, how: dict) -> None:
    source = stock_model("GPT2LMHeadModel", n_embd=WIDTH, vocab_size=11, **stock)
    tensors = source.state_dict()
    report = warm_start("mygpt2", source, overrides=changes, **how)
    check_account(report, report.model, tensors)
    if report.is_exact:
        exact_stock.append(changes)
        same_outputs(report.model, source)


def test_many_changes_of_stock_gpt2_were_exact() -> None:
    assert len(exact_stock) >= 5


def test_split_and_transposed_are_bitwise() -> None:
    stock = stock_model("GPT2LMHeadModel")
    report = warm_start("mygpt2", stock)
    source, state = stock.state_dict(), report.model.state_dict()
    checked = 0
    for row in report.rows:
        if row.how == "transposed; split in 3":
            parts = source[row.sources[0]].numpy().T.reshape(3, 32, 32)
            for name, part in zip(row.targets, parts):
                assert (state[name].numpy() == part).all(), name
                checked += 1
        elif row.how == "transposed":
            assert (state[row.targets[0]].numpy() == source[row.sources[0]].numpy().T).all()
            checked += 1
    assert checked == 3 * (3 + 3)


def test_strict_and_allow() -> None:
    stock = stock_model("BertModel")
    how = {"head": "ForSequenceClassification", "overrides": {"pooling": "mean"}}
    with pytest.raises(
        NotAllowedError, match=r"strict: 2 parameters are newly initialised and 2 tensors are not used, such as"
    ) as caught:
        warm_start("mybert", stock, strict=True, **how)
    assert caught.value.report.model is None and {row.status for row in caught.value.report.rows} >= {"new", "unused"}
    with pytest.raises(NotAllowedError, match="strict: 0 parameters are newly initialised and 2 tensors"):
        warm_start("mybert", stock, strict=True, allow=["^classifier"], **how)
    assert warm_start("mybert", stock, strict=True, allow=["^classifier", "pooler"], **how).model is not None


def test_json_table_and_totals(tmp_path: Path) -> None:
    stock = stock_model("GPT2LMHeadModel")
    report = warm_start("mygpt2", stock, overrides={"num_key_value_heads": 2, "norm_type": "rmsnorm"})
    data = json.loads(report.save_json(tmp_path / "report.json").read_text())
    assert set(data) == {"source", "target", "exact", "totals", "rows", "notes", "coverage", "check"}
    assert {"status", "kind", "targets", "sources", "how", "parameters", "steps", "constant", "frozen"} == set(
        data["rows"][0]
    )
    assert data["exact"] is False and set(data["totals"]) == {"loaded", "transformed", "resized", "new", "unused"}
    text = str(report)
    assert "transformer.h.{0–2}.attn.c_attn." in text and "self_attn.{q,k,v}_proj" in text
    assert "4 key/value heads mean-pooled to 2" in " ".join(text.split())
    assert len(text.splitlines()) < 50  # layers share rows
    assert "the step to RMSNorm is exact with tie_word_embeddings=False and lm_head_bias=True" in text


def test_as_text_it_is_not_shown_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook rich takes every console for the notebook's."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *args: pytest.fail("it was displayed"))
    assert "GPT2LMHeadModel" in str(warm_start("mygpt2", stock_model("GPT2LMHeadModel")))


def test_a_saved_warm_start_loads_anywhere(tmp_path: Path) -> None:
    stock = stock_model("GPT2LMHeadModel")
    report = warm_start("mygpt2", stock, overrides={"norm_type": "rmsnorm", "num_hidden_layers": 4})
    report.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert json.loads((tmp_path / "out" / "warm_start.json").read_text()) == json.loads(report.to_json())
    loaded, loading = MyGPT2ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    for name, tensor in report.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (tmp_path / "out" / "modeling_mygpt2.py").is_file()
    assert mymodels.checkpoints.check_checkpoint(tmp_path / "out", full=True) == []
