"""`warm_start`: stock weights into a modified architecture, with an account of every tensor."""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from accelerate.utils import get_max_memory
from tqdm import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import CheckpointError, load_checkpoint_and_dispatch
from ..checkpoints.checkpoint import resolve_dtype
from ..models import modeling_mybert, modeling_mygpt2
from .checking import SMALL, Check, Checker
from .configs import fields_of, make_config, own_config
from .conversion import TokenVectors
from .key_mapping import CONFIGS, FAMILIES, kind_of
from .lazy_tensor import Value
from .planning import Plan, compiled, make_plan
from .report import Row, WarmStartReport
from .sources import Source, has_own_code, open_source
from .vocabulary import (
    has_tokenizer,
    load_tokenizer,
    match_tokens,
    missing_rows,
    read_word_vectors,
    vectors_by_token,
    words_of,
)

_MODULES = {"mygpt2": modeling_mygpt2, "mybert": modeling_mybert}
_NAMES = {"mygpt2": "MyGPT2", "mybert": "MyBert"}
_HEADS = {
    "mygpt2": ("Model", "ForCausalLM", "ForSequenceClassification"),
    "mybert": ("Model", "ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering"),
}
_STOCK_HEADS = {"LMHeadModel": "ForCausalLM", "DoubleHeadsModel": "ForCausalLM", "ForPreTraining": "ForMaskedLM"}


_LEAST = 0.1  # of a source's weights must load


class NotAllowedError(CheckpointError):
    """Too much starts anew or is not used, and `allow` does not name it; `report` has the whole account.

    Raised where less than a tenth of the source loads, and by `strict` for any parameter or tensor.
    """

    def __init__(self, rows: Sequence[Row], report: WarmStartReport, plan: Plan | None = None):
        new, unused = (sum(row.status == status for row in rows) for status in ("new", "unused"))
        names = ", ".join(repr(row.names[0]) for row in rows[:3])
        if plan is None:
            text = (
                f"strict: {new} parameters start anew and {unused} tensors are not used, such as {names}: allow them by "
                "name, or change the target"
            )
        else:
            share = f"{plan.loaded:,} of {plan.offered:,} elements ({plan.loaded / plan.offered:.1%})"
            text = (
                f"{report.source}: next to nothing of it loads into {report.target}, {share}: {new} parameters start anew "
                f"and {unused} tensors are not used, such as {names}: it is another model's; take another source, map its "
                "names with rename=, or name all of this with allow= (allow='.' for anything)"
            )
        super().__init__(text)
        self.report = report


def warm_start(
    model_or_config: PreTrainedModel | PretrainedConfig | str,
    source: Any,
    *,
    head: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    layers: str | Sequence[int] = "every",
    widen: str = "pad",
    positions: str = "tile",
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
    source_tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
    word_vectors: str | os.PathLike | None = None,
    rename: Mapping[str, str] | None = None,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    freeze_loaded: bool = False,
    strict: bool = False,
    allow: Sequence[str] = (),
    config: PretrainedConfig | Mapping[str, Any] | None = None,
    section: str | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype | None = None,
) -> WarmStartReport:
    """Start a MyGPT2 or MyBert, however modified, from the weights of another model.

    What differs between the two is bridged where it can be: layers, key/value heads, MLP width and gating, norms,
    positions, vocabulary, ties, heads. The report says of every parameter and every tensor what became of it, and
    whether the step is exact (the function stays), approximate or new.

    Args:
        model_or_config: the target. A model is filled in place, and what finds no source keeps its values; of a config,
            a model is made (`report.model`); `"mygpt2"` or `"mybert"` takes the source's own config, with `overrides`.
        source: a checkpoint of any format (`open_checkpoint`), a Hub repo's id, an open `Checkpoint`, a state dict or a
            model, of GPT-2, BERT, RoBERTa, DistilBERT, MyGPT2 or MyBert, with or without a head, as wrapped by
            training. None with `word_vectors`: nothing but these.
        head: with a config, what to put on top: `"ForCausalLM"`, `"ForSequenceClassification"`, …, or `"Model"` for
            nothing. Default: what the source has.
        overrides: config fields that differ from `model_or_config`'s (or the source's); not with a model.
        layers: which of the source's layers become the target's: `"every"` spreads them evenly, `"first"`, `"last"`, or
            a list with one number for each of the target's. Where one stands twice or the target is deeper, MyGPT2 gets
            blocks that change nothing until trained (arXiv 2401.02415).
        widen: new MLP units start by writing zeros (`"pad"`) or as copies that share the old output (`"split"`,
            Net2Net, arXiv 1511.05641).
        positions: a longer table of learned positions repeats the old one (`"tile"`, exact on the old positions) or
            stretches it (`"interpolate"`).
        tokenizer: the target's, where it is another than the source's: a token keeps its row by its string or its role,
            a new one gets the mean of its pieces' rows. Also needed for `word_vectors`.
        source_tokenizer: the source's, if it is not in its folder.
        word_vectors: word2vec or GloVe text file, plain or `.gz`, `hidden_size` wide, for the token embeddings.
        rename: regex → replacement, applied in this order to the source's names before anything else.
        skip: regexes (or one); a parameter is not loaded if its name or that of a tensor it needs is found by one.
        only: regexes; nothing else is loaded.
        freeze_loaded: `requires_grad_(False)` on every parameter that came from the source whole.
        strict: raise if anything is new or unused that no pattern of `allow` finds; masks, optimizer states and second
            names of a tensor do not count.
        allow: regexes (or one) over names, for `strict`, and for a source of which less than a tenth loads, which is
            refused unless every new parameter and unused tensor is named.
        config: the source's config, where no `config.json` stands beside it.
        section, allow_pickle, revision, token: as for `open_checkpoint`.
        trust_remote_code: read a source folder that has code of its own as if its weights meant what they mean here; none
            of it is run, and the report does not call the result exact.
        dtype: of a model made from a config; default float32.

    Returns:
        a `WarmStartReport` with the model, in eval mode if it was made here.

    Raises:
        CheckpointError: the source cannot be read, is of another architecture, is quantised, has NaN or infinite
            values, or needs more memory than there is; a field or option is impossible. The model is unchanged.
        NotAllowedError: `strict` objects, or less than a tenth of the source loads. The model is unchanged.

    Examples:
        >>> report = warm_start("mygpt2", "gpt2", overrides={"num_key_value_heads": 4, "norm_type": "rmsnorm"})
        >>> print(report)
        >>> report.save_pretrained("my-gpt2")
    """
    if isinstance(model_or_config, PretrainedConfig):
        model_or_config = own_config(model_or_config)
    kind, allow = resolve_dtype(dtype), [pattern.pattern for pattern in compiled("allow", allow)]
    given = model_or_config if isinstance(model_or_config, PreTrainedModel) else None
    if given is not None and overrides:
        raise CheckpointError(
            "overrides= changes the config that a model is made from; this model is made: pass its config"
        )
    like = None if isinstance(model_or_config, str) else _config_of(model_or_config)
    model_type = str(model_or_config) if like is None else kind_of(like)
    if model_type not in CONFIGS:
        raise CheckpointError(f"{model_type!r} is no model of mymodels: warm_start fills {' and '.join(CONFIGS)}")
    if source is model_or_config and given is not None:
        source = copy.deepcopy(given)  # it is read while it is written
    how: dict[str, Any] = {"config": config, "section": section, "rename": rename, "allow_pickle": allow_pickle}
    how |= {"skip": compiled("skip", skip), "only": compiled("only", only), "settled": overrides}
    how |= {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
    opened = _open_or_nothing(source, model_type, like, word_vectors, **how)
    new_tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
    target = given or _make_target(model_type, head, opened, like, overrides or {}, new_tokenizer, kind)

    match = _match_vocabulary(opened, target, new_tokenizer, source_tokenizer, word_vectors)
    plan = make_plan(
        target,
        opened,
        dtype=None if given is not None else kind or torch.float32,
        skip=skip,
        only=only,
        keep_new=given is not None,
        layers=layers,
        widen=widen,
        positions=positions,
        token_rows=match.rows,
        vectors=match.vectors,
    )
    report = plan.report()
    if has_own_code(type(target)):
        report.notes.append(
            f"{type(target).__name__} has code of its own, which may compute something else with these weights"
        )
    report.coverage, report.tokenizer = match.coverage, match.tokenizer
    report.notes += match.notes
    found = report.not_allowed(allow)
    if found and plan.loaded < _LEAST * plan.offered:
        raise NotAllowedError(found, report, plan)
    if strict and found:
        raise NotAllowedError(found, report)
    if given is not None:
        _fill(given, plan)
    else:
        load_checkpoint_and_dispatch(target, plan.checkpoint(kind or torch.float32)).eval()
        target.config.dtype = target.dtype
        if target.can_generate() and opened.folder is not None and (opened.folder / "generation_config.json").is_file():
            target.generation_config = GenerationConfig.from_pretrained(opened.folder)
    report.model, report.checker = target, Checker(opened, match.rows)
    if report.checker.is_small(target):
        report.check()
    elif opened.tensors:
        report.checked = Check(
            what=f"the models have more than {SMALL // 10**6} million parameters; report.check() runs both"
        )
    if freeze_loaded:
        report.rows = _freeze(target, plan, report)
    return report


class _Match(NamedTuple):
    """What tokenizers and word vectors say of the rows of the embeddings."""

    rows: list[list[int]] | None
    vectors: TokenVectors | None
    coverage: dict[str, int]
    tokenizer: PreTrainedTokenizerBase | None
    notes: list[str]


def _match_vocabulary(
    source: Source,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    source_tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None,
    word_vectors: str | os.PathLike | None,
) -> _Match:
    beside = source.folder if source.folder is not None and has_tokenizer(source.folder) else None
    theirs = beside if source_tokenizer is None else source_tokenizer
    size, rows, vectors = target.config.vocab_size, None, None
    coverage: dict[str, int] = {}
    if tokenizer is not None and source.tensors:
        if theirs is None:
            raise CheckpointError(f"{source.where} has no tokenizer beside it to compare with: pass source_tokenizer=")
        rows, coverage = match_tokens(load_tokenizer(theirs), tokenizer, source.config.vocab_size, size)
    notes: list[str] = []
    if tokenizer is None and theirs is not None:
        try:
            tokenizer = load_tokenizer(theirs)
        except CheckpointError as error:
            if theirs is not beside or word_vectors is not None:
                raise
            notes.append(f"the model is saved without a tokenizer: {error}, with tokenizer=")
    if word_vectors is not None:
        if tokenizer is None:
            raise CheckpointError("word_vectors need to know which row is which word: pass tokenizer=")
        found = read_word_vectors(word_vectors, words_of(tokenizer), target.config.hidden_size)
        vectors, counts = vectors_by_token(found, tokenizer, size)
        coverage |= counts
    if tokenizer is not None and (note := missing_rows(tokenizer, size)):
        notes.append(note)
    return _Match(rows, vectors, coverage, tokenizer, notes)


def _make_target(
    model_type: str,
    head: str | None,
    source: Source,
    like: PretrainedConfig | None,
    overrides: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    """The model that is asked for, on the meta device."""
    base = like or source.config
    fields = {name: getattr(base, name) for name in fields_of(CONFIGS[model_type]) if hasattr(base, name)}
    if tokenizer is not None and like is None:
        fields |= _token_fields(tokenizer, model_type)
    config = make_config(model_type, fields, overrides)
    model = empty_model(_model_class(model_type, head, source), config)
    check_memory(model, source, dtype or torch.float32)
    return model


def _config_of(model_or_config: PreTrainedModel | PretrainedConfig) -> PretrainedConfig:
    config = getattr(model_or_config, "config", model_or_config)
    if not isinstance(config, PretrainedConfig):
        raise CheckpointError(
            f"a {type(model_or_config).__name__} is no model and no config: pass one of MyGPT2 or MyBert"
        )
    return config


def _open_or_nothing(
    source: Any, model_type: str, like: PretrainedConfig | None, word_vectors: Any, **how: Any
) -> Source:
    if source is not None:
        return open_source(source, target=model_type, like=like, **how)
    if word_vectors is None:
        raise CheckpointError("there is no source: name a checkpoint, or word_vectors")
    family = next(family for family in FAMILIES if family.name == model_type)
    return Source("no checkpoint", None, {}, family, like or CONFIGS[model_type](), {}, {}, {}, [])


def _token_fields(tokenizer: PreTrainedTokenizerBase, model_type: str) -> dict[str, Any]:
    """What a config says of its tokenizer."""
    fields: dict[str, Any] = {"vocab_size": len(tokenizer)}
    names = ("bos_token_id", "eos_token_id", "pad_token_id") if model_type == "mygpt2" else ("pad_token_id",)
    return fields | {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name, None) is not None}


def _model_class(model_type: str, head: str | None, source: Source) -> type[PreTrainedModel]:
    """The class with the head that is asked for, or that the source has."""
    known = _HEADS[model_type]
    if head is not None and head not in known:
        raise CheckpointError(f"head={head!r}: {_NAMES[model_type]} has {', '.join(known)}")
    if head is None:
        stock = "|".join(map(re.escape, _STOCK_HEADS))
        name = (source.raw_config.get("architectures") or [""])[0]
        found = re.search(rf"(For[A-Z]\w+|{stock}|Model)$", name)
        head = _STOCK_HEADS.get(found[1], found[1]) if found else _head_of(source.tensors)
    return getattr(_MODULES[model_type], _NAMES[model_type] + (head if head in known else "Model"))


def _head_of(tensors: Mapping[str, Value]) -> str:
    """The head that tensors show, where no config names it: a language model's may be tied and not be seen."""
    if "score.weight" in tensors:
        return "ForSequenceClassification"
    if "model.embed_tokens.weight" in tensors:
        return "ForCausalLM"
    if "cls.predictions.transform.dense.weight" in tensors:
        return "ForMaskedLM"
    if "qa_outputs.weight" in tensors:
        return "ForQuestionAnswering"
    pooled = "classifier.weight" in tensors and "bert.pooler.dense.weight" in tensors
    return "ForSequenceClassification" if pooled else "Model"


def empty_model(model_class: type[PreTrainedModel], config: PretrainedConfig, **how: Any) -> PreTrainedModel:
    """A model without data, on the meta device."""
    with init_empty_weights():
        model = model_class._from_config(config, **how)
    model.tie_weights()
    return model


def check_memory(model: PreTrainedModel, source: Source, dtype: torch.dtype) -> None:
    """Refuse before anything is allocated."""
    largest = max((info.nbytes for info in source.info.values()), default=0)
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize + 3 * largest
    free = get_max_memory()["cpu"]
    if needed > free:
        raise CheckpointError(
            f"{source.where} → {type(model).__name__}: {needed / 1e9:.1f} GB of memory are needed, {free / 1e9:.1f} GB are "
            "free: choose fewer layers, or dtype='bfloat16'"
        )


@torch.no_grad()
def _fill(model: PreTrainedModel, plan: Plan) -> None:
    """Write the values into a model's own parameters; first all are computed once, so that an error leaves it as it was."""
    parameters = dict(model.named_parameters())
    filled = [name for name, value in plan.values.items() if value.kind != "new" or value.sources]
    for name in tqdm(filled, desc="checking", unit="tensor", disable=None):
        plan.compute(name, parameters[name].dtype)
    for name in tqdm(filled, desc="filling", unit="tensor", disable=None):
        parameters[name].copy_(plan.compute(name, parameters[name].dtype))


def _freeze(model: PreTrainedModel, plan: Plan, report: WarmStartReport) -> list[Row]:
    """Freeze what came from the source whole."""
    whole = {name for name, value in plan.values.items() if value.sources and not value.partly_new}
    for name, parameter in model.named_parameters():
        if name in whole:
            parameter.requires_grad_(False)
    return [
        replace(row, frozen=bool(row.targets) and all(name in whole for name in row.targets if name in plan.values))
        for row in report.rows
    ]
