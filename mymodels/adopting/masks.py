"""Find out how a module excludes padding: by a mask argument and its form, or by a padding id."""

import torch

from ..checkpoints import CheckpointError
from .outputs import take
from .probing import LENGTH, MASK_FORMS, ROWS, Call, Prober, example_ids, is_mask, near

KEPT = LENGTH - 3  # tokens of the padded row


def find_mask(prober: Prober, call: Call, path: str, vocab: int) -> Call | None:
    """The call with a mask under which a padded row gives the same outputs as alone; None if there is no such mask.

    Raises:
        CheckpointError: a mask is required, and two forms of it that exclude padding give different outputs.
    """
    alone, padded = _rows(call, vocab)
    other = padded | {"input_ids": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, 1)}
    names = [name for name, role in call.arguments.items() if isinstance(role, str) and role in MASK_FORMS]
    candidates = [call] if any(isinstance(role, list) for role in call.arguments.values()) else []
    free = [name for name in prober.signature if is_mask(name) and name not in call.arguments]
    for name in [*names, *sorted(free, key=lambda n: (n != "attention_mask", "pad" not in n))]:
        candidates += [call._replace(arguments={**call.arguments, name: form}) for form in MASK_FORMS]
    proven: list[tuple[Call, torch.Tensor]] = []
    for candidate in candidates:
        try:
            plain = take((candidate if names else call).run(prober.module, alone), path)
            want = take(candidate.run(prober.module, alone), path)
            got = take(candidate.run(prober.module, padded), path)[:1]
            moved = take(candidate.run(prober.module, other), path)[:1]
        except Exception:
            continue
        if all(near(_cut(one, want), want) for one in (plain, got, moved)):
            proven.append((candidate, want))
            if not names:
                break
    if not proven:
        return None
    first, want = proven[0]
    for candidate, output in proven[1:]:  # in a causal model, padding on the right proves nothing
        if not near(output, want):
            raise _unclear(prober, names[0], str(first.arguments[names[0]]), str(candidate.arguments[names[0]]))
    torch_own = [name for name in free if "memory" in name]
    added = set(first.arguments) - set(call.arguments)
    if torch_own and added:  # the decoder's cross-attention uses the encoder's mask
        both = first.arguments | dict.fromkeys(torch_own, next(first.arguments[name] for name in added))
        first = first._replace(arguments=both)
    return first


def _unclear(prober: Prober, name: str, one: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"{prober.at_forward()}: forward needs {name}, and `{one}` and `{other}` give different outputs, so it is not clear "
        "which of them it expects: give it a default of None"
    )


def check_meaning(prober: Prober, call: Call, inputs: dict[str, torch.Tensor], path: str) -> None:
    """Check that the meaning of ones in a required mask is clear.

    Raises:
        CheckpointError: two forms of a mask that excludes nothing give different outputs.
    """
    for name in [n for n, role in call.arguments.items() if isinstance(role, str) and role in MASK_FORMS]:
        seen = {}
        for form in MASK_FORMS:
            try:
                other = call._replace(arguments={**call.arguments, name: form})
                output = take(other.run(prober.module, inputs), path)
            except Exception:
                continue
            if output.isfinite().all():
                seen[form] = output
        first = next(iter(seen), "")
        different = [form for form in seen if not near(seen[form], seen[first])]
        if different:
            raise _unclear(prober, name, first, different[0])


def find_pad(prober: Prober, call: Call, path: str, vocab: int, tables: list[int | None]) -> int | None:
    """The id that the module itself ignores after the tokens; None if there is none."""
    named = [v for n, v in prober.fields.items() if "pad" in n and type(v) is int]
    for pad in dict.fromkeys(v for v in [*named, *tables, 0] if v is not None and 0 <= v < vocab):
        alone, padded = _rows(call, vocab)
        for rows in (alone, padded):  # the id occurs only as padding
            rows["input_ids"] = rows["input_ids"].masked_fill(rows["input_ids"] == pad, (pad + 1) % vocab)
        ids = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, pad)
        try:
            want = take(call.run(prober.module, alone), path)
            got = take(call.run(prober.module, {**padded, "input_ids": ids}), path)[:1]
        except Exception:
            continue
        if near(_cut(got, want), want):
            return pad
    return None


def _rows(call: Call, vocab: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A row alone, and the same row padded in a batch with a longer one."""
    ids = example_ids(vocab, ROWS, LENGTH, 3)
    alone = {"input_ids": ids[:1, :KEPT], "attention_mask": torch.ones(1, KEPT, dtype=torch.long)}
    padded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded["attention_mask"][0, KEPT:] = 0
    for rows in (alone, padded):
        rows["token_type_ids"] = torch.zeros_like(rows["input_ids"])
        if "decoder_input_ids" in call.arguments.values():
            rows["decoder_input_ids"] = ids[: len(rows["input_ids"]), :4]
    return alone, padded


def _cut(output: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """The outputs at tokens, if there is one output per token."""
    if output.shape[1:2] == (LENGTH,) and want.shape[1:2] == (KEPT,):
        output = output[:, :KEPT]
    return output
