"""Layouts of stored tensors: transposed, fused matrices, all experts in one. For reading and writing."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..lazy_tensor import Value

# how the code of these model types reads its fused projections
_BY_HEAD = {"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"}
_STACKED = {"gpt2", "phi3", "modernbert", "mpt", "openai-gpt", "glm", "dbrx", "imagegpt", "clvp", "phi4_multimodal"}
_STACKED_NAMES = re.compile(r"^(c_attn|qkv_proj|Wqkv|in_proj|gate_up_proj|w13)$")
_ALTERNATING = {"gpt_oss"}


@dataclass(frozen=True)
class Layout:
    """How a tensor stores its parts, each of which is [out, in], or [out] for a bias.

    Attributes:
        arrangement: `"alone"`; `"stacked"`: one part's rows after the other's; `"by head"`: each key/value head has its
            rows of all parts together (GPT-NeoX, BLOOM; with several query heads for one key/value head also Falcon).
        transposed: stored [in, out], as `Conv1D` has it.
        rows: of each part.
        heads: number of key/value heads, for `"by head"`.
        experts: of a tensor that holds all experts their number; each has all parts.
        offset: rows in front that are no part: of a table of positions, those before position 0.
    """

    arrangement: str = "alone"
    transposed: bool = False
    rows: tuple[int, ...] = ()
    heads: int = 0
    experts: int = 0
    offset: int = 0

    @property
    def describes(self) -> str:
        return {"alone": "", "stacked": "stacked", "by head": "interleaved by head"}[self.arrangement]

    def read(self, value: Value, part: int) -> Value:
        """One part of a stored tensor."""
        if self.experts:
            expert, part = divmod(part, len(self.rows))
            value = value.then(f"expert {expert} of {self.experts}", lambda t: t[expert], value.shape[1:])
        if self.transposed:
            value = value.then("transposed", torch.t, value.shape[::-1])
        if self.offset:
            value = value.rows("rows before position 0 cut", slice(self.offset, None), resized=True)
        if len(self.rows) < 2:
            return value
        shape, heads = (self.rows[part], *value.shape[1:]), self.heads
        start = sum(self.rows[:part])
        if self.arrangement == "stacked":
            return value.then(f"split in {len(self.rows)}", lambda t: t[start : start + shape[0]], shape)
        first, size = start // heads, shape[0] // heads
        return value.then(
            f"split in {len(self.rows)}, head by head",
            lambda t: t.view(heads, -1, *t.shape[1:])[:, first : first + size].reshape(shape),
            shape,
        )

    def write(self, parts: Sequence[Value], shape: tuple[int, ...], before: Value | None = None) -> Value:
        """The stored tensor from its parts; `before`: the tensor with the leading rows to keep."""
        if len(parts) == 1 and not self.experts:
            return self._alone(parts[0], shape, before)
        step = f"{len(self.rows)} fused" + (", head by head" if self.arrangement == "by head" else "")
        step = f"{self.experts} experts in one tensor" if self.experts else step

        def join(first: torch.Tensor) -> torch.Tensor:
            tensors = [first, *(part.compute() for part in parts[1:])]
            if not self.experts:
                return self._fuse(tensors)
            count = len(self.rows)
            each = [tensors[i : i + count] for i in range(0, len(tensors), count)]
            return torch.stack([self._fuse(expert) if count > 1 else self._turned(expert[0]) for expert in each])

        made = parts[0].then(step, join, shape, using=parts[1:])
        steps = dict.fromkeys([*(step for part in parts for step in part.steps), step])
        return Value(
            shape, made.dtype, made.compute, made.sources, tuple(steps), made.kind,
            any(part.resized for part in parts), any(part.partly_new or not part.sources for part in parts),
        )  # fmt: skip

    def _alone(self, part: Value, shape: tuple[int, ...], before: Value | None) -> Value:
        if self.transposed:
            return part.then("transposed", torch.t, part.shape[::-1])
        if self.offset and before is not None:
            front = before
            return part.then(
                f"after {self.offset} rows for padding, which stay as they were",
                lambda t: torch.cat((front.compute()[: self.offset].to(t), t)),
                (part.shape[0] + self.offset, *part.shape[1:]),
                resized=True,
            )
        return part

    def _fuse(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.arrangement == "by head":
            heads = self.heads
            grouped = [tensor.view(heads, -1, *tensor.shape[1:]) for tensor in tensors]
            return self._turned(torch.cat(grouped, dim=1).flatten(0, 1))
        return self._turned(torch.cat(list(tensors)))

    def _turned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.t() if self.transposed else tensor


def arrangement_of(model_type: str, module: str, *, multi_query: bool, new_falcon: bool, code: str) -> tuple[str, bool]:
    """How a fused projection is arranged, and whether that is known or only usual for its name; `""`: unknown.

    Args:
        model_type: of its config; empty if none is known.
        module: the last part of its module's name.
        multi_query: one key/value head for all; `new_falcon`: Falcon's `new_decoder_architecture`.
        code: the source text of the module that has it, if known.
    """
    if model_type == "falcon":
        return ("stacked" if multi_query and not new_falcon else "by head"), True
    if model_type == "gpt_bigcode":
        return ("stacked" if multi_query else "by head"), True
    if model_type in _BY_HEAD:
        return "by head", True
    if model_type in _STACKED or module == "in_proj":
        return "stacked", True
    if model_type in _ALTERNATING:
        return "", True
    if module == "qkv_by_head":
        return "by head", True
    if module == "gate_up_proj" and model_type:
        return "stacked", True
    if _STACKED_NAMES.match(module) or re.search(r"\.chunk\(\s*[23]\b|\.split\(|\.tensor_split\(\s*3", code):
        return "stacked", False
    return "", False
