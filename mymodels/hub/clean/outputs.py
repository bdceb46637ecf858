"""Stages on loaded models: outputs against golden ones and against each other, saving and reloading."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from . import golden_outputs, tokenizers
from .causality import sees_later
from .inputs import (
    Unsuitable,
    difference,
    generate,
    generates,
    make_inputs,
    one_row_only,
    pad,
    room,
    row_of,
    run_model,
    shown_outputs,
    side_of,
    tokens,
)
from .loading import accepts, class_of, describe, load, loaded_event

EQUAL = 5e-5  # two ways to the same numbers in float32, another order of sums


def run(job: dict[str, Any], events: Any) -> None:
    """Everything on the class of `architectures`: the one whose weights the folder holds."""
    name, scratch = job["classes"][0], Path(job["scratch"])
    with events.check("load", name) as check:
        model, loading = load(job, name)
        events.write(**loaded_event(model, name, loading))
        (scratch / "loaded").touch()
    if check.failed:
        return
    golden = golden_outputs.read(job["golden"]) if job["golden"] else None
    tokenizers.run(job, events, model, golden.made if golden else None)
    inputs: dict[str, torch.Tensor] = golden.inputs if golden else {}
    with events.check("forward", name) as check:
        try:
            inputs = inputs or make_inputs(model)
            check_forward(check, model, inputs)
        except Unsuitable as error:
            check.skip(f"{error}; record golden outputs for inputs of your own")
    if check.failed:
        return
    if golden and name in golden.outputs:
        with events.check("golden", name) as check:
            check.fail_if(golden_outputs.compare(model, name, golden))
        if name in golden.greedy:
            with events.check("generation", name) as check:
                check.fail_if(golden_outputs.compare_tokens(model, name, golden))
    if inputs:
        save_file(shown_outputs(model, inputs), scratch / "outputs.safetensors")
    (scratch / "tensors.json").write_text(json.dumps(describe(model)))
    with events.check("save") as check:
        check_save(check, job, model)
    if not check.failed:
        (scratch / "saved-ok").touch()
    if not inputs:
        return
    model.float()  # from here on two ways are compared that round differently
    with events.check("cached generation", name) as cached:
        check_cache(cached, model, inputs)
    with events.check("padding", name) as check:
        check_padding(check, model, inputs, with_generation=generates(model) and not cached.failed)
    with events.check("eager = sdpa", name) as check:
        check_attention(check, job, name, model, inputs)


def run_other_classes(job: dict[str, Any], events: Any) -> None:
    """Load through every other Auto class; outputs against golden ones where those were recorded."""
    for name in job["companions"]:  # processors and such
        with events.check("load", name):
            class_of(name).from_pretrained(job["folder"], trust_remote_code=True)
    golden = golden_outputs.read(job["golden"]) if job["golden"] else None
    for name in job["classes"][1:]:
        with events.check("load", name) as check:
            model, loading = load(job, name)
            events.write(**loaded_event(model, name, loading))
        if check.failed:
            continue
        if golden and name in golden.outputs:
            with events.check("golden", name) as check:
                check.fail_if(golden_outputs.compare(model, name, golden))
        else:
            with events.check("forward", name) as check:
                try:
                    run_model(model, golden.inputs if golden else make_inputs(model))
                except Unsuitable as error:
                    check.skip(str(error))


def run_reload(job: dict[str, Any], events: Any) -> None:
    """What `save_pretrained` wrote, loaded by a process that never saw the first folder."""
    scratch = Path(job["scratch"])
    if not (scratch / "saved-ok").exists():
        return
    name = job["classes"][0]
    with events.check("reload", name) as check:
        model, _ = load(job, name, folder=job["saved"])
        before, after = json.loads((scratch / "tensors.json").read_text()), describe(model)
        changed = sorted(n for n in before if before[n].get("digest") != after.get(n, {}).get("digest"))
        if changed:
            check.fail(f"{len(changed)} tensors are not what was saved, the first is {changed[0]}")
        elif (scratch / "outputs.safetensors").exists():
            inputs = golden_outputs.read_inputs(job) or make_inputs(model)
            check.fail_if(difference(shown_outputs(model, inputs), load_file(scratch / "outputs.safetensors")))


def check_forward(check: Any, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """It runs, finite, and twice the same: dropout that ignores `training` shows here."""
    first = shown_outputs(model, inputs)
    for name, tensor in first.items():
        if not tensor.isfinite().all():
            check.fail(f"{name} has {int((~tensor.isfinite()).sum())} values that are NaN or infinite")
    again = difference(shown_outputs(model, inputs), first)
    if again:
        check.fail(f"two runs on the same inputs in eval mode are not the same: {again}")


def _needed(*names: str) -> list[Any]:
    """The modules of the folder that these modules take anything from, and they themselves: not the tokenizer's."""
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
    modules = _needed(type(model).__module__, type(model.config).__module__)
    used = {Path(getattr(module, "__file__", None) or "__init__.py").name for module in modules} - {"__init__.py"}
    for file in sorted(used):
        if not (saved / file).is_file():
            check.fail(f"save_pretrained does not write {file}, which the model's code needs", file)
        elif (source / file).is_file() and (saved / file).read_bytes() != (source / file).read_bytes():
            check.fail(f"save_pretrained writes another {file} than the one that was loaded", file)
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
    """A row alone, and the same row padded beside a longer one, give the same outputs and tokens."""
    if "input_ids" not in inputs or not accepts(model, "attention_mask"):
        check.skip("forward takes no input_ids with an attention_mask")
        return
    if one_row_only(model):
        check.skip("the config names no pad_token_id, so this model takes one row at a time")
        return
    count, extra = room(model), 3
    ids = tokens(model, 2, count + extra, seed=3)
    decoder = {name: value[:1] for name, value in inputs.items() if name.startswith("decoder_")}
    pair = {name: value.repeat(2, 1) for name, value in decoder.items()}
    for side in _sides(model, ids[:1], decoder):
        kept = ids[:1, extra:] if side == "left" else ids[:1, :count]
        row = {"input_ids": kept, "attention_mask": torch.ones_like(kept), **decoder}
        padded = {**pad(model, ids, side, [extra, 0]), **pair}
        if side == "left" and accepts(model, "position_ids"):
            padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        elif side == "left" and not generates(model):
            continue
        alone, beside = run_model(model, row), run_model(model, padded)
        want = {name: row_of(tensor, row["attention_mask"], 0) for name, tensor in alone.items()}
        seen = {name: row_of(tensor, padded["attention_mask"], 0) for name, tensor in beside.items()}
        wrong = difference(seen, want, EQUAL)
        if wrong:
            check.fail(f"padding on the {side} changes the outputs of the other tokens: {wrong}")
        if side == side_of(model) and with_generation:
            prompts = {name: padded[name] for name in ("input_ids", "attention_mask")}
            both = {"return_dict_in_generate": True, "output_logits": True}
            alone, beside = generate(model, row, **both), generate(model, prompts, **both)
            wrong = same_steps([step[:1] for step in beside.logits], alone.logits, alone, beside)
            if wrong:
                check.fail(f"padding on the {side} changes what is generated: {wrong}")


def _sides(model: Any, ids: torch.Tensor, decoder: dict[str, torch.Tensor]) -> list[str]:
    """Right for all; left too for a model in which no token sees a later one."""
    if decoder or getattr(model.config, "is_encoder_decoder", False):
        return ["right"]
    changed = ids.clone()
    changed[0, -1] = changed[0, 0]
    causal = False
    for name, tensor in run_model(model, {"input_ids": ids}).items():
        if tensor.shape[:2] == ids.shape:
            other = run_model(model, {"input_ids": changed})[name]
            causal = not difference({name: other[:, :-1]}, {name: tensor[:, :-1]}, EQUAL)
    return ["right", "left"] if causal else ["right"]


def same_steps(seen: Any, expected: Any, first: Any, second: Any) -> str:
    """Compare logits step by step, up to the first token that differs (a tie may fall either way)."""
    for step, (got, want) in enumerate(zip(seen, expected)):
        wrong = difference({"logits": got}, {"logits": want}, EQUAL)
        if wrong:
            return f"at token {step + 1}, {wrong}"
        new = len(expected) - step
        if not torch.equal(first.sequences[:1, -new], second.sequences[:1, -new]):
            return ""
    return ""


def check_cache(check: Any, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    if not generates(model):
        check.skip("this model does not generate")
        return
    if "input_ids" in inputs:  # one row: what padding does to the cache is for the next check
        inputs = {"input_ids": tokens(model, 1, room(model), seed=5)}
    both = {"return_dict_in_generate": True, "output_logits": True}
    cached, plain = (generate(model, inputs, use_cache=use_cache, **both) for use_cache in (True, False))
    wrong = same_steps([step[:1] for step in cached.logits], [step[:1] for step in plain.logits], plain, cached)
    if wrong:
        check.fail(sees_later(model) or f"generation with the cache is not generation without it: {wrong}")


def check_attention(check: Any, job: dict[str, Any], name: str, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    own = getattr(model.config, "_attn_implementation", None)
    if own not in ("sdpa", "eager") or (own == "eager" and not getattr(model, "_supports_sdpa", False)):
        check.skip(f"this model declares only {own or 'its own'} attention (_supports_sdpa is not set)")
        return
    other = "eager" if own == "sdpa" else "sdpa"
    second, _ = load(job, name, attn_implementation=other, dtype=torch.float32)
    if second.config._attn_implementation != other:
        check.fail(
            f"attn_implementation={other!r} is ignored, the model stays with {second.config._attn_implementation}"
        )
    wrong = difference(shown_outputs(second, inputs), shown_outputs(model, inputs), EQUAL)
    if wrong:
        check.fail(f"{other} attention gives other outputs than {own}: {wrong}")
