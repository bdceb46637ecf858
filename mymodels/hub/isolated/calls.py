"""Checks of repeated calls: the same inputs give the same outputs, whatever came before, is in the batch, or is embedded."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .comparing import EQUAL, difference, floating, not_finite, row_of, run_model, unpadded_outputs
from .inputs import has_tokens, make_token_ids, non_text_inputs, prompt_length, with_required
from .load_repo import accepts, describe
from .stages import innermost, sentence

DEPTH = 3  # how deep nested containers are counted
_OF_EVERY_MODULE = set(vars(torch.nn.Module()))


def check_forward(check: Any, model: Any, inputs: dict[str, torch.Tensor], before: dict[str, Any]) -> None:
    """forward runs, is finite and deterministic, changes neither weights nor inputs, and accumulates no state."""
    given = {name: tensor.clone() for name, tensor in inputs.items()}
    first = unpadded_outputs(model, inputs)
    check.fail_if(not_finite(first))
    for name, tensor in given.items():
        if not torch.equal(inputs[name], tensor):
            check.fail(f"forward writes into {name}, a tensor of the caller: work on a copy")
    second, kept = unpadded_outputs(model, inputs), state_sizes(model)
    after = describe(model)
    changed = [n for n, t in before.items() if t["persistent"] and t["digest"] != after.get(n, {}).get("digest")]
    if changed:
        check.fail(f"forward changes a loaded tensor: {changed[0]} has other values after it", changed[0])
    for again in (second, *(unpadded_outputs(model, inputs) for _ in range(2))):
        wrong = difference(again, first) or _extra_output(again, first)
        if wrong:
            check.fail(f"two runs on the same inputs in eval mode are not the same: {wrong}")
    report_state(check, kept, state_sizes(model))


def _extra_output(seen: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    more = [name for name in seen if name not in expected]
    return f"there is a new output {more[0]!r}" if more else ""


def state_sizes(model: torch.nn.Module) -> dict[str, tuple[str, int | float]]:
    """State kept by the model's modules and by the folder's code: name → (kind, size), or ("number", its value)."""
    found: dict[str, tuple[str, int | float]] = {}
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
        found.update(_sizes(own, path))
    for name, code in list(sys.modules.items()):
        if name.startswith("transformers_modules.") and getattr(code, "__file__", None):
            values = dict(vars(code))
            found.update(_sizes({n: v for n, v in values.items() if not n.startswith("__")}, name.split(".")[-1]))
            for klass in [v for v in values.values() if isinstance(v, type) and v.__module__ == name]:
                own = {n: v for n, v in vars(klass).items() if not n.startswith("__")}
                found.update(_sizes(own, klass.__name__))
    return found


def _sizes(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, tuple[str, int | float]]]:
    for name, value in values.items():
        if (size := _size(value)) is not None:
            yield f"{path}.{name}".lstrip("."), size


def _size(value: Any) -> tuple[str, int | float] | None:
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return "number", value
    if isinstance(value, torch.Tensor):
        return "values", value.numel()
    count = _count(value, DEPTH)
    return None if count is None else ("entries", count)


def _count(value: Any, depth: int) -> int | None:
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    if not isinstance(value, Mapping | list | tuple | set | frozenset) and type(value).__name__ != "deque":
        return None
    if depth == 0:
        return len(value)
    inner = value.values() if isinstance(value, Mapping) else value
    return len(value) + sum(_count(one, depth - 1) or 0 for one in list(inner))


def report_state(check: Any, before: Mapping[str, tuple[str, Any]], after: Mapping[str, tuple[str, Any]]) -> None:
    """Fail for state that grew in two more calls on the same inputs (a leak); warn of a number that changed."""
    for name, (kind, size) in after.items():
        kept, old = before.get(name, (kind, 0))
        if size == old or kept != kind:
            continue
        if kind != "number" and size > old:
            what = (
                f"{name} grows with every call of forward, from {old} to {size} {kind} in two calls on the same inputs"
            )
            check.fail(f"{what}: memory runs out", name)
        elif kind == "number":
            check.warn(f"forward changes {name} at every call, from {old:g} to {size:g}")


def check_batch(check: Any, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """A row has the same outputs alone, in a batch, in a batch of another order, and after calls on other inputs."""
    rows = {len(tensor) if tensor.dim() else 0 for tensor in inputs.values()}
    if rows == {1} or len(rows) != 1:
        check.not_applicable("the inputs have one row, or different numbers of rows")
        return
    count, mask = rows.pop(), inputs.get("attention_mask")
    together = run_model(model, inputs)
    want = {n: t for n, t in floating(together).items() if t.dim() and len(t) == count}
    for row in range(count):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        try:
            alone = run_model(model, one)
        except Exception as error:
            what = f"{count} rows together run, but one of them alone raises {sentence(error)}"
            check.fail(f"{what}: look for squeeze() or a fixed batch size", innermost(error))
            return
        for name in [n for n in want if n in alone]:
            if alone[name].dim() != want[name].dim():
                shapes = f"{tuple(alone[name].shape)}, of {count} rows {tuple(want[name].shape)}"
                check.fail(f"of one row {name} has the shape {shapes}: look for squeeze()")
                return
            if alone[name].shape != (1, *want[name].shape[1:]):
                continue  # no row for each input, such as similarities between rows
            seen = {name: row_of(alone[name], None if mask is None else mask[row : row + 1], 0)}
            wrong = difference(seen, {name: row_of(want[name], mask, row)}, EQUAL)
            if wrong:
                check.fail(f"row {row} alone gives other outputs than in the batch: {wrong}; forward mixes the rows")
                return
    flipped = run_model(model, {name: tensor.flip(0) for name, tensor in inputs.items()})
    for row in range(count):
        seen = {
            n: row_of(flipped[n], None if mask is None else mask.flip(0), count - 1 - row) for n in want if n in flipped
        }
        ordered = {n: row_of(want[n], mask, row) for n in seen if flipped[n].shape == want[n].shape}
        check.fail_if(_with_prefix("the order of the rows changes their outputs", difference(seen, ordered, EQUAL)))
    again = difference(run_model(model, inputs), together, EQUAL)
    check.fail_if(_with_prefix("calls on other inputs in between change the outputs", again))


def _with_prefix(what: str, wrong: str) -> str:
    return f"{what}: {wrong}" if wrong else ""


def check_inputs_embeds(check: Any, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """inputs_embeds of the same tokens give the same outputs as input_ids."""
    if not has_tokens(inputs) or not accepts(model, "inputs_embeds"):
        check.not_applicable("forward does not take both token ids (input_ids) and inputs_embeds")
        return
    rest = non_text_inputs(inputs)
    ids = with_required(model, {"input_ids": make_token_ids(model, 1, prompt_length(model), seed=3), **rest})
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(ids["input_ids"])
    others = {name: tensor for name, tensor in ids.items() if name != "input_ids"}
    try:
        seen = run_model(model, {"inputs_embeds": embedded, **others})
    except NotImplementedError as error:
        check.not_applicable(f"the model does not support inputs_embeds: {sentence(error)}")
        return
    want = floating(run_model(model, ids))
    wrong = difference(floating(seen), want, EQUAL)
    if not wrong:
        return
    factor = _lookup_factor(model, ids, embedded)
    if factor and not difference(
        floating(run_model(model, {"inputs_embeds": embedded * factor, **others})), want, EQUAL
    ):
        check.warn(
            f"forward multiplies the embeddings that it looks up by {factor:.6g}, and takes inputs_embeds as they are: "
            "whoever passes them has to multiply them"
        )
    else:
        check.fail(f"inputs_embeds of the same tokens give different outputs than input_ids: {wrong}")


def _lookup_factor(model: Any, ids: Mapping[str, torch.Tensor], embedded: torch.Tensor) -> float:
    """The number that forward multiplies looked-up embeddings by before its first layer; 0 if it does more to them."""
    found: list[float] = []

    def look(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        for tensor in [*given, *named.values()]:
            if isinstance(tensor, torch.Tensor) and tensor.shape == embedded.shape and tensor.is_floating_point():
                factor = (tensor * embedded).sum().item() / max((embedded * embedded).sum().item(), 1e-12)
                if torch.allclose(tensor, embedded * factor, rtol=1e-4, atol=1e-6):
                    found.append(factor)

    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in model.modules()]
    try:
        run_model(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return next((factor for factor in found if factor != 1.0), 0.0)
