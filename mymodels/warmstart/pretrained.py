"""`from_pretrained` of MyGPT2 and MyBert for folders of stock models, whose tensors are renamed while they are loaded.

The classes are remote code and do not import this; `import mymodels` replaces their `from_pretrained`.
"""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import logging

from ..checkpoints import CheckpointError, load_checkpoint_and_dispatch, open_checkpoint
from ..checkpoints.checkpoint import resolve_dtype
from ..checkpoints.opening import locate
from ..checkpoints.safetensors_files import read_json
from ..models.base import MyPreTrainedModel
from ..models.compat import TRANSFORMERS_VERSION
from ..models.int8 import Int8Config, quantize
from ..released import check_code, is_installed
from ..tables import print_table, print_text
from .adapter_sources import refuse_adapter
from .configs import make_config, own_config, translate_config
from .key_mapping import CONFIGS, family_of
from .planning import make_plan
from .report import WarmStartReport
from .sources import open_source
from .warm_start_model import check_memory, empty_model

logger = logging.get_logger(__name__)

_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "token", "revision")
_PLACING = ("max_memory", "offload_folder", "offload_buffers")
_IGNORED = {
    "trust_remote_code", "low_cpu_mem_usage", "weights_only", "ignore_mismatched_sizes", "adapter_kwargs", "proxies",
    "code_revision", "offload_state_dict", "disable_mmap", "mirror", "from_tf", "from_flax", "resume_download", "tqdm_class",
    "_fast_init", "_from_auto", "_from_pipeline", "_commit_hash",
}  # fmt: skip
_UNSUPPORTED = {
    "quantization_config", "tp_plan", "tp_size", "device_mesh", "distributed_config", "state_dict", "key_mapping",
    "use_kernels", "kernel_config", "adapter_name",
}  # fmt: skip


def from_pretrained(
    cls: type[PreTrainedModel], pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
) -> Any:
    """transformers' `from_pretrained`, extended to stock checkpoints of the families in `families.py`."""
    raw = None if model_args else _stock_config(cls, pretrained_model_name_or_path, kwargs)
    if raw is None:
        return super(MyPreTrainedModel, cls).from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *model_args, **kwargs
        )
    return _load_stock(cls, pretrained_model_name_or_path, raw, dict(kwargs))


def _config_class(model_class: type[PreTrainedModel]) -> type[PretrainedConfig]:
    assert model_class.config_class is not None
    return model_class.config_class


def _stock_config(model_class: type[PreTrainedModel], path: Any, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `config.json` at `path` if it is a stock config that is converted for this class; else None.

    Raises:
        CheckpointError: it is of a transformers model with another architecture.
    """
    if path is None or kwargs.get("gguf_file") is not None:
        return None
    how = {name: kwargs[name] for name in (*_DOWNLOAD, "subfolder") if kwargs.get(name) is not None}
    try:
        raw, _ = PretrainedConfig.get_config_dict(path, **how)
    except Exception:  # no such folder, config or network: transformers' own loading reports it
        return None
    if isinstance(raw, dict) and raw and is_installed(model_class):
        check_code(raw, path, kwargs, saved=True)
    target = next((kind for kind, ours in CONFIGS.items() if issubclass(_config_class(model_class), ours)), "")
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    family = family_of(model_type)
    if not raw and (Path(path) / "adapter_config.json").is_file():  # transformers loads its base model first
        base = read_json(Path(path) / "adapter_config.json").get("base_model_name_or_path")
        if base and _stock_config(model_class, base, {**kwargs, "subfolder": None, "revision": None}) is not None:
            refuse_adapter(str(path), (), Path(path))
        return None
    if (
        not raw and kwargs.get("config") is None and Path(path).is_dir()
    ):  # transformers would create a model with random weights
        raise CheckpointError(
            f"{path} has no config.json: pass config=, or use mymodels.warm_start, which loads weights without a config"
        )
    own = _config_class(model_class).model_type
    if (
        not target
        or model_type is None
        or model_type == own
        or (family and family.name in CONFIGS and family.target == target)
    ):
        return None
    if family is not None and family.target == target:
        return raw
    if family is not None or (model_type in CONFIG_MAPPING_NAMES):
        raise CheckpointError(
            f"{path} is a {model_type} checkpoint, which {model_class.__name__} cannot load: use AutoModel, or the class "
            f"for {model_type}"
        )
    return None


def _load_stock(model_class: type[PreTrainedModel], path: Any, raw: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """`from_pretrained` for a stock checkpoint: tensors are read one by one, renamed, and placed by accelerate.

    Takes `from_pretrained`'s keyword arguments; those that need transformers' own loader (`tp_plan`, a
    `quantization_config` other than `Int8Config`, …) are refused. A warning lists tensors of the checkpoint that are not
    used and parameters that are newly initialised, because of a changed config field.
    """
    int8 = kwargs.pop("quantization_config") if isinstance(kwargs.get("quantization_config"), Int8Config) else None
    for name in _UNSUPPORTED & kwargs.keys():
        if kwargs[name] not in (None, False):
            raise CheckpointError(
                f"{name}= is not supported for a stock checkpoint: load {path} without it, save it, and load the result with {name}="
            )
    family = family_of(raw["model_type"])
    assert family is not None
    download = {name: kwargs.pop(name) for name in _DOWNLOAD if name in kwargs}
    placing = {name: kwargs.pop(name) for name in _PLACING if name in kwargs}
    device_map, info = kwargs.pop("device_map", None), kwargs.pop("output_loading_info", False)
    dtype, older = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
    attention = kwargs.pop("attn_implementation", None) or kwargs.pop("_attn_implementation", None)
    subfolder, variant = kwargs.pop("subfolder", None) or "", kwargs.pop("variant", None)
    use_safetensors, generation = kwargs.pop("use_safetensors", None), kwargs.pop("generation_config", None)
    config, asks_for_tie = kwargs.pop("config", None), "tie_word_embeddings" in kwargs
    accepted = inspect.signature(model_class.__init__).parameters.keys() - {"self", "config", "args", "kwargs"}
    making: dict[str, Any] = {name: kwargs.pop(name) for name in accepted & kwargs.keys()}
    making |= {"attn_implementation": attention} if attention else {}
    kwargs = {name: value for name, value in kwargs.items() if name not in _IGNORED | _UNSUPPORTED}
    if isinstance(config, (str, os.PathLike)):
        config = _config_class(model_class).from_pretrained(config)
    if isinstance(config, PretrainedConfig):
        config = own_config(config)
        for name, value in kwargs.items():
            setattr(config, name, value)
    else:
        config = make_config(family.target, translate_config(raw, family), kwargs)

    folder = locate(path, **{name: value for name, value in download.items() if value is not None}) / subfolder
    checkpoint = open_checkpoint(_weights(folder, variant, use_safetensors))
    source = open_source(checkpoint, target=family.target, config=raw)
    source.where = str(path)
    if raw.get("tie_word_embeddings", True) and not source.config.tie_word_embeddings and not asks_for_tie:
        config.tie_word_embeddings = False  # its head has other values than the embeddings
    floating = [i.dtype for i in checkpoint.info.values() if i.dtype.is_floating_point]
    wanted = dtype if dtype is not None else older
    if wanted is None:  # the default of the transformers release
        wanted = "auto" if TRANSFORMERS_VERSION >= (5, 0) else torch.float32
    kind = (
        resolve_dtype(wanted)
        or resolve_dtype(raw.get("dtype") or raw.get("torch_dtype"))
        or (floating or [torch.float32])[0]
    )
    model = empty_model(model_class, config, **making)
    plan = make_plan(model, source, dtype=kind, transform=False)
    if device_map is None:
        check_memory(model, source.where, source.info, kind)
    load_checkpoint_and_dispatch(model, plan.checkpoint(kind), device_map, dtype=kind, **placing).eval()  # in place
    model.config.name_or_path, model.config.dtype = str(path), kind
    if generation is not None:
        model.generation_config = generation
    elif model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if int8 is not None:
        quantize(model, activation_bits=int8.activation_bits, modules_to_not_convert=int8.modules_to_not_convert)
    report = plan.report()
    _warn_of_new_and_unused(report, model_class)
    return (model, _loading_info(report)) if info else model


def _weights(folder: Path, variant: str | None, use_safetensors: bool | None) -> Path:
    """The file to open; the folder itself if neither `variant` nor `use_safetensors` is given."""
    if variant is None and use_safetensors is None:
        return folder
    dotted = f".{variant}" if variant else ""
    kinds = [("model", "safetensors")] if use_safetensors is not False else []
    kinds += [("pytorch_model", "bin")] if not use_safetensors else []
    names = [n for stem, end in kinds for n in (f"{stem}{dotted}.{end}", f"{stem}.{end}.index{dotted}.json")]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} has none of {', '.join(names)}: leave out variant= and use_safetensors=")
    return found


def _warn_of_new_and_unused(report: WarmStartReport, model_class: type[PreTrainedModel]) -> None:
    """Log a table of unused tensors and newly initialised parameters, if there are any."""
    lost = [row for row in report.rows if row.status in ("new", "unused") and row.kind != "exact"]
    if not lost and not report.notes:
        return
    console = Console(width=140, force_terminal=False, no_color=True)
    with console.capture() as capture:
        if lost:
            print_table(report.tables(only=("new", "unused"))[0], console)
        for note in report.notes:
            print_text(f"note: {note}", console)
    head, tail = f"{model_class.__name__}.from_pretrained({report.source!r}): ", ""
    if lost:
        head += f"{sum(len(row.targets) for row in lost)} parameters are newly initialised, "
        head += f"{sum(row.status == 'unused' for row in lost)} tensors of the checkpoint are not used.\n"
        tail = "mymodels.warm_start (mymodels warm-start) converts such a checkpoint to this architecture."
    logger.warning(head + capture.get().lstrip("\n") + tail)


def _loading_info(report: WarmStartReport) -> dict[str, Any]:
    """What `output_loading_info=True` returns, as transformers has it."""
    kind = set if TRANSFORMERS_VERSION >= (5, 0) else list
    new = [name for row in report.rows if row.status == "new" and row.kind == "new" for name in row.targets]
    unused = [name for row in report.rows if row.status == "unused" and not row.constant for name in row.sources]
    return {"missing_keys": kind(new), "unexpected_keys": kind(unused), "mismatched_keys": kind(), "error_msgs": []}
