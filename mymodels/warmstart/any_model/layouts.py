"""Layouts of stored tensors: transposed, fused matrices, all experts in one. For reading and writing."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..lazy_tensor import Value

# how the code of these model types reads its fused projections
_BY_HEAD = {"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "deberta"}
_STACKED = {
    "gpt2", "phi3", "modernbert", "mpt", "openai-gpt", "dbrx", "imagegpt", "clvp", "phi4_multimodal", "decision_transformer",
    "layoutlmv2",
}  # fmt: skip
_CODEGEN = (4, (0, 2, 1))  # four blocks of queries, values, keys, whatever the number of heads
_STACKED_NAMES = re.compile(r"^(c_attn|Wqkv|gate_up_proj|w13)$")
_SPLIT_BY_HEAD = re.compile(r"3 *\* *(?:self\.)?\w*head_\w+|, *3, *(?:self\.)?\w*head\w*\)|, *3, *-1\)|\.unflatten\(")
_SPLIT = re.compile(r"\.chunk\(\s*[23]\b|\.split\(|\.tensor_split\(\s*3")
_ALTERNATING = {"gpt_oss"}


@dataclass(frozen=True)
class Layout:
    """How a tensor stores its parts, each of which is [out, in], or [out] for a bias.

    Attributes:
        transposed: stored [in, out], as `Conv1D` has it.
        rows: of each part.
        blocks: how many blocks follow each other, each with its share of all parts' rows. 1: the parts are stacked. As
            many as key/value heads: interleaved by head (GPT-NeoX, BLOOM, Falcon). CodeGen has 4.
        order: of the parts in a block; default: as they are named.
        experts: of a tensor that holds all experts their number; each has all parts.
        offset: rows in front that are no part: of a table of positions, those before position 0.
    """

    transposed: bool = False
    rows: tuple[int, ...] = ()
    blocks: int = 1
    order: tuple[int, ...] = ()
    experts: int = 0
    offset: int = 0

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
        shape, blocks = (self.rows[part], *value.shape[1:]), self.blocks
        first, size = self._start(part), shape[0] // blocks
        return value.then(
            f"split in {len(self.rows)}{self._blockwise()}",
            lambda t: t.reshape(blocks, -1, *t.shape[1:])[:, first : first + size].reshape(shape),
            shape,
        )

    def _ordered(self) -> tuple[int, ...]:
        return self.order or tuple(range(len(self.rows)))

    def _start(self, part: int) -> int:
        """Where a part begins in each block."""
        order = self._ordered()
        return sum(self.rows[other] for other in order[: order.index(part)]) // self.blocks

    def _blockwise(self) -> str:
        return "" if self.blocks == 1 else f", in each of {self.blocks} blocks"

    def write(self, parts: Sequence[Value], shape: tuple[int, ...], before: Value | None = None) -> Value:
        """The stored tensor from its parts; `before`: the tensor with the leading rows to keep."""
        if len(parts) == 1 and not self.experts:
            return self._alone(parts[0], shape, before)
        step = f"{len(self.rows)} fused{self._blockwise()}"
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
        grouped = [tensors[part].reshape(self.blocks, -1, *tensors[part].shape[1:]) for part in self._ordered()]
        return self._turned(torch.cat(grouped, dim=1).flatten(0, 1))

    def _turned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.t() if self.transposed else tensor


def known_arrangement(
    model_type: str, module: str, parts: int, kv_heads: int, new_falcon: bool
) -> tuple[int, tuple[int, ...]] | None:
    """The blocks and the order of a fused projection's parts, of model types whose code is known; None: unknown.

    Args:
        module: the last part of its module's name, or a name that `rename=` gives.
        kv_heads: number of key/value heads; 0 if unknown.
        new_falcon: Falcon's `new_decoder_architecture`.
    """
    by_head = (kv_heads, ()) if kv_heads else None
    if module == "qkv_by_head":
        return by_head
    if parts == 2:
        return (1, ()) if model_type and module == "gate_up_proj" and model_type not in _ALTERNATING else None
    if model_type == "codegen":
        return _CODEGEN
    if model_type in ("falcon", "gpt_bigcode"):
        return (1, ()) if kv_heads == 1 and not new_falcon else by_head
    if model_type in _BY_HEAD:
        return by_head
    return (1, ()) if model_type in _STACKED else None


def is_usually_stacked(module: str, code: str) -> bool:
    """Whether a name or code that could not be run makes it likely that the parts are stacked."""
    if code:
        return bool(_SPLIT.search(code)) and not _SPLIT_BY_HEAD.search(code)
    return bool(_STACKED_NAMES.match(module))
