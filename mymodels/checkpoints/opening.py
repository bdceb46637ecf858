"""`open_checkpoint`: detect the format of a file or folder from its content, and open it lazily."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .checkpoint import Checkpoint, CheckpointError, unreadable
from .deepspeed_folders import find_deepspeed, open_deepspeed
from .flax_files import open_flax
from .keras_files import open_keras
from .kinds import kind_of
from .locating import TRAINING_STATE, WEIGHTS, locate, weight_files
from .safetensors_files import inside, open_index, open_safetensors, read_json
from .third_party_formats import open_gguf, open_npz, open_onnx, open_tensorflow
from .torch_archives import open_distributed, open_exported, open_torchscript
from .torch_files import open_pickle, open_torch_file

_ANY_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|pt2|tar|h5|keras|msgpack|ot|onnx|gguf|npz|tflite|pkl)$|\.ckpt$")
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)(\.\w+)")


def open_checkpoint(
    path: str | os.PathLike,
    *,
    section: str | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Checkpoint:
    """Open any checkpoint as a lazy mapping of name → tensor. The format is detected from the content, not the name.

    Formats: safetensors; sharded safetensors or `.bin` with their index; files of `torch.save` (state dicts, training
    checkpoints nested at any depth, modules, whose code is not run); DeepSpeed's ZeRO folders; TorchScript;
    `torch.export`; `torch.distributed.checkpoint` folders; ONNX (extra `onnx`); TensorFlow checkpoints and SavedModels
    (extra `tf`); Keras (extra `h5`) and Flax (extra `flax`); `.npz`; pickles of arrays; GGUF (extra `gguf`). Objects of
    other classes are not created; see `Checkpoint.extras`.

    Args:
        path: a file, a folder, the prefix of a TensorFlow checkpoint, or the id of a Hub repo.
        section: the model to open of a file with several; see `Checkpoint.sections`.
        allow_pickle: run the code of a pickle that needs more than plain data, in another process, which is confined
            where the machine can do it (`sandbox.available`). If false, such a file is refused, and the error names that code.
        revision: branch, tag or commit of a Hub repo.
        token: as in `huggingface_hub`.

    Returns:
        A `Checkpoint`; only names, shapes and dtypes have been read.

    Raises:
        CheckpointError: the file has none of these formats, or is damaged or incomplete.
        FileNotFoundError: there is no such file, folder or repo.

    Examples:
        >>> checkpoint = open_checkpoint("gpt2/pytorch_model.bin")
        >>> checkpoint.info["wte.weight"].shape
        (50257, 768)
        >>> weight = checkpoint["wte.weight"]
    """
    where = locate(path, revision=revision, token=token)
    opener = partial(_open_folder if where.is_dir() else open_file, where, allow_pickle)
    checkpoint = _open_unchanged(where, opener) if where.is_dir() and not allow_pickle else opener()
    if where.is_dir():
        checkpoint.left_out = _files_left_out(where, checkpoint)
    elif not checkpoint.part_of and checkpoint.path == where:
        checkpoint.part_of = "" if checkpoint.format.startswith("GGUF") else shard_problem(where)
    return checkpoint if section is None else checkpoint.section(section)


def _open_unchanged(folder: Path, opener: Callable[[], Checkpoint]) -> Checkpoint:
    """Open the files of a folder, and open them again if a writer replaced it meanwhile, so that no two saves are mixed."""
    for _ in range(100):
        before = _identity(folder)
        try:
            checkpoint = opener()
        except (CheckpointError, OSError):
            if _identity(folder) == before:
                raise
            continue
        if _identity(folder) == before:
            return checkpoint
    raise CheckpointError(f"{folder} is being replaced again and again: open it when its writer has finished")


def _identity(folder: Path) -> tuple[int, ...]:
    try:
        stat = folder.stat()
    except FileNotFoundError:
        return ()
    return stat.st_dev, stat.st_ino, stat.st_ctime_ns


def _files_left_out(folder: Path, checkpoint: Checkpoint) -> list[str]:
    """Files of weights or training state in a folder, and one level below, that are not part of the checkpoint."""
    read = {info.file for info in checkpoint.info.values()}
    names = [file.relative_to(folder) for pattern in ("*", "*/*") for file in sorted(folder.glob(pattern))]
    return [
        name.as_posix()
        for name in names
        if _ANY_WEIGHTS.search(name.name)
        and name.as_posix() not in read
        and name.name != "golden.safetensors"
        and not any(re.match(r"\.|checkpoint-\d+$", part) for part in name.parts)
        and (folder / name).is_file()
        and not checkpoint.format.startswith(("torch.distributed.checkpoint", "DeepSpeed"))
    ]


def shard_number(path: Path) -> tuple[int, int] | None:
    """`(number, count)` of a file that its name makes one of several shards, the first being 1; else None.

    Example: `(1, 3)` of `model-00001-of-00003.safetensors`.
    """
    found = _SHARD.fullmatch(path.name)
    if not found or int(found[3]) < 2:
        return None
    counted_from_0 = path.with_name(f"{found[1]}-{0:0{len(found[2])}d}-of-{found[3]}{found[4]}").is_file()
    return int(found[2]) + counted_from_0, int(found[3])


def missing_shards(path: Path) -> list[str]:
    """The files that belong to `path`'s set by its name (`model-00001-of-00003.safetensors`) and are not beside it."""
    found = _SHARD.fullmatch(path.name)
    if not found:
        return []
    stem, number, count, suffix = found.groups()
    names = [f"{stem}-{i:0{len(number)}d}-of-{count}{suffix}" for i in range(1, min(int(count), 100_000) + 1)]
    if number.strip("0") == "":  # counted from 0
        names = [f"{stem}-{0:0{len(number)}d}-of-{count}{suffix}", *names[:-1]]
    return [name for name in names if not path.with_name(name).is_file()]


def has_all_shards(path: Path) -> bool:
    """Whether a file is one of several shards by its name, and all the others lie beside it."""
    return shard_number(path) is not None and not missing_shards(path)


def shard_problem(path: Path) -> str:
    """Why a file is only a part of a model, if its name says so; else ""."""
    shard = shard_number(path)
    if shard is None or path.suffix == ".gguf":  # a split GGUF is opened by any of its files
        return ""
    missing = missing_shards(path)
    others = (
        f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} {'is' if len(missing) == 1 else 'are'} missing"
        if missing
        else "the other shards are in the same folder"
    )
    return (
        f"{path} is shard {shard[0]} of {shard[1]} of a model, {others}: name a folder with all shards and their index"
    )


def _open_several(path: Path, parts: dict[str, Checkpoint]) -> Checkpoint:
    """Several models in one folder as one checkpoint with sections."""
    first = next(iter(parts.values()))
    homes = {f"{stem}.{name}": (part, name) for stem, part in parts.items() for name in part}
    return Checkpoint(
        path,
        f"{len(parts)} models of {first.format}",
        {full: part.info[name]._replace(file=_below(path, part, name)) for full, (part, name) in homes.items()},
        lambda full: homes[full][0][homes[full][1]],
        sections={stem: list(part) for stem, part in parts.items()},
        aliases={f"{stem}.{a}": f"{stem}.{b}" for stem, part in parts.items() for a, b in part.aliases.items()},
    )


def _below(path: Path, part: Checkpoint, name: str) -> str:
    home = part.path if part.path.is_dir() else part.path.parent
    return (home / part.info[name].file).relative_to(path).as_posix()


def _open_folder(folder: Path, allow_pickle: bool) -> Checkpoint:
    files = weight_files(folder)
    if all(file.suffix == ".pt" for file in files) and (save := find_deepspeed(folder)):
        return _guarded(open_deepspeed, save, "the folder")
    if not files:
        inner = [path.parent for path in sorted(folder.glob("*/manifest.json")) if weight_files(path.parent)]
        if inner and not any(re.fullmatch(r"checkpoint-\d+", path.name) for path in inner):  # as `convert` writes them
            return _open_several(folder, {path.name: _open_folder(path, allow_pickle) for path in inner})
        for file in sorted(folder.iterdir()):  # of a format that is not supported
            if file.is_file() and _ANY_WEIGHTS.search(file.name) and not TRAINING_STATE.match(file.name):
                raise CheckpointError(f"{folder} has no weights except {file.name}, which is {kind_of(file)}")
        inner = [path.parent for path in folder.glob("*/*") if weight_files(path.parent)]
        hint = f"; did you mean {max(inner, key=_training_step)}?" if inner else ""
        raise CheckpointError(f"{folder} holds no checkpoint: no {', '.join(WEIGHTS[:8])} or similar file{hint}")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:6])
        if kind_of(files[0]) == "safetensors" and (part := open_safetensors(files[0]).part_of):
            raise CheckpointError(part)
        if re.search(r"-of-\d+", files[0].name):
            raise CheckpointError(
                f"{folder} holds shards ({names}) but not their index; copy {files[0].name} index too"
            )
        raise CheckpointError(f"{folder} holds several checkpoints ({names}): name the file")
    if missing := missing_shards(files[0]):
        raise CheckpointError(
            f"{folder} holds {files[0].name} but not {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}: copy the "
            f"missing shards and the index too"
        )
    if files[0].name in ("model.safetensors", "pytorch_model.bin"):
        more = [file for file in folder.glob(f"{files[0].stem}_*{files[0].suffix}") if _trailing_number(file.stem)]
        if more:
            several = [
                files[0],
                *sorted(more, key=lambda file: int(_trailing_number(file.stem))),
            ]  # as accelerate writes them
            return _open_several(folder, {file.stem: open_file(file, allow_pickle) for file in several})
    if files[0].name == ".metadata":
        return _guarded(open_distributed, folder, "the folder")
    if files[0].name == "saved_model.pb":
        return _guarded(open_tensorflow, folder / "variables" / "variables", "the checkpoint")
    return open_file(files[0], allow_pickle)


def _training_step(folder: Path) -> tuple[int, str]:
    """A sort key by which the last of a trainer's folders, such as `checkpoint-500`, comes last."""
    return int(_trailing_number(folder.name) or -1), folder.name


def _trailing_number(name: str) -> str:
    found = re.search(r"[-_](\d+)$", name)
    return found[1] if found else ""


def open_file(path: Path, allow_pickle: bool = False) -> Checkpoint:
    """Open the file `path`, or the files that it is the index of."""
    if not path.exists():
        if not path.with_name(path.name + ".index").is_file():
            raise FileNotFoundError(f"{path} does not exist any more")
        return _guarded(open_tensorflow, path, "the checkpoint")
    if beside := _tensorflow_index(path):
        path = beside
    kind = kind_of(path)
    if kind == "index":
        if _index_files(path) and all(re.search(r"\.(h5|msgpack)$", file) for file in _index_files(path)):
            return _guarded(_open_shards, path, "the checkpoint")
        opener = partial(open_file, allow_pickle=allow_pickle)
        sharded = partial(open_index, path, opener, _index_format(path))
        return sharded() if allow_pickle else _open_unchanged(path.parent, sharded)
    if kind == "PyTorch":
        return _guarded(partial(open_torch_file, allow_pickle=allow_pickle), path, "the file")
    if kind == "pickle":
        return open_pickle(path)
    if kind == "TensorFlow index":
        return _guarded(open_tensorflow, _tf_prefix(path), "the checkpoint")
    if kind in _OPENERS:
        return _guarded(_OPENERS[kind], path, "the file")
    raise CheckpointError(f"{path} is {kind}")


_OPENERS: dict[str, Callable[[Path], Checkpoint]] = {
    "safetensors": open_safetensors,
    "TorchScript": open_torchscript,
    "torch.export": open_exported,
    "NumPy": open_npz,
    "GGUF": open_gguf,
    "ONNX": open_onnx,
    "HDF5": open_keras,
    "Flax": open_flax,
}


def _guarded(opener: Callable[[Path], Checkpoint], path: Path, what: str) -> Checkpoint:
    try:
        return opener(path)
    except (CheckpointError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # from a third-party reader
        raise unreadable(path, what, error) from error


def _tensorflow_index(path: Path) -> Path | None:
    """The index of the TensorFlow checkpoint that another file of it belongs to; None if it is none of its files."""
    if path.name == "checkpoint":  # a text file that names the newest checkpoint
        found = re.match(rb'model_checkpoint_path: "(?:[^"]*[/\\])?([^"/\\]+)"', path.read_bytes()[:1000])
        index = path.with_name(found[1].decode("utf-8", "replace") + ".index") if found else path
    else:
        index = path.with_name(re.sub(r"\.(data-\d+-of-\d+|meta)$", "", path.name) + ".index")
    return index if index != path and index.is_file() and path.suffix != ".index" else None


def _tf_prefix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".index" else path  # TensorFlow 1 also wrote a single file


def _index_files(path: Path) -> list[str]:
    """The files that an index names, each once."""
    weight_map = read_json(path).get("weight_map")
    return list(dict.fromkeys(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []


def _index_format(path: Path) -> str:
    safe = all(file.endswith(".safetensors") for file in _index_files(path))
    return "sharded safetensors" if safe else "sharded PyTorch"


def _open_shards(index: Path) -> Checkpoint:
    """Shards of TensorFlow or Flax. Their index has that framework's names, so only their number is compared."""
    parts: dict[str, Checkpoint] = {}
    for name in _index_files(index):
        if not inside(index.parent, name, index).is_file():
            raise CheckpointError(f"{index.parent / name} is missing; {index.name} names it: copy or download it again")
        parts[name] = open_file(index.parent / name)
    homes = {name: part for part in parts.values() for name in part}
    listed = len(read_json(index)["weight_map"])
    if len(homes) != sum(map(len, parts.values())) or len(homes) != listed:
        raise CheckpointError(
            f"{index}: it lists {listed} tensors, its files have {len(homes)}: copy or download all again"
        )
    first = next(iter(parts.values()))
    info = {name: part.info[name] for name, part in homes.items()}
    extras = {**first.extras, "layout": f"torch's names; kernels were transposed from [in, out], in {len(parts)} files"}
    return Checkpoint(index, f"sharded {first.format}", info, lambda name: homes[name][name], extras=extras)
