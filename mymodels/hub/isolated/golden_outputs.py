"""Golden outputs: inputs and the outputs a model gave for them when it was recorded, kept beside its weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from . import tokenizers
from .comparing import QUANTISED, TOLERANCES, difference, not_finite, run_model, unpadded_outputs
from .generating import generate, generate_as_configured
from .inputs import (
    NEW_TOKENS,
    accepted_inputs,
    check_caller_inputs,
    generates,
    kept_inputs,
    last_positions,
    make_inputs,
    non_text_inputs,
    read_tensors,
)
from .load_repo import load
from .processors import processed_inputs, record_processors

LAST, LAST_VALUES = 8, 20_000


class Golden(NamedTuple):
    """The content of a `golden.safetensors`.

    Attributes:
        inputs: argument of `forward` → tensor.
        outputs: class → name of the output → its values without padding, flat.
        greedy: class → prompt and generated tokens; always `made["max_new_tokens"]` new ones.
        configured: class → the same by the folder's own generation config, without sampling.
        last_inputs, last_outputs: the same at the last positions of the config's maximum. Files of earlier versions
            have neither these nor `configured`, and fewer outputs.
        made: the recording's `tolerance` (times the largest expected value or 1), `dtype`, `max_new_tokens`, versions.
    """

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, dict[str, torch.Tensor]]
    greedy: dict[str, torch.Tensor]
    configured: dict[str, torch.Tensor]
    last_inputs: dict[str, torch.Tensor]
    last_outputs: dict[str, dict[str, torch.Tensor]]
    made: dict[str, Any]


def read(path: str | Path) -> Golden:
    """Read a golden file.

    Raises:
        ValueError: the safetensors file has not the tensors and metadata of a golden file.
    """
    golden = Golden({}, {}, {}, {}, {}, {}, {})
    plain = {
        "input": golden.inputs,
        "greedy": golden.greedy,
        "configured": golden.configured,
        "last_input": golden.last_inputs,
    }
    by_class = {"output": golden.outputs, "last_output": golden.last_outputs}
    with safe_open(path, framework="pt") as file:
        try:
            golden.made.update(json.loads((file.metadata() or {})["golden"]))
            golden.made["tolerance"] = float(golden.made["tolerance"])
            for key in sorted(file.keys()):
                kind, name, *rest = key.split(".", 2)
                if kind in by_class:
                    by_class[kind].setdefault(name, {})[rest[0]] = file.get_tensor(key)
                else:
                    plain[kind][name] = file.get_tensor(key)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"the file lacks the tensors or metadata of a golden file ({error})") from error
    if not golden.inputs or not golden.outputs:
        raise ValueError("the file has no inputs, or no outputs")
    return golden


def run(job: dict[str, Any], events: Any) -> None:
    """Record the golden outputs of every class whose weights are all in the folder."""
    import transformers

    inputs: dict[str, torch.Tensor] = read_inputs(job)
    tensors, last, made = {}, {}, {}
    for number, name in enumerate(job["classes"]):
        model, loading = load(job, name)
        if loading.get("missing_keys") or loading.get("mismatched_keys"):
            if number == 0:
                missing = sorted([*loading["missing_keys"], *map(str, loading["mismatched_keys"])])
                raise RuntimeError(f"the folder has no weight {missing[0]} of {name}")
            continue
        if number == 0:
            own = bool(inputs)
            inputs = choose_inputs(job, model)
            last = {} if own else last_positions(model)
            last = {**non_text_inputs(inputs), **last} if last else {}
            tolerance = QUANTISED if getattr(model, "is_quantized", False) else TOLERANCES.get(model.dtype, 1e-5)
            made = {"dtype": str(model.dtype).removeprefix("torch."), "tolerance": tolerance}
        outputs = unpadded_outputs(model, accepted_inputs(model, inputs))
        if wrong := not_finite(outputs):
            raise RuntimeError(f"the outputs of {name} are not finite: {wrong}")
        tensors.update({f"output.{name}.{key}": tensor for key, tensor in outputs.items()})
        if last:
            tensors.update({f"last_output.{name}.{key}": tensor for key, tensor in outputs_at(model, last).items()})
        if number == 0 and generates(model):
            tensors[f"greedy.{name}"] = generate(model, inputs)
            tensors[f"configured.{name}"] = generate_as_configured(model, inputs)
    tensors.update({f"last_input.{name}": tensor for name, tensor in last.items()})
    tensors.update({f"input.{name}": tensor for name, tensor in inputs.items()})
    made.update(
        **tokenizers.record(job),
        **record_processors(job),
        max_new_tokens=NEW_TOKENS,
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
    )
    # one metadata entry: safetensors writes several in an order that changes from run to run
    save_file(
        tensors, Path(job["scratch"], "golden.safetensors"), metadata={"golden": json.dumps(made, sort_keys=True)}
    )


def read_inputs(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The caller's inputs, else those of the golden file, else those an earlier stage made, else none."""
    if job.get("inputs"):
        return read_tensors(job["inputs"])
    return read(job["golden"]).inputs if job["golden"] else kept_inputs(job)


def choose_inputs(job: dict[str, Any], model: Any) -> dict[str, torch.Tensor]:
    """The inputs of `read_inputs`, or inputs generated from the config.

    Raises:
        WrongInputs: the caller's inputs have an argument that `forward` does not take, or lack one that it needs.
        FailedOnInputs: `forward` fails on the caller's inputs.
        NoSuitableInputs: none were given, and none of those generated suit the model.
    """
    inputs = read_inputs(job)
    if inputs and job.get("inputs"):
        check_caller_inputs(model, inputs)
    return inputs or make_inputs(model, processed_inputs(job))


def outputs_at(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs at the last tokens, flat; outputs without a token dimension completely.

    Args:
        inputs: of the class of `architectures`; those that this class's `forward` does not take are left out.
    """
    shown = {}
    for name, tensor in run_model(model, accepted_inputs(model, inputs)).items():
        if tensor.shape[:2] == inputs["input_ids"].shape:
            tensor = tensor[:, -LAST:]
        values = tensor.reshape(-1)
        shown[name] = values[:: -(-values.numel() // LAST_VALUES) or 1].contiguous()
    return shown


def compare(model: Any, name: str, golden: Golden) -> str:
    """A sentence on the first output that differs from the recorded one, or ""."""
    tolerance = golden.made["tolerance"]
    wrong = difference(unpadded_outputs(model, accepted_inputs(model, golden.inputs)), golden.outputs[name], tolerance)
    if wrong or name not in golden.last_outputs:
        return wrong
    wrong = difference(outputs_at(model, golden.last_inputs), golden.last_outputs[name], tolerance)
    return f"at the last positions that the config promises, {wrong}" if wrong else ""


def compare_tokens(model: Any, name: str, golden: Golden) -> str:
    """A sentence on the first generated token that differs from the recorded one, or ""."""
    count, tolerance = int(golden.made["max_new_tokens"]), golden.made["tolerance"]
    if name in golden.greedy:
        got = generate(model, golden.inputs, max_new_tokens=count, min_new_tokens=count)
        if wrong := _other_tokens(got, golden.greedy[name], tolerance):
            return f"generation {wrong}"
    if name in golden.configured:
        got = generate_as_configured(model, golden.inputs, max_new_tokens=count)
        if wrong := _other_tokens(got, golden.configured[name], tolerance):
            return f"generation by the folder's own generation config {wrong}"
    return ""


def _other_tokens(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> str:
    if want.is_floating_point():  # a series of numbers
        wrong = difference({"the series": got}, {"the series": want}, tolerance)
        return f"differs from the recorded numbers: {wrong}" if wrong else ""
    if got.shape != want.shape:
        return f"gives {tuple(got.shape)} tokens, {tuple(want.shape)} were recorded"
    if torch.equal(got, want):
        return ""
    row, column = (got != want).nonzero()[0].tolist()
    return (
        f"differs from the recorded tokens in row {row} at position {column}: "
        f"{got[row, column].item()} instead of {want[row, column].item()}"
    )
