"""Compare a module's own loss with the cross-entropy of its logits, and find the label that it ignores."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from .build_module import no_output
from .outputs import take
from .probing import PER_ROW, Call, Loss, Prober, find_outputs, is_labels, near

MADE = "made by the wrapper: cross-entropy of the logits"
OWN = "the module's own, which is passed on"


def find_loss(
    prober: Prober, call: Call, inputs: dict[str, torch.Tensor], path: str, kind: str, width: int, argument: str = ""
) -> Loss:
    """Find out how the wrapper gets a loss.

    Args:
        call: a call without labels.
        kind: kind of the outputs, one of `describing.KINDS`.
        argument: the module's argument for labels, if known.
    """
    names = [argument] if argument else [n for n in prober.signature if is_labels(n) and n not in call.arguments]
    for name in names:
        for labels in _labels(kind, inputs, width):
            found = _run(prober, call, inputs, name, labels)
            if found is None:
                continue
            where, loss, output = found
            at, logits = _logits_with_labels(output, take(call.run(prober.module, inputs), path), labels, path)
            return _compare(prober, call, inputs, name, labels, Loss("own", OWN, name, where, at), loss, logits, kind)
    if kind == "body":
        return Loss("none", "no loss is known for these outputs")
    if kind in PER_ROW and width == 1:
        return Loss("none", "one number per row may be a probability or a quantity, and forward has no loss")
    return Loss("made", MADE)


def find_span_loss(prober: Prober, call: Call, inputs: dict[str, torch.Tensor], paths: list[str]) -> Loss:
    """How the loss of starts and ends is made: the mean of both cross-entropies, unless the module's own is another.

    `argument` names the module's own arguments for the positions, with a blank between them.
    """
    names = [
        next((n for n in prober.signature if word in n and n not in call.arguments), "") for word in ("start", "end")
    ]
    if not all(names):
        return Loss("made", MADE)
    places = torch.arange(len(inputs["input_ids"])) + 1, torch.arange(len(inputs["input_ids"])) + 2
    roles = {name: f"<{name}>" for name in names}
    extended = call._replace(arguments={**call.arguments, **roles})
    try:
        with no_output(), torch.no_grad():
            output = extended.run(prober.module, {**inputs, **dict(zip(roles.values(), places))})
            logits = [take(call.run(prober.module, inputs), path) for path in paths]
    except Exception:
        return Loss("made", MADE)
    found = _losses(output)
    want = (cross_entropy(logits[0], places[0]) + cross_entropy(logits[1], places[1])) / 2
    if found and not near(found[0][1].reshape(()), want):
        return Loss("none", "the module's own loss is not the mean cross-entropy of starts and ends", " ".join(names))
    note = "equal to the module's own: mean cross-entropy of starts and ends" if found else MADE
    return Loss("made", note, " ".join(names))


def _labels(kind: str, inputs: dict[str, torch.Tensor], width: int) -> list[torch.Tensor]:
    """Labels in all possible forms, the most likely first: classes, numbers, several classes per row."""
    first = next(iter(inputs.values()))
    rows = len(first)
    if kind in PER_ROW:
        halves = [torch.arange(rows) % 2 * 1.0, (torch.arange(rows) % 2 * 1.0)[:, None]]
        several = (torch.arange(rows * width).view(rows, width) % 3 == 0).float()
        return halves if width == 1 else [torch.arange(rows) % (width - 1) + 1, several]
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if ids is None or kind == "body":
        return []
    return [ids.flip(1) % max(width - 1, 1) + 1 if width > 1 else ids.flip(1) * 0]  # 0 may be ignored


def _run(
    prober: Prober, call: Call, inputs: dict[str, torch.Tensor], name: str, labels: torch.Tensor
) -> tuple[str, torch.Tensor, Any] | None:
    """Path of the loss, the loss, and the complete output with labels."""
    extended = call._replace(arguments={**call.arguments, name: f"<{name}>"})
    try:
        with no_output(), torch.no_grad():
            output = extended.run(prober.module, {**inputs, f"<{name}>": labels})
    except Exception:
        return None
    found = _losses(output)
    return (*found[0], output) if found else None


def _losses(output: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(output, torch.Tensor):
        items: list[tuple[str, Any]] = [("", output)] if output.dim() == 0 else []
    elif isinstance(output, (tuple, list)):
        items = [(f"[{number}]", value) for number, value in enumerate(output)]
    else:
        items = [(f'["{key}"]', value) for key, value in output.items()] if hasattr(output, "items") else []
    numbers = [(p, v) for p, v in items if isinstance(v, torch.Tensor) and v.numel() == 1 and v.is_floating_point()]
    return sorted(numbers, key=lambda pair: (pair[1].dim(), "loss" not in pair[0]))


def _logits_with_labels(output: Any, logits: torch.Tensor, labels: torch.Tensor, path: str) -> tuple[str, torch.Tensor]:
    """Where the logits are in the output with labels; they may be for more tokens."""
    found = find_outputs(output)
    same = [(p, v) for p, v in found if v.shape == logits.shape and near(v, logits)]
    full = [
        (p, v) for p, v in found if v.dim() > 1 and v.shape[:-1] == labels.shape and v.shape[-1] == logits.shape[-1]
    ]
    return (same or full or [("none", logits)])[0]


def _compare(
    prober: Prober,
    call: Call,
    inputs: dict[str, torch.Tensor],
    name: str,
    labels: torch.Tensor,
    own: Loss,
    loss: torch.Tensor,
    logits: torch.Tensor,
    kind: str,
) -> Loss:
    def again(other: torch.Tensor) -> torch.Tensor | None:
        found = _run(prober, call, inputs, name, other)
        return None if found is None else found[1].reshape(())

    loss, width = loss.reshape(()), logits.shape[-1]
    if labels.is_floating_point():
        return own if own.logits != "none" else Loss("none", "the module returns no logits with its loss")
    ignored = _ignored(prober, again, labels)
    flat, target = logits.reshape(-1, width), labels.reshape(-1)
    left_out = f"; the label {ignored} is left out" if ignored not in (None, -100) else ""
    if len(flat) == len(target) and near(loss, cross_entropy(flat, target)):
        return Loss("made", f"equal to the module's own: cross-entropy of the labels{left_out}", name, ignored=ignored)
    by_token = kind == "causal" and labels.shape == logits.shape[:-1]
    if by_token and near(loss, cross_entropy(logits[:, :-1].reshape(-1, width), labels[:, 1:].reshape(-1))):
        note = f"equal to the module's own: cross-entropy of the next token{left_out}"
        return Loss("made", note, name, ignored=ignored)
    if own.logits == "none":
        return Loss("none", "the module returns no logits with its loss, which is not the cross-entropy of its logits")
    note = f"the module's own, which is not the cross-entropy of its logits; it is passed on{left_out}"
    if kind != "causal":
        return own._replace(note=note, ignored=ignored)
    first = labels.clone()
    first[:, 0] = labels[:, 0] % (width - 1) + 1
    changed = again(first)
    if changed is not None and torch.equal(changed, loss):  # the loss ignores the first label, which no token precedes
        return own._replace(note=note, ignored=ignored)
    if ignored is None:
        return Loss("none", "the module's own loss takes labels that are shifted already and leaves none out", name)
    return own._replace(note=f"{note}; the labels are shifted for it", ignored=ignored, shifted=True)


def _ignored(prober: Prober, again: Callable[[torch.Tensor], torch.Tensor | None], labels: torch.Tensor) -> int | None:
    """The label that the loss ignores: with this label only, the loss is NaN or 0."""
    if labels.dim() < 2:
        return None
    named = [v for n, v in prober.fields.items() if ("pad" in n or "ignore" in n) and type(v) is int]
    for candidate in dict.fromkeys([-100, -1, *named, 0]):
        value = again(torch.full_like(labels, candidate))
        if value is not None and (not value.isfinite().item() or value.item() == 0):
            return candidate
    return None
