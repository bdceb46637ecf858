"""What is exported: a model with the head of a task, tensors in and a dict of tensors out."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel


class Task(NamedTuple):
    """The Auto class that loads a model for it, the ends of such classes' names, and what comes out of the graph."""

    auto_class: str
    endings: tuple[str, ...]
    outputs: tuple[str, ...] = ("logits",)


# by the names that pipelines and optimum have for them
TASKS = {
    "text-generation": Task("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "text-classification": Task("AutoModelForSequenceClassification", ("ForSequenceClassification",)),
    "token-classification": Task("AutoModelForTokenClassification", ("ForTokenClassification",)),
    "question-answering": Task(
        "AutoModelForQuestionAnswering", ("ForQuestionAnswering",), ("start_logits", "end_logits")
    ),
    "fill-mask": Task("AutoModelForMaskedLM", ("ForMaskedLM",)),
    "feature-extraction": Task("AutoModel", ("Model",), ("last_hidden_state", "pooler_output")),
}


def task_of(architecture: str) -> str | None:
    """The task that a model class is for, by how its name ends; None if it is for none of `TASKS`."""
    return next((name for name, task in TASKS.items() if architecture.endswith(task.endings)), None)


def input_names(task: str, config: PretrainedConfig) -> list[str]:
    """The tensors that a model for `task` takes, all `[batch, length]`, but for cached keys and values."""
    names = ["input_ids", "attention_mask"]
    if getattr(config, "type_vocab_size", 0):
        names.append("token_type_ids")
    # told, not counted: a row may be padded on the left
    return [*names, "position_ids"] if task == "text-generation" else names


class Graph(nn.Module):
    """A model as a function from tensors to a dict of tensors, by the names that optimum gives them.

    Args:
        model: is put into eval mode.
        task: a key of `TASKS`.
        cache: keys and values go in, `[batch, kv_heads, past, head_dim]` for each layer, and come out with the new
            tokens' at their end. A layer with a sliding window gets, and gives, all of them: the mask is the window.
    """

    def __init__(self, model: PreTrainedModel, task: str, *, cache: bool = False):
        super().__init__()
        self.model = model
        self.task = task
        self.cache_shapes = _cache_shapes(model) if cache else []
        names = [f"{i}.{part}" for i in range(len(self.cache_shapes)) for part in ("key", "value")]
        self.inputs = input_names(task, model.config)
        self.past = [f"past_key_values.{name}" for name in names]
        self.present = [f"present.{name}" for name in names]
        self.eval()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: list[torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Arguments that the task has no use for stay None; `past_key_values` are key, value, key, value, …"""
        given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            given["token_type_ids"] = token_type_ids
        if position_ids is not None:
            given["position_ids"] = position_ids
        if past_key_values is not None:
            cache = DynamicCache()  # without the config, so that no layer forgets
            for i in range(len(past_key_values) // 2):
                cache.update(past_key_values[2 * i], past_key_values[2 * i + 1], i)
            given["past_key_values"] = cache
        if self.task == "text-generation":
            given["use_cache"] = past_key_values is not None
        outputs = self.model(**given, return_dict=True)
        results = {name: outputs[name] for name in TASKS[self.task].outputs if outputs.get(name) is not None}
        if past_key_values is not None:
            states = [part for layer in outputs.past_key_values.layers for part in (layer.keys, layer.values)]
            results |= dict(zip(self.present, states))
        return results

    def example(self) -> dict[str, Any]:
        """Inputs to trace with: no size is 0 or 1, which a graph would be made for, and no two are alike."""
        batch, length, past = 3, 5, 7 if self.past else 0
        ids = torch.arange(batch * length).view(batch, length) % (self.model.config.vocab_size - 1) + 1
        found: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones(batch, past + length, dtype=torch.long)}
        if "token_type_ids" in self.inputs:
            found["token_type_ids"] = torch.zeros_like(ids)
        if "position_ids" in self.inputs:
            found["position_ids"] = torch.arange(past, past + length).repeat(batch, 1)
        if self.past:
            found["past_key_values"] = [
                torch.zeros(batch, heads, past, width, dtype=self.model.dtype)
                for heads, width in self.cache_shapes
                for _ in ("key", "value")
            ]
        return found


@torch.no_grad()
def _cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Heads and width of each layer's keys and values."""
    tokens = torch.zeros(1, 2, dtype=torch.long)
    cache = model(input_ids=tokens, attention_mask=tokens + 1, use_cache=True, return_dict=True).get("past_key_values")
    keys: list[Any] = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())]
    if not keys or any(not isinstance(key, torch.Tensor) or key.ndim != 4 for key in keys):
        raise ValueError(f"{type(model).__name__} has no cache of keys and values in each layer")
    return [(key.shape[1], key.shape[3]) for key in keys]
