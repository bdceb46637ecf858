"""Modified GPT-2 and BERT models that load anywhere with transformers' Auto classes.

Importing this package registers both families, so that `AutoModel.from_pretrained(path)` needs no
`trust_remote_code` here. Everything beyond the models is imported when first used.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from .adapters import register_with_peft
from .models import base, modeling_mybert, modeling_mygpt2
from .models.configuration_mybert import MyBertConfig
from .models.configuration_mygpt2 import MyGPT2Config
from .models.modeling_mybert import (
    MyBertForMaskedLM,
    MyBertForQuestionAnswering,
    MyBertForSequenceClassification,
    MyBertForTokenClassification,
    MyBertModel,
)
from .models.modeling_mygpt2 import MyGPT2ForCausalLM, MyGPT2ForSequenceClassification, MyGPT2Model

if TYPE_CHECKING:
    from .checkpoints import load_checkpoint_and_dispatch, load_state_dict, open_checkpoint, save_checkpoint
    from .export import export_model
    from .hub import build_repo, load_in_clean_process
    from .hub.lock import load
    from .predicting import predict
    from .training.finetune import FineTuned, finetune
    from .training.importing import import_checkpoint
    from .training.loop import train
    from .training.sample_text import load_sample_text
    from .training.trainer import Trainer
    from .warmstart import WarmStartReport, warm_start

__version__ = "0.1.0"

_LAZY = {
    "load_checkpoint_and_dispatch": ".checkpoints",
    "load_state_dict": ".checkpoints",
    "open_checkpoint": ".checkpoints",
    "save_checkpoint": ".checkpoints",
    "build_repo": ".hub",
    "export_model": ".export",
    "import_checkpoint": ".training.importing",
    "load": ".hub.lock",
    "load_in_clean_process": ".hub",
    "predict": ".predicting",
    "load_sample_text": ".training.sample_text",
    "FineTuned": ".training.finetune",
    "finetune": ".training.finetune",
    "train": ".training.loop",
    "Trainer": ".training.trainer",
    "WarmStartReport": ".warmstart",
    "warm_start": ".warmstart",
}

__all__ = [
    "FineTuned",
    "MyBertConfig",
    "MyBertForMaskedLM",
    "MyBertForQuestionAnswering",
    "MyBertForSequenceClassification",
    "MyBertForTokenClassification",
    "MyBertModel",
    "MyGPT2Config",
    "MyGPT2ForCausalLM",
    "MyGPT2ForSequenceClassification",
    "MyGPT2Model",
    "Trainer",
    "WarmStartReport",
    "build_repo",
    "export_model",
    "finetune",
    "import_checkpoint",
    "load",
    "load_checkpoint_and_dispatch",
    "load_in_clean_process",
    "load_sample_text",
    "load_state_dict",
    "open_checkpoint",
    "predict",
    "save_checkpoint",
    "train",
    "warm_start",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def _register() -> None:
    for config, modeling in ((MyGPT2Config, modeling_mygpt2), (MyBertConfig, modeling_mybert)):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto_class, reference in config.AUTO_MAP.items():
            if auto_class != "AutoConfig":
                model = getattr(modeling, reference.split(".")[1])
                getattr(transformers, auto_class).register(config, model, exist_ok=True)
                # where `transformers serve` looks for it; the module may have been made anew while it was imported
                setattr(sys.modules["transformers"], model.__name__, model)


def _is_saved_by(model_class: Any, path: Any) -> bool:
    """Whether `path` is a folder of this very family: one look spares a cold start the import of all that converts."""
    try:
        return json.loads(Path(path, "config.json").read_bytes())["model_type"] == model_class.config_class.model_type
    except (OSError, TypeError, ValueError, KeyError, AttributeError):
        return False


def _convert_stock_checkpoints() -> None:
    """Let `from_pretrained` take stock checkpoints too; the classes are remote code and know nothing of them."""

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("subfolder") and _is_saved_by(cls, pretrained_model_name_or_path):
            return super(base.MyPreTrainedModel, cls).from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *model_args, **kwargs
            )
        from .warmstart.stock import from_pretrained as convert

        return convert(cls, pretrained_model_name_or_path, *model_args, **kwargs)

    from_pretrained.__doc__ = base.MyPreTrainedModel.from_pretrained.__doc__
    base.MyPreTrainedModel.from_pretrained = classmethod(from_pretrained)


_register()
_convert_stock_checkpoints()
register_with_peft()
