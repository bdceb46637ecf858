"""Adapters of PEFT, which are refused as sources."""

import re
from collections.abc import Iterable
from pathlib import Path

from ..checkpoints import CheckpointError
from ..checkpoints.safetensors_files import read_json

# names of the tensors of PEFT's methods: LoRA and variants, IA³, prompts and prefixes, copies of modules
_ADAPTER = re.compile(
    r"(^|\.)(lora_\w+|lokr_\w+|hada_\w+|oft_\w+|vera_\w+|ia3_l|prompt_embeddings|prompt_encoder|modules_to_save|"
    r"original_module|base_layer)(\.|$)"
)


def refuse_adapter(where: str, names: Iterable[str], folder: Path | None = None) -> None:
    """Refuse an adapter of PEFT, which has no weights of its base model, and a base model with an unmerged adapter.

    Raises:
        CheckpointError: the source is one of these.
    """
    described = folder / "adapter_config.json" if folder is not None else None
    if described is not None and described.is_file():
        if (folder / "config.json").is_file():  # type: ignore[operator]
            return  # the folder has a complete model too
        base = read_json(described).get("base_model_name_or_path") or "its base model"
        raise CheckpointError(
            f"{where} is an adapter of PEFT for {base}, without that model's weights: load it with "
            "peft.AutoPeftModel…from_pretrained, save what merge_and_unload() returns, and start from that folder"
        )
    names = list(names)
    if found := next((name for name in names if _ADAPTER.search(name)), None):
        merged = any(name.endswith("base_layer.weight") for name in names)
        what = "has an adapter of PEFT that is not merged" if merged else "is an adapter of PEFT"
        raise CheckpointError(
            f"{where} {what} ({found}): save what the PEFT model's merge_and_unload() returns, and start from that"
        )
