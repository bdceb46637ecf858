"""What is exported: a model with the head of a task, tensors in and a dict of tensors out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..forward_calls import accepted, as_mapping, takes


class Task(NamedTuple):
    """The Auto class that loads a model for it, the ends of such classes' names, and what comes out of the graph."""

    auto_class: str
    endings: tuple[str, ...]
    outputs: tuple[str, ...] = ("logits",)


# by the names that pipelines and optimum have for them
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
}


def task_of(architecture: str, auto_map: Mapping[str, Any] | None = None) -> str | None:
    """The task that a model class is for, by its entry in `auto_map`, else by how its name ends; None for none of `TASKS`."""
    for auto_class, target in (auto_map or {}).items():
        found = next((name for name, task in TASKS.items() if task.auto_class == auto_class), None)
        if found and isinstance(target, str) and target.rpartition(".")[2] == architecture:
            return found
    return next((name for name, task in TASKS.items() if architecture.endswith(task.endings)), None)


def input_names(task: str, model: PreTrainedModel) -> list[str]:
    """The tensors that a model for `task` takes, all `[batch, length]`, but for cached keys and values."""
    wanted = ["input_ids", "attention_mask"]
    if getattr(model.config, "type_vocab_size", 0):
        wanted.append("token_type_ids")
    if task == "text-generation":
        wanted.append("position_ids")  # an input, because a row may be padded on the left
    names = [name for name in wanted if takes(model, name)]
    return [*names, "decoder_input_ids"] if task == "text2text-generation" else names


def named_outputs(task: str, outputs: Any) -> dict[str, torch.Tensor]:
    """The outputs of a task by their names, in whatever form a model returns them.

    Raises:
        ValueError: there is none of them.
    """
    found, names = as_mapping(outputs), TASKS[task].outputs
    if named := {name: found[name] for name in names if isinstance(found.get(name), torch.Tensor)}:
        return named
    tensors = [value for value in found.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    count = 2 if task == "question-answering" else 1
    if len(tensors) < count:
        raise ValueError(f"forward gives no {' and '.join(names[:count])}")
    return dict(zip(names[:count], tensors))


class Graph(nn.Module):
    """A model as a function from tensors to a dict of tensors, by the names that optimum gives them.

    Args:
        model: is put into eval mode.
        task: a key of `TASKS`.
        cache: keys and values go in, `[batch, kv_heads, past, head_dim]` for each layer, and come out with the new
            tokens' at their end. A layer with a sliding window gets, and gives, all of them: the mask is the window. A
            model without such a cache gets a graph without.
    """

    def __init__(self, model: PreTrainedModel, task: str, *, cache: bool = False):
        super().__init__()
        self.model = model
        self.task = task
        self.cache_shapes = _cache_shapes(model) if cache else []
        names = [f"{i}.{part}" for i in range(len(self.cache_shapes)) for part in ("key", "value")]
        self.inputs = input_names(task, model)
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
        """Arguments that the task has no use for stay None; `past_key_values` are key, value, key, value, …"""
        named = {"token_type_ids": token_type_ids, "position_ids": position_ids, "decoder_input_ids": decoder_input_ids}
        given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **named}
        given = {name: value for name, value in given.items() if value is not None}
        if past_key_values is not None:
            cache = DynamicCache()  # without the config, so that no layer forgets
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
        """Inputs to trace with: no size is 0 or 1, which a graph would be made for, and no two are alike."""
        batch, length, past = 3, 5, 7 if self.past else 0
        ids = torch.arange(batch * length).view(batch, length) % (self.model.config.vocab_size - 1) + 1
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
                torch.zeros(batch, heads, past, width, dtype=self.model.dtype)
                for heads, width in self.cache_shapes
                for _ in ("key", "value")
            ]
        return found


def run_forward(model: PreTrainedModel, task: str, given: dict[str, Any], *, cache: bool = False) -> Any:
    """The model's outputs, as a mapping where `forward` lets one ask for it; a cache is kept only if it is wanted."""
    options: dict[str, Any] = {"return_dict": True}
    if task in ("text-generation", "text2text-generation"):
        options["use_cache"] = cache
    return model(**accepted(model, {**given, **options}))


@torch.no_grad()
def _cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Heads and width of each layer's keys and values; empty for a model that keeps none."""
    if not takes(model, "past_key_values"):
        return []
    tokens = torch.zeros(1, 2, dtype=torch.long)
    given = {"input_ids": tokens, "attention_mask": tokens + 1}
    cache = as_mapping(run_forward(model, "text-generation", given, cache=True)).get("past_key_values")
    keys: list[Any] = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())]
    if any(not isinstance(key, torch.Tensor) or key.ndim != 4 for key in keys):
        return []  # another kind of state, such as that of a recurrence
    return [(key.shape[1], key.shape[3]) for key in keys]
