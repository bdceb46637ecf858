"""Stages: what serving engines look at, read off the model's structure; and whether it can be exported."""

import inspect
from typing import Any

import torch

from .golden_outputs import read_inputs
from .inputs import make_inputs
from .loading import build, config_of, load
from .stages import sentence


def run(job: dict[str, Any], events: Any) -> None:
    """Report facts about the class of `architectures`, built on the meta device; `serving.py` judges them."""
    config = config_of(job)
    with torch.device("meta"):
        model = build(job["classes"][0], config)
    parameters = inspect.signature(model.forward).parameters.values()
    base = getattr(model, "base_model", model)
    base_parameters = inspect.signature(base.forward).parameters.values()
    linears = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    attention = [
        {
            "path": path,
            **{name: hasattr(module, name) for name in ("layer_idx", "scaling", "is_causal")},
            "children": [name for name, child in module.named_children() if _projects(child)],
            "kwargs": any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values()),
        }
        for path, module in model.named_modules()
        if "Attention" in type(module).__name__ and sum(map(_projects, module.children())) > 1
    ]
    events.write(
        facts={
            "model_type": config.model_type,
            "forward": [p.name for p in base_parameters],
            "forward_kwargs": any(p.kind is p.VAR_KEYWORD for p in [*parameters, *base_parameters]),
            "attention_backend": bool(getattr(model, "_supports_attention_backend", False)),
            "attention": attention,
            "linears": sorted({path.rpartition(".")[2] for path in linears}),
            "conv1d": sorted({p.rpartition(".")[2] for p, m in model.named_modules() if type(m).__name__ == "Conv1D"}),
            "heads": [name for name, _ in model.named_children()],
            "norms": sorted({type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__}),
            "input_embeddings": _has_input_embeddings(model),
            "tp_plan": bool(getattr(config, "base_model_tp_plan", None) or getattr(model, "_tp_plan", None)),
            "config": [name for name in CONFIG_NAMES if getattr(config, name, None) is not None],
        }
    )


def _has_input_embeddings(model: Any) -> bool:
    try:
        return model.get_input_embeddings() is not None
    except (AttributeError, NotImplementedError):
        return False


def _projects(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


CONFIG_NAMES = ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim", "num_hidden_layers")


def run_export(job: dict[str, Any], events: Any) -> None:
    """Try `torch.export`, the first step of an ONNX export, with a free number of rows."""
    model, _ = load(job, job["classes"][0])
    inputs: dict[str, Any] = read_inputs(job) or make_inputs(model)
    free = {name: {0: torch.export.Dim.AUTO} for name in inputs}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"], free["use_cache"] = False, None  # type: ignore[assignment]
    try:
        torch.export.export(model, (), kwargs=inputs, dynamic_shapes=free, strict=False)
        events.write(export="")
    except Exception as error:
        events.write(export=sentence(error))
