"""Modified GPT-2 and BERT models that load anywhere with transformers' Auto classes.

Importing this package registers both families, so that `AutoModel.from_pretrained(path)` needs no `trust_remote_code`,
unless the folder has custom code. Everything except the models is imported on first use. Only the command line registers
them later, when a verb runs: see `_is_command_line`.
"""

import sys
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adopting import Adopted, adopt
    from .checkpoints import load_checkpoint_and_dispatch, load_state_dict, open_checkpoint, save_checkpoint
    from .export import export_model
    from .hub import build_repo, load_in_clean_process
    from .hub.lock import load
    from .hub.upgrading.upgrade import Upgrade, upgrade
    from .models.configuration_mybert import MyBertConfig
    from .models.configuration_mygpt2 import MyGPT2Config
    from .models.int8 import Int8Config, quantize
    from .models.modeling_mybert import (
        MyBertForMaskedLM,
        MyBertForQuestionAnswering,
        MyBertForSequenceClassification,
        MyBertForTokenClassification,
        MyBertModel,
    )
    from .models.modeling_mygpt2 import MyGPT2ForCausalLM, MyGPT2ForSequenceClassification, MyGPT2Model
    from .predicting import predict
    from .training.finetune import FineTuned, finetune
    from .training.importing import import_checkpoint
    from .training.loop import train
    from .training.sample_text import load_sample_text
    from .training.trainer import Trainer
    from .warmstart import WarmStartReport, warm_start

__version__ = "0.1.0"

_LAZY = {
    "Adopted": ".adopting",
    "adopt": ".adopting",
    "Int8Config": ".models.int8",
    "MyBertConfig": ".models.configuration_mybert",
    "MyBertForMaskedLM": ".models.modeling_mybert",
    "MyBertForQuestionAnswering": ".models.modeling_mybert",
    "MyBertForSequenceClassification": ".models.modeling_mybert",
    "MyBertForTokenClassification": ".models.modeling_mybert",
    "MyBertModel": ".models.modeling_mybert",
    "MyGPT2Config": ".models.configuration_mygpt2",
    "MyGPT2ForCausalLM": ".models.modeling_mygpt2",
    "MyGPT2ForSequenceClassification": ".models.modeling_mygpt2",
    "MyGPT2Model": ".models.modeling_mygpt2",
    "load_checkpoint_and_dispatch": ".checkpoints",
    "load_state_dict": ".checkpoints",
    "open_checkpoint": ".checkpoints",
    "save_checkpoint": ".checkpoints",
    "build_repo": ".hub",
    "export_model": ".export",
    "import_checkpoint": ".training.importing",
    "load": ".hub.lock",
    "Upgrade": ".hub.upgrading",
    "upgrade": ".hub.upgrading",
    "load_in_clean_process": ".hub",
    "predict": ".predicting",
    "quantize": ".models.int8",
    "load_sample_text": ".training.sample_text",
    "FineTuned": ".training.finetune",
    "finetune": ".training.finetune",
    "train": ".training.loop",
    "Trainer": ".training.trainer",
    "WarmStartReport": ".warmstart",
    "warm_start": ".warmstart",
}

__all__ = [
    "Adopted",
    "FineTuned",
    "Int8Config",
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
    "Upgrade",
    "WarmStartReport",
    "adopt",
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
    "quantize",
    "save_checkpoint",
    "train",
    "upgrade",
    "warm_start",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


@cache
def _register_all() -> None:
    """Register the models and patch their loading and saving; done once, usually on import."""
    from . import huge_pages, registering  # noqa: F401  the models look for huge_pages among the imported modules
    from .peft_targets import register_with_peft

    registering.register_auto_classes()
    registering.prefer_code_of_folders()
    registering.convert_stock_checkpoints()
    registering.save_code_of_subclasses()
    register_with_peft()


def _is_command_line() -> bool:
    """Whether this process is `mymodels …` or `python -m mymodels …`, whose help must not wait for torch.

    Importing `mymodels.cli` imports this package first. So the script starts `mymodels_command`, which is outside the
    package; `python -m` is recognised by the interpreter's arguments (`sys.argv[0]` is "-m" until the module is found,
    and the entry of `sys.orig_argv` before the arguments is its name). Otherwise, also in worker processes of the
    command, the models are registered at once. A wrong result only costs time.

    An import hook on transformers is not an alternative, as there is no safe moment to register: while `transformers` is
    imported, accelerate or PEFT, which it needs, may be partly imported; while `transformers.models.auto` is,
    `transformers.modeling_layers` may be, which imports it and which we import.
    """
    if getattr(sys.modules.get("mymodels_command"), "started", False):
        return True
    started = sys.orig_argv[-len(sys.argv)] if 0 < len(sys.argv) < len(sys.orig_argv) else ""
    return sys.argv[:1] == ["-m"] and started in ("mymodels", "mymodels.cli")


if not _is_command_line():
    _register_all()
