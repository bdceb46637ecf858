"""Two checkpoints compared tensor by tensor."""

import re
from collections import Counter
from typing import Any

import torch
from tqdm import tqdm

from .checkpoint import Checkpoint, widened


def compare_checkpoints(a: Checkpoint, b: Checkpoint) -> list[dict[str, Any]]:
    """Compare two checkpoints, reading one tensor at a time from each.

    If the names of one checkpoint are those of the other with a prefix, as with and without a head, they are paired.

    Returns:
        a row for each tensor of either, with `name`, `status` (`"equal"`, `"prefix"`: equal, under names that differ by a prefix, `"dtype"`: equal
        values, `"different"`, `"shape"`, `"missing"`: only in `a`, `"extra"`: only in `b`), `a` and `b` (shape and
        dtype), `prefix` where there is one (`{"a": …}` or `{"b": …}`), and `max_difference` where both have the same shape.
    """
    rows = []
    side, prefix = _prefix(a, b)
    pairs: dict[str, tuple[str, str]] = {}
    if prefix:
        short, long = (b, a) if side == "a" else (a, b)
        for name in short:
            if name not in long and prefix + name in long:
                pairs[name] = (prefix + name, name) if side == "a" else (name, prefix + name)
    paired = {name for pair in pairs.values() for name in pair}
    names = [name for name in dict.fromkeys([*a, *b]) if name not in paired]
    for name in tqdm([*pairs, *names], desc="comparing", unit="tensor", disable=None):
        first, second = pairs.get(name, (name, name))
        left, right = a.info.get(first), b.info.get(second)
        row: dict[str, Any] = {"name": name, "max_difference": None}
        row |= {key: f"{i.dtype_name} {list(i.shape)}" if i else None for key, i in (("a", left), ("b", right))}
        row |= {"prefix": {side: prefix}} if name in pairs else {}
        if left is None or right is None:
            row["status"] = "extra" if left is None else "missing"
        elif left.shape != right.shape:
            row["status"] = "shape"
        else:
            row["max_difference"] = max_difference(a[first], b[second])
            same = "dtype" if left.dtype != right.dtype else "prefix" if name in pairs else "equal"
            row["status"] = same if row["max_difference"] == 0 else "different"
        rows.append(row)
    return rows


def _prefix(a: Checkpoint, b: Checkpoint) -> tuple[str, str]:
    """The side (`"a"` or `"b"`) whose names are mostly the other's with a prefix, and that prefix; else `("", "")`."""
    best = ("", "")
    most = 0
    for side, long, short in (("a", a, b), ("b", b, a)):
        alone = [name for name in short if name not in long]
        counts: Counter[str] = Counter()
        for name in long:
            for match in re.finditer(r"\.", name) if name not in short else ():
                if (
                    (rest := name[match.end() :]) in short
                    and rest not in long
                    and long.info[name].shape == short.info[rest].shape
                ):
                    counts[name[: match.end()]] += 1
        prefix, count = counts.most_common(1)[0] if counts else ("", 0)
        if count > most and 2 * count > len(alone):
            best, most = (side, prefix), count
    return best


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference of two tensors of one shape; NaN where only one of them is NaN."""
    a, b = widened(a), widened(b)
    if a.dtype == b.dtype and torch.equal(a, b):
        return 0.0
    if not any(tensor.is_floating_point() or tensor.is_complex() for tensor in (a, b)):
        return float((a.long() - b.long()).abs().max())
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    left, right = a.to(wide), b.to(wide)
    same = (left == right) | (left.isnan() & right.isnan())
    return torch.where(same, 0.0, (left - right).abs()).max().item() if left.numel() else 0.0
