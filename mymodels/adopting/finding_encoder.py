"""Find out how an encoder-decoder can generate: whether its decoder is causal, and what of the encoder can be kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .outputs import take
from .probing import ROWS, Call, Prober, example_ids, near


def is_causal_decoder(prober: Prober, call: Call, inputs: dict[str, torch.Tensor], path: str) -> bool:
    """Whether no output depends on a later token of the target, tried at every token."""
    ids = inputs["decoder_input_ids"]
    before = take(call.run(prober.module, inputs), path)
    for place in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[:, place] = ids[:, place - 1] if (ids[:, place - 1] != ids[:, place]).all() else ids[:, place].flip(0)
        after = take(call.run(prober.module, {**inputs, "decoder_input_ids": changed}), path)
        if not near(before[:, :place], after[:, :place]):
            return False
    return True


def find_encoder(prober: Prober, call: Call, inputs: dict[str, torch.Tensor], path: str, vocab: int) -> str:
    """The module whose output is all that the decoder gets of the source but for masks; `""` if there is none.

    With its output for one source, the outputs for another source have to be those for the first, bit for bit.
    """
    module, want = prober.module, take(call.run(prober.module, inputs), path)
    other_source = {**inputs, "input_ids": example_ids(vocab, *inputs["input_ids"].shape, seed=5)}
    other_target = {**inputs, "decoder_input_ids": inputs["decoder_input_ids"].flip(1)}
    if torch.equal(take(call.run(module, other_source), path), want):
        return ""  # the outputs do not depend on the source, so nothing can be shown
    parts = {name: part for name, part in module.named_modules() if name and not isinstance(part, nn.Embedding)}
    ran, same = (_run_once(parts, module, call, given) for given in (inputs, other_target))
    for name in reversed([name for name in ran if name in same and torch.equal(ran[name], same[name])]):
        # recorded alone, because torch's encoder layers compute in another way when a part of theirs has a hook
        alone = _run_once({name: parts[name]}, module, call, inputs)[name]
        with _returning(parts[name], alone):
            try:
                got = take(call.run(module, other_source), path)
            except Exception:
                continue
        if got.shape == want.shape and torch.equal(got, want):
            return name
    return ""


def _run_once(
    parts: dict[str, nn.Module], module: nn.Module, call: Call, inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The output of each part that runs once and returns one tensor with the rows of the batch, in order."""
    found: dict[str, list[Any]] = {}

    def keep(name: str) -> Callable:
        return lambda part, args, output: found.setdefault(name, []).append(output)

    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    try:
        call.run(module, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    once = {name: outputs[0] for name, outputs in found.items() if len(outputs) == 1}
    return {
        name: output
        for name, output in once.items()
        if isinstance(output, torch.Tensor) and output.dim() > 1 and output.shape[0] == ROWS
    }


@contextmanager
def _returning(module: nn.Module, output: torch.Tensor) -> Iterator[None]:
    module.forward = lambda *args, **kwargs: output  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
