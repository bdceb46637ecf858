"""Token ids of generation that a nested config has by default: newer releases read them from config.json alone."""

from typing import Any

from ...static.repo_snapshot import Folder
from ..rule import Report, Rule

_PARTS = ("decoder", "generator", "text_config")  # where transformers looks
_IDS = ("bos_token_id", "eos_token_id")


def _configure(config: dict[str, Any], folder: Folder, report: Report) -> dict[str, Any]:
    """Write the default token ids of a stock config into the part, unless the folder says itself what ends a text."""
    if "generation_config.json" in folder.files or config.get("eos_token_id") is not None:
        return config
    name = next((part for part in _PARTS if isinstance(config.get(part), dict)), "")
    part = config.get(name) or {}
    if not name or any(key in part for key in _IDS):
        return config
    defaults = _defaults(str(part.get("model_type", "")))
    if defaults:
        report(f"{name} names its default token ids: {', '.join(f'{key} {value}' for key, value in defaults.items())}")
        config[name] = {**part, **defaults}
    return config


def _defaults(model_type: str) -> dict[str, Any]:
    """The token ids that a config of transformers has by default."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return {}
    made = CONFIG_MAPPING[model_type]()
    return {key: value for key in _IDS if isinstance(value := getattr(made, key, None), int)}


RULE = Rule(
    name="token ids of parts",
    reason="generate no longer ends at the eos token that a nested config has by default, so it runs on",
    releases="5.0 and newer",
    config={"model_type": "toy", "text_config": {"model_type": "llama", "vocab_size": 8}},
    config_after={
        "model_type": "toy",
        "text_config": {"model_type": "llama", "vocab_size": 8, "bos_token_id": 1, "eos_token_id": 2},
    },
    configure=_configure,
    order=51,
)
