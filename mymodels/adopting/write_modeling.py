"""The text of `modeling_NAME.py`: the wrapper around the author's module."""

import textwrap
from typing import NamedTuple

from torch import nn

from .author_file import AuthorFile
from .constructor import Argument, Constructor, Field
from .probing import Probe
from .write_configuration import Names
from .write_forward import dotted, write_forward
from .write_generation import encoder_classes, encoder_imports, write_generation

OUTPUT = {
    "causal": "CausalLMOutput",
    "masked": "MaskedLMOutput",
    "tokens": "TokenClassifierOutput",
    "sequence": "SequenceClassifierOutput",
    "seq2seq": "Seq2SeqLMOutput",
    "image": "ImageClassifierOutput",
    "audio": "SequenceClassifierOutput",
    "span": "QuestionAnsweringModelOutput",
    "body": "BaseModelOutput",
}


TIE_WEIGHTS = """\
def tie_weights(self, missing_keys: set[str] | None = None, **kwargs: Any) -> None:
    if missing_keys is None:
        return super().tie_weights(**kwargs)
    if transformers.__version__.startswith("5.3."):  # a bug: it does not list a tied head of remote code as missing
        missing_keys.update(name for name in self._tied_weights_keys if self.get_parameter(name).is_meta)
    return super().tie_weights(missing_keys=missing_keys, **kwargs)
"""


class Wrapped(NamedTuple):
    """What the wrapper needs to know of the module, besides the `Probe`.

    Attributes:
        is_pretrained: whether it is a PreTrainedModel.
        flags: class attributes that the wrapper takes over from a PreTrainedModel.
        no_split: names of the classes of repeated blocks.
        ties: tied name → the name it is tied to.
        tables: whether it has non-persistent buffers of its own.
        on_cpu: whether its constructor needs real tensors.
    """

    is_pretrained: bool
    flags: dict[str, object]
    no_split: list[str]
    ties: dict[str, str]
    tables: bool
    on_cpu: bool


def wrapped(module: nn.Module, ties: dict[str, str], on_cpu: bool) -> Wrapped:
    from transformers import PreTrainedModel

    is_pretrained = isinstance(module, PreTrainedModel)
    names = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")
    flags: dict[str, object] = {}
    if is_pretrained:
        stock = [type(p) for p in module.modules() if type(p).__module__.startswith("transformers.models.")]
        if any("Attention" in kind.__name__ for kind in stock):  # the author's own attention looks up no other function
            flags = {name: True for name in names if getattr(module, name, False)}
        if any(hasattr(part, "gradient_checkpointing") for part in module.modules() if part is not module):
            flags["supports_gradient_checkpointing"] = True
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part)]
    firsts = [part[0] for part in lists if next(part[0].children(), None) is not None]
    # torch's own layers read the weights of their parts past the hooks that a device map sets
    blocks = list(
        dict.fromkeys(type(part).__name__ for part in firsts if not type(part).__module__.startswith("torch."))
    )
    tables = any(
        getattr(part, "_non_persistent_buffers_set", None) and not type(part).__module__.startswith("transformers.")
        for part in module.modules()
    )
    return Wrapped(is_pretrained, flags, blocks, ties, tables, on_cpu)


def write_modeling(
    constructor: Constructor,
    probe: Probe,
    names: Names,
    cls: str,
    file: AuthorFile,
    renamed: dict[str, str],
    about: Wrapped,
) -> str:
    """The file's text."""
    generates, two = probe.generates, probe.generates and probe.kind == "seq2seq"
    bases = "PreTrainedModel, GenerationMixin" if generates else "PreTrainedModel"
    dataclasses = sorted({a.type_name for a in constructor.arguments if a.type_name and a.kind != "config"})
    namespace = any(a.kind == "namespace" for a in constructor.arguments)
    head = [
        f'"""{names.model}: `{cls}` as a transformers model.',
        "",
        f"The module itself is in {file.path.name}, as its author wrote it.",
        '"""',
        "",
        *(encoder_imports(probe) if two else []),
        *(["from types import SimpleNamespace"] if namespace else []),
        "from typing import Any",
        "",
        "import torch",
        *(["import transformers"] if about.ties else []),
        "from torch import nn",
        f"from transformers import {'GenerationMixin, ' if generates else ''}PreTrainedModel",
        f"from transformers.modeling_outputs import {'BaseModelOutput, ' if two else ''}{OUTPUT[probe.kind]}",
        "from transformers.utils import can_return_tuple",
        "",
        f"from .configuration_{names.model_type} import {names.config}",
        f"from .{file.path.stem} import {', '.join(sorted([cls, *dataclasses]))}",
        "",
        "",
        *([*encoder_classes(probe, dotted(probe.encoder)).split("\n"), ""] if two else []),
        f"class {names.model}({bases}):",
        f'    """{_summary(probe, cls)}"""',
        "",
        "",
    ]
    body = "\n\n".join(
        part
        for part in (
            _attributes(probe, names, about),
            _init(constructor, names, cls, renamed, about),
            _init_weights(about),
            TIE_WEIGHTS.rstrip() if about.ties else "",
            _embeddings(probe),
            write_forward(probe, OUTPUT[probe.kind]),
            write_generation(probe),
        )
        if part
    )
    return "\n".join(head) + textwrap.indent(body, "    ", lambda line: bool(line.strip())) + "\n"


def _summary(probe: Probe, cls: str) -> str:
    return {
        "causal": f"`{cls}` with next-token labels and `generate`, which runs all tokens again at each step.",
        "masked": f"`{cls}` with a loss for masked tokens.",
        "tokens": f"`{cls}` with a loss for a label per token.",
        "sequence": f"`{cls}` with a loss for a label per row.",
        "seq2seq": f"`{cls}` with a loss for the tokens of the target"
        + (", and `generate`, which runs the target's tokens again at each step." if probe.generates else "."),
        "image": f"`{cls}` with a loss for a label per image.",
        "audio": f"`{cls}` with a loss for a label per row.",
        "span": f"`{cls}` with a loss for the start and the end of an answer.",
        "body": f"`{cls}` with its output as `last_hidden_state`.",
    }[probe.kind]


def _attributes(probe: Probe, names: Names, about: Wrapped) -> str:
    lines = [f"config_class = {names.config}"]
    if probe.call.main != "input_ids":
        lines.append(f'main_input_name = "{probe.call.main}"')
    if about.no_split:
        lines.append(f"_no_split_modules = [{', '.join(f'{name!r}' for name in about.no_split)}]".replace("'", '"'))
    if about.ties:
        pairs = [f'"net.{tied}": "net.{target}"' for tied, target in sorted(about.ties.items())]
        line = f"_tied_weights_keys = {{{', '.join(pairs)}}}"
        many = "".join(f"    {pair},\n" for pair in pairs)
        lines.append(line if len(line) <= 100 else f"_tied_weights_keys = {{\n{many}}}")
    lines += [f"{name} = {value}" for name, value in about.flags.items()]
    if probe.loss.kind == "own":
        lines.append("accepts_loss_kwargs = False  # the module's loss knows of no num_items_in_batch")
    return "\n".join(lines)


def _init(constructor: Constructor, names: Names, cls: str, renamed: dict[str, str], about: Wrapped) -> str:
    calls = [_argument(argument, renamed) for argument in constructor.arguments]
    built = f"self.net = {cls}({', '.join(calls)})"
    if len(built) > 90 or "\n" in built:
        built = f"self.net = {cls}(\n" + "".join(textwrap.indent(f"{call},\n", "    ") for call in calls) + ")"
    lines = [f"def __init__(self, config: {names.config}):", "    super().__init__(config)"]
    loading = "any(weight.is_meta for weight in self.net.parameters())"
    if about.on_cpu:
        lines += [
            '    loading = torch.get_default_device().type == "meta"',
            '    with torch.device("cpu"):  # its constructor computes with tensors, which have no values on the meta device',
            textwrap.indent(built, " " * 8),
        ]
        loading = f"(loading or {loading})"
    else:
        lines.append(textwrap.indent(built, " " * 4))
    if about.tables:
        lines += [
            "    for module in self.net.modules():",
            *(
                [
                    '        if not type(module).__module__.startswith("transformers."):',
                    "            module._non_persistent_buffers_set.clear()",
                ]
                if about.is_pretrained
                else ["        module._non_persistent_buffers_set.clear()"]
            ),
        ]
        lines[-1] += "  # saved too: the loader would not compute them again"
    if not about.is_pretrained:
        lines += [
            f"    if not {loading}:",
            "        for module in self.net.modules():  # a new model keeps the initialisation of its author",
            "            module._is_hf_initialized = True",
        ]
    return "\n".join([*lines, "    self.post_init()"])


def _argument(argument: Argument, renamed: dict[str, str]) -> str:
    if argument.kind == "config":
        return "config"
    pairs = [(field.argument, _value(field, renamed)) for field in argument.fields]
    prefix = f"{argument.name}=" if argument.keyword else ""
    if argument.kind == "value":
        return prefix + pairs[0][1]
    after = [(name, value) for name, value in pairs if name in argument.set_after]
    pairs = [pair for pair in pairs if pair not in after]
    kind = {"namespace": "SimpleNamespace", "dict": "dict"}.get(argument.kind, argument.type_name)
    made = _written(kind, pairs)
    return prefix + (_written("with_values", after, made) if after else made)


def _written(function: str, pairs: list[tuple[str, str]], first: str = "") -> str:
    """A call, over several lines if it is long."""
    parts = [*([first] if first else []), *(f"{name}={value}" for name, value in pairs)]
    if sum(map(len, parts)) > 60:
        return f"{function}(\n{textwrap.indent(''.join(f'{part},' + chr(10) for part in parts), '    ')})"
    return f"{function}({', '.join(parts)})"


def _value(field: Field, renamed: dict[str, str]) -> str:
    name = "num_labels" if renamed.get("num_labels") == field.name else field.name
    if not field.is_tuple:
        return f"config.{name}"
    return f"tuple(config.{name})" if field.value is not None else f"config.{name} and tuple(config.{name})"


def _init_weights(about: Wrapped) -> str:
    if about.is_pretrained:
        return (
            "def _init_weights(self, module: nn.Module) -> None:\n"
            "    if module is not self:\n"
            "        self.net._init_weights(module)"
        )
    return """\
def _init_weights(self, module: nn.Module) -> None:
    # New tokens, and what a checkpoint lacks. `nn.init` on the parameter: the loader guards these calls.
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)) and module.weight is not None:
        nn.init.ones_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)"""


def _embeddings(probe: Probe) -> str:
    if not probe.embeddings or not probe.resizes:
        return ""
    text = _getter("input", probe.embeddings, "value")
    return text + "\n\n" + _getter("output", probe.head, "value") if probe.head else text


def _getter(kind: str, path: str, value: str) -> str:
    return (
        f"def get_{kind}_embeddings(self) -> nn.Module:\n    return self.net.{dotted(path)}\n\n"
        f"def set_{kind}_embeddings(self, {value}: nn.Module) -> None:\n    self.net.{dotted(path)} = {value}"
    )


REFUSE = '''\
def refuse_unknown(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise a TypeError for an argument that would otherwise be ignored."""
    for name, value in kwargs.items():
        if name not in ("num_items_in_batch", "use_cache") and value is not None and value is not False:
            raise TypeError(f"{type(model).__name__} takes no {name}")
'''
WITH_VALUES = '''\
def with_values(made: Any, **values: Any) -> Any:
    """An object of the author's with attributes that its constructor does not take."""
    for name, value in values.items():
        setattr(made, name, value)
    return made
'''
PADDING_LAST = '''\
def padding_last(attention_mask: torch.Tensor) -> torch.Tensor:
    """The place of each token in a row whose padding is moved behind its tokens, `[batch, length]`."""
    kept = attention_mask.bool()
    return torch.where(kept, kept.cumsum(1), kept.sum(1, keepdim=True) + (~kept).cumsum(1)) - 1
'''
HELPERS = {"refuse_unknown(": REFUSE, "with_values(": WITH_VALUES, "padding_last(": PADDING_LAST}


def pretty(text: str) -> str:
    """The text with the helpers that wrappers share, before the class."""
    helpers = "\n\n".join(helper for call, helper in HELPERS.items() if call in text)
    return text.replace("\n\n\nclass ", f"\n\n\n{helpers}\n\nclass ", 1)
