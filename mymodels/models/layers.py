"""What MyGPT2 and MyBert share: the bridge over transformers releases, base classes, attention, packing, rotary positions.

This file is copied as it is into Hub repos and runs there without mymodels. It imports the standard library, torch
and transformers only.
"""

import inspect
from collections.abc import Callable
from itertools import groupby
from typing import Any, ClassVar

import torch
import transformers
from torch import nn

# ---- bridge over transformers 4.56 … 5.23: everything that differs between releases is here, and only here ----------

TRANSFORMERS_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if TRANSFORMERS_VERSION < (4, 56):
    raise ImportError(
        f"this model needs transformers 4.56 or newer (tested from 4.56 to 5.23), but transformers "
        f"{transformers.__version__} is installed: run `pip install --upgrade transformers`"
    )

from transformers import PretrainedConfig, PreTrainedModel, masking_utils  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as _ATTENTION_FUNCTIONS  # noqa: E402


def _bridge_mask(create_mask: Callable) -> Callable:
    """Give a mask builder of transformers one signature, whatever the release.

    Before 5.2 the keyword is `input_embeds`; `cache_position` is needed through 5.3, then ignored, then gone.
    """
    accepted = inspect.signature(create_mask).parameters

    def create(
        config, inputs_embeds, attention_mask, past_key_values=None, position_ids=None, cache_position=None, **kw
    ):
        kw.update(config=config, attention_mask=attention_mask, past_key_values=past_key_values)
        kw.update(position_ids=position_ids, cache_position=cache_position)
        kw["inputs_embeds" if "inputs_embeds" in accepted else "input_embeds"] = inputs_embeds
        return create_mask(**{name: value for name, value in kw.items() if name in accepted})

    return create


create_causal_mask = _bridge_mask(masking_utils.create_causal_mask)
create_sliding_window_causal_mask = _bridge_mask(masking_utils.create_sliding_window_causal_mask)

if hasattr(masking_utils, "create_bidirectional_mask"):  # 5.0 and newer
    create_bidirectional_mask = _bridge_mask(masking_utils.create_bidirectional_mask)
else:  # 4.56, 4.57: a causal mask opened in the forward direction too; padding is still taken out

    def create_bidirectional_mask(config, inputs_embeds, attention_mask, **kwargs):
        if attention_mask is None and not kwargs:
            return None
        return create_causal_mask(
            config,
            inputs_embeds,
            attention_mask,
            cache_position=torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device),
            or_mask_function=lambda batch, head, query, key: query >= 0,
            **kwargs,
        )


class _AttentionFunctions50:
    """4.56 … 5.0: the attention functions without `get_interface`, which later releases have."""

    @staticmethod
    def get_interface(name: str, default: Callable) -> Callable:
        return default if name == "eager" else _ATTENTION_FUNCTIONS[name]


# what is registered ("sdpa", "flash_attention_2", an engine's own, …); "eager" is the default that is given
ALL_ATTENTION_FUNCTIONS = (
    _ATTENTION_FUNCTIONS if hasattr(_ATTENTION_FUNCTIONS, "get_interface") else _AttentionFunctions50
)


class _TieWeights53(PreTrainedModel):
    """5.3 only: it forgets, for remote code, that a tied head is absent from the checkpoint, and then leaves it empty."""

    def tie_weights(self, missing_keys: set[str] | None = None, **kwargs: Any) -> None:
        if missing_keys is not None:
            missing_keys.update(name for name in self.all_tied_weights_keys if self.get_parameter(name).is_meta)
        super().tie_weights(missing_keys=missing_keys, **kwargs)


# names of tensor-parallel styles; the second one is needed to train, and not known before 5.3
SHARED_OUT_AND_GATHERED = "colwise_gather_output" if TRANSFORMERS_VERSION >= (5, 1) else "colwise_rep"
WHOLE_BUT_SEES_A_SHARE = "replicated_with_grad_allreduce" if TRANSFORMERS_VERSION >= (5, 3) else None

_Bridge = _TieWeights53 if TRANSFORMERS_VERSION == (5, 3) else PreTrainedModel

# ---- end of the bridge -----------------------------------------------------------------------------------------------

# torch 2.13 with MKL, seen here: the first exp or tanh of a process, if it is split over threads, is now and then off
# by up to 2e-3 (the threads race to pick a kernel). Making it once on one element first takes the race away.
for _function in (torch.exp, torch.tanh):
    _function(torch.zeros(1, device="cpu"))


class Plan:
    """A parallel plan that depends on a config's switches: read like an attribute, never saved with the config.

    One that is set on a config, by its `config.json` for example, goes before it.
    """

    def __init__(self, make: Callable[[Any], dict[str, Any]]):
        self.make, self.__doc__ = make, make.__doc__

    def __get__(self, config: Any, owner: Any = None) -> Any:
        return self if config is None else self.make(config)


def is_elsewhere(module: nn.Module) -> bool:
    """Whether pipeline parallelism has put a placeholder here (a kind of `Identity`): the module is on another stage."""
    return isinstance(module, nn.Identity) and type(module) is not nn.Identity


class MyPretrainedConfig(PretrainedConfig):
    """Base of both configs: a complete `auto_map`, GPT-2's and BERT's usual fields checked in one place.

    `AUTO_MAP` names the class behind every Auto class that the model serves. It goes into each saved `config.json`, so
    that any of them loads the folder, whichever head was saved.
    """

    AUTO_MAP: ClassVar[dict[str, str]] = {}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}  # field: its allowed values

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # 5.4 and newer make a dataclass of a config, whose `__init__` would take the place of an inherited one
        cls.__init__ = cls.__init__
        super().__init_subclass__(**kwargs)

    def _finish_init(self, auto_map: dict[str, Any] | None, **fields: Any) -> None:
        # Called after `PretrainedConfig.__init__`, which sets or drops some of these itself, differently by release.
        for name, value in fields.items():
            setattr(self, name, value)
        self.auto_map = {**self.AUTO_MAP, **(auto_map or {})}
        self.check_consistency()

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        # The code is saved beside the config, so a class is named by its file there, not by the repo it came from.
        auto_map = output.get("auto_map") or {}
        output["auto_map"] = {k: v.split("--")[-1] if isinstance(v, str) else v for k, v in auto_map.items()}
        return output

    def _require(self, condition: bool, field: str, need: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {field}={getattr(self, field)!r}, but it must be {need}")

    def _require_whole_heads(self, *fields: str) -> None:
        # set by `from_pretrained`; None: the plan of this config, a dict: the caller's own
        distributed = getattr(self, "distributed_config", None)
        size = getattr(distributed, "tp_size", None) or 1
        if not isinstance(getattr(distributed, "tp_plan", None), dict):
            for field in fields:
                need = f"a multiple of tp_size={size}: each of these processes takes whole heads"
                self._require(getattr(self, field) % size == 0, field, need)

    def check_consistency(self) -> None:
        """Raise a `ValueError` that names the first field whose value is impossible, with the value and the remedy."""
        for field, choices in self.CHOICES.items():
            self._require(getattr(self, field) in choices, field, f"one of {', '.join(map(repr, choices))}")
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            value = getattr(self, field)
            self._require(isinstance(value, int) and value > 0, field, "a positive integer")
        self._require(self.max_position_embeddings > 0, "max_position_embeddings", "a positive integer")


class MyPreTrainedModel(_Bridge):
    """Base of every model here: what it supports, and how its weights start."""

    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]

    def _init_weights(self, module: nn.Module) -> None:
        # `nn.init` on the parameter itself, leaf modules only: the loader guards exactly these calls, so that they
        # never touch a weight that came from a checkpoint.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = self.config.initializer_range
            if getattr(module, "is_residual_projection", False):
                # GPT-2 report, section 2.3: 1/√N for the N projections that write to the residual stream
                std /= (2 * self.config.num_hidden_layers) ** 0.5
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            padding_idx = getattr(module, "padding_idx", None)
            if padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.zeros_(module.weight[padding_idx])
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def _outputs_wanted(self, output_attentions: bool | None, output_hidden_states: bool | None) -> tuple[bool, bool]:
        """Resolve the two flags against the config; refuse attentions that the chosen function cannot return."""
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True needs attn_implementation='eager', but this model runs "
                f"{self.config._attn_implementation!r}: call model.set_attn_implementation('eager') first"
            )
        return bool(output_attentions), bool(output_hidden_states)

    def _runs_packed(self, device: torch.device, lengths: list[int] | None, *outputs_wanted: bool) -> bool:
        """Whether to run without padding: where values can be read at no cost, and no layer's states are asked for."""
        implementation = self.config._attn_implementation
        fast = device.type == "cpu" and implementation == "sdpa"
        needed = lengths is not None and "flash" in implementation  # which takes no mask that keeps sequences apart
        return (fast or needed) and readable() and not any(outputs_wanted)


NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for `attn_implementation="eager"`: the only one that returns its weights.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, kv_heads, keys, head_dim]`; each key/value head serves `heads // kv_heads` query heads.
        attention_mask: added to the scores, broadcastable to `[batch, heads, queries, keys]`.

    Returns:
        The mixed values `[batch, queries, heads, head_dim]` and the weights `[batch, heads, queries, keys]`.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def rotary_cos_sin(
    position_ids: torch.Tensor, head_dim: int, rope_theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary positions (RoFormer, arXiv 2104.09864), `[batch, length, head_dim]` each.

    Computed from `position_ids` (`[batch, length]`) at each call: a table kept as a buffer would not survive loading
    on the meta device under transformers 5.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None].float() * rope_theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn queries or keys `[batch, heads, length, head_dim]` by their positions; half i pairs with half i + d/2."""
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (states * cos[:, None] + turned * sin[:, None]).to(states.dtype)  # autocast: states may be narrower


def packed_sequence_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """Number the sequences packed in each row: a new one starts wherever positions do not go on by one.

    `[[0, 1, 2, 0, 1]]` → `[[0, 0, 0, 1, 1]]`.
    """
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return nn.functional.pad(starts, (1, 0)).cumsum(-1)


def readable() -> bool:
    """Whether values of tensors may be looked at: not while a graph is being captured."""
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def packed_lengths(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> list[int] | None:
    """Lengths of the sequences packed in rows of `position_ids` `[batch, length]`, row by row.

    None if each row is one sequence, if a mask says what sees what, or in a graph that is exported.
    """
    if position_ids is None or attention_mask is not None or EXPORTING() or torch.jit.is_tracing():
        return None
    return _read_lengths(position_ids)


@torch.compiler.disable  # a compiled model stops here to look, rather than take packed sequences for one
def _read_lengths(position_ids: torch.Tensor) -> list[int] | None:
    ids = packed_sequence_ids(position_ids)
    if not ids[:, -1:].any():
        return None
    return [length for row in ids for length in row.bincount().tolist()]


EXPORTING = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # the first: torch 2.7 and newer


def counts_padding(labels: torch.Tensor | None, attention_mask: Any) -> bool:
    """Whether some label other than -100 is for an output at padding, so that padding has to be computed too."""
    if labels is None or not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != labels.shape:
        return False
    return readable() and bool(((labels != -100) & (attention_mask == 0)).any())


def unpacked(packed: torch.Tensor, lengths: list[int], padding_value: float = 0) -> torch.Tensor:
    """Sequences of `lengths` out of packed rows `[batch, length, …]`, each in a row of its own, padded on the right."""
    return nn.utils.rnn.pad_sequence(packed.flatten(0, 1).split(lengths), True, padding_value)


def served_class(config: PretrainedConfig) -> str | None:
    """Under vLLM, which builds the base model alone and does a head's work itself: the class that was saved, by name."""
    if config._attn_implementation != "vllm":
        return None
    return config.architectures[0] if config.architectures else ""


class _FirstTokenLinear(nn.Linear):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states[:, 0])


def make_classifier(config: PretrainedConfig, bias: bool = True) -> nn.Linear:
    """A head from the hidden states to the labels.

    To vLLM's, pooled vectors come as `[sequences, 1, width]`: it is made for heads that pick the first token themselves.
    """
    head = nn.Linear if served_class(config) is None else _FirstTokenLinear
    return head(config.hidden_size, config.num_labels, bias=bias)


def lengths_for_engine(position_ids: torch.Tensor) -> list[int]:
    """Lengths of the sequences in the one row that vLLM runs.

    Raises:
        ValueError: in a compiled graph, where they cannot be read, and where padding may follow.
    """
    if not readable():
        raise ValueError("this pooling needs vLLM's eager mode: add --enforce-eager, or enforce_eager=True for LLM")
    return packed_lengths(position_ids, None) or [position_ids.shape[1]]


def spread(pooled: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """A vector per sequence, `[sequences, width]`, at each of its tokens, `[1, tokens, width]`.

    An engine that pools by a rule of its own, first token, last token or mean, then comes to that vector.
    """
    return pooled.repeat_interleave(torch.tensor(lengths, device=pooled.device), dim=0)[None]


class Packing:
    """Sequences laid end to end in one row, `[1, tokens]`, without padding, and the way back.

    Nothing is computed for padding, and each sequence attends to itself alone, without a mask.

    Args:
        lengths: tokens of each sequence, in their order in the row.
        shape: `(batch, length)` of what they come from.
        index: `[tokens]`, where each token stands in the flattened `[batch * length]`; None: in this very order.
    """

    def __init__(self, lengths: list[int], shape: tuple[int, int], index: torch.Tensor | None = None):
        self.shape, self.index, self.tokens = shape, index, sum(lengths)
        self.groups = [(length, len(list(same))) for length, same in groupby(lengths)]  # neighbours of one length

    @classmethod
    def find(
        cls, shape: tuple[int, int], attention_mask: Any, lengths: list[int] | None, right_padded: bool = False
    ) -> "Packing | None":
        """What a batch of `shape` holds, longest sequence first, or packed rows of sequences of `lengths`.

        None where nothing is gained or the mask says more than where padding is: no padding, or some amid the tokens.
        """
        if lengths is not None:
            return cls(lengths, shape)
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != shape or attention_mask.all():
            return None
        mask = attention_mask.bool()
        runs = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(dim=1)
        if (runs != 1).any() or (right_padded and not mask[:, 0].all()):
            return None
        ordered, order = mask.sum(dim=1).sort(descending=True, stable=True)
        rows, columns = mask[order].nonzero(as_tuple=True)
        index, lengths = order[rows] * shape[1] + columns, ordered.tolist()
        # oneDNN compiles kernels for each number of rows and keeps them, in the end half a gigabyte. So that numbers
        # recur, some tokens (at most 1 in 16) are there twice: as one more sequence, which `put` leaves out.
        step = 1 if torch.is_grad_enabled() else max(1, (1 << len(index).bit_length()) // 32)
        rest = -len(index) % step
        packing = cls(lengths + [rest] * (rest > 0), shape, torch.cat((index, index[:rest])))
        packing.tokens = len(index)
        return packing

    def take(self, padded: torch.Tensor | None) -> torch.Tensor | None:
        """`[batch, length, …]` → `[1, tokens, …]`; a batch of one row counts for all, None stays None."""
        if padded is None:
            return None
        flat = padded.expand(self.shape[0], *padded.shape[1:]).flatten(0, 1)
        return (flat if self.index is None else flat[self.index])[None]

    def put(self, packed: torch.Tensor) -> torch.Tensor:
        """`[1, tokens, width]` → `[batch, length, width]`, with zeros for padding."""
        flat = packed[0]
        if self.index is not None:
            index, flat = self.index[: self.tokens], flat[: self.tokens]
            flat = flat.new_zeros(self.shape[0] * self.shape[1], flat.shape[-1]).index_copy(0, index, flat)
        return flat.unflatten(0, self.shape)


def attend_apart(
    function: Callable,
    packing: Packing,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention `function` on a batch of one row, sequence by sequence, those of one length together.

    Shapes as in `eager_attention_forward`.
    """
    window = kwargs.get("sliding_window")
    kwargs.pop("position_ids", None)  # of the whole row
    start, pieces = 0, []
    for length, count in packing.groups:
        rows = slice(start, start := start + length * count)
        parts = [states[0, :, rows].unflatten(1, (count, length)).transpose(0, 1) for states in (query, key, value)]
        if window is not None and length > window:
            pieces.append(attend_in_blocks(function, module, *parts, None, **kwargs)[0].flatten(0, 1))
        else:
            pieces.append(function(module, *parts, None, **kwargs)[0].flatten(0, 1))
    return torch.cat(pieces)[None], None


def attends_in_blocks(config: PretrainedConfig, states: torch.Tensor, window: int | None) -> bool:
    """Whether a layer with this sliding window takes rows `[batch, heads, length, …]` in blocks, and needs no mask."""
    if window is None or config._attn_implementation != "sdpa" or not readable():
        return False
    return states.device.type == "cpu" and states.shape[2] > window


def attend_in_blocks(
    function: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    sliding_window: int,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention `function` on the last `sliding_window` tokens of each, in time that grows with the length and not with its square.

    A block of queries sees its own keys and the `sliding_window - 1` before them. Shapes as in `eager_attention_forward`.
    """
    rows, length = query.shape[0], query.shape[2]
    size = min(length, max(sliding_window, 64))
    blocks, before = -(-length // size), sliding_window - 1
    fill = blocks * size - length
    query = nn.functional.pad(query, (0, 0, 0, fill)).unflatten(2, (blocks, size))  # [B, H, blocks, size, D]
    key, value = (  # [B, K, blocks, before + size, D]
        nn.functional.pad(states, (0, 0, before, fill)).unfold(2, before + size, size).transpose(-1, -2)
        for states in (key, value)
    )
    parts = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    seen = torch.ones(size, before + size, dtype=torch.bool, device=query.device).triu().tril(before)
    seen = seen.repeat(rows, blocks, 1, 1)
    seen[:, 0, :, :before] = False  # nothing is before the first block
    kwargs["sliding_window"] = sliding_window
    mixed, _ = function(module, *parts, seen.flatten(0, 1)[:, None], **kwargs)  # [B × blocks, size, H, D]
    return mixed.unflatten(0, (rows, blocks)).flatten(1, 2)[:, :length], None


def check_ids(name: str, ids: torch.Tensor, limit: int, field: str) -> None:
    """Raise a `ValueError` if `ids` leave `[0, limit)`, where `limit` is the config's `field`.

    On the CPU and outside compilation only: elsewhere reading a value would stall the device or break the graph.
    """
    if ids.device.type != "cpu" or ids.numel() == 0 or not readable():
        return
    low, high = (bound.item() for bound in torch.aminmax(ids))
    if low < 0 or high >= limit:
        raise ValueError(
            f"{name} contains {low if low < 0 else high}, but this model has {field}={limit}: "
            f"valid values are 0 to {limit - 1}"
        )


def check_length(length: int, limit: int) -> None:
    """Raise a `ValueError` if an input of `length` tokens does not fit into a learned table of `limit` positions."""
    if not torch.compiler.is_compiling() and length > limit:
        raise ValueError(
            f"the input is {length} tokens long, but this model's learned position table ends at "
            f"max_position_embeddings={limit}: shorten the input (truncation=True, max_length={limit} in the tokenizer)"
        )
