"""How code divides a fused projection, found by running it: which rows act as query, key and value, or as gate and up.

A forward pass is stopped after the module around the projection. The projection's output is replaced by random numbers
in which gradients are taken:

- with one token, attention has one weight, which is 1: the output depends on the value rows only;
- with three tokens, the last output depends on the first token by its key and value rows, not by its query rows;
- the gradient of up rows depends on the gate rows only.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from .running import made_up

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_TOKENS = 3
_SMALL = 1e-5  # relative to the largest gradient; below it is rounding
# blocks that follow each other, each with rows of all parts, and the order of the parts in a block
Arrangement = tuple[int, tuple[int, ...]]


class _Done(Exception):
    """Ends a forward pass that has shown enough."""


def kind_of_module(model: torch.nn.Module, path: str) -> tuple[str, type]:
    """What modules of several layers have in common: the path without numbers, and the class of the module around."""
    return _NUMBER.sub("*", path), type(model.get_submodule(path.rpartition(".")[0]))


def probed(model: torch.nn.Module, path: str, parts: int) -> Arrangement | None:
    """The arrangement of one fused projection.

    Args:
        path: of the projection in `model`.
        parts: 3 for query, key and value, 2 for gate and up.

    Returns:
        the number of blocks and the order of the parts in each; None: no run succeeds, or it does not show it.

    Example:
        >>> probed(GPT2LMHeadModel(config), "transformer.h.0.attn.c_attn", 3)
        (1, (0, 1, 2))
    """
    module, parent = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    if any(p.is_meta for p in model.parameters()):
        return None
    for run in (partial(_run_model, model), partial(_run_parent, parent, module)):
        with contextlib.suppress(Exception), _evaluating(model):  # someone's forward
            probe = partial(_gradients, module, parent, run)
            found = _blocks(_attention_rows(probe)) if parts == 3 else _gate_first(probe)
            if found is not None:
                return found
    return None


def probed_offset(model: torch.nn.Module, path: str) -> int | None:
    """The row of a table of positions that the first token gets; None: no run succeeds, or it does not show it.

    Args:
        path: of the table's module in `model`.
    """
    table: Any = model.get_submodule(path)
    rows: list[int] = []

    def used(_: Any, __: Any, output: torch.Tensor) -> None:
        (gradient,) = torch.autograd.grad(output.sum(), table.weight)
        rows.extend(gradient.abs().sum(dim=-1).nonzero().flatten().tolist())
        raise _Done

    if any(p.is_meta for p in model.parameters()):
        return None
    before = table.weight.requires_grad
    hook = table.register_forward_hook(used)
    try:
        table.weight.requires_grad_(True)
        with contextlib.suppress(Exception), _evaluating(model):  # someone's forward
            _run_model(model, _TOKENS)
    finally:
        hook.remove()
        table.weight.requires_grad_(before)
    return rows[0] if len(rows) == _TOKENS and rows == list(range(rows[0], rows[0] + _TOKENS)) else None


def _run_model(model: torch.nn.Module, tokens: int) -> None:
    (inputs, *_) = made_up(model, model)
    if isinstance(inputs, dict):
        model(**{name: tensor[:1, :tokens] for name, tensor in inputs.items()})
    elif inputs[0].is_floating_point():
        model(_numbers(tokens, inputs[0].shape[-1], next(model.parameters())))
    else:
        model(inputs[0][:1, :tokens])


def _run_parent(parent: torch.nn.Module, module: Any, tokens: int) -> None:
    weight = module.weight
    wide = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
    parent(_numbers(tokens, wide, weight))


def _numbers(tokens: int, width: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(5)).to(like)


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    state = torch.get_rng_state()
    try:
        model.eval()
        with torch.enable_grad():
            yield
    finally:
        torch.set_rng_state(state)
        for module, mode in modes:
            module.training = mode


def _gradients(
    module: torch.nn.Module,
    parent: torch.nn.Module,
    run: Callable[[int], None],
    tokens: int,
    change: Any = None,
    last: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The projection's rows and the gradient of the parent's output in them, [tokens, rows] each.

    Args:
        change: of the random rows before they are used.
        last: take the output at the last token only.
    """
    seen: dict[str, torch.Tensor] = {}

    def replaced(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        made = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)
        made = made if change is None else change(made)
        seen["rows"] = made.detach().requires_grad_(True)
        return seen["rows"]

    def ended(_: Any, __: Any, output: Any) -> None:
        if "rows" not in seen:
            return
        output = output[0] if isinstance(output, (tuple, list)) else output
        seen["output"] = output
        raise _Done

    hooks = [module.register_forward_hook(replaced), parent.register_forward_hook(ended)]
    try:
        run(tokens)
    except _Done:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    rows, output = seen["rows"], seen["output"]
    if output.ndim == 3 and last:
        output = output.select(_token_axis(output, tokens), -1)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(11)).to(output)
    (gradient,) = torch.autograd.grad((output * weights).sum(), rows)
    width = rows.shape[-1]
    return rows.detach().reshape(-1, width), gradient.reshape(-1, width).abs()


def _token_axis(output: torch.Tensor, tokens: int) -> int:
    """[batch, tokens, width] or [tokens, batch, width]; the batch has one row."""
    return 1 if output.shape[1] == tokens else 0


def _attention_rows(probe: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> list[int] | None:
    """0, 1 or 2 for each row of the projection: query, key or value."""
    _, alone = probe(1)
    _, among = probe(_TOKENS)
    if alone.shape[0] != 1 or among.shape[0] != _TOKENS:
        return None
    value, later = (g > _SMALL * g.max() for g in (alone[0], among[0]))
    now = among[-1] > _SMALL * among[-1].max()
    if not bool((value <= later).all()) or not bool(now.all()):
        return None
    labels = torch.where(value, 2, torch.where(later, 1, 0)).tolist()
    return labels if set(labels) == {0, 1, 2} else None


def _blocks(labels: Sequence[int] | None) -> Arrangement | None:
    """The blocks that rows with these labels form; None: they differ."""
    if not labels:
        return None
    runs = [(labels[0], 1)]
    for label in labels[1:]:
        if label == runs[-1][0]:
            runs[-1] = label, runs[-1][1] + 1
        else:
            runs.append((label, 1))
    block = runs[:3]
    if len(runs) % 3 or runs != block * (len(runs) // 3) or {label for label, _ in block} != {0, 1, 2}:
        return None
    return len(runs) // 3, tuple(label for label, _ in block)


def _gate_first(probe: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Arrangement | None:
    """Of an MLP whose first half or whose even rows are one part: which part."""
    rows, before = probe(1, last=False)
    width = rows.shape[-1]
    halves = torch.arange(width) < width // 2
    pairs = torch.arange(width) % 2 == 0
    found = []
    for part, blocks in ((halves, 1), (pairs, width // 2)):
        for up, order in ((~part, (0, 1)), (part, (1, 0))):

            def resampled(made: torch.Tensor, up: torch.Tensor = up) -> torch.Tensor:
                other = torch.randn(made.shape, generator=torch.Generator().manual_seed(13)).to(made)
                return torch.where(up, other, made)

            _, after = probe(1, resampled, last=False)
            scale = before.max()
            steady = bool(((after - before).abs()[..., up] <= _SMALL * scale).all())
            moved = bool(((after - before).abs()[..., ~up] > _SMALL * scale).any())
            if steady and moved and bool((before[..., up] > _SMALL * scale).any()):
                found.append((blocks, order))
    return found[0] if len(found) == 1 else None
