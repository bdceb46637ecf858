"""Load or build a model by the name of its class, and describe its tensors."""

import hashlib
import inspect
import random
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

from .stages import sentence

# the argument of `from_pretrained`; old releases run the original of an upgraded folder
DTYPE = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"


def load(
    job: dict[str, Any], name: str, folder: str | None = None, seed: int | None = 0, **how: Any
) -> tuple[Any, dict[str, Any]]:
    """`from_pretrained` of an Auto class or another class of transformers, in the dtype of the file.

    Args:
        seed: for weights that are initialised at random; None leaves the generators as they are.

    Returns:
        The model in eval mode, and its loading info (missing, unexpected, mismatched keys); empty if it returns none.
    """
    if seed is not None:
        seed_all(seed)
    if "dtype" in how:
        how[DTYPE] = how.pop("dtype")
    options = {DTYPE: "auto", "output_loading_info": True, **how}
    if name.startswith("Auto"):
        options["trust_remote_code"] = True
    try:
        loaded = class_of(name).from_pretrained(folder or job["folder"], **options)
    except RuntimeError as error:
        if "mismatch" in str(error) and (what := _describe_mismatched_sizes(name, folder or job["folder"], options)):
            raise RuntimeError(what) from error
        raise
    model, loading = loaded if isinstance(loaded, tuple) else (loaded, {})
    return model.eval(), loading


def in_float(model: Any) -> Any:
    """The model in float32; a quantised one is dequantised, or returned as it is if its quantiser cannot do so."""
    if not getattr(model, "is_quantized", False):
        return model.float()
    try:
        return model.dequantize().float()
    except NotImplementedError:
        return model


def _describe_mismatched_sizes(name: str, folder: str, options: dict[str, Any]) -> str:
    """A sentence on the tensors whose sizes differ from the files: the library's error only points to its log."""
    try:
        _, loading = class_of(name).from_pretrained(folder, ignore_mismatched_sizes=True, **options)
        found = sorted(loading["mismatched_keys"])
        key, stored, wanted = found[0]
    except Exception:
        return ""
    more = f" ({len(found) - 1} more tensors likewise)" if len(found) > 1 else ""
    return (
        f"the sizes in config.json differ from those of the weights: {key} is {tuple(stored)} in the files and "
        f"{tuple(wanted)} in the model{more}"
    )


def seed_all(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def class_of(name: str) -> Any:
    """A class of transformers by its name."""
    if not hasattr(transformers, name):
        raise ImportError(f"transformers {transformers.__version__} has no {name}, and no auto_map names its file")
    return getattr(transformers, name)


def config_of(job: dict[str, Any]) -> Any:
    return transformers.AutoConfig.from_pretrained(job["folder"], trust_remote_code=True)


def build(name: str, config: Any, dtype: torch.dtype | None = None) -> Any:
    """A model with newly initialised weights."""
    how = {} if dtype is None else {"dtype": dtype}
    if name.startswith("Auto"):
        return class_of(name).from_config(config, trust_remote_code=True, **how).eval()
    return class_of(name)._from_config(config, **how).eval()


def text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def digest(tensor: torch.Tensor) -> str:
    """The SHA-256 of a tensor's bytes, of any dtype."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(plain.view(torch.uint8).numpy().data).hexdigest() if plain.numel() else ""


def describe(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Dtype, shape, digest and more of every parameter and buffer; tied tensors appear under each name."""
    saved = model.state_dict()
    named = [
        *((name, tensor, True) for name, tensor in model.named_parameters(remove_duplicate=False)),
        *((name, tensor, False) for name, tensor in model.named_buffers(remove_duplicate=False)),
    ]
    digests: dict[tuple, str] = {}
    tensors = {}
    for name, tensor, is_parameter in named:
        meta = tensor.is_meta
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if not meta and key not in digests:
            digests[key] = digest(tensor)
        tensors[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "meta": meta,
            "digest": "" if meta else digests[key],
            "parameter": is_parameter,
            "persistent": name in saved,
            "memory": "" if meta or not tensor.numel() else str(key[0]),
        }
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                name = f"{path}.{attribute}".lstrip(".")
                tensors[name] = {"meta": True, "persistent": False, "parameter": False, "attribute": True}
    return tensors


def tie(model: Any) -> dict[str, Any] | None:
    """Whether the config ties head and input embeddings, and whether they are tied; None without such a head."""
    try:
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if getattr(head, "weight", None) is None or getattr(embeddings, "weight", None) is None:
        return None
    wanted = getattr(text_config(model.config), "tie_word_embeddings", None)
    wanted = getattr(model.config, "tie_word_embeddings", False) if wanted is None else wanted
    same = head.weight is embeddings.weight or (
        not head.weight.is_meta and head.weight.data_ptr() == embeddings.weight.data_ptr()
    )
    names = [name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor is head.weight]
    return {"wanted": bool(wanted), "tied": same, "head": names}


KEPT_WIDE = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")


def loaded_event(job: dict[str, Any], model: Any, name: str, loading: dict[str, Any]) -> dict[str, Any]:
    """What `hub/weights.py` needs to compare a loaded model with its files."""
    from .origins import origins

    keys = {kind: sorted(map(str, loading.get(f"{kind}_keys", []))) for kind in ("missing", "unexpected", "mismatched")}
    tensors = describe(model)
    event = {
        "loaded": name,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "prefix": getattr(model, "base_model_prefix", ""),
        "kept_wide": [name for field in KEPT_WIDE for name in getattr(model, field, None) or []],
        "tensors": tensors,
        "tie": tie(model),
        "accounted": bool(loading),
        "origins": origins(job, name, model, tensors, set(keys["missing"])),
        **keys,
    }
    unsaved = [n for n, tensor in tensors.items() if not tensor["persistent"] and not tensor["meta"]]
    if unsaved:
        try:
            fresh = describe(build(name, model.config, model.dtype))
            event["fresh_buffers"] = {n: fresh[n] for n in unsaved if n in fresh}
        except Exception as error:
            event["fresh_error"] = sentence(error)
    return event


def names_argument(model: Any, argument: str) -> bool:
    """Whether the model's own `forward` names this argument."""
    return argument in inspect.signature(model.forward).parameters


def accepts(model: Any, argument: str) -> bool:
    """Whether the model's `forward` names this argument, or passes **kwargs to a base model whose forward does."""
    parameters = inspect.signature(model.forward).parameters
    if names_argument(model, argument):
        return True
    base = getattr(model, "base_model", model)
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return base is not model and hands_on and argument in inspect.signature(base.forward).parameters


def place_of_forward(model: Any) -> str:
    """File and line of the model's `forward`, if it is the folder's own."""
    try:
        function = inspect.unwrap(type(model).forward)
        file, line = Path(inspect.getsourcefile(function) or ""), inspect.getsourcelines(function)[1]
    except (OSError, TypeError):
        return ""
    return f"{file.name}:{line}" if "transformers_modules" in file.parts else ""


def clear_code_cache() -> None:
    """Empty the module cache, as on a machine that never loaded this code."""
    from transformers.utils import HF_MODULES_CACHE

    shutil.rmtree(Path(HF_MODULES_CACHE), ignore_errors=True)
