"""Checks of generation: with and without a cache, beams, a static cache, and the folder's generation config."""

import traceback
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationMixin

from .causality import future_leak, scaled_by_length, steady_length
from .comparing import EQUAL, difference, run_model
from .inputs import (
    NEW_TOKENS,
    generates,
    has_encoder_and_decoder,
    make_rows,
    non_text_inputs,
    pad_id,
    prompt_length,
    takes_numbers,
    with_required,
)
from .stages import sentence

BEAMS = 4


@torch.inference_mode()
def generate(model: Any, inputs: Mapping[str, torch.Tensor], **how: Any) -> Any:
    """Generate exactly `NEW_TOKENS` tokens, greedily by default."""
    how = {
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        **how,
    }
    return model.generate(**_prompt(inputs), pad_token_id=pad_id(model), **how)


@torch.inference_mode()
def generate_as_configured(model: Any, inputs: Mapping[str, torch.Tensor], **how: Any) -> Any:
    """Generate by the folder's generation config (eos, pad, beams), without sampling."""
    own = getattr(model, "generation_config", None)
    kept = None if own is None else {name: getattr(own, name, None) for name in _SAMPLING}
    try:
        if own is not None:
            for name in _SAMPLING:  # newer transformers raises for these without do_sample
                setattr(own, name, None)
        made = model.generate(**_prompt(inputs), do_sample=False, **{"max_new_tokens": NEW_TOKENS, **how})
        return made if isinstance(made, torch.Tensor) else made.sequences
    finally:
        for name, value in (kept or {}).items():
            setattr(own, name, value)


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def _prompt(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if not name.startswith("decoder_")}


def same_steps(seen: Any, expected: Any, first: Any, second: Any) -> str:
    """Compare logits step by step, up to the first token that differs (equal scores may be resolved either way)."""
    for step, (got, want) in enumerate(zip(seen, expected)):
        wrong = difference({"logits": got}, {"logits": want}, EQUAL)
        if wrong:
            return f"at token {step + 1}, {wrong}"
        new = len(expected) - step
        if not torch.equal(first.sequences[:1, -new], second.sequences[:1, -new]):
            return ""
    return ""


def first_step(model: Any, prompt: dict[str, torch.Tensor], made: Any) -> str:
    """A sentence on how the logits of the first generated token differ from forward on the same tokens, or "".

    `generate` passes a mask and positions that a plain call of forward leaves to the model.
    """
    start = made.sequences[:, : made.sequences.shape[1] - len(made.logits)]
    if type(model).generate is not GenerationMixin.generate or not start.shape[1]:
        return ""
    inputs = dict(prompt)
    if has_encoder_and_decoder(model):
        inputs["decoder_input_ids"] = start
    logits = run_model(model, with_required(model, inputs)).get("logits")
    if logits is None or logits.dim() != 3:
        return ""
    return difference({"logits": made.logits[0].float()}, {"logits": logits[:, -1].float()}, EQUAL)


def same_sequences(made: Any, plain: Any) -> str:
    """Compare what a `generate` of the folder's own returns, which may be no object with logits."""
    seen, want = (one if isinstance(one, torch.Tensor) else one.sequences for one in (made, plain))
    return difference({"the sequence": seen}, {"the sequence": want}, EQUAL)


def _with_and_without_cache(model: Any, prompt: dict[str, torch.Tensor]) -> tuple[Any, Any, str]:
    """What is generated with the cache and without it, and a sentence on how they differ."""
    plain = generate(model, prompt, use_cache=False, **STEPS)
    made = generate(model, prompt, use_cache=True, **STEPS)
    if isinstance(made, torch.Tensor) or isinstance(plain, torch.Tensor):
        return made, plain, same_sequences(made, plain)
    seen, want = ([step[:1] for step in one.logits] for one in (made, plain))
    return made, plain, same_steps(seen, want, plain, made)


def _steady_prompt(model: Any, prompt: dict[str, torch.Tensor]) -> int:
    """The length of a shorter prompt that leaves the generated row within `steady_length`; 0 if there is none."""
    length = prompt["input_ids"].shape[1]
    most = steady_length(model, prompt, length + NEW_TOKENS) - NEW_TOKENS
    return most if 2 <= most < length else 0


STEPS = {"return_dict_in_generate": True, "output_logits": True}


def check_generation(events: Any, name: str, model: Any, inputs: dict[str, torch.Tensor]) -> bool:
    """Run the four checks.

    Returns:
        Whether generation with a cache gives what generation without it gives.
    """
    with events.check("cached generation", name) as cached:
        if not generates(model):
            cached.not_applicable("this model does not generate")
            return True
        prompt = inputs
        if "input_ids" in inputs:  # one row: the check "padding" covers padded batches
            ids = make_rows(model, inputs, 1, prompt_length(model), seed=5)
            prompt = {"input_ids": ids, **non_text_inputs(inputs)}
        made, plain, wrong = _with_and_without_cache(model, prompt)
        if wrong and "input_ids" in prompt and (most := _steady_prompt(model, prompt)):
            prompt = {**prompt, "input_ids": prompt["input_ids"][:, :most]}
            made, plain, shorter = _with_and_without_cache(model, prompt)
            if not shorter:
                setting, most = scaled_by_length(model.config), most + NEW_TOKENS
                why = f"the config scales positions by the length of the row ({setting})"
                cached.warn(f"{why}: up to {most} tokens the cache changes nothing, beyond them {wrong}")
            wrong = shorter
        if wrong:
            leak = future_leak(model, prompt)
            cached.fail(leak or f"generation with the cache differs from generation without it: {wrong}")
        elif isinstance(plain, torch.Tensor):
            cached.note("generate of its own returns no logits, so what it generates was compared")
        elif wrong := first_step(model, prompt, plain):
            cached.fail(f"generate computes other logits for the first token than forward does: {wrong}")
    with events.check("generation config", name) as check:
        check_configured(check, model, inputs)
    if not cached.failed:
        with events.check("beams", name) as check:
            check_beams(check, model, prompt)
        with events.check("static cache", name) as check:
            check_static(check, model, prompt, made)
    return not cached.failed


@torch.inference_mode()
def check_configured(check: Any, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """generate() with its own config gives valid token ids, and only padding after eos."""
    if takes_numbers(inputs):
        check.not_applicable("the model generates numbers, not token ids")
        return
    torch.manual_seed(0)
    made = model.generate(**_prompt(inputs), max_new_tokens=NEW_TOKENS)
    made = made if isinstance(made, torch.Tensor) else made.sequences
    size = getattr(getattr(model, "get_output_embeddings", bool)(), "out_features", None)
    if made.numel() and (made.min() < 0 or (isinstance(size, int) and made.max() >= size)):
        check.fail(f"generate gives the token id {made.max().item()}, but the head has {size} outputs")
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else [end for end in ends or [] if isinstance(end, int)]
    known = "input_ids" in inputs and not has_encoder_and_decoder(model)
    start = inputs["input_ids"].shape[1] if known else 1
    for number, row in enumerate(made[:, start:].tolist()):
        first = next((place for place, token in enumerate(row) if token in ends), None)
        if first is not None and len(set(row[first + 1 :])) > 1:
            check.fail(f"generate continues after the eos token {row[first]} in row {number}")


def check_beams(check: Any, model: Any, prompt: dict[str, torch.Tensor]) -> None:
    """Beam search gives the same scores with and without the cache, which has to be reordered with the beams."""
    how = {"num_beams": BEAMS, "num_return_sequences": BEAMS, "output_scores": True, "return_dict_in_generate": True}
    try:
        plain = generate(model, prompt, use_cache=False, **how)
    except (NotImplementedError, ValueError) as error:
        if isinstance(error, ValueError) and _raised_in_own_forward(
            error
        ):  # `generate` refuses before it runs the model
            raise
        check.not_applicable(f"the model does not support beams: {sentence(error)}")
        return
    try:
        made = generate(model, prompt, use_cache=True, **how)
    except NotImplementedError as error:
        check.warn(f"beams work without the cache only: {sentence(error)}")
        return
    if getattr(plain, "sequences_scores", None) is None:
        check.not_applicable("generate returns no scores of beams")
        return
    apart = (plain.sequences_scores.double() - made.sequences_scores.double()).abs().max().item()
    if not apart <= 1e-3:  # two beams with nearly equal scores may be exchanged
        check.fail(f"the scores of {BEAMS} beams differ with the cache by {apart:.3g}: the cache is not reordered")


def _raised_in_own_forward(error: BaseException) -> bool:
    """Whether an error comes from a `forward` of the folder's code."""
    codes = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(code.co_name == "forward" and "transformers_modules" in code.co_filename for code in codes)


def check_static(check: Any, model: Any, prompt: dict[str, torch.Tensor], dynamic: Any) -> None:
    """Generation with a cache of fixed size, which torch.compile and export need."""
    declared = bool(getattr(model, "_can_compile_fullgraph", False) or getattr(model, "_supports_static_cache", False))
    try:
        made = generate(model, prompt, cache_implementation="static", disable_compile=True, **STEPS)
    except Exception as error:
        if declared:
            raise
        check.not_applicable(f"the model does not declare _can_compile_fullgraph, and raises {sentence(error)}")
        return
    if isinstance(made, torch.Tensor):
        check.not_applicable("generate of its own returns no logits")
        return
    wrong = same_steps([step[:1] for step in made.logits], [step[:1] for step in dynamic.logits], dynamic, made)
    if wrong and declared:
        check.fail(f"generation with a static cache differs from generation with a dynamic one: {wrong}")
    elif wrong:
        check.warn(f"a static cache, which the model does not declare to support, changes what is generated: {wrong}")
