"""Safetensors files and index files; everything in a header or an index is checked."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from ..messages import shorten
from .checkpoint import DTYPES, Checkpoint, TensorInfo
from .errors import CheckpointError, unreadable
from .json_files import ADVICE, MAX_JSON_BYTES, inside, parse_json, read_json

MAX_DIMENSIONS = 64  # torch's own limit


class Problem(NamedTuple):
    """A problem of a checkpoint, as a sentence."""

    file: str
    message: str
    tensor: str = ""


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and metadata in the header of a safetensors file, checked against the file's size.

    Raises:
        CheckpointError: the header is invalid, or its tensors do not cover the data exactly.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{path}: the header claims {length:,} bytes, but the file has {size:,}: truncated, or not safetensors; "
                f"{ADVICE}"
            )
        header = parse_json(file.read(min(length, MAX_JSON_BYTES + 1)), path, "the header")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # the library accepts null
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the header's __metadata__ is not an object of strings; {ADVICE}")
    info: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{path}: tensor {name!r} lacks dtype, shape or data_offsets; {ADVICE}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} has the dtype {shorten(repr(dtype), 100)}, not one of {', '.join(DTYPES)}"
            )
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
            raise CheckpointError(
                f"{path}: tensor {name!r} has the shape {shorten(repr(shape), 100)}, not a list of sizes; {ADVICE}"
            )
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))):
            raise CheckpointError(
                f"{path}: tensor {name!r} has the offsets {shorten(repr(offsets), 100)}, not [begin, end]; {ADVICE}"
            )
        if dtype == "F4":  # torch counts bytes, with two numbers each
            if not shape or shape[-1] % 2:
                raise CheckpointError(
                    f"{path}: tensor {name!r} of 4-bit numbers has an odd shape {shorten(repr(shape), 100)}; {ADVICE}"
                )
            shape = [*shape[:-1], shape[-1] // 2]
        info[name] = TensorInfo(tuple(shape), DTYPES[dtype], path.name)
        if offsets[1] - offsets[0] != info[name].nbytes:
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {shorten(repr(shape), 100)} and dtype {dtype} needs {info[name].nbytes:,} bytes, its "
                f"offsets {offsets} hold {offsets[1] - offsets[0]:,}; {ADVICE}"
            )
        spans.append((offsets[0], offsets[1], name))
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            problem = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {name!r} begins at byte {begin:,}, which {problem}; {ADVICE}")
        end = stop
    if end != size - 8 - length:
        raise CheckpointError(
            f"{path}: its tensors end at byte {end:,} of the data, but the file has {size - 8 - length:,}: truncated or "
            f"with something appended; {ADVICE}"
        )
    return info, metadata


def open_safetensors(path: Path) -> Checkpoint:
    """A single safetensors file."""
    info, metadata = read_header(path)
    try:
        file = safe_open(path, framework="pt")
    except Exception as error:  # refused by the library, for a reason not checked above
        raise unreadable(path, "the file", error) from error
    aliases = _tied_names(info, metadata)
    part = (
        f"{path} is one process's part of a model that torch.distributed saved as safetensors: consolidate the files with "
        f"consolidate_safetensors_files(folder, new_folder) of torch.distributed.checkpoint._consolidate_hf_safetensors"
        if "DCP_SHARDING_INFO" in metadata
        else ""
    )
    return Checkpoint(path, "safetensors", info, file.get_tensor, aliases=aliases, part_of=part)


_PLAIN_METADATA = re.compile(
    r"^(name|title|author|description|license|tags?|trigger\w*|tokens?|base_model|architecture|version)$"
)


def _tied_names(info: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, str]:
    """Tied names recorded by `safetensors.torch.save_model`: alias → the name stored; other metadata is ignored.

    An alias ends like the name it is tied to (`lm_head.weight`, `wte.weight`), or all metadata are such pairs.
    """
    noted = {alias: name for alias, name in metadata.items() if alias != "format"}
    pairs = all(name in info for name in noted.values())
    return {
        alias: name
        for alias, name in noted.items()
        if name in info
        and alias not in info
        and (alias.rpartition(".")[2] == name.rpartition(".")[2] or (pairs and not _PLAIN_METADATA.match(alias)))
    }


def scan_index(
    index_path: Path, open_file: Callable[[Path], Checkpoint]
) -> tuple[dict[str, Checkpoint], list[Problem]]:
    """Compare an index with its shards; returns name → the shard that holds it, and the problems."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index_path}: it has no weight_map (tensor → file), so it is not the index of a checkpoint"
        )
    problems: list[Problem] = []
    homes: dict[str, Checkpoint] = {}
    shards: dict[str, Checkpoint] = {}
    names_in: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if isinstance(file, str):
            names_in.setdefault(file, []).append(name)
        else:
            message = f"{index_path}: weight_map gives {file!r} for tensor {name!r}, which is not a file name; {ADVICE}"
            problems.append(Problem(index_path.name, message, name))
    for file, names in names_in.items():
        try:
            path = inside(index_path.parent, file, index_path)
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing; {index_path.name} names it for {len(names)} tensors, the first is "
                    f"{names[0]!r}: copy or download the shard again"
                )
            if path.suffix == ".json":  # it might name itself
                raise CheckpointError(f"{path} is an index, and {index_path.name} names it as a shard; {ADVICE}")
            shards[file] = open_file(path)
        except CheckpointError as error:
            problems.append(Problem(file or index_path.name, str(error)))
    for file, shard in shards.items():
        noted = shard.aliases if shard.format == "safetensors" else {}  # not stored, only recorded in the header
        for name in shard.info:
            if name in noted:
                continue
            if name in homes:
                message = f"{shard.path}: tensor {name!r} is also in {homes[name].path.name}; {ADVICE}"
                problems.append(Problem(file, message, name))
            elif weight_map.get(name, file) != file:
                message = (
                    f"{shard.path}: tensor {name!r} is here, but in {weight_map[name]!r} by {index_path.name}; {ADVICE}"
                )
                problems.append(Problem(file, message, name))
            elif name not in weight_map:
                message = f"{shard.path}: tensor {name!r} is not in {index_path.name}; write the index again"
                problems.append(Problem(file, message, name))
            homes.setdefault(name, shard)
    for shard in shards.values():
        for alias in shard.aliases:
            homes.setdefault(alias, shard)
    for file, shard in shards.items():
        for name in names_in[file]:
            if name not in shard.info:
                message = f"{shard.path}: tensor {name!r} is missing; {index_path.name} says it is there: {ADVICE}"
                problems.append(Problem(file, message, name))
    return homes, problems


def open_index(index_path: Path, open_file: Callable[[Path], Checkpoint], format: str) -> Checkpoint:
    """The shards that an index file names, as one checkpoint."""
    homes, problems = scan_index(index_path, open_file)
    if problems:
        more = f" ({len(problems) - 1} more: see `mymodels check`)" if len(problems) > 1 else ""
        raise CheckpointError(problems[0].message + more)
    shards = {shard.path: shard for shard in homes.values()}
    folder = index_path.parent
    return Checkpoint(
        index_path,
        format,
        {n: shard.info[n]._replace(file=shard.path.relative_to(folder).as_posix()) for n, shard in homes.items()},
        lambda name: homes[name][name],
        aliases={
            alias: name for shard in shards.values() for alias, name in shard.aliases.items() if homes[alias] is shard
        },
    )
