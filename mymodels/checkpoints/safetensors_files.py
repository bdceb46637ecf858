"""Safetensors files and index files; everything in a header or an index is checked."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from ..messages import shorten
from .checkpoint import DTYPES, Checkpoint, CheckpointError, TensorInfo, unreadable

MAX_JSON_BYTES = 100_000_000  # the safetensors library's own limit for a header
MAX_DIMENSIONS = 64  # torch's own limit
ADVICE = "copy or download it again"


class Problem(NamedTuple):
    """A problem of a checkpoint, as a sentence."""

    file: str
    message: str
    tensor: str = ""


def parse_json(data: bytes, path: Path, what: str = "it") -> dict[str, Any]:
    """A JSON object, without duplicate keys, `NaN`, or text that is not Unicode.

    Raises:
        CheckpointError: it is not one, or larger than 100 MB.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{path}: {what} names {twice!r} twice; {ADVICE}")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {what} is {len(data):,} bytes of JSON, more than {MAX_JSON_BYTES:,}; {ADVICE}")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate such as "\ud800" cannot be encoded
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not valid JSON ({error}); {ADVICE}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} is a JSON {type(value).__name__}, not an object; {ADVICE}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`, as strictly as `parse_json`."""
    with path.open("rb") as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1), path)


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


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def inside(folder: Path, name: Any, where: Path) -> Path:
    """The file `name` of `folder`, if it is inside it; in the Hub's cache, links to its `blobs` are allowed.

    Raises:
        CheckpointError: `name` is absolute, or leads out of the folder by `..` or a link.
    """
    if not isinstance(name, str) or not name or _CONTROL.search(name) or "\\" in name:
        raise CheckpointError(f"{where}: {shorten(repr(name), 100)} is not a file name; {ADVICE}")
    try:
        root, path = folder.resolve(), (folder / name).resolve()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, or a cyclic link
        raise CheckpointError(
            f"{where}: {shorten(repr(name), 100)} cannot be a file name ({type(error).__name__}); {ADVICE}"
        ) from error
    allowed = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    if os.path.isabs(name) or ".." in Path(name).parts or not any(path.is_relative_to(home) for home in allowed):
        raise CheckpointError(f"{where}: {name!r} leads out of the folder; do not use a checkpoint that does this")
    return folder / name


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
