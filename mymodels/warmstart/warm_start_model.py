"""`warm_start`: load weights of one model into another, with a report on every tensor."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import get_max_memory
from tqdm import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import CheckpointError, TensorInfo, load_checkpoint_and_dispatch
from ..checkpoints.checkpoint import resolve_dtype
from .any_model.asking import SHARING_ROLES, Asked, ask, table_rows, vocabulary_of, worth_trying
from .any_model.own_config import nearest_config
from .any_model.planning import plan_any
from .any_model.running import AnyChecker
from .any_model.same_class import not_shown
from .any_model.sides import own_tensors
from .any_model.targets import build, class_for
from .checking import SMALL, Checker
from .configs import fields_of, make_config
from .families import FAMILIES
from .key_mapping import CONFIGS, UnknownNamesError
from .opening import Opened, has_own_code, open_tensors
from .own_models import model_class_of, token_fields
from .planning import Plan, compiled, make_plan
from .report import AMBIGUOUS, Row, WarmStartReport, mark_unproven
from .sources import Source
from .sources import describe_source as read_source
from .token_rows import match_vocabulary
from .vocabulary import load_tokenizer

_MIN_LOADED_SHARE = 0.1  # minimum fraction of a source's weights that must load
_SHOWN_NOTES = 3  # of those that name candidates


class NotAllowedError(CheckpointError):
    """Parameters are newly initialised or tensors unused, and not matched by `allow`; `report` lists all.

    Raised if less than a tenth of the source loads, and with `strict` for any parameter or tensor.
    """

    def __init__(self, rows: Sequence[Row], report: WarmStartReport, plan: Plan | None = None):
        new, unused = (sum(row.status == status for row in rows) for status in ("new", "unused"))
        names = ", ".join(repr(row.names[0]) for row in rows[:3])
        if plan is None:
            text = (
                f"strict: {new} parameters are newly initialised and {unused} tensors are not used, such as {names}: allow them by "
                "name, or change the target"
            )
        else:
            share = f"{plan.loaded:,} of {plan.offered:,} elements ({plan.loaded / plan.offered:.1%})"
            text = (
                f"{report.source}: too little of it loads into {report.target}, {share}: {new} parameters are newly initialised "
                f"and {unused} tensors are not used, such as {names}: it may belong to another model; use another source, map its "
                "names with rename=, or allow all of this with allow= (allow='.' for anything)"
            )
        ambiguous = [note for note in report.notes if note.startswith(AMBIGUOUS)]
        if ambiguous:
            more = len(ambiguous) - _SHOWN_NOTES
            text += "; some tensors have several places: " + "; ".join(ambiguous[:_SHOWN_NOTES])
            text += f"; and {more} more such notes in error.report.notes" if more > 0 else ""
        super().__init__(text)
        self.report = report


def warm_start(
    model_or_config: torch.nn.Module | PretrainedConfig | str | os.PathLike,
    source: Any,
    *,
    model_class: type[torch.nn.Module] | None = None,
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
    """Initialise a model from the weights of another one with a different architecture.

    Differences are converted where possible: layers, key/value heads, MLP width and gating, norms, positions,
    vocabulary, ties, heads, experts. The report lists what became of every parameter and tensor, and whether the step is
    exact (it preserves the function), approximate or new.

    MyGPT2 and MyBert start from GPT-2, BERT, RoBERTa, DistilBERT, MyGPT2 and MyBert by tables of names. Between any other
    two models, tensors are matched by role (query, norm, …), by name, by name with a prefix, as low-rank factors, and by
    position in the structure. Ambiguous tensors are not loaded; a note names the candidates and a `rename` for them.

    Args:
        model_or_config: the target. A model (any `nn.Module`) is changed in place, and parameters without a source keep
            their values; for a config, a model is created (`report.model`); a folder is loaded with its weights, or used
            as its config if it has none; `"mygpt2"` or `"mybert"` means the source's config with `overrides`. A stock
            GPT-2, BERT, RoBERTa or DistilBERT config is translated to MyGPT2's or MyBert's, unless `model_class` is given.
        source: a checkpoint of any format (`open_checkpoint`), a Hub repo's id, an open `Checkpoint`, a state dict or a
            model, with or without a head, also with wrappers of training. None with `word_vectors`: only these.
        model_class: with a config or a folder, the class to create.
        head: with a config, the head: `"ForCausalLM"`, `"ForSequenceClassification"`, …, or `"Model"` for none. Default:
            the source's.
        overrides: config fields that differ from those of `model_or_config` (or of the source); not with a model.
        layers: which of the source's layers become the target's: `"every"` spreads them evenly, `"first"`, `"last"`, or
            a list with one number for each of the target's. A repeated layer of MyGPT2 has zero outputs until it is trained
            (arXiv 2401.02415).
        widen: new MLP units start with zero outputs (`"pad"`) or as copies that divide the old output (`"split"`,
            Net2Net, arXiv 1511.05641).
        positions: a longer table of learned positions repeats the old one (`"tile"`, exact on the old positions) or
            stretches it (`"interpolate"`).
        tokenizer: the target's, if it differs from the source's: a token keeps its row by its string or role, and a new
            one gets the mean of its pieces' rows. Also needed for `word_vectors`.
        source_tokenizer: the source's, if it is not in its folder.
        word_vectors: word2vec or GloVe text file, plain or `.gz`, `hidden_size` wide, for the token embeddings.
        rename: regex → replacement, applied in this order to the source's names before anything else.
        skip: regexes (or one); a parameter is not loaded if one matches its name or that of a tensor it needs.
        only: regexes; only matching parameters and tensors are loaded.
        freeze_loaded: `requires_grad_(False)` on every parameter that came completely from the source.
        strict: raise if a parameter is new or a tensor unused that no pattern of `allow` matches; masks, optimizer
            states and second names of a tensor are ignored.
        allow: regexes (or one) over names, for `strict`, and for a source of which less than a tenth loads, which is
            refused unless every new parameter and unused tensor is matched.
        config: the source's config, if it has no `config.json`.
        section, allow_pickle, revision, token: as for `open_checkpoint`.
        trust_remote_code: read a source folder with custom code as if its weights had the same meaning here; the code is
            not run, and the result is not called exact. The code of a target folder is run.
        dtype: of a model created from a config; default float32.

    Returns:
        a `WarmStartReport` with the model, in eval mode if it was created here.

    Raises:
        CheckpointError: the source cannot be read, is of another architecture, is quantised, has NaN or infinite
            values, or needs more memory than there is; a field or option is invalid. The model is unchanged.
        NotAllowedError: `strict` refuses a row, or less than a tenth of the source loads. The model is unchanged.

    Examples:
        >>> report = warm_start("mygpt2", "gpt2", overrides={"num_key_value_heads": 4, "norm_type": "rmsnorm"})
        >>> print(report)
        >>> report.save_pretrained("my-gpt2")
    """
    kind, allow = resolve_dtype(dtype), [pattern.pattern for pattern in compiled("allow", allow)]
    asked = ask(model_or_config, model_class, head, overrides or {}, trust_remote_code)
    if source is model_or_config and isinstance(source, torch.nn.Module):
        source = copy.deepcopy(source)  # the target is written while the source is read
    how: dict[str, Any] = {"config": config, "section": section, "allow_pickle": allow_pickle, "revision": revision}
    how |= {"token": token, "trust_remote_code": trust_remote_code}
    opened = _open(source, word_vectors, **how)
    filters: dict[str, Any] = {"rename": rename, "skip": compiled("skip", skip), "only": compiled("only", only)}
    described = _read_by_tables(asked, opened, {**filters, "settled": overrides})
    new_tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
    options: dict[str, Any] = {"layers": layers, "widen": widen, "positions": positions}
    choices: dict[str, Any] = {"skip": skip, "only": only}
    rows_by = (new_tokenizer, source_tokenizer, word_vectors)
    if described is not None:
        target = asked.model or _make_own(asked, described, new_tokenizer, kind)
        sizes = (
            described.config.vocab_size if described.tensors else 0,
            target.config.vocab_size,
            target.config.hidden_size,
        )
        match = match_vocabulary(described.where, described.folder, sizes, *rows_by)
        options |= {"token_rows": match.rows, "vectors": match.vectors, **choices}
        new_dtype = None if asked.model is not None else kind or torch.float32
        plan = make_plan(target, described, dtype=new_dtype, keep_new=asked.model is not None, **options)
        checker: Any = Checker(described, match.rows)
    else:
        if asked.model is None and asked.config is None:
            assert asked.own is not None
            asked = replace(asked, config=nearest_config(opened, asked.own, rename or {}, asked.overrides))
        target = asked.model or _make_any(asked, opened, kind)
        sizes = table_rows(opened.info), *vocabulary_of(target)
        match = match_vocabulary(opened.where, opened.folder, sizes, *rows_by)
        options |= {"token_rows": match.rows, "vectors": match.vectors, **choices}
        plan, unproven, until_proven = plan_any(
            target, opened, rename=rename or {}, made_here=asked.model is None, **options
        )
        checker = AnyChecker(opened, unproven, match.rows, not_shown(opened, target), until_proven)
    report = plan.report()
    report.rows = mark_unproven(report.rows, checker.unproven)
    report.notes += asked.notes
    if described is not None and has_own_code(type(target)):
        report.notes.append(f"{type(target).__name__} has custom code, which may give other outputs with these weights")
    report.coverage, report.tokenizer = match.coverage, match.tokenizer
    report.notes += match.notes
    found = report.not_allowed(allow)
    if found and plan.loaded < _MIN_LOADED_SHARE * plan.offered:
        raise NotAllowedError(found, report, plan)
    if strict and found:
        raise NotAllowedError(found, report)
    if described is None or asked.model is not None:
        _fill(target, plan)
    else:
        load_checkpoint_and_dispatch(target, plan.checkpoint(kind or torch.float32)).eval()
        target.config.dtype = target.dtype
    if asked.model is None:
        _take_generation_config(target, opened.folder)
    report.model, report.checker = target, checker
    if checker.is_small(target):
        report.check()
    elif opened.info:
        report.set_not_checked(
            f"the models have more than {SMALL // 10**6} million parameters; report.check() runs both"
        )
    if freeze_loaded:
        report.rows = _freeze(target, plan, report)
    return report


def _open(source: Any, word_vectors: Any, **how: Any) -> Opened:
    if source is None and word_vectors is None:
        raise CheckpointError("there is no source: name a checkpoint, or word_vectors")
    return (
        Opened({}, "no checkpoint", None, None, {}, {}, {}, "", {}) if source is None else open_tensors(source, **how)
    )


def _read_by_tables(asked: Asked, opened: Opened, how: dict[str, Any]) -> Source | None:
    """The source by the tables of names; None if they do not apply to source or target.

    Raises:
        CheckpointError: the target is MyGPT2 or MyBert, and the source fits neither.
    """
    if asked.own is None:
        return None
    if opened.where == "no checkpoint" and not opened.info:
        family = next(family for family in FAMILIES if family.name == asked.own)
        return Source("no checkpoint", None, {}, family, asked.like or CONFIGS[asked.own](), {}, {}, {}, [])
    if opened.raw.get("model_type") in SHARING_ROLES[asked.own]:
        return None
    try:
        return read_source(opened, target=asked.own, like=asked.like, **how)
    except UnknownNamesError:
        if not (asked.model is not None and worth_trying(asked.model, opened.info)):
            raise
        return None


def _make_own(
    asked: Asked, source: Source, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Create the MyGPT2 or MyBert target on the meta device."""
    assert asked.own is not None
    if asked.model_class is not None:
        assert asked.config is not None
        model = empty_model(asked.model_class, asked.config)
    else:
        base = asked.like or source.config
        fields = {name: getattr(base, name) for name in fields_of(CONFIGS[asked.own]) if hasattr(base, name)}
        if tokenizer is not None and asked.like is None:
            fields |= token_fields(tokenizer, asked.own)
        config = make_config(asked.own, fields, asked.overrides)
        model = empty_model(model_class_of(asked.own, asked.head, source), config)
    check_memory(model, source.where, source.info, dtype or torch.float32)
    return model


def _make_any(asked: Asked, opened: Opened, dtype: torch.dtype | None) -> torch.nn.Module:
    """Create the target of any other config, initialised by its class."""
    assert asked.config is not None
    hint = (opened.raw.get("architectures") or [""])[0]
    model_class = class_for(asked.config, asked.head, hint, asked.model_class)
    with init_empty_weights():
        model = build(model_class, asked.config, dtype)
    check_memory(model, opened.where, opened.info, dtype or torch.float32)
    return build(model_class, asked.config, dtype)


def _take_generation_config(model: torch.nn.Module, folder: Path | None) -> None:
    if not (isinstance(model, PreTrainedModel) and model.can_generate() and folder is not None):
        return
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def empty_model(model_class: type[PreTrainedModel], config: PretrainedConfig, **how: Any) -> PreTrainedModel:
    """A model without data, on the meta device."""
    with init_empty_weights():
        model = model_class._from_config(config, **how)
    model.tie_weights()
    return model


def check_memory(model: torch.nn.Module, where: str, info: Mapping[str, TensorInfo], dtype: torch.dtype) -> None:
    """Raise a `CheckpointError` if the model does not fit into memory, before anything is allocated."""
    largest = max((about.nbytes for about in info.values()), default=0)
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize + 3 * largest
    free = get_max_memory()["cpu"]
    if needed > free:
        raise CheckpointError(
            f"{where} → {type(model).__name__}: {needed / 1e9:.1f} GB of memory are needed, {free / 1e9:.1f} GB are "
            "free: choose fewer layers, or dtype='bfloat16'"
        )


@torch.no_grad()
def _fill(model: torch.nn.Module, plan: Plan) -> None:
    """Write the values into a model's parameters; all are computed first, so that an error leaves the model unchanged."""
    parameters = own_tensors(model)
    filled = [name for name, value in plan.values.items() if value.kind != "new" or value.sources]
    for name in tqdm(filled, desc="checking", unit="tensor", disable=None):
        plan.compute(name, parameters[name].dtype)
    for name in tqdm(filled, desc="filling", unit="tensor", disable=None):
        parameters[name].copy_(plan.compute(name, parameters[name].dtype))


def _freeze(model: torch.nn.Module, plan: Plan, report: WarmStartReport) -> list[Row]:
    """Freeze the parameters that came completely from the source, and mark their rows."""
    complete = {name for name, value in plan.values.items() if value.sources and not value.partly_new}
    for name, parameter in model.named_parameters():
        if name in complete:
            parameter.requires_grad_(False)
    return [
        replace(row, frozen=bool(row.targets) and all(name in complete for name in row.targets if name in plan.values))
        for row in report.rows
    ]
