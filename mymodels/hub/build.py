"""Build a Hub repo folder: config with `auto_map`, code, sharded weights, tokenizer, card, manifest."""

import json
import os
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import replace_folder, write_manifest
from ..checkpoints.writing import save_model_files

CONFIG_NAME = "config.json"


def build_repo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | os.PathLike,
    *,
    card: str,
    max_shard_size: int | str = "2GB",
) -> Path:
    """Write a folder that `AutoModel.from_pretrained(output_dir, trust_remote_code=True)` loads anywhere.

    The folder takes `output_dir`'s place in one step when it is complete, so an interruption leaves what was there;
    its `manifest.json` lists the size and SHA-256 of every file.

    Args:
        model: a MyGPT2 or MyBert model; its code files are copied along.
        tokenizer: saved so that every supported transformers release can load it.
        output_dir: created, or replaced if it is empty or an older Hub repo folder.
        card: content of `README.md`, see `mymodels.hub.card`.
        max_shard_size: as in `save_pretrained`: bytes, or a string like `"500MB"`.

    Returns:
        `output_dir` as a `Path`.

    Raises:
        FileExistsError: `output_dir` holds something that is not a Hub repo folder.
    """
    output_dir = check_output_dir(output_dir)
    with replace_folder(output_dir, finish=write_manifest) as folder:
        save_model_files(model, folder, max_shard_size)
        _save_tokenizer(tokenizer, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
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


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save without traces of how this tokenizer was loaded or last called, under a class every release knows."""
    if tokenizer.is_fast:  # the padding and truncation of the last call would become the saved default
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for trace in ("is_local", "local_files_only"):
        config.pop(trace, None)
    if config.get("tokenizer_class") == "TokenizersBackend":  # what transformers 5 writes, 4.x does not know it
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
