"""Load the model and the tokenizer that a fine-tuning starts from: from a folder, the Hub or memory."""

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.load_errors import clear_load_errors, fit_tokenizer, refuse_other_class
from ..checkpoints.opening import locate
from ..checkpoints.safetensors_files import read_json
from ..forward_calls import check_loss, logits_of
from ..hub.auto_class_names import auto_class_of
from ..library_logging import only_errors_logged
from ..messages import first_line
from ..released import own_code, reader
from ..warmstart import warm_start
from .added_heads import heads_added, own_base_model
from .data import Data

CLASS_SUFFIXES = {
    "classification": "ForSequenceClassification",
    "causal": "ForCausalLM",
    "masked": "ForMaskedLM",
    "seq2seq": "ForSeq2SeqLM",
    "tokens": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
KINDS = {  # by task
    "classification": ("classification",),
    "token-classification": ("tokens",),
    "question-answering": ("span",),
    "lm": ("causal", "masked"),
    "seq2seq": ("seq2seq",),
}
LABELLED = ("classification", "token-classification")
_OURS = {"mygpt2": "causal", "mybert": "masked"}


@dataclass
class LoadedBase:
    """The model and tokenizer to fine-tune.

    Attributes:
        kind: a key of `CLASS_SUFFIXES`.
        new: names of the newly initialised parameters, and of a classifier's head.
        hub_id: the model's Hub id, if it was loaded from the Hub.
        how: a sentence on how it was loaded.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kind: str
    new: list[str] = field(default_factory=list)
    hub_id: str | None = None
    how: str = ""


def known_labels(model: PreTrainedModel | str | os.PathLike, revision: str | None = None) -> list[str]:
    """The labels of a classifier in order of their numbers; empty if they have only default names."""
    _check_model_argument(model)
    if isinstance(model, PreTrainedModel):
        found: Mapping[Any, str] = model.config.id2label or {}
    else:
        path = locate(model, revision=revision)
        config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        heads = ("ForSequenceClassification", "ForTokenClassification")
        found = config.get("id2label") or {} if any(h in str(config.get("architectures")) for h in heads) else {}
    names = [str(found[number]) for number in sorted(found, key=int)]
    return [] if names == [f"LABEL_{i}" for i in range(len(names))] else names


def _check_model_argument(model: Any) -> None:
    if not isinstance(model, (PreTrainedModel, str, os.PathLike)):
        raise ValueError(
            f"finetune takes a transformers model or the name of one, and {type(model).__name__} is neither: derive your "
            "model from PreTrainedModel, or wrap it with `mymodels adopt`"
        )


def load_base(
    model: PreTrainedModel | str | os.PathLike,
    task: str,
    *,
    labels: Sequence[str] | None = None,
    to: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedBase:
    """Load the model and tokenizer; arguments as of `finetune`. Weights are float32, so that small updates are not lost.

    Raises:
        ValueError: the model has no head for the task, another number of labels, or no tokenizer.
        OSError: the folder or Hub repo does not exist.
    """
    _check_model_argument(model)
    known = known_labels(model, revision) if task in LABELLED else []
    if isinstance(model, PreTrainedModel):
        if to or overrides:
            raise ValueError("to= and overrides= do not apply to a model in memory: leave them out")
        found = _in_memory(model, task, labels, tokenizer)
    else:
        found = _from_checkpoint(model, task, labels, to, dict(overrides or {}), tokenizer, revision, trust_remote_code)
    if task in LABELLED:
        inside = f"{found.model.base_model_prefix}."
        head = [name for name, _ in found.model.named_parameters() if not name.startswith(inside)]
        found.new = list(dict.fromkeys([*found.new, *head]))
        if labels is not None and known and len(known) == len(labels) and list(labels) != known:
            _reinitialize_head(found.model, inside)
            if not (overrides or {}).get("class_weights") and getattr(found.model.config, "class_weights", None):
                found.model.config.class_weights = None
            found.how += f", but with a new head, as its labels were {', '.join(known[:6])}{', …' * (len(known) > 6)}"
    _fit_tokenizer(found)
    return found


def _in_memory(model: PreTrainedModel, task: str, labels: Sequence[str] | None, tokenizer: Any) -> LoadedBase:
    name = type(model).__name__
    kind = next(
        filter(None, map(_head_kind, type(model).__mro__)), ""
    )  # a subclass's own name need not have the suffix
    if kind not in KINDS[task]:
        wanted = " or ".join(f"AutoModel{CLASS_SUFFIXES[kind]}" for kind in KINDS[task])
        raise ValueError(
            f"{name} is not a model for --task {task} by its name: use a class that ends in {_class_suffixes(task)}, or call "
            f"{name}.register_for_auto_class with {wanted}"
        )
    if labels is not None:
        if model.config.num_labels != len(labels):
            raise ValueError(
                f"{name} has num_labels={model.config.num_labels}, but the data have {len(labels)} labels: create it with "
                f"num_labels={len(labels)}"
            )
        _set_labels(model.config, labels)
    if tokenizer is None:
        raise ValueError("a model in memory has no tokenizer: pass tokenizer=")
    return LoadedBase(model.float(), _tokenizer(tokenizer, False), kind, how=f"{name} in memory")


def _head_kind(cls: type) -> str:
    """The kind of a class's head, by its registered Auto class or its name; `""` for kinds that cannot be trained."""
    by_name = auto_class_of(cls.__name__, inspect.signature(cls.forward).parameters) if hasattr(cls, "forward") else ""
    auto_class = vars(cls).get("_auto_class") or by_name
    return next((kind for kind, head in CLASS_SUFFIXES.items() if auto_class == f"AutoModel{head}"), "")


def _from_checkpoint(
    source: str | os.PathLike,
    task: str,
    labels: Sequence[str] | None,
    to: str | None,
    overrides: dict[str, Any],
    tokenizer: Any,
    revision: str | None,
    trust_remote_code: bool,
) -> LoadedBase:
    path = locate(source, revision=revision)
    hub_id = None if Path(source).expanduser().exists() else str(source)
    raw = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    own = raw.get("model_type") if raw.get("model_type") in _OURS and not own_code(raw, reader(path)) else None
    to = to or (own if overrides else None)
    if to is not None:
        if to not in _OURS:
            raise ValueError(f"to={to!r}: mymodels has {' and '.join(_OURS)}")
        if task == "seq2seq":
            raise ValueError(f"to={to!r} is not an encoder-decoder: leave out to= for --task seq2seq")
        kind = _OURS[to] if task == "lm" else KINDS[task][0]
        if labels is not None:
            named = PretrainedConfig()
            _set_labels(named, labels)
            label_fields = {name: getattr(named, name) for name in ("id2label", "label2id", "problem_type")}
            overrides = (
                {"class_weights": None} | label_fields | overrides if to == "mybert" else label_fields | overrides
            )
        how: dict[str, Any] = {"overrides": overrides, "tokenizer": tokenizer, "trust_remote_code": trust_remote_code}
        report = warm_start(to, path, head=CLASS_SUFFIXES[kind], dtype="float32", revision=revision, **how)
        assert report.model is not None
        new = [name for row in report.rows if row.status == "new" for name in row.targets]
        cut = tokenizer if tokenizer is not None else report.tokenizer
        how_loaded = f"{type(report.model).__name__}, warm-started from {source}: {_describe_new(new)}"
        return LoadedBase(report.model, _tokenizer(cut, trust_remote_code, source), kind, new, hub_id, how_loaded)
    if not raw:
        raise ValueError(f"{path} has no config.json: name the folder of a model, or pass --to mygpt2 or --to mybert")
    with clear_load_errors(source):
        config, unknown = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, return_unused_kwargs=True, **overrides
        )
    if unknown:
        raise ValueError(
            f"{source} is a {config.model_type}, whose config has no field {', '.join(unknown)}: pass --to mygpt2 or mybert"
        )
    kind = _language_model_kind(config, raw) if task == "lm" else KINDS[task][0]
    if labels is not None:
        _set_labels(config, labels)
        if len(getattr(config, "class_weights", None) or labels) != len(labels):
            config.class_weights = None
    auto_class = getattr(transformers, f"AutoModel{CLASS_SUFFIXES[kind]}")
    if own_base_model(raw.get("auto_map"), kind) is not None:
        with heads_added(path, source, raw, trust_remote_code) as folder:
            loaded = _from_checkpoint(
                folder, task, labels, None, overrides, tokenizer or path, revision, trust_remote_code
            )
        loaded.model.name_or_path = loaded.model.config._name_or_path = str(source)
        loaded.hub_id = hub_id
        loaded.how = f"{type(loaded.model).__name__}, a new head on the base model of {source}"
        return loaded
    with only_errors_logged(), clear_load_errors(source), _explain_missing_head(source, config, task):
        model, info = auto_class.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head for another number of labels
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    refuse_other_class(model, raw.get("auto_map"), auto_class.__name__, source)
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    new = sorted({*info["missing_keys"], *mismatched} & dict(model.named_parameters()).keys())
    base = [name for name, _ in model.named_parameters() if name.startswith(f"{model.base_model_prefix}.")]
    if base and set(base) <= set(new):
        raise ValueError(f"{source} has no weights of {type(model).__name__} by their names: see `mymodels inspect`")
    how_loaded = f"{type(model).__name__} from {source}: {_describe_new(new)}"
    return LoadedBase(model, _tokenizer(tokenizer or path, trust_remote_code, source), kind, new, hub_id, how_loaded)


@contextlib.contextmanager
def _explain_missing_head(source: Any, config: PretrainedConfig, task: str) -> Iterator[None]:
    """Context of `from_pretrained` that raises one sentence for a model without a head for the task."""
    try:
        yield
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"{source} is a {config.model_type}, which has no class for AutoModel{_class_suffixes(task).split(' ')[0]}: choose "
            "another --task, or add the class to auto_map in its config.json"
        ) from None


def _reinitialize_head(model: PreTrainedModel, inside: str) -> None:
    """Initialise the layer of the logits, as transformers does for another number of labels."""
    for name, module in model.named_modules():
        last = isinstance(module, torch.nn.Linear) and module.out_features == model.config.num_labels
        if last and not name.startswith(inside):
            torch.nn.init.normal_(module.weight, std=getattr(model.config, "initializer_range", 0.02))
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)


def _set_labels(config: PretrainedConfig, labels: Sequence[str]) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = "single_label_classification"


def _language_model_kind(config: PretrainedConfig, raw: Mapping[str, Any]) -> str:
    """`"masked"` for an encoder, `"causal"` for a decoder."""
    available = {
        kind: type(config) in getattr(transformers, f"MODEL_FOR_{name}_MAPPING")
        or f"AutoModel{CLASS_SUFFIXES[kind]}" in (raw.get("auto_map") or {})
        for kind, name in (("masked", "MASKED_LM"), ("causal", "CAUSAL_LM"))
    }
    if available["masked"] and not getattr(config, "is_decoder", False):
        return "masked"
    if available["causal"]:
        return "causal"
    raise ValueError(f"{config.model_type} models have no language-model head: choose another model or --task")


def _tokenizer(given: Any, trust_remote_code: bool, source: Any = "the model") -> PreTrainedTokenizerBase:
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    try:
        if given is None:
            raise OSError("it does not exist")
        return AutoTokenizer.from_pretrained(given, trust_remote_code=trust_remote_code)
    except Exception as error:  # of many kinds, by what is missing
        where = source if given is None or isinstance(given, Path) else given
        raise ValueError(
            f"{where} has no tokenizer that can be loaded ({first_line(error)}): pass --tokenizer PATH"
        ) from error


def _fit_tokenizer(found: LoadedBase) -> None:
    """Check that every token has an embedding, and set the same pad token, and padding on the right for classifiers."""
    model, tokenizer = found.model, found.tokenizer
    remedy = "use the model's own, or warm-start a model with --to and --tokenizer"
    fit_tokenizer(model, tokenizer, "the model", remedy)
    if found.kind == "masked" and tokenizer.mask_token is None:
        raise ValueError(
            "the tokenizer has no mask token, which training a masked language model needs: choose another"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if found.kind in ("classification", "tokens", "span"):
        tokenizer.padding_side = "right"  # so that positions are the same in training and inference


def check_task(base: LoadedBase, data: Data, batch: Mapping[str, Any]) -> None:
    """Run a batch through a model with custom code before training.

    Raises:
        ValueError: `forward` fails, returns no loss, or logits of the wrong shape for the task.
    """
    outputs = check_loss(base.model, batch)
    logits, name = logits_of(outputs), type(base.model).__name__
    wanted = None if data.labels is None else (*batch["labels"].shape, len(data.labels))
    if wanted is not None and (logits is None or logits.shape != wanted):
        shape = "none" if logits is None else str(list(logits.shape))
        form = f"[batch, {'tokens, ' if base.kind == 'tokens' else ''}{wanted[-1]}]"
        raise ValueError(
            f"{name}.forward returns logits of the shape {shape}, but {wanted[-1]} labels need {form}: create its head with "
            "config.num_labels"
        )
    if "attention_mask" not in batch and base.kind not in ("causal", "masked"):
        data.notes.append(
            f"{name}.forward takes no attention_mask, so padding counts as text unless it detects the pad token itself"
        )


def _describe_new(new: Sequence[str]) -> str:
    if not new:
        return "every weight loaded"
    return f"new are {', '.join(new[:6])}" + (f" and {len(new) - 6} more" if len(new) > 6 else "")


def _class_suffixes(task: str) -> str:
    return " or ".join(CLASS_SUFFIXES[kind] for kind in KINDS[task]) + (
        " or ForConditionalGeneration" if task == "seq2seq" else ""
    )
