"""DeepSpeed's ZeRO folders: the float32 weights that are partitioned over ranks, joined a tensor at a time.

The partitions are in the ranks' `*_optim_states.pt`, one flat vector for each group of parameters; names and shapes, the
buffers and the frozen parameters are in `*_model_states.pt`. DeepSpeed's own `zero_to_fp32.py` gives the same tensors.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from .checkpoint import Checkpoint, CheckpointError, TensorInfo
from .plain_pickle import Unopened
from .safetensors_files import inside
from .torch_files import load_data

_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_MODEL_KEYS = {
    "module",
    "param_shapes",
    "buffer_names",
    "shared_params",
    "frozen_param_shapes",
    "frozen_param_fragments",
}
_COPY_ALL_RANKS = "copy the files of all ranks from one save"


def find_deepspeed(folder: Path) -> Path | None:
    """The folder of one save: `folder` itself or the one that its `latest` names; None if it is not DeepSpeed's.

    Raises:
        CheckpointError: `latest` names a missing folder, or the save is in DeepSpeed's universal layout.
    """
    if any(_MODEL.fullmatch(file.name) or _RANK.fullmatch(file.name) for file in folder.glob("*_states.pt")):
        return folder
    for name in ("latest", "latest_universal"):
        note = folder / name
        if not note.is_file() or note.stat().st_size > 1000:
            continue
        tag = note.read_text(encoding="utf-8", errors="replace").strip()
        inner = inside(folder, tag, note)
        if (inner / "zero").is_dir():
            _refuse_universal(inner)
        if inner.is_dir() and any(inner.glob("*_states.pt")):
            return inner
        if (folder / "zero_to_fp32.py").is_file():
            raise CheckpointError(f"{note} names {tag!r}, which is not in {folder}: copy that folder too")
    if any(folder.glob("zero/*/fp32.pt")):
        _refuse_universal(folder)
    return None


def _refuse_universal(folder: Path) -> NoReturn:
    raise CheckpointError(
        f"{folder} is a checkpoint in DeepSpeed's universal layout, which is not supported: name the folder it was made from, or "
        "load it with DeepSpeed (load_universal_checkpoint) and save it"
    )


def open_deepspeed(folder: Path) -> Checkpoint:
    """Open one save of DeepSpeed: of ZeRO stage 1, 2 or 3, or without ZeRO.

    Raises:
        CheckpointError: files of ranks are missing or of different saves, the model is also split by tensor
            parallelism, pipeline stages or experts, or its partitions do not have the size that the shapes need.
    """
    names = sorted(file.name for file in folder.glob("*.pt"))
    if split := [name for name in names if re.search(r"expert_\d+|^layer_\d+", name)]:
        raise CheckpointError(
            f"{folder} holds a model whose layers or experts are split over ranks ({split[0]}): join it with the "
            "training framework's own tool"
        )
    models = {int(found[1] or 0): name for name in names if (found := _MODEL.fullmatch(name))}
    ranks = {int(found[1]): name for name in names if (found := _RANK.fullmatch(name))}
    parallel = [name for name in names if (found := re.search(r"mp_rank_(\d+)", name)) and int(found[1])]
    if parallel:
        raise CheckpointError(
            f"{folder} holds a model split by tensor parallelism ({parallel[0]}): join it with the training framework's own tool"
        )
    if 0 not in models:
        raise CheckpointError(
            f"{folder} has no *mp_rank_00_model_states.pt, which names the tensors: {_COPY_ALL_RANKS}"
        )
    states = {rank: _load(folder / name) for rank, name in models.items()}
    first = states[0]
    if "ds_autoep_layers" in first or "autoep_layers" in first:
        raise CheckpointError(f"{folder} holds experts split over ranks by DeepSpeed's AutoEP, which is not supported")
    if not ranks:
        return _without_parts(folder, models[0], first)
    return _Zero(folder, ranks, models, states).open()


def _load(file: Path) -> Mapping[str, Any]:
    node = load_data(file)
    if not isinstance(node, Mapping):
        raise CheckpointError(f"{file} is not a file of DeepSpeed's: it holds a {type(node).__name__}")
    return node


def _without_parts(folder: Path, name: str, state: Mapping[str, Any]) -> Checkpoint:
    """A save without ZeRO, or without its optimizer files: the weights in the precision of training."""
    module = state.get("module")
    if not isinstance(module, Mapping):
        raise CheckpointError(f"{folder / name} has no 'module', the model's tensors: {_COPY_ALL_RANKS}")
    tensors = {key: value for key, value in module.items() if isinstance(value, torch.Tensor)}
    if not tensors or any(not value.numel() for value in tensors.values()):
        raise CheckpointError(
            f"{folder} has no *_optim_states.pt, where ZeRO stage 3 keeps the weights: {_COPY_ALL_RANKS}"
        )
    info = {key: TensorInfo(tuple(value.shape), value.dtype, name) for key, value in tensors.items()}
    what = "DeepSpeed, weights in the precision of training"
    return Checkpoint(folder, what, info, lambda key: tensors[key].detach(), extras=_extras(state))


def _extras(state: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in state.items() if key not in _MODEL_KEYS and value is not None}
    return {key: value for key, value in kept.items() if not isinstance(value, (Mapping, list, set)) or len(value)}


class _Zero:
    """The partitions of all ranks, and the position of each tensor in them."""

    def __init__(
        self, folder: Path, ranks: dict[int, str], models: dict[int, str], states: dict[int, Mapping[str, Any]]
    ):
        self.folder, self.models, self.states = folder, models, states
        loaded = {rank: _load(folder / name) for rank, name in sorted(ranks.items())}
        optimizers = [state.get("optimizer_state_dict") for state in loaded.values()]
        self.files = list(dict(sorted(ranks.items())).values())
        if not all(isinstance(one, Mapping) and "zero_stage" in one for one in optimizers):
            raise CheckpointError(
                f"{folder / self.files[0]} is not a state of ZeRO, it has no zero_stage: {_COPY_ALL_RANKS}"
            )
        self.optimizers: list[Mapping[str, Any]] = optimizers  # type: ignore[assignment]
        self.stage = _number(self.optimizers[0]["zero_stage"])
        counts = self.optimizers[0].get("partition_count", 0)
        counts = counts if isinstance(counts, (list, tuple)) else [counts]
        if len(set(counts)) > 1:
            raise CheckpointError(
                f"{folder}: its groups are split over {counts} ranks, as experts are: join it with DeepSpeed's tools"
            )
        self.world = _number(counts[0])
        if self.world != len(ranks) or set(ranks) != set(range(self.world)):
            raise CheckpointError(
                f"{folder} has {len(ranks)} *_optim_states.pt, but was saved by {self.world} ranks: {_COPY_ALL_RANKS}"
            )
        if self.stage not in (1, 2, 3):
            raise CheckpointError(f"{folder} is of ZeRO stage {self.stage}, which is not known")
        if self.stage == 3 and set(models) != set(range(self.world)):
            raise CheckpointError(
                f"{folder} has {len(models)} *_model_states.pt, but was saved by {self.world} ranks: {_COPY_ALL_RANKS}"
            )
        self.info: dict[str, TensorInfo] = {}
        self.reads: dict[str, Callable[[], torch.Tensor]] = {}

    def open(self) -> Checkpoint:
        state = self.states[0]
        for key in ("module", "param_shapes", "buffer_names"):
            if key not in state:
                raise CheckpointError(
                    f"{self.folder / self.models[0]} has no {key!r}, which names the tensors: {_COPY_ALL_RANKS}"
                )
        for name, value in state["module"].items():
            if name in state["buffer_names"] and isinstance(value, torch.Tensor):
                wide = value.float() if value.is_floating_point() else value
                self._add(name, tuple(value.shape), wide.dtype, self.models[0], partial(torch.Tensor.detach, wide))
        self._add_frozen(state.get("frozen_param_shapes") or {})
        shapes = state["param_shapes"]
        groups = [shapes] if isinstance(shapes, Mapping) else list(shapes)
        self._add_stage_3(groups) if self.stage == 3 else self._add_stage_2(groups)
        aliases = {}
        for alias, name in dict(state.get("shared_params") or {}).items():
            if name in self.info:
                aliases[alias] = name
        lost = [
            name
            for name in state["module"]
            if name not in self.info and name not in aliases and isinstance(state["module"][name], torch.Tensor)
        ]
        if lost:
            raise CheckpointError(
                f"{self.folder}: {len(lost)} tensors of the model, such as {lost[0]!r}, are in no rank's partition: {_COPY_ALL_RANKS}"
            )
        return Checkpoint(
            self.folder,
            f"DeepSpeed ZeRO stage {self.stage}, {self.world} rank{'s' if self.world > 1 else ''} joined",
            self.info,
            lambda name: self.reads[name](),
            aliases=aliases,
            extras=_extras(state),
        )

    def _add(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, file: str, read: Callable[[], torch.Tensor]
    ) -> None:
        self.info[name], self.reads[name] = TensorInfo(shape, dtype, file), read

    def _add_frozen(self, shapes: Mapping[str, Any]) -> None:
        """Frozen parameters are stored with the model: complete, or with stage 3 a fragment by each rank."""
        states = [self.states[rank] for rank in sorted(self.states)] if self.stage == 3 else [self.states[0]]
        for name, size in shapes.items():
            parts: list[Any] = [(state.get("frozen_param_fragments") or {}).get(name) for state in states]
            shape = tuple(size)
            if not all(isinstance(part, torch.Tensor) for part in parts) or sum(
                part.numel() for part in parts
            ) < math.prod(shape):
                raise CheckpointError(
                    f"{self.folder}: the frozen parameter {name!r} is not complete: {_COPY_ALL_RANKS}"
                )
            self._add(name, shape, parts[0].dtype, self.models[0], partial(_joined, parts, shape))

    def _flat(self, key: str) -> list[list[torch.Tensor]]:
        """Rank → group → the flat vector of its partition."""
        vectors = [optimizer.get(key) for optimizer in self.optimizers]
        for file, groups in zip(self.files, vectors):
            if not isinstance(groups, (list, tuple)) or not all(isinstance(one, torch.Tensor) for one in groups):
                raise CheckpointError(f"{self.folder / file} has no {key!r}, the float32 weights: {_COPY_ALL_RANKS}")
        if len({len(groups) for groups in vectors if groups is not None}) > 1:
            raise CheckpointError(
                f"{self.folder}: the ranks have different numbers of groups of parameters: {_COPY_ALL_RANKS}"
            )
        return [[one.detach().reshape(-1) for one in groups] for groups in vectors if groups is not None]

    def _add_stage_2(self, groups: list[Mapping[str, Any]]) -> None:
        """Stages 1 and 2: each group's flat vector is padded and split over the ranks, also within parameters."""
        flat = self._flat("single_partition_of_fp32_groups")
        if len(flat[0]) != len(groups):
            raise CheckpointError(
                f"{self.folder} has {len(groups)} groups of parameters by its model states and {len(flat[0])} by its optimizer "
                f"states: {_COPY_ALL_RANKS}"
            )
        paddings = self.optimizers[0].get("param_alignment_paddings")
        for number, shapes in enumerate(groups):
            pieces = [vectors[number] for vectors in flat]
            offset = 0
            for index, (name, size) in enumerate(shapes.items()):
                shape = tuple(size)
                count = math.prod(shape)
                self._add(
                    name,
                    shape,
                    pieces[0].dtype,
                    self.files[0],
                    partial(_read, [pieces], offset, count, shape),
                )
                offset += count + (int(paddings[number][index]) if paddings is not None else 0)
            self._check_size(offset, sum(piece.numel() for piece in pieces), 2 * self.world)

    def _add_stage_3(self, groups: list[Mapping[str, Any]]) -> None:
        """Stage 3: each parameter is padded and split separately; every rank has a piece of each, concatenated."""
        flat = self._flat("fp32_flat_groups")
        offset = 0
        for name, size in ((name, size) for shapes in groups for name, size in shapes.items()):
            shape = tuple(size)
            piece = math.ceil(math.prod(shape) / self.world)
            self._add(
                name,
                shape,
                flat[0][0].dtype,
                self.files[0],
                partial(_read, flat, offset, piece, shape),
            )
            offset += piece
        for vectors in flat:
            self._check_size(offset, sum(one.numel() for one in vectors), 1)

    def _check_size(self, used: int, available: int, multiple: int) -> None:
        if math.ceil(used / multiple) != math.ceil(available / multiple):
            raise CheckpointError(
                f"{self.folder}: the shapes in the model states need {used:,} elements, the partitions in the optimizer states "
                f"have {available:,}: {_COPY_ALL_RANKS}"
            )


def _number(value: Any) -> int:
    """An int, also if it was pickled as a member of DeepSpeed's enum of stages; -1 for anything else."""
    value = value.args[0] if isinstance(value, Unopened) and value.args else value
    return value if isinstance(value, int) else -1


def _cut(vectors: list[torch.Tensor], begin: int, count: int) -> list[torch.Tensor]:
    """Views of the `count` elements from `begin` of the concatenated vectors."""
    parts, start, end = [], 0, begin + count
    for vector in vectors:
        stop = start + vector.numel()
        if start < end and begin < stop:
            parts.append(vector[max(begin - start, 0) : min(end, stop) - start])
        start = stop
    return parts


def _read(sources: list[list[torch.Tensor]], begin: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor whose pieces begin at the same position in each of `sources`."""
    return _joined([part for vectors in sources for part in _cut(vectors, begin, count)], shape)


def _joined(parts: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    count = math.prod(shape)
    flat = torch.cat([part.reshape(-1) for part in parts]) if parts else torch.empty(0)
    return flat[:count].reshape(shape)
