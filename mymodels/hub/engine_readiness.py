"""Requirements of serving engines and tools: whether a model meets them, and what is missing. Never a failure."""

from collections.abc import Callable
from typing import Any

from .checks import Check

Facts = dict[str, Any]
KNOWN_HEAD_NAMES = {"lm_head", "classifier", "score"}


def _first_attention(facts: Facts) -> dict[str, Any]:
    return facts["attention"][0] if facts["attention"] else {}


def _missing_for_backends(facts: Facts) -> list[str]:
    """The missing requirements that the Transformers backends of vLLM and SGLang share, a sentence each."""
    attention, forward = _first_attention(facts), set(facts["forward"])
    missing = []
    if not facts["attention_backend"]:
        missing.append("the class does not set _supports_attention_backend = True")
    if not facts["forward_kwargs"]:
        missing.append("forward takes no **kwargs, so the engine cannot pass arguments to the attention")
    if not attention:
        missing.append("there is no class with Attention in its name that holds the projections")
    elif not attention["kwargs"]:
        missing.append(f"{attention['path']} takes no **kwargs")
    if absent := [name for name in ("layer_idx", "scaling", "is_causal") if attention and not attention[name]]:
        missing.append(f"{attention['path']} has no attribute {', '.join(absent)}")
    if absent := [name for name in ("input_ids", "inputs_embeds", "position_ids") if name not in forward]:
        missing.append(f"the base model's forward does not name {', '.join(absent)}")
    return missing


def _vllm(facts: Facts) -> list[str]:
    missing = _missing_for_backends(facts)
    if facts["custom_code"] and not facts["auto_model"]:
        missing.insert(0, "auto_map has no AutoModel")
    attention = _first_attention(facts)
    if attention and not attention["interface"]:
        missing.append(
            f"the forward of {attention['path']} does not take the attention function from ALL_ATTENTION_FUNCTIONS "
            "and call it once"
        )
    if facts["conv1d"]:
        missing.append(f"{', '.join(facts['conv1d'])} are Conv1D, not nn.Linear")
    if not facts["input_embeddings"]:
        missing.append("get_input_embeddings returns None")
    if not KNOWN_HEAD_NAMES & set(facts["heads"]) and facts["head_expected"]:
        missing.append(f"the head is none of {', '.join(sorted(KNOWN_HEAD_NAMES))}")
    return missing


def _sglang(facts: Facts) -> list[str]:
    needed = ("num_attention_heads", "hidden_size")
    absent = [name for name in needed if name not in facts["config"]]
    missing = _missing_for_backends(facts)
    return missing + ([f"the config has no {', '.join(absent)}"] if absent else [])


def _peft(facts: Facts) -> list[str]:
    if facts["linears"] or facts["conv1d"]:
        return []
    return ["there is no nn.Linear to put an adapter on"]


def _tensor_parallel(facts: Facts) -> list[str]:
    return [] if facts["tp_plan"] else ["neither the config (base_model_tp_plan) nor the class (_tp_plan) has a plan"]


def _onnx(facts: Facts) -> list[str]:
    return [f"torch.export fails: {facts['export']}"] if facts["export"] else []


def _peft_targets(facts: Facts) -> str:
    names = facts["linears"] or facts["conv1d"]
    return f"target_modules can be any of {', '.join(names)}"


def _fused_by_engine(facts: Facts) -> str:
    fused = ", ".join(facts["fused"])
    return f"the engine can fuse {fused}" if fused else "there are no projections or norms that the engine fuses"


# name, function that lists what is missing, note if nothing is
READINESS: list[tuple[str, Callable[[Facts], list[str]], Callable[[Facts], str]]] = [
    ("vLLM", _vllm, _fused_by_engine),
    ("SGLang", _sglang, lambda facts: "the attention receives the engine's arguments"),
    ("PEFT", _peft, _peft_targets),
    ("tensor parallel", _tensor_parallel, lambda facts: "there is a plan"),
    ("ONNX export", _onnx, lambda facts: "torch.export exports the model"),
]


def serving_checks(facts: Facts | None, *, classes: list[str], custom_code: bool, export: str | None) -> list[Check]:
    """Checks of the model's structure, as the clean process reported it.

    Args:
        facts: the event of this name, see `isolated/facts.py`; None if there is none.
        classes: the folder's Auto classes, that of `architectures` first.
        custom_code: whether the folder has custom code.
        export: the error of `torch.export`, "" for success, None if it was not tried.

    Returns:
        One check for each engine or tool: `"ok"` for ready, `"warning"` with what is missing, or `"skipped"`.
    """
    try:
        return _checks_of(dict(facts or {}), classes, custom_code, export)
    except (KeyError, TypeError, ValueError, AttributeError):  # missing, or forged by the folder's code
        return [Check(name, "skipped", "the model's structure could not be read") for name, _, _ in READINESS]


def _checks_of(facts: Facts, classes: list[str], custom_code: bool, export: str | None) -> list[Check]:
    facts = {
        **facts,
        "auto_model": "AutoModel" in classes,
        "custom_code": custom_code,
        "head_expected": classes[0] not in ("AutoModel",) and "For" in classes[0],
        "export": export,
    }
    checks = []
    for name, find_missing, describe in READINESS:
        if name == "ONNX export" and export is None:
            checks.append(Check(name, "skipped", "not tried"))
            continue
        missing = find_missing(facts)
        checks.append(
            Check(name, "warning", f"not ready: {'; '.join(missing)}")
            if missing
            else Check(name, "ok", describe(facts))
        )
    return checks
