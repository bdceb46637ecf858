"""The module to export: a model for a task, from tensors to a dict of tensors."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..checkpoints.load_errors import embedded_tokens
from ..forward_calls import accepted, as_mapping, is_known, names_argument, takes


class Task(NamedTuple):
    """The Auto class of a task, suffixes of its model classes, the names of the graph's outputs, and what it reads."""

    auto_class: str
    endings: tuple[str, ...]
    outputs: tuple[str, ...] = ("logits",)
    reads: str = "text"


# names as in transformers' pipelines and optimum
TASKS = {
    "text-generation": Task("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "text2text-generation": Task("AutoModelForSeq2SeqLM", ("ForConditionalGeneration", "ForSeq2SeqLM")),
    "text-classification": Task("AutoModelForSequenceClassification", ("ForSequenceClassification",)),
    "token-classification": Task("AutoModelForTokenClassification", ("ForTokenClassification",)),
    "question-answering": Task(
        "AutoModelForQuestionAnswering", ("ForQuestionAnswering",), ("start_logits", "end_logits")
    ),
    "fill-mask": Task("AutoModelForMaskedLM", ("ForMaskedLM",)),
    "feature-extraction": Task("AutoModel", ("Model",), ("last_hidden_state", "pooler_output")),
    "image-classification": Task("AutoModelForImageClassification", ("ForImageClassification",), reads="images"),
    "image-segmentation": Task("AutoModelForSemanticSegmentation", ("ForSemanticSegmentation",), reads="images"),
    "audio-classification": Task("AutoModelForAudioClassification", ("ForAudioClassification",), reads="audio"),
    "automatic-speech-recognition": Task("AutoModelForCTC", ("ForCTC",), reads="audio"),
}
OTHER = "other"  # of another Auto class, whose inputs are given: every floating-point output, by its name


def task_of(architecture: str, auto_map: Mapping[str, Any] | None = None) -> str | None:
    """The task of a model class, by its entry in `auto_map`, else by its suffix; None if it is none of `TASKS`."""
    for auto_class, target in (auto_map or {}).items():
        found = next((name for name, task in TASKS.items() if task.auto_class == auto_class), None)
        if found and isinstance(target, str) and target.rpartition(".")[2] == architecture:
            return found
    return next((name for name, task in TASKS.items() if architecture.endswith(task.endings)), None)


def vocab_size_of(model: PreTrainedModel) -> int | None:
    """The number of token ids that a model knows, by its config or its embeddings; None if neither has one."""
    size = getattr(model.config, "vocab_size", None)
    return size if isinstance(size, int) else embedded_tokens(model)


def reads_text(model: PreTrainedModel, task: str) -> bool:
    """Whether the inputs of a model for `task` are token ids alone, which can be generated."""
    text = task in TASKS and TASKS[task].reads == "text" and model.main_input_name == "input_ids"
    return text and vocab_size_of(model) is not None


def input_names(task: str, model: PreTrainedModel) -> list[str]:
    """The input tensors of a model for `task`, all `[batch, length]`, without cached keys and values.

    Of custom code, arguments that `forward` only seems to take, through **kwargs, and refuses, are left out.
    """
    wanted = ["input_ids", "attention_mask"]
    if getattr(model.config, "type_vocab_size", 0):
        wanted.append("token_type_ids")
    if task == "text-generation" and names_argument(model, "position_ids"):
        wanted.append("position_ids")  # an input, because rows may be padded on the left
    names = [name for name in wanted if takes(model, name)]
    names += ["decoder_input_ids"] if task == "text2text-generation" else []
    refused = (
        () if is_known(model) else ((), ("token_type_ids",), ("attention_mask",), ("token_type_ids", "attention_mask"))
    )
    fewer = ([name for name in names if name not in left] for left in refused)
    return next((tried for tried in fewer if _runs(model, task, tried)), names)


@torch.no_grad()
def _runs(model: PreTrainedModel, task: str, names: list[str]) -> bool:
    """Whether `forward` takes these inputs, with a row that is padded."""
    ids = torch.ones(2, 3, dtype=torch.long)
    given = {name: ids if "input_ids" in name else torch.zeros_like(ids) for name in names}
    if "attention_mask" in given:
        given["attention_mask"] = torch.tensor([[1, 1, 1], [0, 1, 1]])
    try:
        run_forward(model.eval(), task, given)
    except Exception:  # custom code can raise anything
        return False
    return True


def named_outputs(task: str, outputs: Any) -> dict[str, torch.Tensor]:
    """The outputs of a task by name, from any form of output.

    Raises:
        ValueError: the model returns none of them.
    """
    found = as_mapping(outputs)
    if task == OTHER:
        floating = {n: v for n, v in found.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim}
        if not floating:
            raise ValueError("forward returns no floating-point tensor")
        return floating
    names = TASKS[task].outputs
    if named := {name: found[name] for name in names if isinstance(found.get(name), torch.Tensor)}:
        return named
    tensors = [value for value in found.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    count = 2 if task == "question-answering" else 1
    if len(tensors) < count:
        raise ValueError(f"forward returns no {' and '.join(names[:count])}")
    return dict(zip(names[:count], tensors))


class Graph(nn.Module):
    """A model as a function from tensors to a dict of tensors, with optimum's names.

    Args:
        model: is set to eval mode.
        task: a key of `TASKS`.
        cache: whether keys and values, `[batch, kv_heads, past, head_dim]` for each layer, are inputs and, with those of
            the new tokens appended, outputs. For layers with a sliding window too all of them, because the mask applies
            the window. Ignored for a model without such a cache.
    """

    def __init__(self, model: PreTrainedModel, task: str, *, cache: bool = False):
        super().__init__()
        self.model = model
        self.task = task
        layers = _cache_shapes(model) if cache else []
        self.past_shapes = [shape for shape in layers for _ in ("key", "value")]
        names = [f"{i}.{part}" for i in range(len(layers)) for part in ("key", "value")]
        self.inputs = input_names(task, model) if reads_text(model, task) else []
        self.past = [f"past_key_values.{name}" for name in names]
        self.present = [f"present.{name}" for name in names]
        self.eval()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        past_key_values: list[torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Arguments that the task does not use are None; `past_key_values` are key, value, key, value, …"""
        named = {"token_type_ids": token_type_ids, "position_ids": position_ids, "decoder_input_ids": decoder_input_ids}
        given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **named}
        given = {name: value for name, value in given.items() if value is not None}
        if past_key_values is not None:
            cache = DynamicCache()  # without the config, so that sliding-window layers keep all tokens
            for i in range(len(past_key_values) // 2):
                cache.update(past_key_values[2 * i], past_key_values[2 * i + 1], i)
            given["past_key_values"] = cache
        outputs = run_forward(self.model, self.task, given, cache=past_key_values is not None)
        results = named_outputs(self.task, outputs)
        if past_key_values is not None:
            states = [part for layer in outputs.past_key_values.layers for part in (layer.keys, layer.values)]
            results |= dict(zip(self.present, states))
        return results

    def example(self) -> dict[str, Any]:
        """Inputs for tracing: no size is 0 or 1, which tracing specialises on, and no two sizes are equal."""
        batch, length, past = 3, 5, 7 if self.past else 0
        ids = torch.arange(batch * length).view(batch, length) % ((vocab_size_of(self.model) or 2) - 1) + 1
        found: dict[str, Any] = {"input_ids": ids}
        if "attention_mask" in self.inputs:
            found["attention_mask"] = torch.ones(batch, past + length, dtype=torch.long)
        if "token_type_ids" in self.inputs:
            found["token_type_ids"] = torch.zeros_like(ids)
        if "position_ids" in self.inputs:
            found["position_ids"] = torch.arange(past, past + length).repeat(batch, 1)
        if "decoder_input_ids" in self.inputs:
            found["decoder_input_ids"] = ids.flip(1)[:, :4].clone()
        if self.past:
            found["past_key_values"] = [
                torch.zeros(batch, heads, past, width, dtype=self.model.dtype) for heads, width in self.past_shapes
            ]
        return found

    def axes(self) -> dict[str, dict[int, str]]:
        """Input → its axes of any size, by name; without the cache."""
        axes = {name: {0: "batch_size", 1: "sequence_length"} for name in self.inputs}
        if "attention_mask" in axes and self.past:
            axes["attention_mask"][1] = "total_sequence_length"
        if "decoder_input_ids" in axes:
            axes["decoder_input_ids"][1] = "decoder_sequence_length"
        return axes


class GivenGraph(Graph):
    """A model as a function of given tensors, such as images; only the batch may have another size.

    Args:
        given: argument of `forward` → tensor, all with the same number of rows.
    """

    def __init__(self, model: PreTrainedModel, task: str, given: Mapping[str, torch.Tensor]):
        super().__init__(model, task)
        self.given = dict(given)
        self.inputs = list(given)

    def example(self) -> dict[str, Any]:
        return {name: torch.cat([tensor] * 3)[:3] for name, tensor in self.given.items()}

    def axes(self) -> dict[str, dict[int, str]]:
        return {name: {0: "batch_size"} for name in self.inputs}


def graph_of_inputs(model: PreTrainedModel, task: str, given: Mapping[str, torch.Tensor]) -> GivenGraph:
    """A `GivenGraph` whose `forward` has one argument for each given tensor, by its name."""

    def forward(self: GivenGraph, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return named_outputs(task, run_forward(self.model, task, inputs))

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *given)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # tracing reads the names
    return type("Graph", (GivenGraph,), {"forward": forward})(model, task, given)


def run_forward(model: PreTrainedModel, task: str, given: dict[str, Any], *, cache: bool = False) -> Any:
    """The model's outputs, with `return_dict=True` if `forward` takes it, and a cache only if `cache`."""
    options: dict[str, Any] = {"return_dict": True}
    if task in ("text-generation", "text2text-generation"):
        options["use_cache"] = cache
    dtype = model.dtype
    cast = {n: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in given.items()}
    return model(**accepted(model, {**cast, **options}))


@torch.no_grad()
def _cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(heads, head_dim) of each layer's keys and values; empty for a model without a cache."""
    if not names_argument(model, "past_key_values"):
        return []
    tokens = torch.zeros(1, 2, dtype=torch.long)
    given = {"input_ids": tokens, "attention_mask": tokens + 1}
    cache = as_mapping(run_forward(model, "text-generation", given, cache=True)).get("past_key_values")
    keys: list[Any] = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())]
    if any(not isinstance(key, torch.Tensor) or key.ndim != 4 for key in keys):
        return []  # another kind of cache, such as a recurrent state
    return [(key.shape[1], key.shape[3]) for key in keys]
