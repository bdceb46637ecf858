"""Export of adopted modules and of models whose inputs are given; torch itself is the truth."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from adopting.cases import AUTHORS, CASES, job
from exports import lines_that_run_it
from own_models.make import make
from torch import nn

from mymodels.adopting.examine import examine
from mymodels.export import export_model, graphs
from mymodels.export.exporting import _reason
from mymodels.export.parity import _reason as reason_of_process
from mymodels.export.parity import compute_expected, make_cases
from mymodels.export.programs import export_program, write_torchscript


@pytest.fixture(scope="module")
def adopted(tmp_path_factory: pytest.TempPathFactory):
    """By file: the adopted model, loaded from a folder whose name starts with a digit, as the hash of remote code may."""

    def load(file: str):
        name, config, auto_class = CASES[file]
        out = tmp_path_factory.mktemp(file)
        examine(job(AUTHORS / f"{file}.py", name, config), out)
        (out / "source").rename(out / f"1{file}")
        auto = getattr(transformers, auto_class)
        return auto.from_pretrained(out / f"1{file}", trust_remote_code=True).eval(), out / f"1{file}"

    return load


def test_a_trace_of_remote_code_can_be_loaded_again(adopted, tmp_path: Path) -> None:
    model, _ = adopted("gpt")
    graph = graphs.Graph(model, "text-generation")
    before = type(model).__module__
    loaded = torch.jit.load(write_torchscript(graph, tmp_path))
    assert type(model).__module__ == before
    cases = make_cases(graph)
    compute_expected(model, graph, cases)
    for case in cases:
        got = loaded(**case.inputs)["logits"][case.mask]
        torch.testing.assert_close(got, case.expected["logits"][case.mask], atol=1e-5, rtol=1e-4)


def test_padding_is_moved_without_a_sort_and_masks_are_not_read(adopted) -> None:
    """ONNX has no stable sort; `nn.TransformerDecoder` reads the values of its mask to see if it is causal."""
    for file, task in (("gpt", "text-generation"), ("decoder", "text-generation"), ("seq2seq", "text2text-generation")):
        graph = graphs.Graph(adopted(file)[0], task)
        program = export_program(graph)
        assert "sort" not in {
            str(node.target).split(".")[1] for node in program.graph.nodes if "aten" in str(node.target)
        }
        case = make_cases(graph)[2]
        with torch.no_grad():
            want = graph(**case.inputs)["logits"]
        torch.testing.assert_close(program.module()(**case.inputs)["logits"], want, atol=1e-5, rtol=1e-4)


def test_arguments_that_kwargs_only_seem_to_take_are_no_inputs() -> None:
    class Refusing(type(make("conv_bert"))):
        def forward(self, input_ids, **kwargs):
            if kwargs.get("token_type_ids") is not None:
                raise TypeError("takes no token_type_ids")
            if not kwargs["attention_mask"].all() if "attention_mask" in kwargs else False:
                raise ValueError("cannot leave out padding")
            return super().forward(input_ids, torch.ones_like(input_ids))

    model = Refusing(make("conv_bert").config).eval()
    assert graphs.input_names("text-classification", model) == ["input_ids"]
    assert graphs.input_names("text-classification", make("conv_bert")) == ["input_ids", "attention_mask"]


def test_images_are_exported_by_given_inputs_and_by_recorded_ones(adopted, tmp_path: Path) -> None:
    model = make("tiny_cnn")
    given = {"pixel_values": torch.rand(2, 3, 8, 8)}
    exported = export_model(model, "torchscript", tmp_path / "out", task="image-classification", inputs=given)
    assert exported.inputs == ["pixel_values"] and [shape[0] for shape in exported.shapes] == [2, 1, 4]
    graph = torch.jit.load(tmp_path / "out" / "model_torchscript.pt")
    other = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(graph(pixel_values=other)["logits"], model(other)[0])
    code = lines_that_run_it(tmp_path / "out").replace("model_torchscript.pt", str(exported.file))
    variables: dict = {}
    exec(code, variables)
    assert variables["logits"].shape == (3, 3)
    with pytest.raises(ValueError, match=r"inputs have different numbers of rows \(a 1, b 2\)"):
        export_model(model, "pt2", tmp_path / "no", inputs={"a": [[1]], "b": [[1], [2]]})
    with pytest.raises(ValueError, match=r"\(pixel_values\) cannot be generated: pass --inputs FILE"):
        export_model(adopted("cnn")[1], "pt2", tmp_path / "no", trust_remote_code=True)
    assert not (tmp_path / "no").exists()


def test_any_outputs_of_any_class_by_given_inputs(tmp_path: Path) -> None:
    class TwoForNothing(type(make("tiny_cnn"))):
        def forward(self, series, scale):
            return {"mean": series.mean(1) * scale, "last": series[:, -1]}

    model = TwoForNothing(make("tiny_cnn").config)
    inputs = {"series": torch.rand(3, 6), "scale": torch.rand(3)}
    exported = export_model(model, "pt2", tmp_path / "out", inputs=inputs)
    assert exported.outputs == ["mean", "last"] and exported.task == "other"


def test_reasons_are_one_sentence_without_colours() -> None:
    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if (x > 0).all() else x

    class Loops(nn.Module):
        def forward(self, x):
            return sum(x[:, i] for i in range(x.shape[1]))

    for module, message in [(Branches(), r"branches on the values of a tensor \(test_adopted.py:\d+\)"), (Loops(), "one size of its inputs only, which is 4 here")]:  # fmt: skip
        sizes = {"x": {0: torch.export.Dim("b", min=1), 1: torch.export.Dim("t", min=1)}}
        with pytest.raises(Exception) as caught:
            torch.export.export(module, (), {"x": torch.rand(3, 4)}, dynamic_shapes=sizes)
        assert re.search(message, _reason(caught.value))
    error = type("ConversionError", (RuntimeError,), {"__module__": "torch.onnx.x"})("\x1b[96mstep 3/3\x1b[0m")
    error.__cause__ = ValueError("No ONNX function found")
    assert _reason(error) == "No ONNX function found" and _reason(RuntimeError("\x1b[96mred\x1b[0m")) == "red"
    text = "Traceback:\n  File x\nRuntimeError: expected newline but found 'number' here:\n  def forward(\n    input_ids: Tensor,\n"
    assert reason_of_process(text, 1) == "expected newline but found 'number' here:"
    assert reason_of_process("", 3) == "exit code 3"


@pytest.mark.export
@pytest.mark.parametrize("file", ["gpt", "seq2seq", "cnn"])
def test_adopted_modules_run_in_onnxruntime(adopted, file: str, tmp_path: Path) -> None:
    _, folder = adopted(file)
    inputs = {"pixel_values": torch.rand(2, 3, 32, 32)} if file == "cnn" else None
    exported = export_model(folder, "onnx", tmp_path / "out", trust_remote_code=True, inputs=inputs)
    assert exported.differences["logits"] < 1e-4
