"""Stage: record everything that folders compute, each in a fork: the two sides of a proof that code is unchanged.

The job names the folders (`beside`: key → settings of `describe_folder`) and, for the second side, the inputs that the
first side was given (`recorded`: key → file of tensors). For each folder it writes `KEY.safetensors` and `KEY.json`.
"""

import contextlib
import faulthandler
import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import GenerationMixin

from .comparing import run_model, unpadded_outputs
from .generating import generate
from .inputs import (
    LENGTH,
    accepted_inputs,
    generates,
    has_encoder_and_decoder,
    has_tokens,
    make_inputs,
    make_token_ids,
    non_text_inputs,
    one_row_only,
    pad,
    read_tensors,
    with_required,
)
from .load_repo import DTYPE, class_of, digest, seed_all, text_config
from .losses import IGNORED, make_labels
from .outputs import check_padding
from .processors import TEXTS, processed_inputs, processor_names, run_processor
from .stages import Outcome, innermost, run_stage, sentence
from .tokenizers import RECORDED, load_tokenizer
from .training import LARGEST, gradients

MAX_VALUES = 20_000  # of one gradient
BATCHES = ("one row", "right padding", "left padding")
PROMPTS = (
    *("greedy, with cache", "greedy, without cache", "greedy, left padding", "repetition penalty, left padding"),
    *("beams, with cache", "beams, without cache"),
)
BEAMS = 2
_HOW = ("use_cache", "num_beams", "penalty")  # settings of `generate`, recorded with its inputs


def run(job: dict[str, Any], events: Any) -> None:
    """Record every folder of the job, each in a fork of its own."""
    faulthandler.cancel_dump_traceback_later()  # a fork cannot end the thread that it waits in; the limit holds anyway
    for key, described in job["beside"].items():
        one = {**job, **described, "time_limit": job["each_limit"], "key": key}
        run_stage(f"numbers of {key}", _record_folder, one, events)


def _record_folder(job: dict[str, Any], events: Any) -> None:
    recorded = job["recorded"].get(job["key"])
    given = read_tensors(recorded) if recorded else {}
    tensors: dict[str, torch.Tensor] = {}
    report: dict[str, Any] = {"transformers": transformers.__version__, "classes": {}}
    for name in job["classes"]:
        earlier: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in given.items():
            of, item, argument = key.split("|")
            if of == name:
                earlier.setdefault(item, {})[argument] = value
        record = _Record(name, tensors, job["scratch"], earlier)
        _record_class(record, job)
        report["classes"][name] = record.items
    if job["tokenizer"]:
        record = _Record("AutoTokenizer", tensors, job["scratch"])
        record.item("tokens", lambda: _tokens(job))
        report["classes"]["AutoTokenizer"] = record.items
    for name in processor_names(job):
        record = _Record(name, tensors, job["scratch"])
        record.item("processed", lambda name=name: _processed(job, name))  # type: ignore[misc]
        report["classes"][name] = record.items
    save_file(tensors, Path(job["scratch"], f"{job['key']}.safetensors"))
    Path(job["scratch"], f"{job['key']}.json").write_text(json.dumps(report), encoding="utf-8")


class LeftOut(Exception):
    """An item cannot be computed under this release, whatever the folder's code does."""


class _Record:
    """What one class of a folder computes: items that were recorded, or the error that each raised.

    Each item's inputs are recorded too, as `input`, `input of ITEM`: the second side is given those of the first, since
    what is generated from a config depends on the release that read it.
    """

    def __init__(
        self,
        name: str,
        tensors: dict[str, torch.Tensor],
        scratch: str,
        earlier: Mapping[str, dict[str, torch.Tensor]] | None = None,
    ):
        self.name, self.tensors, self.scratch, self.earlier = name, tensors, scratch, earlier or {}
        self.items: dict[str, dict[str, Any]] = {}

    def inputs(
        self, make: Callable[[], Mapping[str, Mapping[str, torch.Tensor]]], items: tuple[str, ...]
    ) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """The inputs of these items: those of the first side, or what `make` returns for some of them.

        What `make` raises is noted at the first item.
        """
        found: dict[str, Mapping[str, torch.Tensor]] = {
            item: self.earlier[f"input of {item}"] for item in items if f"input of {item}" in self.earlier
        }
        if not self.earlier:
            if not self.item(items[0], lambda: found.update(make()) or {}):  # type: ignore[func-returns-value]
                return {}
            del self.items[items[0]]
        found = {item: found[item] for item in items if item in found}  # in one order: a model may keep a state
        for item, batch in found.items():
            self.item(f"input of {item}", lambda batch=batch: batch)  # type: ignore[misc]
        return found

    def item(self, item: str, compute: Callable[[], Mapping[str, torch.Tensor]], twice: bool = False) -> bool:
        """Record the tensors that `compute` returns; whatever it raises is noted in their place."""
        try:
            seed_all(0)
            found = {key: tensor.detach().clone().contiguous() for key, tensor in compute().items()}
            self.items[item] = {"status": "recorded"}
            if twice:
                seed_all(1)
                again = compute()
                if any(not torch.equal(tensor, again[key]) for key, tensor in found.items() if key in again):
                    self.items[item] = {"status": "random"}
        except BaseException as error:
            what = str(error) if isinstance(error, LeftOut) else sentence(error).replace(f"{self.scratch}/", "")
            needs = isinstance(error, ImportError) and item in ("tokens", "processed")  # a package that is not here
            needs = needs or isinstance(error, LeftOut)
            self.items[item] = {"status": "left out" if needs else "failed", "what": what, "where": innermost(error)}
            return False
        self.tensors.update({f"{self.name}|{item}|{key}": tensor for key, tensor in found.items()})
        return True


def _load(job: dict[str, Any], name: str, folder: str | None = None) -> tuple[Any, dict[str, Any]]:
    seed_all(0)
    options: dict[str, Any] = {DTYPE: torch.float32, "output_loading_info": True}
    if name.startswith("Auto"):
        options["trust_remote_code"] = True
    model, loading = class_of(name).from_pretrained(folder or job["folder"], **options)
    model = model if getattr(model, "is_quantized", False) else model.float()  # transformers refuses to cast these
    return model.eval(), {key: sorted(map(str, keys)) for key, keys in loading.items() if keys}


def _record_class(record: _Record, job: dict[str, Any]) -> None:
    held: dict[str, Any] = {}
    own = record.earlier.get("input", {})

    def load() -> dict[str, torch.Tensor]:
        held["model"], held["loading"] = _load(job, record.name)
        return {}

    if not record.item("load", load):
        return
    model, loading = held["model"], held["loading"]
    if lacking := loading.get("missing_keys") or loading.get("mismatched_keys"):
        record.items["load"] = {"status": "new weights", "what": f"the folder has no weight {lacking[0]}"}
        return
    saved = _digests(model)
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    record.items["load"] |= {
        "weights": {key: value for key, value in saved.items() if key in parameters},
        "buffers": {key: value for key, value in saved.items() if key not in parameters},
        "second names": sorted(parameters - {key for key, _ in model.named_parameters()}),
    }

    def inputs() -> dict[str, torch.Tensor]:
        callers = job["own_inputs"].get(job["key"])
        made = own or (read_tensors(callers) if callers else make_inputs(model, processed_inputs(job)))
        held["inputs"] = accepted_inputs(model, made)
        return held["inputs"]

    if not record.item("input", inputs):
        return
    given = held["inputs"]
    record.item("outputs", lambda: _outputs(model, given), twice=not own)  # what is random is known from the original
    for item, batch in record.inputs(lambda: _batches(model, given), BATCHES).items():
        record.item(item, lambda batch=batch: _outputs(model, batch))  # type: ignore[misc]
    _record_training(record, job, model, given)
    if generates(model):
        for item, batch in record.inputs(lambda: _prompts(model, given), PROMPTS).items():
            record.item(item, lambda batch=batch: _generated(model, batch))  # type: ignore[misc]
    record.item("save and reload", lambda: _reload(job, record.name, model, given))
    if not own:
        _record_property(record, model, given)


def _record_property(record: _Record, model: Any, given: Mapping[str, torch.Tensor]) -> None:
    """Whether padding counts in the original: `verify` names it of the upgraded code too, which keeps the numbers."""
    check = Outcome()
    with contextlib.suppress(Exception):  # what raises is noted at the items above
        check_padding(check, model, dict(given), with_generation=False)
    if check.failed:
        record.items["padding"] = {"status": "property", "what": check.what}


def _record_training(record: _Record, job: dict[str, Any], model: Any, given: Mapping[str, torch.Tensor]) -> None:
    """Loss and gradients, by the labels that the original was given."""
    item = "loss and gradients"
    if job["weights_size"] > LARGEST:
        record.items[item] = {"status": "left out", "what": "the weights are too large for a training step"}
        return
    made = record.inputs(
        lambda: {item: {**given, **_without_padding(make_labels(record.name, model, dict(given)), given)}}, (item,)
    )

    def loss_and_gradients() -> dict[str, torch.Tensor]:
        fresh, _ = _load(job, record.name)  # what the code keeps from forward in inference mode cannot be trained on
        loss, found = gradients(fresh, dict(made[item]))
        return {"loss": torch.tensor(loss), **{name: thinned(gradient) for name, gradient in found.items()}}

    if made:
        record.item(item, loss_and_gradients)


def thinned(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient's norm and every n-th value, at most `MAX_VALUES`."""
    flat = gradient.flatten().float()
    return torch.cat([flat.norm()[None], flat[:: -(-flat.numel() // MAX_VALUES) or 1]])


def _tokens(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Token ids of several texts, alone and as a padded batch, and the text that they decode to."""
    tokenizer = load_tokenizer(job)
    found: dict[str, torch.Tensor] = {"size": torch.tensor(len(tokenizer))}
    for number, text in enumerate([RECORDED, *TEXTS]):
        ids = tokenizer(text).input_ids
        found[f"ids of text {number}"] = torch.tensor(ids, dtype=torch.long)
        decoded = tokenizer.decode(ids).encode()
        found[f"decoded text {number}"] = torch.tensor(list(decoded), dtype=torch.long)
    if tokenizer.pad_token_id is not None:
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        found |= {f"batch {key}": value for key, value in batch.items()}
    return found


def _processed(job: dict[str, Any], name: str) -> dict[str, torch.Tensor]:
    processor = class_of(name).from_pretrained(job["folder"], trust_remote_code=True)
    return run_processor(processor)


def _without_padding(labels: dict[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Labels that are scored against real tokens only: what a padding token predicts is not defined."""
    mask, scored = given.get("attention_mask"), labels.get("labels")
    if mask is None or scored is None or scored.shape != mask.shape:
        return labels
    after_padding = torch.cat([mask[:, :1], mask[:, :-1]], 1) == 0
    return {**labels, "labels": torch.where(after_padding, IGNORED, scored)}


def _digests(model: Any) -> dict[str, str]:
    """The digest of every parameter and saved buffer; tied ones under each name."""
    return {name: digest(tensor) for name, tensor in model.state_dict().items()}


def _outputs(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    more: dict[str, Any] = {}
    if "output_hidden_states" in model.forward.__code__.co_varnames:
        more["output_hidden_states"] = True
    return unpadded_outputs(model, {**batch, **more})


def _batches(model: Any, given: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Text without padding, and padded on either side, if the model takes text and a mask."""
    if not has_tokens(given) or one_row_only(model):
        return {}
    other = {name: value for name, value in given.items() if name.startswith("decoder_")}
    other |= non_text_inputs(given, 2)
    length = min(given["input_ids"].shape[1], LENGTH)
    ids = make_token_ids(model, 2, length, seed=3)
    batches = {"one row": with_required(model, {**non_text_inputs(given), "input_ids": ids[:1]})}
    if "attention_mask" in given:
        for side in ("right", "left"):
            padded = pad(model, ids, side, [0, min(3, length - 1)])
            batches[f"{side} padding"] = with_required(model, {**other, **padded})
    return batches


def _prompts(model: Any, given: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Prompts by item, with how to generate from each."""

    def how(cache: bool, beams: int, penalty: bool = True) -> dict[str, torch.Tensor]:
        return dict(zip(_HOW, map(torch.tensor, (cache, beams, penalty))))

    if not has_tokens(given):
        return {"greedy, with cache": {**given, **how(True, 1)}}
    length = min(given["input_ids"].shape[1], LENGTH)
    ids = make_token_ids(model, 2, length, seed=5)
    alone = {"input_ids": ids[:1], **non_text_inputs(given)}
    found = {
        "greedy, with cache": {**alone, **how(True, 1)},
        "greedy, without cache": {**alone, **how(False, 1)},
        "beams, with cache": {**alone, **how(True, BEAMS)},
        "beams, without cache": {**alone, **how(False, BEAMS)},
    }
    if "attention_mask" in given and not has_encoder_and_decoder(model):
        padded = {**pad(model, ids, "left", [0, min(3, length - 1)]), **non_text_inputs(given, 2)}
        caches = getattr(text_config(model.config), "use_cache", True) is not False
        found["greedy, left padding"] = {**padded, **how(caches, 1, penalty=False)}
        if getattr(getattr(model, "generation_config", None), "repetition_penalty", None) not in (None, 1.0):
            found["repetition penalty, left padding"] = {**padded, **how(caches, 1)}
    return found


def _generated(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tokens, and the scores of each step: random weights may give one token forever. Of beams, the two best rows."""
    batch = dict(batch)
    cache, beams, penalty = (batch.pop(name).item() for name in _HOW)
    steps: dict[str, Any] = {"use_cache": cache, "return_dict_in_generate": True, "output_scores": True}
    if not penalty:  # the model's own numbers: releases differ in whether padding counts as repeated
        steps["repetition_penalty"] = 1.0
    elif "attention_mask" in batch and not batch["attention_mask"].all() and _penalty_skips_padding():
        raise LeftOut(f"repetition_penalty of transformers {transformers.__version__} leaves padding out")
    if beams > 1:
        # a penalty of 0: the score is the sum over the new tokens, in every release
        if wrong := _beams_by_vocab_size(model, batch):
            raise LeftOut(wrong)
        made = generate(model, batch, num_beams=beams, num_return_sequences=beams, length_penalty=0.0, **steps)
        return {"tokens": made.sequences, "scores": made.sequences_scores}
    made = generate(model, batch, **steps)
    if isinstance(made, torch.Tensor):  # of a `generate` of its own
        return {"tokens": made}
    scores = torch.stack(list(made.scores), 1)
    return {"tokens": made.sequences, "scores": torch.where(scores.isfinite(), scores, 0.0)}


def _penalty_skips_padding() -> bool:
    """Whether the release's own repetition penalty no longer takes padding for a repeated token."""
    makes = getattr(GenerationMixin, "_get_logits_processor", None)
    return makes is not None and "padding_lengths" in inspect.getsource(makes)


def _beams_by_vocab_size(model: Any, batch: Mapping[str, torch.Tensor]) -> str:
    """Why the release's own beam search cannot run: some take `config.vocab_size` for the number of logits."""
    search = getattr(GenerationMixin, "_beam_search", None)
    if search is None or "get_text_config().vocab_size" not in inspect.getsource(search):
        return ""
    size = getattr(text_config(model.config), "vocab_size", None)
    logits = run_model(model, with_required(model, batch)).get("logits")
    if logits is None or size is None or logits.shape[-1] == size:
        return ""
    return (
        f"beam search of transformers {transformers.__version__} takes config.vocab_size ({size}) for the number of "
        f"logits ({logits.shape[-1]})"
    )


def _reload(job: dict[str, Any], name: str, model: Any, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Save, load what was saved, and give its outputs; its weights are compared here."""
    saved = Path(job["scratch"], f"{job['key']}-{name}", f"{Path(job['folder']).name}_saved")
    model.save_pretrained(saved)
    for code in Path(job["folder"]).glob("*.py"):  # older releases save it with some classes only
        if not (saved / code.name).exists():
            shutil.copyfile(code, saved / code.name)
    other, loading = _load(job, name, str(saved))
    if loading.get("missing_keys"):
        raise RuntimeError(f"after save_pretrained the weight {loading['missing_keys'][0]} is missing")
    before, after = _digests(model), _digests(other)
    changed = [key for key, value in before.items() if after.get(key) != value]
    if changed:
        raise RuntimeError(f"after save_pretrained and from_pretrained {changed[0]} has other values")
    return _outputs(other, given)
