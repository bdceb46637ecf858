"""Golden outputs: what a model made of known inputs when it was known to be right, kept beside its weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from . import tokenizers
from .inputs import NEW_TOKENS, TOLERANCES, difference, generate, generates, make_inputs, shown_outputs
from .loading import load


class Golden(NamedTuple):
    """The content of a `golden.safetensors`.

    Attributes:
        inputs: argument of `forward` → tensor.
        outputs: class → name of the output → its values where they are no padding, flat.
        greedy: class → the tokens it generates, the prompt first.
        made: `tolerance` (times the largest expected value or 1), `dtype`, `max_new_tokens`, and versions.
    """

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, dict[str, torch.Tensor]]
    greedy: dict[str, torch.Tensor]
    made: dict[str, Any]


def read(path: str | Path) -> Golden:
    """Read a golden file.

    Raises:
        ValueError: it is a safetensors file, but not of this kind.
    """
    golden = Golden({}, {}, {}, {})
    with safe_open(path, framework="pt") as file:
        try:
            golden.made.update(json.loads((file.metadata() or {})["golden"]))
            golden.made["tolerance"] = float(golden.made["tolerance"])
            for key in sorted(file.keys()):
                kind, name, *rest = key.split(".", 2)
                if kind == "output":
                    golden.outputs.setdefault(name, {})[rest[0]] = file.get_tensor(key)
                else:
                    {"input": golden.inputs, "greedy": golden.greedy}[kind][name] = file.get_tensor(key)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"it has not the tensors and metadata of a golden file ({error})") from error
    if not golden.inputs or not golden.outputs:
        raise ValueError("it has no inputs, or no outputs")
    return golden


def run(job: dict[str, Any], events: Any) -> None:
    """Record the golden outputs of every class that finds all its weights in the folder."""
    import transformers

    inputs: dict[str, torch.Tensor] = read_inputs(job)
    tensors, made = {}, {}
    for number, name in enumerate(job["classes"]):
        model, loading = load(job, name)
        if loading.get("missing_keys") or loading.get("mismatched_keys"):
            if number == 0:
                missing = sorted([*loading["missing_keys"], *map(str, loading["mismatched_keys"])])
                raise RuntimeError(f"{name} does not find its weight {missing[0]} in the folder")
            continue
        if number == 0:
            inputs = inputs or make_inputs(model)
            made = {"dtype": str(model.dtype).removeprefix("torch."), "tolerance": TOLERANCES.get(model.dtype, 1e-5)}
        outputs = shown_outputs(model, inputs)
        if any(not tensor.isfinite().all() for tensor in outputs.values()):
            raise RuntimeError(f"the outputs of {name} are not finite")
        tensors.update({f"output.{name}.{key}": tensor for key, tensor in outputs.items()})
        if number == 0 and generates(model):
            tensors[f"greedy.{name}"] = generate(model, inputs)
    tensors.update({f"input.{name}": tensor for name, tensor in inputs.items()})
    made.update(
        **tokenizers.record(job),
        max_new_tokens=NEW_TOKENS,
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
    )
    # one entry only: safetensors writes several in an order that changes from run to run
    save_file(
        tensors, Path(job["scratch"], "golden.safetensors"), metadata={"golden": json.dumps(made, sort_keys=True)}
    )


def read_inputs(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The inputs the caller gave, or those of the golden file, or none."""
    if job.get("inputs"):
        with safe_open(job["inputs"], framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    return read(job["golden"]).inputs if job["golden"] else {}


def compare(model: Any, name: str, golden: Golden) -> str:
    """What the model makes of the golden inputs that it should not, in words; nothing if all is as recorded."""
    return difference(shown_outputs(model, golden.inputs), golden.outputs[name], golden.made["tolerance"])


def compare_tokens(model: Any, name: str, golden: Golden) -> str:
    """Where generation leaves the recorded tokens, in words; nothing if it does not."""
    want, count = golden.greedy[name], int(golden.made["max_new_tokens"])
    got = generate(model, golden.inputs, max_new_tokens=count, min_new_tokens=count)
    if got.shape != want.shape:
        return f"generation gives {tuple(got.shape)} tokens, {tuple(want.shape)} were recorded"
    if torch.equal(got, want):
        return ""
    row, column = (got != want).nonzero()[0].tolist()
    return (
        f"generation differs from the recorded tokens in row {row} at position {column}: "
        f"{got[row, column].item()} instead of {want[row, column].item()}"
    )
