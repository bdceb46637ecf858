"""Load the model, its tokenizer and its task, from a folder, the Hub or memory."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.checkpoint import resolve_dtype
from ..checkpoints.load_errors import (
    clear_load_errors,
    fit_tokenizer,
    needs_trust_remote_code,
    refuse_mismatched,
    refuse_other_class,
    refuse_plain_module,
    remote_code_error,
)
from ..checkpoints.opening import locate
from ..checkpoints.safetensors_files import read_json
from ..hub.auto_class_names import auto_class_of
from ..library_logging import only_errors_logged
from ..messages import first_line
from ..training.preprocessing import longest_input
from .tasks import TASKS, Embedding, Task


def load_task(
    source: PreTrainedModel | str | os.PathLike,
    task: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    max_length: int | None = None,
    max_new_tokens: int = 50,
    top_k: int | None = None,
) -> tuple[Task, list[str]]:
    """A task with a loaded model, and notes for the user, a sentence each; arguments as of `predict`.

    Raises:
        ValueError: the task is unknown or its weights are missing, the folder has code that is not trusted, or model and
            tokenizer do not fit.
        OSError: the folder or Hub repo does not exist.
    """
    device = _device(device)
    refuse_plain_module(source, "predict")
    path: Path | None = None
    notes: list[str] = []
    if isinstance(source, PreTrainedModel):
        chosen, model = _task_of_model(source, task), source
        source = type(model).__name__
        if (wanted := resolve_dtype(dtype)) is not None:
            model.to(dtype=wanted)  # type: ignore[call-arg]
    else:
        path = locate(source, revision=revision)
        chosen, model, notes = _from_folder(path, task, source, trust_remote_code, dtype)
    if chosen in (TASKS["text-generation"], TASKS["text2text-generation"]) and not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} has no generate: derive its class from GenerationMixin, or choose another --task"
        )
    if path is None and tokenizer is None:
        raise ValueError("a model in memory has no tokenizer: pass tokenizer=")
    loaded_tokenizer = _load_tokenizer(path if tokenizer is None else tokenizer, source, trust_remote_code)
    fit_tokenizer(model, loaded_tokenizer, source, "pass the right one by --tokenizer")
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = loaded_tokenizer.pad_token_id
    longest = longest_input(model, loaded_tokenizer, None)
    if chosen is TASKS["text-generation"]:
        longest -= max_new_tokens
        if longest < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} leaves no positions for a prompt: lower it")
    if max_length is not None and not 0 < max_length <= longest:
        raise ValueError(f"max_length={max_length}, but it must be between 1 and {longest}")
    options = {"max_length": max_length or longest, "top_k": top_k, "max_new_tokens": max_new_tokens}
    ready = chosen(model.to(device).eval(), loaded_tokenizer, **options)  # type: ignore[arg-type]
    if isinstance(ready, Embedding):
        ready.pooled = not notes
    return ready, notes


def _from_folder(
    path: Path, task: str | None, source: Any, trust_remote_code: bool, dtype: str | torch.dtype
) -> tuple[type[Task], PreTrainedModel, list[str]]:
    """The task, the model, and notes for the user."""
    if not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        remedy = (
            "merge the adapter into its model first (merge_and_unload)" if adapter else "name the folder of a model"
        )
        raise ValueError(f"{path} has no config.json: {remedy}")
    chosen = _choose_task(task, read_json(path / "config.json"), source)
    return chosen, *_load_model(chosen, path, source, trust_remote_code, dtype)


def _task_of_model(model: PreTrainedModel, task: str | None) -> type[Task]:
    name = type(model).__name__
    auto_class = getattr(type(model), "_auto_class", None) or auto_class_of(
        name, inspect.signature(model.forward).parameters
    )
    return _choose_task(task, {"architectures": [name], "auto_map": {auto_class: name}}, name)


def _device(wanted: str | torch.device | None) -> torch.device:
    device = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # a build without CUDA fails an assertion
        raise ValueError(f"device={str(device)!r} cannot be used here: {first_line(error)}") from error


def _choose_task(task: str | None, config: Mapping[str, Any], source: Any) -> type[Task]:
    """The task with that name, or the task of the folder's class."""
    if task is not None:
        if task not in TASKS:
            raise ValueError(f"task={task!r}: choose one of {', '.join(TASKS)}")
        return TASKS[task]
    name = next(iter(config.get("architectures") or []), "")
    for auto_class, target in (config.get("auto_map") or {}).items():  # takes precedence over the suffix of the class
        kinds = [kind for kind in TASKS.values() if kind.auto_class == auto_class]
        if kinds and isinstance(target, str) and target.rpartition(".")[2] == name:
            return kinds[0]
    for kind in sorted(TASKS.values(), key=lambda kind: kind is Embedding):  # last, because …LMHeadModel ends in Model
        if name.endswith(kind.heads):
            return kind
    raise ValueError(
        f"{source} is a {name or 'model of unnamed class'}, whose task cannot be determined: choose --task, such as "
        "feature-extraction"
    )


def _load_model(
    task: type[Task], path: Path, source: Any, trust_remote_code: bool, dtype: str | torch.dtype
) -> tuple[PreTrainedModel, list[str]]:
    try:
        with only_errors_logged(), clear_load_errors(source):
            model, info = getattr(transformers, task.auto_class).from_pretrained(
                path,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `refuse_mismatched` raises with their names
            )
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise ValueError(f"{source} has no {task.auto_class}: choose another --task") from error
        raise
    refuse_other_class(model, read_json(path / "config.json").get("auto_map"), task.auto_class, source)
    refuse_mismatched(info, source)
    missing = sorted(info["missing_keys"])
    if task is Embedding and missing and all("pooler." in name for name in missing):
        return model, ["it has no weights of a pooler: embeddings are the mean of the hidden states"]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{source} has no weights for {', '.join(missing[:3])}{more}, so the answers of {type(model).__name__} would be "
            "random: choose another --task"
        )
    return model, []


def _load_tokenizer(path: Any, source: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if isinstance(path, PreTrainedTokenizerBase):
        return path
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # of many kinds, by what is missing
        if needs_trust_remote_code(error):
            raise remote_code_error(source) from error
        raise ValueError(
            f"{path} has no tokenizer that can be loaded ({first_line(error)}): pass --tokenizer PATH"
        ) from error
