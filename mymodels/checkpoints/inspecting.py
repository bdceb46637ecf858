"""What is in a checkpoint or a Hub folder, as data and as tables; nothing in it is executed."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from ..messages import one_line, printable
from .adapters import adapter_config, describe_adapter
from .checkpoint import Checkpoint, widened
from .opening import locate, open_checkpoint
from .plain_pickle import Unopened
from .quantised import quantisation
from .quantised_sizes import packed_weights
from .safetensors_files import read_json
from .torch_files import Leaf, unread

_PURPOSES = (
    (r"^\.metadata$", "which file holds which tensor"),
    (r"^config\.json$", "architecture and settings"),
    (r"^generation_config\.json$", "defaults of generate()"),
    (r"\.index\.json$", "which shard holds which tensor"),
    (r"^golden\.safetensors$", "recorded inputs and outputs that prove a load"),
    (r"^adapter_", "adapter (PEFT)"),
    (r"\.safetensors$", "weights"),
    (r"^pytorch_model.*\.bin$", "weights (pickle)"),
    (r"^(optimizer|scheduler|scaler|rng_state)", "training state"),
    (r"^training_args\.bin$", "training arguments (pickle)"),
    (r"^trainer_state\.json$", "training history"),
    (r"\.(pt|pth|bin|tar|ckpt)$", "PyTorch file (pickle)"),
    (r"\.(h5|msgpack|onnx|gguf|npz|tflite|ot|pt2)$|\.ckpt|\.data-\d+-of-\d+$|\.distcp$", "weights of another format"),
    (r"^manifest\.json$", "size and SHA-256 of every file"),
    (r"^configuration_.*\.py$", "code: configuration"),
    (r"^modeling_.*\.py$", "code: model"),
    (r"^tokenization_.*\.py$", "code: tokenizer"),
    (r"\.py$", "code"),
    (r"^(tokenizer|vocab|merges|spiece|special_tokens|added_tokens)|\.model$", "tokenizer"),
    (r"^chat_template", "chat template"),
    (r"^(preprocessor|processor)_config\.json$", "preprocessing"),
    (r"^README\.md$", "model card"),
    (r"^LICENSE", "license"),
    (r"^\.gitattributes$", "Git LFS settings"),
)


def inspect_checkpoint(
    path: str | os.PathLike,
    *,
    section: str | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    duplicates: bool = True,
) -> dict[str, Any]:
    """All that `mymodels inspect` shows, as JSON-ready data.

    Args:
        path: what `open_checkpoint` opens; `section`, `allow_pickle` and `revision` are its.
        duplicates: read the tensors to find those with the same bytes.

    Returns:
        `path`, `format`, `parameters`, `bytes`, `dtypes` (name → parameters), `modules` (name → parameters), `tensors`
        (name → shape, dtype, file), `tied` (name → the name stored), `duplicates` (lists of names with equal bytes),
        `sections` (name → number of tensors), `extras` (name → description), `quantisation` (how, or None),
        `quantised_modules` (name → parameters, of GPTQ, AWQ and bitsandbytes; `parameters` counts these unpacked, and not
        their scales), `adapter` (of
        which base, or None), `part_of` (why
        this is only a part of a model, or ""), `left_out` (files of weights in the folder that were not opened); of a folder also `files` (name → size,
        purpose) and `auto_map` (class → file, whether it exists).

    Raises:
        CheckpointError, FileNotFoundError: as `open_checkpoint`.
    """
    where = locate(path, revision=revision)
    folder = where if where.is_dir() else None
    opened = open_checkpoint(where, section=section, allow_pickle=allow_pickle)
    beside = where if folder else where.parent
    config = read_json(beside / "config.json") if (beside / "config.json").is_file() else None
    stored = {name: info for name, info in opened.info.items() if name not in opened.aliases}
    dtypes: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    packed = packed_weights(opened, config)
    for name, info in stored.items():
        dtypes[info.dtype_name] += info.numel
        if packed is None or name not in packed.beside | packed.packed:
            modules[_module(name)] += info.numel
    for module, count in packed.modules.items() if packed else ():
        modules[_module(f"{module}.weight")] += count
    return {
        "path": str(path),
        "format": opened.format,
        "parameters": sum(modules.values()),
        "bytes": sum(info.nbytes for info in stored.values()),
        "dtypes": dict(dtypes.most_common()),
        "modules": dict(modules),
        "sections": {name or "(top)": len(names) for name, names in opened.sections.items()},
        "extras": {
            name: describe(value) for name, value in {**unread(opened.extras), **_trainer_state(folder)}.items()
        },
        "quantisation": quantisation(opened, config)
        or (opened.extras.get("quantisation") and "GGUF, read dequantised"),
        "quantised_modules": packed.modules if packed else {},
        "adapter": describe_adapter(adapter_config(beside)),
        "part_of": opened.part_of,
        "left_out": opened.left_out,
        "tied": opened.aliases,
        "duplicates": _duplicates(opened) if duplicates else [],
        "tensors": {
            name: {"shape": list(info.shape), "dtype": info.dtype_name, "file": info.file}
            for name, info in opened.info.items()
        },
        **({"files": _files(folder), "auto_map": _auto_map(folder)} if folder else {}),
    }


def _trainer_state(folder: Path | None) -> dict[str, Any]:
    """How far transformers' Trainer was when it wrote this folder."""
    if folder is None or not (folder / "trainer_state.json").is_file():
        return {}
    state = read_json(folder / "trainer_state.json")
    return {
        key: state[key] for key in ("epoch", "global_step", "max_steps", "best_metric") if state.get(key) is not None
    }


def _module(name: str) -> str:
    """The module of a tensor, layers with their number left open: `model.layers.*.self_attn`."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")[:-1]]
    depth = parts.index("*") + 2 if "*" in parts else 2
    return ".".join(parts[:depth]) or name


def describe(value: Any) -> str:
    """One line on something that is no tensor of the model: what it is, and its value if that is short."""
    if isinstance(value, Leaf):
        return f"tensor {value.info.shape}"
    if isinstance(value, Unopened):
        return f"{_short(value, 200)}, not opened: its class was not imported"
    if isinstance(value, torch.Tensor):
        return (
            f"{value.item():.6g}" if value.numel() == 1 and not value.is_complex() else f"tensor {tuple(value.shape)}"
        )
    if isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys():
        groups = value["param_groups"]
        rates = ", ".join(
            f"{group['lr']:.3g}" for group in _values(groups) if isinstance(group, Mapping) and "lr" in group
        )
        count = len(_values(value["state"]))
        return f"optimizer: state of {count} parameters, {len(_values(groups))} groups" + (
            f", lr {rates}" if rates else ""
        )
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key}: {_short(item)}" for key, item in list(value.items())[:6])
        return f"{inner}{', …' if len(value) > 6 else ''}" if value else "empty"
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
        return "; ".join(describe(item) for item in value)
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"{type(value).__name__} of {len(value)}"
    return _short(value, 200)


def _values(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, Mapping) else list(container)


def _short(value: Any, width: int = 40) -> str:
    if isinstance(value, Leaf):
        return f"tensor {value.info.shape}"
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)}"
    if isinstance(value, (Mapping, list, tuple)) and len(value) > 4:
        return f"{type(value).__name__} of {len(value)}"
    return one_line(value, width)


def _duplicates(checkpoint: Checkpoint) -> list[list[str]]:
    """Groups of tensors that are stored several times with the same bytes; constant ones, as fresh norms are, apart."""
    alike = defaultdict(list)
    for name, info in checkpoint.info.items():
        if name not in checkpoint.aliases and info.numel > 1:
            alike[info.shape, info.dtype].append(name)
    candidates = [name for names in alike.values() if len(names) > 1 for name in names]
    found = defaultdict(list)
    for name in tqdm(candidates, desc="comparing", unit="tensor", disable=None):
        tensor = checkpoint[name]
        if tensor.layout != torch.strided or tensor.is_quantized:
            continue
        data = tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
        size = tensor.dtype.itemsize
        if not torch.equal(data[size:], data[:-size]):  # not one value throughout
            found[checkpoint.info[name].shape, hashlib.sha256(data.numpy().data).digest()].append(name)
    return [names for names in found.values() if len(names) > 1]


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: {"size": (folder / name).stat().st_size, "purpose": _purpose(name)} for name in names}


def _purpose(name: str) -> str:
    base = name.rsplit("/", 1)[-1]
    return next((text for pattern, text in _PURPOSES if re.search(pattern, base)), "unknown: loading does not need it")


def _auto_map(folder: Path) -> dict[str, dict[str, Any]]:
    """Auto class → the file its code is in, and whether it is there, as `config.json` and the tokenizer's say."""
    found = {}
    for name in ("config.json", "tokenizer_config.json"):
        auto_map = read_json(folder / name).get("auto_map") if (folder / name).is_file() else None
        for auto_class, references in auto_map.items() if isinstance(auto_map, dict) else ():
            for reference in references if isinstance(references, list) else [references]:
                if isinstance(reference, str):
                    repo, _, target = reference.rpartition("--")
                    module, _, class_name = target.rpartition(".")
                    file = f"{module.replace('.', '/')}.py"
                    exists = bool(repo) or _defines(folder / file, class_name)
                    found[auto_class] = {"target": reference, "file": file, "exists": exists} | (
                        {"repo": repo} if repo else {}
                    )
    return found


def _defines(file: Path, class_name: str) -> bool:
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return bool(re.search(rf"^class {re.escape(class_name)}\b", text, re.MULTILINE))


def compare_checkpoints(a: Checkpoint, b: Checkpoint) -> list[dict[str, Any]]:
    """Every tensor of either, with how it differs; tensors are read one at a time from each side.

    Where the names of one side are those of the other after a prefix, as a model's are with a head, they are compared
    with each other.

    Returns:
        rows with `name`, `status` (`"equal"`, `"prefix"`: equal, under names that differ by a prefix, `"dtype"`: equal
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
    """The side whose names begin with a prefix before those of the other, and that prefix, if most do."""
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


def show_inspection(data: Mapping[str, Any], console: Console, *, every_tensor: bool = False) -> None:
    """Print what `inspect_checkpoint` found; layers of one shape share a row unless `every_tensor`."""
    dtypes = ", ".join(
        f"{name} {_share(count, sum(data['dtypes'].values()))}" for name, count in data["dtypes"].items()
    )
    console.print(Text(f"{data['path']}: {data['format']}", style="bold"))
    console.print(
        Text(f"{data['parameters']:,} parameters in {len(data['tensors'])} tensors, {_size(data['bytes'])}, {dtypes}")
    )
    for what, text in (
        ("quantised", data["quantisation"]),
        ("adapter", data["adapter"]),
        ("only a part", data["part_of"]),
    ):
        if text:
            console.print(Text(printable(f"{what}: {text}")))
    if packed := data["quantised_modules"]:
        share = _share(sum(packed.values()), data["parameters"])
        first = ", ".join(list(packed)[:3]) + (", …" if len(packed) > 3 else "")
        text = f"{sum(packed.values()):,} of the parameters ({share}) are quantised, in {len(packed)} modules: {first}"
        console.print(Text(printable(f"{text}; they are counted unpacked, without scales and zeros")))
    if data["left_out"]:
        console.print(Text(printable(f"not opened, name the file to see it: {', '.join(data['left_out'])}")))
    if len(data["sections"]) > 1 or "(top)" not in data["sections"]:
        table = _table("models", ("section", "left"), ("tensors", "right"))
        for name, count in data["sections"].items():
            _add(table, name, str(count))
        console.print(table)
    if data["extras"]:
        table = _table("beside the weights", ("name", "left"), ("what it is", "left"))
        for name, text in data["extras"].items():
            _add(table, name, text)
        console.print(table)
    table = _table("modules", ("module", "left"), ("parameters", "right"), ("share", "right"))
    for name, count in data["modules"].items():
        _add(table, name, f"{count:,}", _share(count, data["parameters"]))
    console.print(table)
    table = _table("tensors", ("name", "left"), ("shape", "left"), ("dtype", "left"), ("file", "left"))
    for names, shape, dtype, files in _rows(data["tensors"], every_tensor):
        _add(table, names, "×".join(map(str, shape)) or "scalar", dtype, files)
    console.print(table)
    for alias, name in data["tied"].items():
        console.print(Text(printable(f"tied: {alias} is {name}")))
    for names in data["duplicates"]:
        console.print(Text(printable(f"stored {len(names)} times with the same bytes: {', '.join(names)}")))
    if "files" in data:
        table = _table("files", ("file", "left"), ("size", "right"), ("what it is for", "left"))
        for name, file in data["files"].items():
            _add(table, name, _size(file["size"]), file["purpose"])
        console.print(table)
    if data.get("auto_map"):
        table = _table("auto_map", ("class", "left"), ("code", "left"), ("", "left"))
        for name, entry in data["auto_map"].items():
            state = f"in {entry['repo']}" if "repo" in entry else "ok" if entry["exists"] else "missing"
            _add(table, name, entry["target"], state)
        console.print(table)


def show_difference(rows: list[dict[str, Any]], a: str, b: str, console: Console) -> None:
    """Print what `compare_checkpoints` found, the tensors that differ in a table."""
    counts = Counter(row["status"] for row in rows)
    table = _table(None, ("tensor", "left"), ("", "left"), (a, "left"), (b, "left"), ("max |Δ|", "right"))
    for row in rows:
        if row["status"] not in ("equal", "prefix"):
            change = "" if row["max_difference"] is None else f"{row['max_difference']:.3g}"
            _add(table, row["name"], row["status"], row["a"] or "–", row["b"] or "–", change)
    if table.row_count:
        console.print(table)
    if prefix := next((row["prefix"] for row in rows if "prefix" in row), None):
        ((side, text),) = prefix.items()
        longer, shorter = (a, b) if side == "a" else (b, a)
        console.print(Text(printable(f"the names in {longer} are those in {shorter} with {text!r} before them")))
    counts = Counter({"equal but for the prefix" if key == "prefix" else key: n for key, n in counts.items()})
    console.print(Text(", ".join(f"{count} {status}" for status, count in counts.items()) or "no tensors"))


def _rows(tensors: Mapping[str, Mapping[str, Any]], every: bool) -> list[tuple[str, list[int], str, str]]:
    groups: dict[tuple, list[tuple[list[int], str]]] = {}
    for name, tensor in tensors.items():
        pattern = name if every else re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1)
        layers = [] if pattern == name else [int(re.findall(r"(?<=\.)\d+(?=\.)", name)[0])]
        groups.setdefault((pattern, tuple(tensor["shape"]), tensor["dtype"]), []).append((layers, tensor["file"]))
    rows = []
    for (pattern, shape, dtype), members in groups.items():
        layers = [number for numbers, _ in members for number in numbers]
        files = list(dict.fromkeys(file for _, file in members))
        rows.append((pattern.replace("*", ranges(layers)) if layers else pattern, list(shape), dtype, _span(files)))
    return rows


def _span(files: list[str]) -> str:
    shards = sorted(int(found[1]) for file in files if (found := re.search(r"-0*(\d+)-of-\d+\.", file)))
    if len(shards) == len(files):
        return f"shard {ranges(shards)}"
    return files[0] if len(files) == 1 else f"{files[0]} … {files[-1]}"


def ranges(numbers: list[int]) -> str:
    """`{0–11}` for numbers in a row, `{0,2,4}` for others."""
    if len(numbers) == 1:
        return str(numbers[0])
    whole = sorted(numbers) == list(range(min(numbers), max(numbers) + 1))
    return f"{{{min(numbers)}–{max(numbers)}}}" if whole else "{" + ",".join(map(str, sorted(numbers))) + "}"


def _table(title: str | None, *columns: tuple[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(printable(cell), style="red" if cell == "missing" else "") for cell in cells))


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %" if total else ""


def _size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"
