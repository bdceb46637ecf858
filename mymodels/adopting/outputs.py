"""Find the main output of a module, and check that transformers can use it as logits."""

import ast
from typing import Any

import torch
from torch import nn

from ..checkpoints import CheckpointError
from .probing import ROWS, Call, Prober, find_outputs, near

_PROBABILITIES = ("SoftmaxBackward0", "SigmoidBackward0")


def take(output: Any, path: str) -> Any:
    """The part of an output at `path` (`""`, `[0]`, `["logits"]`)."""
    if not path:
        return output
    key = path[1:-1]
    return output[int(key)] if key.lstrip("-").isdigit() else output[key.strip("'\"")]


def main_output(
    prober: Prober, call: Call, inputs: dict[str, torch.Tensor], output: Any, vocab: int | None
) -> tuple[str, torch.Tensor, list[str]]:
    """Path and value of the main output, and the paths of the others.

    It is chosen by name, else as the output of a linear layer; of several, the one as wide as the vocabulary or the last.
    """
    found = find_outputs(output)
    named = [pair for key in ("logits", "last_hidden_state") for pair in found if pair[0] == f'["{key}"]']
    if named or len(found) == 1:
        path, value = (named or found)[0]
    else:
        order = [name for name, part in prober.module.named_modules() if isinstance(part, nn.Linear)]
        heads = {path: prober.head(call, inputs, value) for path, value in found}
        made = [pair for pair in found if heads[pair[0]]]
        made.sort(key=lambda pair: (pair[1].shape[-1] == vocab, order.index(heads[pair[0]])))
        path, value = made[-1] if made else found[0]
    return path, value, [name for name in parts_of(output) if name != path]


def span_outputs(output: Any, shape: torch.Size) -> list[str]:
    """The paths of the logits of starts and ends, a number for each token; `[]` if there are none.

    By name, or as the only two outputs of a tuple.
    """
    found = [path for path, value in find_outputs(output) if value.shape == shape]
    if isinstance(output, (tuple, list)):
        return found if len(found) == 2 == len(find_outputs(output)) else []
    named = [[path for path in found if word in path] for word in ("start", "end")]
    return [paths[0] for paths in named] if all(len(paths) == 1 for paths in named) else []


def parts_of(output: Any) -> list[str]:
    """The paths of the parts of an output; None has no parts."""
    if isinstance(output, (tuple, list)):
        return [f"[{number}]" for number, value in enumerate(output) if value is not None]
    if hasattr(output, "items"):
        return [f'["{key}"]' for key, value in output.items() if value is not None]
    return []


def check_outputs(prober: Prober, call: Call, inputs: dict[str, torch.Tensor], path: str, value: torch.Tensor) -> None:
    """Check that outputs are deterministic, independent of other rows, and not probabilities.

    Raises:
        CheckpointError: one sentence with the line of `forward`.
    """
    where = prober.at_forward()
    if not value.isfinite().all():
        raise CheckpointError(f"{where}: forward gives non-finite numbers for generated inputs")
    if not torch.equal(take(call.run(prober.module, inputs), path), value):
        raise CheckpointError(
            f"{where}: forward gives different outputs each time in eval mode: pass training=self.training to F.dropout, "
            "and draw no random numbers"
        )
    if not _row_by_row(prober, call, inputs, path, value):
        raise CheckpointError(
            f"{where}: a row of the batch depends on the other rows, as if the first dimension were time: transpose "
            "at the start of forward, as in x = x.t(), and the output back, as in out.transpose(0, 1)"
        )
    node = take(call.run(prober.module, inputs, grad=True), path).grad_fn
    while node is not None and type(node).__name__.startswith(("View", "Squeeze", "Unsqueeze", "Reshape", "Alias")):
        node = node.next_functions[0][0]
    if type(node).__name__ in _PROBABILITIES:
        name = type(node).__name__.removesuffix("Backward0").lower()
        raise CheckpointError(
            f"{_call_of(prober, name) or where}: forward returns probabilities, from which the losses and pipelines of "
            f"transformers compute wrong numbers: return what goes into the {name}"
        )


def _row_by_row(prober: Prober, call: Call, inputs: dict[str, torch.Tensor], path: str, value: torch.Tensor) -> bool:
    if value.shape[:1] != (ROWS,):
        return False
    for row in range(ROWS):
        try:
            alone = take(call.run(prober.module, {n: t[row : row + 1] for n, t in inputs.items()}), path)
        except Exception:
            return False
        if not near(alone, value[row : row + 1]):
            return False
    return True


def _call_of(prober: Prober, name: str) -> str:
    """`file:line` of the last call of function `name` in the class."""
    cls = prober.file.classes.get(type(prober.module).__name__)
    lines = [
        node.lineno
        for node in (ast.walk(cls) if cls else ())
        if isinstance(node, ast.Call) and name in ast.unparse(node.func).lower()
    ]
    return f"{prober.file.path}:{max(lines)}" if lines else ""
