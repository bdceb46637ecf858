"""Build a Hub repo folder: config with `auto_map`, flat code, sharded weights, tokenizer, card, golden outputs, manifest."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import Checkpoint, CheckpointError, open_checkpoint, replace_folder, write_manifest
from ..checkpoints.opening import locate
from ..checkpoints.safetensors_files import read_json
from ..checkpoints.writing import parse_size, save_model_files, save_tokenizer_files, write_shards
from ..models import configuration_mybert, configuration_mygpt2
from .card import Card, card_of_folder
from .code_files import collect_code, file_of, served
from .contents import kind_of
from .golden import record_golden

CONFIG_NAME, CARD_NAME = "config.json", "README.md"
_OURS = {"mygpt2": configuration_mygpt2, "mybert": configuration_mybert}
_TAKEN = ("config", "tokenizer", "document")  # kinds of files that a source folder's are copied as they are


def build_repo(
    source: PreTrainedModel | str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None,
    output_dir: str | os.PathLike,
    *,
    card: str | Card | None = None,
    max_shard_size: int | str = "2GB",
    golden: bool = True,
) -> Path:
    """Write a folder that `AutoModel.from_pretrained(output_dir, trust_remote_code=True)` loads anywhere.

    The folder takes `output_dir`'s place in one step when it is complete, so an interruption leaves what was there;
    its `manifest.json` lists the size and SHA-256 of every file. The same input gives the same bytes.

    Args:
        source: a model, or a folder (or Hub repo) with a config and weights of any format, such as what fine-tuning
            left; nothing of a folder is executed but for `golden`. Code files are copied flat, imports rewritten, and
            `auto_map` names every Auto class that they serve.
        tokenizer: saved so that every supported transformers release can load it; None takes a source folder's own.
        output_dir: created, or replaced if it is empty or an older Hub repo folder.
        card: content of `README.md`, or what it is made from. Default: the source folder's own, or one made from what
            the folder says.
        max_shard_size: as in `save_pretrained`: bytes, or a string like `"500MB"`.
        golden: record `golden.safetensors` by running the models in a clean process.

    Returns:
        `output_dir` as a `Path`.

    Raises:
        FileExistsError: `output_dir` holds something that is not a Hub repo folder.
        CheckpointError: the weights cannot be read, the code cannot be made flat, or the models do not run.
    """
    output_dir, size = check_output_dir(output_dir), parse_size(max_shard_size)
    fill = _from_model if isinstance(source, PreTrainedModel) else _from_folder
    if isinstance(source, PreTrainedModel) and card is None:
        raise CheckpointError("a model in memory does not say what it is: pass card=, see mymodels.hub.card.Card")
    with replace_folder(output_dir, finish=write_manifest) as folder:
        fill(source, folder, size)  # type: ignore[arg-type]
        if tokenizer is not None:
            save_tokenizer_files(tokenizer, folder)
        if card is not None or not (folder / CARD_NAME).is_file():
            history = None if isinstance(source, PreTrainedModel) else locate(source) / "trainer_state.json"
            text = (
                card
                if isinstance(card, str)
                else card_of_folder(folder, card or Card(), name=output_dir.name, history=history)
            )
            (folder / CARD_NAME).write_text(text, encoding="utf-8")
        if golden:
            record_golden(folder)
    return output_dir


def check_output_dir(output_dir: str | os.PathLike) -> Path:
    """`output_dir` as a `Path`, if `build_repo` may write there; else the `FileExistsError` described there."""
    path = Path(output_dir)
    replaceable = (path / CONFIG_NAME).is_file() or (path.is_dir() and not any(path.iterdir()))
    if path.exists() and not replaceable:
        raise FileExistsError(
            f"{path} exists and is not a Hub repo folder (it has no {CONFIG_NAME}): choose another output folder"
        )
    return path


def _from_model(model: PreTrainedModel, folder: Path, max_shard_size: int) -> None:
    save_model_files(model, folder, max_shard_size)
    for stale in folder.glob("*.py"):  # `save_pretrained` copies imports as they are
        stale.unlink()
    classes = [type(model), type(model.config)]
    entries = [file for file in map(file_of, classes) if file is not None]
    _write_code(folder, entries, [cls.__name__ for cls in classes])


def _from_folder(source: str | os.PathLike, folder: Path, max_shard_size: int) -> None:
    where = locate(source)
    if not (where / CONFIG_NAME).is_file():
        raise CheckpointError(f"{where} has no {CONFIG_NAME}, so nobody could load it: save the model with its config")
    config = read_json(where / CONFIG_NAME)
    checkpoint = open_checkpoint(where)
    if len(checkpoint.sections) > 1:
        raise CheckpointError(
            f"{where} holds several models ({', '.join(checkpoint.sections)}): `mymodels convert` one first"
        )
    stored = {name: checkpoint.info[name] for name in sorted(checkpoint) if name not in checkpoint.aliases}
    tensors = Checkpoint(checkpoint.path, checkpoint.format, stored, checkpoint.__getitem__)
    for file in sorted(where.iterdir()):
        if file.is_file() and not file.is_symlink() and kind_of(file.name) in _TAKEN:
            shutil.copyfile(file, folder / file.name)
    write_shards(tensors, folder, max_shard_size=max_shard_size)
    if config.get("model_type") in _OURS:
        ours = Path(str(_OURS[config["model_type"]].__file__))
        entries, first = [ours, ours.with_name(ours.name.replace("configuration", "modeling"))], []
    else:
        targets = [t.rsplit(".", 1) for t in _targets(config) if "--" not in t]
        entries = [
            where / f"{module.replace('.', '/')}.py" for module in dict.fromkeys(module for module, _ in targets)
        ]
        first = [name for _, name in targets]
    _write_code(folder, entries, first)


def _targets(config: Mapping[str, Any]) -> list[str]:
    """What `auto_map` names, `file.Class` each."""
    auto_map = config.get("auto_map") or {}
    entries = [entry for value in auto_map.values() for entry in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(entry for entry in entries if isinstance(entry, str)))


def _write_code(folder: Path, entries: list[Path], first: list[str]) -> None:
    """The code, and an `auto_map` that names every Auto class it serves; `first` classes go before others."""
    texts = collect_code(entries)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    path = folder / CONFIG_NAME
    config = read_json(path)
    if texts:
        own = {name.removesuffix(".py") for name in texts}
        known = {
            auto_class: target
            for auto_class, target in (config.get("auto_map") or {}).items()
            if isinstance(target, str) and target.split(".")[0] in own
        }
        found = served(texts, [*first, *config.get("architectures", [])])
        named = {a: t for a, t in found.items() if t.split(".")[1] in first}
        config["auto_map"] = dict(sorted({**found, **known, **named}.items()))
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
