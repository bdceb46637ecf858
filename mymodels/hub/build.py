"""Build a Hub repo folder: config with `auto_map`, code, sharded weights, tokenizer, card, manifest."""

import os
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import replace_folder, write_manifest
from ..checkpoints.writing import save_model_files, save_tokenizer_files

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
        save_tokenizer_files(tokenizer, folder)
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
