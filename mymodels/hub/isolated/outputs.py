"""Stages on loaded models: compare outputs with golden ones and with each other, save and reload."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from . import golden_outputs, tokenizers
from .calls import check_batch, check_forward, check_inputs_embeds
from .causality import scaled_by_length, steady_length
from .comparing import EQUAL, MUST_BE_FINITE, difference, floating, not_finite, row_of, run_model, unpadded_outputs
from .generating import STEPS, check_generation, generate, same_sequences, same_steps
from .inputs import (
    NEW_TOKENS,
    FailedOnInputs,
    NoSuitableInputs,
    WrongInputs,
    accepted_inputs,
    affordable_length,
    attention_window,
    full_mask,
    generates,
    has_encoder_and_decoder,
    has_tokens,
    keep_inputs,
    last_positions,
    make_inputs,
    make_rows,
    max_positions,
    non_text_inputs,
    one_row_only,
    pad,
    padding_side,
    prompt_length,
    takes_numbers,
    vocabulary_size,
    with_mask,
    with_required,
)
from .load_repo import accepts, class_of, describe, in_float, load, loaded_event, names_argument
from .processors import PROCESSORS, check_pipelines, check_processors, check_tokenizer_output, processed_inputs
from .stages import Outcome, sentence

PADDING = 3  # tokens


def run(job: dict[str, Any], events: Any) -> None:
    """All checks of the class of `architectures`, whose weights the folder holds."""
    name, scratch = job["classes"][0], Path(job["scratch"])
    with events.check("load", name) as check:
        model, loading = load(job, name)
        event = loaded_event(job, model, name, loading)
        events.write(**event)
        (scratch / "loaded").touch()
    if check.failed:
        return
    with events.check("auto_map", name) as check:
        check_entry(check, job, name, model)
    if check.failed:
        return
    golden = golden_outputs.read(job["golden"]) if job["golden"] else None
    tokenizer = tokenizers.run(job, events, model, golden.made if golden else None)
    inputs: dict[str, torch.Tensor] = {}
    with events.check("forward", name) as check:
        try:
            inputs = golden_outputs.choose_inputs(job, model)
            keep_inputs(job, inputs)
            check_forward(check, model, inputs, event["tensors"])
            check_head(check, name, model, run_model(model, inputs))
        except NoSuitableInputs as error:
            check.skip(f"{error}; pass --inputs FILE")
        except WrongInputs as error:
            events.write(wrong_inputs=str(error))
            check.fail(str(error))
        except FailedOnInputs as error:
            check.fail(str(error))
    if check.failed:
        return
    if golden:
        with events.check("golden", name) as check:
            compare_golden(check, model, name, golden)
        if generates(model):
            with events.check("generation", name) as check:
                if name in golden.greedy:
                    check.fail_if(golden_outputs.compare_tokens(model, name, golden))
                else:
                    check.skip("the golden file has no generated tokens, so none were compared: record it again")
    if inputs:
        save_file(unpadded_outputs(model, inputs), scratch / "outputs.safetensors")
    (scratch / "tensors.json").write_text(json.dumps(event["tensors"]))  # before forward, which may add buffers
    with events.check("save") as check:
        check_save(check, job, model)
    if not check.failed:
        (scratch / "saved-ok").touch()
    check_processors(job, events, model, golden.made if golden else {})
    if not inputs:
        return
    if tokenizer:
        with events.check("tokenizer output", name) as check:
            check_tokenizer_output(check, job, model)
        if not check.failed:
            check_pipelines(job, events, name, model)
    model = in_float(model)  # the checks from here on compare computations that round differently
    same_cached = check_generation(events, name, model, inputs)
    with events.check("batch", name) as batch:
        check_batch(batch, model, inputs)
    with events.check("padding", name) as check:
        if batch.failed:
            check.skip("not checked while the rows of a batch affect each other")
        else:
            check_padding(check, model, inputs, with_generation=generates(model) and same_cached)
    if check.failed:  # do not report the effect of padding again as a difference of attention implementations
        inputs = {name: torch.ones_like(x) if name == "attention_mask" else x for name, x in inputs.items()}
    with events.check("inputs_embeds", name) as check:
        check_inputs_embeds(check, model, inputs)
    with events.check("last position", name) as check:
        check_last_position(check, model, inputs)
    with events.check("eager = sdpa", name) as check:
        check_attention(check, job, name, model, inputs)


def run_other_classes(job: dict[str, Any], events: Any) -> None:
    """Load through every other Auto class; compare outputs with golden ones where recorded."""
    for name in job["companions"]:  # processors are checked in `run`, with a model
        if name not in PROCESSORS:
            with events.check("load", name):
                class_of(name).from_pretrained(job["folder"], trust_remote_code=True)
    golden = golden_outputs.read(job["golden"]) if job["golden"] else None
    for name in job["classes"][1:]:
        with events.check("load", name) as check:
            model, loading = load(job, name)
            events.write(**loaded_event(job, model, name, loading))
        if check.failed:
            continue
        with events.check("auto_map", name) as check:
            check_entry(check, job, name, model)
        if check.failed:
            continue
        if golden and name in golden.outputs:
            with events.check("golden", name) as check:
                compare_golden(check, model, name, golden)
        else:
            with events.check("forward", name) as check:
                try:
                    inputs = golden_outputs.read_inputs(job) or make_inputs(model, processed_inputs(job))
                    check_head(check, name, model, run_model(model, accepted_inputs(model, inputs)))
                    if golden:
                        check.note("the golden file has no outputs of this class")
                except NoSuitableInputs as error:
                    check.skip(str(error))


def compare_golden(check: Any, model: Any, name: str, golden: golden_outputs.Golden) -> None:
    """Compare with the recorded outputs, and report what the golden file lacks."""
    if name not in golden.outputs:
        check.skip("the golden file has no outputs of this class, so none were compared: record it again")
        return
    check.fail_if(golden_outputs.compare(model, name, golden))
    if name not in golden.last_outputs and last_positions(model):
        check.note("no outputs are recorded at the config's last positions")


DIMENSIONS = {  # Auto class: dimensions of its logits
    "AutoModelForCausalLM": 3,
    "AutoModelForMaskedLM": 3,
    "AutoModelForTokenClassification": 3,
    "AutoModelForSequenceClassification": 2,
    "AutoModelForImageClassification": 2,
}


def check_entry(check: Any, job: dict[str, Any], name: str, model: Any) -> None:
    """Entries of auto_map are not exchanged: AutoModel names the base model, other Auto classes one with a head."""
    if name not in job["auto_map"]:
        check.not_applicable("a class of transformers")
        return
    inner = [module for module in model.modules() if module is not model]
    for other, place in job["auto_map"].items():
        klass = place.rpartition(".")[2]
        if (
            name == "AutoModel"
            and other.startswith("AutoModelFor")
            and any(_is_class_named(module, klass) for module in inner)
        ):
            what = f"auto_map exchanges AutoModel and {other}: AutoModel names {type(model).__name__}"
            check.fail(f"{what}, a model with a head around the {klass} of {other}", "config.json")
        elif other == "AutoModel" and name.startswith("AutoModelFor") and _is_class_named(model, klass):
            check.warn(f"{name} and AutoModel name the same class, {klass}")


def _is_class_named(module: Any, klass: str) -> bool:
    return type(module).__name__ == klass


def check_head(check: Any, name: str, model: Any, outputs: dict[str, torch.Tensor]) -> None:
    """The logits have as many dimensions as the task of the Auto class needs."""
    want, logits = DIMENSIONS.get(name), outputs.get("logits")
    if want and logits is not None and logits.dim() != want:
        what = f"{name} names {type(model).__name__}, whose logits have {logits.dim()} dimensions, not {want}"
        check.fail(f"{what}: correct this entry of auto_map", "config.json")


def run_reload(job: dict[str, Any], events: Any) -> None:
    """Load what `save_pretrained` wrote, in a process that never loaded the original folder."""
    scratch = Path(job["scratch"])
    name = job["classes"][0]
    with events.check("reload", name) as check:
        if not (scratch / "saved-ok").exists():
            check.skip("there is no saved folder to load: save_pretrained failed or was not run")
            return
        model, _ = load(job, name, folder=job["saved"])
        before, after = json.loads((scratch / "tensors.json").read_text()), describe(model)
        changed = sorted(n for n in before if before[n].get("digest") != after.get(n, {}).get("digest"))
        if changed:
            check.fail(f"{len(changed)} tensors differ from those saved, the first is {changed[0]}")
        elif (scratch / "outputs.safetensors").exists():
            inputs = golden_outputs.read_inputs(job)
            check.fail_if(difference(unpadded_outputs(model, inputs), load_file(scratch / "outputs.safetensors")))


def _imported_folder_modules(*names: str) -> list[Any]:
    """These modules and those of the folder that they import from, directly or indirectly; not the tokenizer's."""
    found: dict[str, Any] = {}
    queue = list(names)
    while queue:
        name = queue.pop()
        if name in found or not name.startswith("transformers_modules.") or name not in sys.modules:
            continue
        found[name] = sys.modules[name]
        for value in list(vars(found[name]).values()):
            home = value.__name__ if isinstance(value, type(sys)) else getattr(value, "__module__", None)
            queue += [home] if isinstance(home, str) else []
    return list(found.values())


def check_save(check: Any, job: dict[str, Any], model: Any) -> None:
    model.save_pretrained(job["saved"])
    source, saved = Path(job["folder"]), Path(job["saved"])
    modules = _imported_folder_modules(type(model).__module__, type(model.config).__module__)
    used = {Path(getattr(module, "__file__", None) or "__init__.py").name for module in modules} - {"__init__.py"}
    for file in sorted(used):
        if not (saved / file).is_file():
            check.fail(f"save_pretrained does not write {file}, which the model's code needs", file)
        elif (source / file).is_file() and (saved / file).read_bytes() != (source / file).read_bytes():
            check.fail(f"save_pretrained writes a {file} that differs from the one that was loaded", file)
    if job["auto_map"] and not check.failed:
        written = json.loads((saved / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
        lost = sorted(set(job["auto_map"]) - set(written))
        if job["classes"][0] in lost:
            check.fail(
                f"the config that save_pretrained writes has no auto_map entry for {', '.join(lost)}", "config.json"
            )
        elif lost:
            check.warn(f"the auto_map that save_pretrained writes lacks {', '.join(lost)}")


def check_padding(check: Any, model: Any, inputs: dict[str, torch.Tensor], *, with_generation: bool) -> None:
    """A row has the same outputs and generated tokens alone and padded in a batch with a longer row."""
    if "input_ids" not in inputs or not accepts(model, "attention_mask"):
        check.not_applicable("forward takes no input_ids with an attention_mask")
        return
    if one_row_only(model):
        check.not_applicable("the config names no pad_token_id, so this model takes one row at a time")
        return
    count = prompt_length(model)
    found = _with_padding(model, inputs, count, with_generation)
    if found.failed and generates(model):  # positions may be scaled by the length of the row, which padding adds to
        added = PADDING + NEW_TOKENS
        most = steady_length(model, inputs, count + added) - added
        if 2 <= most < count and not _with_padding(model, inputs, most, with_generation).failed:
            why = f"the config scales positions by the length of the row ({scaled_by_length(model.config)})"
            check.warn(f"{why}: up to {most + added} tokens padding changes nothing, beyond them {found.what}")
            return
    if found.failed:
        check.fail(found.what)
    elif found.what:
        check.warn(found.what)


def _with_padding(model: Any, inputs: dict[str, torch.Tensor], count: int, with_generation: bool) -> Outcome:
    """The outcome of `check_padding` for a row of `count` tokens beside a longer one."""
    check, extra = Outcome(), PADDING
    ids = make_rows(model, inputs, 2, count + extra, seed=3)
    rest, pair = non_text_inputs(inputs), non_text_inputs(inputs, rows=2)
    for side in _padding_sides(model, ids[:1], rest):
        kept = ids[:1, extra:] if side == "left" else ids[:1, :count]
        row = with_required(model, {"input_ids": kept, "attention_mask": full_mask(kept), **rest})
        padded = {**pad(model, ids, side, [extra, 0]), **pair}
        if side == "left" and accepts(model, "position_ids"):
            padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        elif side == "left" and not generates(model):
            continue
        padded = with_required(model, padded)
        alone, beside = run_model(model, row), run_model(model, padded)
        seen, want = (
            _first_row_outputs(beside, padded["attention_mask"]),
            _first_row_outputs(alone, row["attention_mask"]),
        )
        for key in [k for k in want if k not in MUST_BE_FINITE and (k not in seen or seen[k].shape != want[k].shape)]:
            del want[key]  # no row for each input, such as similarities between rows
        wrong = difference(seen, want, EQUAL)
        if wrong:
            check.fail(f"padding on the {side} changes the outputs of the other tokens: {wrong}")
        if side == padding_side(model) and with_generation:
            prompts = {name: padded[name] for name in ("input_ids", "attention_mask")}
            alone, beside = generate(model, row, **STEPS), generate(model, prompts, **STEPS)
            if isinstance(alone, torch.Tensor):  # of a `generate` of the folder's own
                wrong = same_sequences(beside[:1, -NEW_TOKENS:], alone[:, -NEW_TOKENS:])
            else:
                wrong = same_steps([step[:1] for step in beside.logits], alone.logits, alone, beside)
            if wrong and accepts(model, "position_ids") and not names_argument(model, "position_ids"):
                why = "forward does not name position_ids, so generate passes none to the base model"
                check.warn(f"{why}, and padding on the {side} changes what is generated: {wrong}")
            elif wrong:
                check.fail(f"padding on the {side} changes what is generated: {wrong}")
    return check


def _first_row_outputs(outputs: dict[str, torch.Tensor], mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The first row, without padding, of the outputs whose first dimension is the batch."""
    rows = {n: t for n, t in floating(outputs).items() if t.dim() and t.shape[0] == len(mask)}
    return {name: row_of(tensor, mask, 0) for name, tensor in rows.items()}


def _padding_sides(model: Any, ids: torch.Tensor, rest: dict[str, torch.Tensor]) -> list[str]:
    """The sides to pad on: right for all models, left too for a causal one."""
    if rest or has_encoder_and_decoder(model):
        return ["right"]
    changed = ids.clone()
    changed[0, -1] = changed[0, 0]
    causal = False
    for name, tensor in floating(run_model(model, with_required(model, {"input_ids": ids}))).items():
        if name in ("logits", "last_hidden_state", "0") and tensor.shape[:2] == ids.shape[:2]:
            other = run_model(model, with_required(model, {"input_ids": changed}))[name]
            causal = not difference({name: other[:, :-1]}, {name: tensor[:, :-1]}, EQUAL)
    return ["right", "left"] if causal else ["right"]


def check_last_position(check: Any, model: Any, others: dict[str, torch.Tensor]) -> None:
    """forward gives finite outputs up to the config's last position."""
    inputs, most = last_positions(model), max_positions(model)
    if takes_numbers(others) and 0 < most <= affordable_length(model):
        inputs = with_mask(model, make_rows(model, others, 1, most, seed=11))
    if attention_window(model) >= affordable_length(model):
        check.skip(
            f"no row longer than the window of {attention_window(model)} tokens was tried: it is too large for a check"
        )
    if not inputs:
        if has_tokens(others) and not vocabulary_size(model):
            check.skip("the config has no vocab_size, so no token ids can be generated")
        elif most and getattr(model, "main_input_name", "") == "input_ids" and accepts(model, "input_ids"):
            check.skip(f"a row of {most} tokens, the config's maximum, is too long for a check")
        else:
            check.not_applicable("the config names no maximum number of positions")
        return
    try:
        outputs = run_model(model, {**non_text_inputs(others), **inputs})
    except Exception as error:
        raise RuntimeError(
            f"the config allows {most} positions, but on a row that reaches the last one forward raises {sentence(error)}"
        ) from error
    check.fail_if(not_finite(outputs))


def check_attention(check: Any, job: dict[str, Any], name: str, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    own = getattr(model.config, "_attn_implementation", None)
    if own not in ("sdpa", "eager") or (own == "eager" and not getattr(model, "_supports_sdpa", False)):
        check.not_applicable(f"this model declares only {own or 'its own'} attention (_supports_sdpa is not set)")
        return
    other = "eager" if own == "sdpa" else "sdpa"
    second = in_float(load(job, name, attn_implementation=other, dtype=torch.float32)[0])
    if second.config._attn_implementation != other:
        check.fail(
            f"attn_implementation={other!r} is ignored: the model still uses {second.config._attn_implementation}"
        )
    seen, want = floating(unpadded_outputs(second, inputs)), floating(unpadded_outputs(model, inputs))
    common = [key for key in want if key in seen or "attentions" not in key]  # which sdpa does not give
    if not inputs.get("attention_mask", torch.ones(1)).all():  # one number of a batch may count its padding
        common = [key for key in common if want[key].numel() > 1]
    wrong = difference(seen, {key: want[key] for key in common}, EQUAL)
    if wrong:
        check.fail(f"{other} attention gives different outputs than {own}: {wrong}")
