"""Build a Hub repo folder: config with `auto_map`, code, sharded weights, tokenizer, card."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

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

    The folder is made beside `output_dir` and put in its place when it is complete, so a failure leaves what was there.

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
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
    try:
        new, old = staging / "new", staging / "old"
        # by name: transformers 5 keeps another order for a model that was loaded than for one that was trained
        state_dict = dict(sorted(model.state_dict().items()))
        model.save_pretrained(new, state_dict=state_dict, max_shard_size=max_shard_size)
        _save_tokenizer(tokenizer, new)
        (new / "README.md").write_text(card, encoding="utf-8")
        if output_dir.exists():
            output_dir.rename(old)
        try:
            new.rename(output_dir)
        except OSError:
            if old.exists():
                old.rename(output_dir)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
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
