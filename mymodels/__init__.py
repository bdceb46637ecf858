"""Modified GPT-2 and BERT models that load anywhere with transformers' Auto classes.

Importing this package registers both families, so that `AutoModel.from_pretrained(path)` needs no `trust_remote_code`
here, unless the folder has code of its own. Everything beyond the models is imported when first used. The command line
alone registers them later, when a verb runs: see `_is_command_line`.
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
    "Adopted",
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
    "save_checkpoint",
    "train",
    "warm_start",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


@cache
def _register_all() -> None:
    """All that importing the package does, once."""
    from . import registering
    from .peft_targets import register_with_peft

    registering.register_auto_classes()
    registering.prefer_code_of_folders()
    registering.convert_stock_checkpoints()
    registering.save_code_of_subclasses()
    register_with_peft()


def _is_command_line() -> bool:
    """Whether this process is `mymodels …` or `python -m mymodels …`, of which help shall not wait for torch.

    `mymodels.cli` cannot be imported without this package. So the script starts `mymodels_command`, which lies outside;
    of `python -m`, the interpreter's own arguments tell (`sys.argv[0]` is "-m" until the module is found, and what
    `sys.orig_argv` has before the arguments is its name). Where neither is so, also in worker processes of the command,
    the models are registered at once; a wrong guess could only be slow.

    Registering when transformers is imported, by a hook on its import, would need no such mark, but has no safe moment:
    while `transformers` is imported, accelerate or PEFT may be half imported themselves and transformers needs them;
    while `transformers.models.auto` is, `transformers.modeling_layers` may be, which imports it and which we import.
    """
    if getattr(sys.modules.get("mymodels_command"), "started", False):
        return True
    started = sys.orig_argv[-len(sys.argv)] if 0 < len(sys.argv) < len(sys.orig_argv) else ""
    return sys.argv[:1] == ["-m"] and started in ("mymodels", "mymodels.cli")


if not _is_command_line():
    _register_all()
