"""Modified GPT-2 and BERT models that load anywhere with transformers' Auto classes.

Importing this package registers both families, so that `AutoModel.from_pretrained(path)` needs no `trust_remote_code`
here, unless the folder has code of its own. Everything beyond the models is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import registering
from .adapters import register_with_peft
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


registering.register_auto_classes()
registering.prefer_code_of_folders()
registering.convert_stock_checkpoints()
registering.save_code_of_subclasses()
register_with_peft()
