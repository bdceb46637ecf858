"""torch.export and AOTInductor: any batch and length, and torch alone reloads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import COMBINED, ROOT, mybert, mygpt2, run_lines
from tiny import SWITCHES, batch
from torch.overrides import _get_current_function_mode_stack
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from mymodels import export_model
from mymodels.export import graphs, products, programs

pytestmark = pytest.mark.export
TEXTS = ["The cat sat on the mat.", "It was late."]


def test_no_fast_path_is_in_a_graph() -> None:
    """They are for this machine and look at values: packing, products by oneDNN."""
    for model, task in (
        (mygpt2(**SWITCHES["everything"], vocab_size=97 * 64, n_embd=64), "text-generation"),
        (mybert("SequenceClassification"), "text-classification"),
    ):
        program = programs.export_program(graphs.Graph(model, task))
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert any("linear" in name or "addmm" in name for name in called)
        assert not [name for name in called if "mkldnn" in name or "index_copy" in name or "nonzero" in name]
        assert not [name for name in called if "scalar_dense" in name or "aten.item" in name]


@pytest.mark.parametrize("pay", [True, False])
def test_products_of_a_decoder_are_those_that_are_fastest_for_one_token(
    pay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches, if this processor is faster with them, and only of large weights; the numbers are the model's."""
    monkeypatch.setattr(products, "batches_pay", lambda *args: pay)
    torch.manual_seed(0)
    model = mygpt2(n_embd=64, intermediate_size=1 << 13, n_layer=2)

    def batches(cache: bool) -> tuple[Any, int]:
        program = programs.export_program(graphs.Graph(model, "text-generation", cache=cache))
        return program, sum("bmm" in str(node.target) for node in program.graph.nodes)

    assert batches(False)[1] == 0
    program, count = batches(True)
    assert count == (2 if pay else 0)  # down_proj has too few rows for parts
    ids, module = torch.randint(0, 97, (2, 7)), program.module()
    past = [torch.zeros(2, model.config.num_key_value_heads, 0, model.config.head_dim)] * 4
    with torch.no_grad():
        expected = model(ids).logits
        for start, end in ((0, 6), (6, 7)):
            positions = torch.arange(start, end).expand(2, -1).contiguous()
            results = module(
                input_ids=ids[:, start:end].contiguous(),
                attention_mask=torch.ones(2, end, dtype=torch.long),
                position_ids=positions,
                past_key_values=past,
            )
            past = [value for name, value in results.items() if name.startswith("present.")]
            # another order of summing 8,192 numbers
            assert (results["logits"] - expected[:, start:end]).abs().max() < 5e-5


def test_weights_of_another_kind_keep_their_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As quantised ones, which are subclasses of tensors."""
    monkeypatch.setattr(products, "batches_pay", lambda *args: True)
    graph = graphs.Graph(mygpt2(n_embd=64, intermediate_size=1 << 13), "text-generation", cache=True)
    with products.fast_for_one_token(graph):
        assert _get_current_function_mode_stack()
    layer = graph.model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(type("Packed", (torch.Tensor,), {})))
    with products.fast_for_one_token(graph):
        assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("name, kind", [("everything", "pt2"), ("learned-window", "pt2"), ("everything", "aoti")])
def test_a_decoder_keeps_keys_and_values(name: str, kind: str, tmp_path: Path) -> None:
    """Any batch, any number of new tokens, after any number of others: none, one, many; padded on the left."""
    model = mygpt2(**COMBINED[name])
    model.save_pretrained(tmp_path / "model")
    exported = export_model(tmp_path / "model", kind, tmp_path / "out")
    assert exported.inputs[-1] == "past_key_values" and exported.differences["present"] < 1e-5
    if kind == "pt2":
        program = torch.export.load(exported.file).module()
    else:
        program = torch._inductor.aoti_load_package(str(exported.file))
    layers, heads, width = model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.head_dim
    for rows, pieces in ((1, (1, 1, 1)), (3, (5, 1, 7)), (2, (1, 9))):
        length = sum(pieces)
        ids, mask = torch.randint(2, 97, (rows, length)), torch.ones(rows, length, dtype=torch.long)
        mask[0, : length // 3] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, position_ids=positions).logits
            past = [torch.zeros(rows, heads, 0, width) for _ in range(2 * layers)]
            end, found = 0, []
            for piece in pieces:
                start, end = end, end + piece
                new = {"input_ids": ids[:, start:end], "position_ids": positions[:, start:end]}
                new = {part: tensor.contiguous() for part, tensor in new.items()}
                results = program(**new, attention_mask=mask[:, :end].contiguous(), past_key_values=past)
                past = [value for part, value in results.items() if part.startswith("present.")]
                found.append(results["logits"])
        kept = mask.bool()
        assert (torch.cat(found, 1)[kept] - expected[kept]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["stock", "everything"])
def test_a_program_takes_any_batch_and_length(name: str, tmp_path: Path) -> None:
    model = mygpt2(**SWITCHES[name])
    model.save_pretrained(tmp_path / "model")
    exported = export_model(tmp_path / "model", "pt2", tmp_path / "out")
    assert exported.differences["logits"] < 1e-5
    assert str(ROOT).encode() not in exported.file.read_bytes()
    program = torch.export.load(exported.file).module()

    def empty(rows: int) -> list[torch.Tensor]:
        shape = (rows, model.config.num_key_value_heads, 0, model.config.head_dim)
        return [torch.zeros(shape)] * 2 * model.config.num_hidden_layers

    for rows, length in ((1, 1), (7, 2), (2, 50)):
        inputs = batch("none", rows, length)
        inputs["position_ids"] = torch.arange(length).repeat(rows, 1)
        with torch.no_grad():
            expected = model(**inputs).logits
        assert (program(**inputs, past_key_values=empty(rows))["logits"] - expected).abs().max() < 1e-4
    if name == "stock":  # the table of positions ends at 64
        inputs = batch("none", 1, 65)
        with pytest.raises(Exception, match="64"):
            program(**inputs, position_ids=torch.arange(65)[None], past_key_values=empty(1))


@pytest.mark.parametrize("kind", ["pt2", "aoti", "torchscript"])
def test_a_classifier_in_a_process_with_torch_alone(kind: str, tmp_path: Path) -> None:
    source = ROOT / "hub_repo" / "mybert"
    export_model(source, kind, tmp_path / "out")
    labels, logits = run_lines(tmp_path / "out", "print(logits.tolist())").splitlines()
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForSequenceClassification.from_pretrained(source)
    with torch.no_grad():
        expected = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    assert (torch.tensor(json.loads(logits)) - expected).abs().max() < 1e-4
    assert labels == str([model.config.id2label[i] for i in expected.argmax(-1).tolist()])


@pytest.mark.parametrize("kind", ["pt2", "aoti", "torchscript"])
def test_a_language_model_in_a_process_with_torch_alone(kind: str, tmp_path: Path) -> None:
    source = ROOT / "hub_repo" / "mygpt2"
    export_model(source, kind, tmp_path / "out")
    *_, ids = run_lines(tmp_path / "out", "print(ids.tolist())").splitlines()
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=20, no_repeat_ngram_size=0)
    assert json.loads(ids) == expected.tolist()


def test_aotinductor_without_a_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mybert("SequenceClassification").save_pretrained(tmp_path / "model")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "none"),))
    with pytest.raises(ValueError, match=r"AOTInductor compiles C\+\+: install g\+\+ or clang\+\+"):
        export_model(tmp_path / "model", "aoti", tmp_path / "out")
    assert not (tmp_path / "out").exists()
