"""LoRA adapters as PEFT saves them: describe them, and merge them into the weights of their base model."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, CheckpointError, TensorInfo
from .safetensors_files import read_json

CONFIG = "adapter_config.json"
_LORA_TENSOR = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?$"
)
_PREFIX = "base_model.model."
# Initialisations of LoRA that also change the base's weights, so that the adapter alone does not determine the result.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")


def adapter_config(folder: Path | None) -> dict[str, Any]:
    """The content of `adapter_config.json` in a folder; {} if there is none."""
    return read_json(folder / CONFIG) if folder is not None and (folder / CONFIG).is_file() else {}


def describe_adapter(config: Mapping[str, Any]) -> str | None:
    """The kind, rank and base of an adapter, as a phrase; None for an empty config."""
    if not config:
        return None
    rank, base = (
        config.get("r"),
        config.get("base_model_name_or_path") or "a base that adapter_config.json does not name",
    )
    kind = f"{config.get('peft_type') or 'PEFT'}{f' of rank {rank}' if rank else ''}"
    return f"{kind} for {base}: the base's weights are not included"


def merge_adapter(adapter: Checkpoint, config: Mapping[str, Any], base: Checkpoint) -> Checkpoint:
    """The base's checkpoint with a LoRA adapter merged in, as by PEFT's `merge_and_unload`.

    Each tensor is computed in float32 when it is read, and rounded once to the base's dtype.

    Args:
        adapter: the opened adapter.
        config: its `adapter_config.json`.
        base: the opened base.

    Raises:
        CheckpointError: the adapter is not LoRA, uses a feature that is not merged here, or has tensors that do not fit
            the base. All of this is checked before a tensor is read.
    """
    return _Merging(adapter, config, base).merged()


class _Merging:
    def __init__(self, adapter: Checkpoint, config: Mapping[str, Any], base: Checkpoint):
        self.adapter, self.config, self.base = adapter, config, base
        self.where = adapter.path
        self.fan_in_fan_out = bool(config.get("fan_in_fan_out"))

    def _unsupported(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: {what}: merge it with PEFT (PeftModel.from_pretrained(model, adapter).merge_and_unload())"
        )

    def merged(self) -> Checkpoint:
        config = self.config
        if str(config.get("peft_type")).upper() != "LORA":
            raise self._unsupported(f"it is a {config.get('peft_type')} adapter, and only LoRA is merged here")
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
            raise self._unsupported(f"it was initialised by {start}, which also changes the base's weights")
        for key in (
            "layer_replication",
            "trainable_token_indices",
            "target_parameters",
            "arrow_config",
            "alora_invocation_tokens",
        ):
            if config.get(key):
                raise self._unsupported(f"it uses {key}, which is not merged here")
        pairs: dict[str, dict[str, str]] = {}
        replaced: dict[str, str] = {}
        for name in self.adapter:
            found = _LORA_TENSOR.fullmatch(name)
            if found:
                pairs.setdefault(found[1], {})[found[2]] = name
            elif "lora_" in name:
                raise self._unsupported(f"tensor {name!r} is of a kind that is not merged here")
            else:
                replaced[self._in_base(name, required=False) or self._without_peft_prefixes(name)] = name
        info = dict(self.base.info)
        for name, own in replaced.items():
            kept = info.get(name)
            dtype = kept.dtype if kept is not None else self.adapter.info[own].dtype
            file = kept.file if kept is not None else self.adapter.info[own].file
            info[name] = TensorInfo(self.adapter.info[own].shape, dtype, file)
        deltas = {self._weight_of(module, parts, info): (module, parts) for module, parts in pairs.items()}
        aliases = {
            alias: name for alias, name in self.base.aliases.items() if alias not in replaced and alias not in deltas
        }
        reads: dict[str, Callable[[], torch.Tensor]] = {}
        for name, own in replaced.items():
            reads[name] = partial(self._replaced, own, info[name].dtype)
        for name, (
            module,
            parts,
        ) in deltas.items():  # an embedding may be in both: PEFT also saves the one it was trained on
            reads[name] = self._reader(reads.get(name, partial(self.base.__getitem__, name)), module, parts)
        return Checkpoint(
            self.base.path,
            f"{self.base.format} with {len(deltas)} LoRA matrices merged in"
            + (f" and {len(replaced)} tensors replaced" if replaced else ""),
            info,
            lambda name: reads[name]() if name in reads else self.base[name],
            aliases=aliases,
        )

    def _replaced(self, own: str, dtype: torch.dtype) -> torch.Tensor:
        return self.adapter[own].to(dtype)

    @staticmethod
    def _without_peft_prefixes(name: str) -> str:
        return name.removeprefix(_PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")

    def _in_base(self, name: str, *, required: bool = True) -> str | None:
        """The base's name of a tensor; checkpoints of models without a head have no base-model prefix."""
        plain = self._without_peft_prefixes(name)
        rest = plain.partition(".")[2]
        found = [one for one in (plain, rest) if one in self.base]
        if not found:
            found = [one for one in self.base if one.endswith(f".{plain}")]
        if len(found) == 1 or (found and found[0] == plain):
            return found[0]
        if required:
            raise CheckpointError(
                f"{self.where}: it changes {plain!r}, which {self.base.path} {'has several times' if found else 'does not have'}: name "
                f"the base it was trained on, {self.config.get('base_model_name_or_path') or 'which its config does not name'}"
            )
        return None

    def _weight_of(self, module: str, parts: dict[str, str], info: Mapping[str, TensorInfo]) -> str:
        """The base's name of the weight that a pair of matrices changes; checks their shapes."""
        name = self._in_base(f"{module}.weight")
        assert name is not None
        first, second = (
            ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts else ("lora_A", "lora_B")
        )
        if not {first, second} <= parts.keys():
            raise CheckpointError(f"{self.where}: {module!r} has only {', '.join(parts)}: copy the adapter again")
        a, b = self.adapter.info[parts[first]].shape, self.adapter.info[parts[second]].shape
        if len(a) != 2 or len(b) != 2:
            raise self._unsupported(f"{module!r} is a convolution, which is not merged here")
        shape = (b[0], a[1])
        stored = info[name].shape
        transposed = self._is_transposed(parts)
        if a[0] != b[1] or (shape[::-1] if transposed else shape) != stored:
            raise CheckpointError(
                f"{self.where}: {module!r} changes a matrix of {shape[::-1] if transposed else shape}, but {name!r} of "
                f"{self.base.path} has {stored}: name the base it was trained on"
            )
        if not self.base.info[name].dtype.is_floating_point:
            raise CheckpointError(
                f"{self.base.path}: {name!r} is {self.base.info[name].dtype}: use the base that is not quantised"
            )
        if "lora_magnitude_vector" in parts and first != "lora_A":
            raise self._unsupported(f"{module!r} is an embedding with DoRA, which is not merged here")
        return name

    def _is_transposed(self, parts: dict[str, str]) -> bool:
        return "lora_embedding_A" in parts or self.fan_in_fan_out

    def _scaling(self, module: str, rank: int) -> float:
        plain = module.removeprefix(_PREFIX)
        r = _by_pattern(self.config.get("rank_pattern"), plain, self.config.get("r") or rank)
        alpha = _by_pattern(self.config.get("alpha_pattern"), plain, self.config.get("lora_alpha") or r)
        if r != rank:
            raise CheckpointError(
                f"{self.where}: the matrices of {module!r} have rank {rank}, {CONFIG} says {r}: copy both from one save"
            )
        return alpha / math.sqrt(r) if self.config.get("use_rslora") else alpha / r

    def _reader(
        self, before: Callable[[], torch.Tensor], module: str, parts: dict[str, str]
    ) -> Callable[[], torch.Tensor]:
        embedding = "lora_embedding_A" in parts
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        scaling = self._scaling(module, self.adapter.info[parts[first]].shape[0])
        transposed = self._is_transposed(parts)

        def read() -> torch.Tensor:
            weight = before()
            delta = self.adapter[parts[second]].float() @ self.adapter[parts[first]].float() * scaling
            full = weight.float() + (delta.T if transposed else delta)
            if "lora_magnitude_vector" in parts:  # DoRA: scale each output's row to the learnt norm
                rows = full.T if transposed else full
                magnitude = self.adapter[parts["lora_magnitude_vector"]].float().reshape(-1, 1)
                rows = rows * (magnitude / rows.norm(dim=1, keepdim=True))
                full = rows.T if transposed else rows
            return full.to(weight.dtype).contiguous()

        return read


def _by_pattern(patterns: Any, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def merged_config(config: dict[str, Any], base: Checkpoint, merged: Checkpoint) -> dict[str, Any]:
    """The base's `config.json`, changed for the merged weights: a separately trained head is untied."""
    changed = dict(config)
    new = [name for name in merged if name not in base or (name in base.aliases and name not in merged.aliases)]
    if config.get("tie_word_embeddings", True) and any(
        re.search(r"(lm_head|decoder|output)\.weight$", name) for name in new
    ):
        changed["tie_word_embeddings"] = False
    rows = [
        (base.info[name].shape[0], info.shape[0])
        for name, info in merged.info.items()
        if name in base and base.info[name].shape != info.shape
    ]
    if (
        rows
        and all(before == config.get("vocab_size") for before, _ in rows)
        and len({after for _, after in rows}) == 1
    ):
        changed["vocab_size"] = rows[0][1]
    return changed
