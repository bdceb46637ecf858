"""Export of encoder-decoders and of models of a file of one's own: parity is proven in a fresh process by each export."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exports import lines_that_run_it
from own_models.make import make
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from mymodels.export import export_model, graphs
from mymodels.export.parity import compute_expected, make_cases


def tiny_bart() -> BartForConditionalGeneration:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=97, init_std=0.2, forced_eos_token_id=None, **sizes, **heads, **special)
    ).eval()


def test_a_graph_takes_and_gives_what_the_model_does() -> None:
    """Of every form of output, without running a runtime: the graph as a module against the model itself."""
    llama = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    for model, task, inputs in [
        (make("conv_bert"), "text-classification", ["input_ids", "attention_mask"]),
        (make("small_t5"), "text2text-generation", ["input_ids", "attention_mask", "decoder_input_ids"]),
        (tiny_bart(), "text2text-generation", ["input_ids", "attention_mask", "decoder_input_ids"]),
        (make("moe_gpt2"), "text-generation", ["input_ids", "attention_mask", "position_ids"]),
        (LlamaForCausalLM(LlamaConfig(vocab_size=97, **llama)).eval(), "text-generation", ["input_ids", "attention_mask", "position_ids"]),
    ]:  # fmt: skip
        graph = graphs.Graph(model, task, cache=task == "text-generation")
        named = [name for name in graph.inputs if name != "token_type_ids"]
        assert named == inputs and bool(graph.past) == (task == "text-generation")
        cases = make_cases(graph)
        compute_expected(model, graph, cases)
        for case in cases:
            with torch.no_grad():
                expected = model(**case.inputs)
                plain = graphs.Graph(model, task)(**case.inputs)["logits"]
            expected = expected[0] if isinstance(expected, tuple) else expected.logits
            kept = case.mask if expected.shape[:2] == case.mask.shape else slice(None)
            torch.testing.assert_close(case.expected["logits"][kept], expected[kept], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(plain[kept], expected[kept], atol=1e-5, rtol=1e-4)


def test_a_model_without_keys_and_values_has_a_graph_without() -> None:
    class NoCache(type(make("moe_gpt2"))):
        def forward(self, input_ids, labels=None):
            return (super().forward(input_ids, labels=labels, use_cache=False).logits,)

    model = NoCache(make("moe_gpt2").config).eval()
    graph = graphs.Graph(model, "text-generation", cache=True)
    assert graph.inputs == ["input_ids"] and not graph.past
    assert set(graph.example()) == {"input_ids"}
    assert graph(**graph.example())["logits"].shape == (3, 5, 97)


def test_a_class_that_says_nothing_needs_a_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the task of ConvBert cannot be determined .*pass task="):
        export_model(make("conv_bert"), "torchscript", tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"the inputs of TinyCnnForImageClassification .* cannot be generated: pass --inputs"
    ):
        export_model(make("tiny_cnn"), "torchscript", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_tuple_without_kwargs_is_exported_from_memory(tmp_path: Path) -> None:
    model = make("conv_bert")
    before = model.config._attn_implementation
    exported = export_model(model, "torchscript", tmp_path / "out", task="text-classification")
    assert exported.differences["logits"] < 1e-5 and exported.inputs == ["input_ids", "attention_mask"]
    assert model.config._attn_implementation == before
    code = lines_that_run_it(tmp_path / "out")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", check=True)


@pytest.mark.export
@pytest.mark.parametrize("name", ["bart", "small_t5"])
def test_an_encoder_decoder_generates_by_onnx_alone(name: str, tmp_path: Path) -> None:
    model = tiny_bart() if name == "bart" else make(name, eos_token_id=3)
    exported = export_model(model, "onnx", tmp_path / "out")
    assert exported.differences["logits"] < 1e-4
    code = lines_that_run_it(tmp_path / "out")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", check=True, capture_output=True, text=True)
    tokens = model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, num_beams=1, max_new_tokens=20)
    assert run.stdout.split() == str(tokens.numpy()).split()
