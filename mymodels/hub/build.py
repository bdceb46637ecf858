"""Build a Hub repo folder: config with `auto_map`, flat code, sharded weights, tokenizer, card, golden outputs, manifest."""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import Checkpoint, CheckpointError, open_checkpoint, replace_folder, write_manifest
from ..checkpoints.integrity import MANIFEST, read_manifest
from ..checkpoints.opening import locate
from ..checkpoints.safetensors_files import inside, read_json
from ..checkpoints.writing import (
    normalise_tokenizer_config,
    parse_size,
    save_model_files,
    save_tokenizer_files,
    write_shards,
)
from ..messages import printable
from ..models import configuration_mybert, configuration_mygpt2
from ..models.int8 import METHOD
from ..released import OwnCodeError, check_code, own_code, reader
from .build_code import NamedCode, check_code_arguments, check_parts, code_in_folder, named_code
from .card import Card, card_of_folder
from .code_files import auto_map_of_files, collect_code, with_int8
from .given_inputs import Inputs, read_inputs
from .golden import record_golden
from .own_classes import CodeNotSaved, code_of
from .push_files import kind_of

CONFIG_NAME, CARD_NAME = "config.json", "README.md"
_OURS = {"mygpt2": configuration_mygpt2, "mybert": configuration_mybert}
_WITH_CODE = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)  # may name code
_COPIED_KINDS = ("config", "tokenizer", "document")  # kinds of a source folder's files that are copied unchanged


def build_repo(
    source: PreTrainedModel | str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None,
    output_dir: str | os.PathLike,
    *,
    card: str | Card | None = None,
    max_shard_size: int | str = "2GB",
    golden: bool = True,
    inputs: Inputs | None = None,
    code: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    auto_classes: Mapping[str, str] | None = None,
) -> Path:
    """Write a folder that `AutoModel.from_pretrained(output_dir, trust_remote_code=True)` loads anywhere.

    The complete folder replaces `output_dir` in one step, so an interruption leaves the old content in place. Its
    `manifest.json` lists the size and SHA-256 of every file. The same input gives the same bytes.

    Args:
        source: a model; or a folder or Hub repo with a config and weights of any format, such as the output of a
            training; or a file of weights with `config.json` beside it. Code of a folder runs only for `golden`.
            Code files are copied into one flat folder with rewritten imports, and `auto_map` lists their classes.
        tokenizer: saved so that every supported transformers release can load it; None takes a source folder's own.
        output_dir: created, or replaced if it is empty or an older Hub repo folder: one whose manifest lists all its files.
        card: content of `README.md`, or a `Card` to write it from. Default: the source folder's `README.md`, or a
            card written from the folder's content.
        max_shard_size: as in `save_pretrained`: bytes, or a string like `"500MB"`.
        golden: record `golden.safetensors` by running the models in a clean process.
        inputs: inputs for the golden outputs, see `given_inputs.read_inputs`. Default: generated from the config.
        code: `.py` files with the classes of the model, for weights that were saved without code. Default: the files
            that the folder's `auto_map` names, or files in the folder that define the class in its `architectures`.
        auto_classes: Auto class → class of the code, such as `{"AutoModel": "MyNet"}`, for a class whose name does not
            end in `ForCausalLM`, `ForImageClassification` or the like.

    Returns:
        `output_dir` as a `Path`.

    Raises:
        FileExistsError: `output_dir` holds files that would be lost.
        CheckpointError: the weights cannot be read, the code cannot be made flat, or the models do not run.

    Examples:
        >>> build_repo("runs/tuned", None, "my-model", card=Card(license="apache-2.0"))
    """
    named = [Path(code)] if isinstance(code, (str, os.PathLike)) else [Path(file) for file in code or []]
    if isinstance(source, PreTrainedModel) and (named or auto_classes):
        raise CheckpointError(
            "the code of a model in memory is found from its class: leave out code= and auto_classes="
        )
    check_code_arguments(named, auto_classes or {})
    where = None if isinstance(source, PreTrainedModel) else locate(source)
    output_dir, size = check_output_dir(output_dir, where), parse_size(max_shard_size)
    if isinstance(source, PreTrainedModel) and card is None:
        raise CheckpointError("build_repo needs card= for a model in memory: pass a text or a mymodels.hub.card.Card")
    if inputs is not None:
        if not golden:
            raise CheckpointError("inputs are only used for golden outputs: leave out --no-golden (golden=False)")
        inputs = read_inputs(inputs)  # errors are raised before anything is written
    with replace_folder(output_dir, finish=write_manifest) as folder, _naming_output_dir(folder, output_dir):
        if isinstance(source, PreTrainedModel):
            _from_model(source, folder, size)
        elif where is not None:
            _from_files(where, folder, size, named, auto_classes or {})
        if tokenizer is not None:
            save_tokenizer_files(tokenizer, folder)
        if card is not None or not (folder / CARD_NAME).is_file():
            history = None if where is None else where / "trainer_state.json"
            text = (
                card
                if isinstance(card, str)
                else card_of_folder(folder, card or Card(), name=output_dir.name, history=history)
            )
            (folder / CARD_NAME).write_text(text, encoding="utf-8")
        if golden:
            record_golden(folder, inputs=inputs)
    return output_dir


@contextlib.contextmanager
def _naming_output_dir(folder: Path, output_dir: Path) -> Iterator[None]:
    """Errors inside this context name the output folder instead of the temporary one."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        text = str(error).replace(str(folder), str(output_dir))
        raise (error if text == str(error) else type(error)(text)) from None


def check_output_dir(output_dir: str | os.PathLike, source: Path | None = None) -> Path:
    """`output_dir` as a `Path`, after a check that `build_repo` may write there.

    Raises:
        FileExistsError: it holds files that its `manifest.json` does not list, which would be lost, or the source.
    """
    path = Path(output_dir)
    if source is not None and path.exists() and source.resolve().is_relative_to(path.resolve()):
        raise FileExistsError(f"{path} holds the source itself: choose another output folder")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: choose another output folder")
    there = (
        {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()} if path.exists() else set()
    )
    listed = {MANIFEST, *read_manifest(path)} if MANIFEST in there else set()
    if unlisted := sorted(there - listed):
        names = ", ".join(map(printable, unlisted[:4])) + (
            f" and {len(unlisted) - 4} more" if len(unlisted) > 4 else ""
        )
        raise FileExistsError(
            f"{path} exists and its manifest.json does not list {names}, which would be lost: choose another output folder"
        )
    return path


def _from_model(model: PreTrainedModel, folder: Path, max_shard_size: int) -> None:
    code = code_of(model.config, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CodeNotSaved)
        save_model_files(model, folder, max_shard_size)
    for stale in folder.glob("*.py"):  # written by `save_pretrained` without rewriting imports
        stale.unlink()
    _write_code(folder, code.files, code.auto_map)


def _from_files(
    source: Path, folder: Path, max_shard_size: int, named: Sequence[Path], auto_classes: Mapping[str, str]
) -> None:
    """Fill `folder` from a folder or a file of weights; see `build_repo`."""
    where = source if source.is_dir() else source.parent
    check_parts(source, where)
    config = read_json(where / CONFIG_NAME)
    checkpoint = open_checkpoint(source)
    if len(checkpoint.sections) > 1:
        raise CheckpointError(
            f"{where} holds several models ({', '.join(checkpoint.sections)}): extract one with `mymodels convert`"
        )
    stored = {name: checkpoint.info[name] for name in sorted(checkpoint) if name not in checkpoint.aliases}
    tensors = Checkpoint(checkpoint.path, checkpoint.format, stored, checkpoint.__getitem__)
    for name in files_to_copy(where) if source.is_dir() else _companion_files(source):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inside(where, name, where), folder / name)
    normalise_tokenizer_config(folder)
    code = None
    if code_files := [*named] or code_in_folder(where, config, asked=bool(auto_classes)):
        code = named_code(code_files, config, auto_classes, within=None if named else where)
    write_shards(tensors, folder, max_shard_size=max_shard_size)
    if code is not None:
        _write_named_code(folder, code, config, where)
        return
    entries: list[Path] = []
    targets = [target for file in _WITH_CODE for target in _auto_map_targets(where / file)]
    first = [name for _, name in targets]
    if config.get("model_type") in _OURS and not own_code(config, reader(where)):
        _check_saved_class(config, where)
        ours = Path(str(_OURS[config["model_type"]].__file__))
        entries = [ours, ours.with_name(ours.name.replace("configuration", "modeling"))]
        targets = [target for target in targets if f"{target[0]}.py" not in {file.name for file in entries}]
    entries += [
        inside(where, f"{module.replace('.', '/')}.py", where) for module in dict.fromkeys(m for m, _ in targets)
    ]
    files = collect_code(entries, within=where)
    own = {name.removesuffix(".py") for name in files}
    known = {}
    for auto_class, target in (config.get("auto_map") or {}).items():
        names = target if isinstance(target, list) else [target]
        if all(name is None or str(name).split(".")[0] in own for name in names):
            known[auto_class] = target
    config_class = str(known.get("AutoConfig", "")).rpartition(".")[2]
    found = auto_map_of_files(files, [*first, *config.get("architectures", [])], config_class=config_class)
    _write_code(folder, files, {**found, **known})


def _companion_files(file: Path) -> list[str]:
    """The config and tokenizer files beside a file of weights."""
    return [name for name in files_to_copy(file.parent) if "/" not in name and kind_of(name) in ("config", "tokenizer")]


def _write_named_code(folder: Path, code: NamedCode, config: Mapping[str, Any], where: Path) -> None:
    """Write code files given by the user or found in the folder, those of its tokenizer, and the config."""
    others = {auto: target for auto, target in (config.get("auto_map") or {}).items() if not auto.startswith("Auto")}
    path = folder / CONFIG_NAME
    changed = {**read_json(path), "architectures": [code.architecture]}
    if code.model_type:
        changed["model_type"] = code.model_type
    path.write_text(json.dumps(changed, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    extra = [
        inside(where, f"{module}.py", where) for file in _WITH_CODE[1:] for module, _ in _auto_map_targets(where / file)
    ]
    _write_code(folder, {**collect_code(extra, within=where), **code.files}, {**others, **code.auto_map})


def _check_saved_class(config: Mapping[str, Any], where: Path) -> None:
    try:
        check_code(config, where, saved=True)
    except OwnCodeError as error:
        raise CheckpointError(str(error)) from None


def files_to_copy(where: Path) -> list[str]:
    """The files of a source folder that a build copies unchanged; in subfolders, weights too.

    Excluded are weights, code and manifest, which the build writes itself, and files that do not belong to a model.
    """
    names = sorted(file.relative_to(where).as_posix() for file in where.rglob("*") if file.is_file())
    taken = []
    for name in names:
        *folders, base = name.split("/")
        hidden = any(
            part.startswith(".") or part in ("__pycache__", "runs", "wandb") or part.startswith("checkpoint-")
            for part in folders
        )
        if (
            not hidden
            and not base.startswith(".")
            and (kind_of(base) in _COPIED_KINDS or (folders and kind_of(base) == "weights"))
        ):
            taken.append(name)
    return taken


def _auto_map_targets(path: Path) -> list[tuple[str, str]]:
    """The (module, class) pairs that a config file's `auto_map` names in this folder.

    Raises:
        CheckpointError: an entry is not of the form `file.Class`.
    """
    auto_map = read_json(path).get("auto_map") if path.is_file() else None
    values = list(auto_map.values()) if isinstance(auto_map, dict) else []
    entries = [
        entry for value in values for entry in (value if isinstance(value, list) else [value]) if entry is not None
    ]
    found = []
    for entry in dict.fromkeys(map(str, entries)):
        if "--" in entry:
            continue
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", entry):
            raise CheckpointError(f"{path}: the auto_map entry {printable(entry)!r} is not file.Class: correct it")
        module, _, name = entry.rpartition(".")
        found.append((module, name))
    return found


def _write_code(folder: Path, files: Mapping[str, str], auto_map: Mapping[str, Any]) -> None:
    path = folder / CONFIG_NAME
    config = read_json(path)
    if (config.get("quantization_config") or {}).get("quant_method") == METHOD:
        if not files:
            raise CheckpointError(
                f"the weights are int8 by mymodels.quantize, and {(config.get('architectures') or ['the model'])[0]} is a "
                "class of transformers, which loads them only after `import mymodels`: build the folder from the float model"
            )
        files = with_int8(files, auto_map)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if files:
        config["auto_map"] = dict(sorted(auto_map.items()))
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
