"""The check of the training loss: it must equal the loss computed from the model's logits and labels."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from .causality import future_leak
from .comparing import EQUAL, difference, flatten
from .inputs import has_encoder_and_decoder, pad_id
from .load_repo import accepts, seed_all, text_config
from .stages import innermost, sentence

IGNORED = -100


def make_labels(name: str, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Labels for the head of a class, -100 at padding; none for classes whose loss is not known."""
    kind, ids = f"{name} {type(model).__name__}", inputs.get("input_ids")
    if accepts(model, "start_positions") and ids is not None:
        last = ids.shape[1] - 1
        return {"start_positions": torch.full((len(ids),), last - 1), "end_positions": torch.full((len(ids),), last)}
    if not accepts(model, "labels"):
        return {}
    count = getattr(model.config, "num_labels", 2)
    if "SequenceClassification" in kind or "ImageClassification" in kind or "AudioClassification" in kind:
        rows = len(next(iter(inputs.values())))
        problem = getattr(model.config, "problem_type", None)
        if problem == "multi_label_classification":
            return {"labels": (torch.arange(rows * count) % 2).float().reshape(rows, count)}
        if count == 1 or problem == "regression":
            return {"labels": torch.linspace(-1, 1, rows * count).reshape(rows, *([count] if count > 1 else []))}
        return {"labels": torch.arange(rows) % count}
    decoded = inputs.get("decoder_input_ids")
    if decoded is not None:
        return {"labels": decoded.flip(1)}
    if ids is None:
        return {}
    if ids.is_floating_point():  # a series of numbers: no label is left out
        return {"labels": ids}
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    if "TokenClassification" in kind:
        return {"labels": torch.where(mask, torch.arange(ids.numel()).reshape(ids.shape) * 7 % 3 % count, IGNORED)}
    if any(part in kind for part in ("CausalLM", "MaskedLM", "LMHead", "ConditionalGeneration")):
        return {"labels": torch.where(mask, ids, IGNORED)}
    return {}


def check_loss(check: Any, model: Any, inputs: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> None:
    """The loss is a finite number and equals what transformers computes from these logits and labels."""
    if not labels:
        check.not_applicable("forward takes no labels, or the loss of this class is not known")
        return
    batch = {**inputs, **labels}
    output = call(model, batch)
    loss = _output_field(output, "loss")
    if loss is None:
        check.fail(f"the loss is None though {' and '.join(labels)} were given")
        return
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.isfinite().all():
        check.fail(f"the loss is {_describe_value(loss)}, not one finite number")
        return
    logits, given = _output_field(output, "logits"), labels.get("labels")
    if not isinstance(logits, torch.Tensor) or given is None:
        check.note("there is a loss, a finite number; it was not recomputed")
    elif logits.dim() == 3 and logits.shape[:2] == given.shape and not given.is_floating_point():
        check_token_loss(check, model, batch, logits, loss.item())
    elif logits.dim() == 2 and (reference := _classification_loss(model, logits, given)) is not None:
        check_scale(check, model, batch, logits, loss.item(), reference)
    else:
        check.note("there is a loss, a finite number; it was not recomputed")
    if has_encoder_and_decoder(model) and "decoder_input_ids" in inputs and not check.failed:
        check_labels_alone(check, model, batch)


def check_token_loss(check: Any, model: Any, batch: dict[str, torch.Tensor], logits: torch.Tensor, loss: float) -> None:
    """The loss is the cross-entropy of each token's logits and label; in a causal model, the next token's label."""
    causal = not has_encoder_and_decoder(model) and _causal_head(model)
    if causal is None:
        check.note("there is a loss, a finite number; it was not recomputed")
        return
    labels, right = batch["labels"], 1 if causal else 0
    shifts = {shift: _cross_entropy(logits, labels, shift) for shift in (-1, 0, 1, 2)}
    found = next((shift for shift in (right, *shifts) if _is_close(loss, shifts[shift])), None)
    if found is None and any(_is_close(-loss, value) for value in shifts.values()):
        check.fail(WRONG_SIGN)
    elif found is None and (wrong := _known_mistake(loss, model, logits, labels, right)):
        check.fail(wrong)
    elif found is None:
        check_scale(check, model, batch, logits, loss, lambda made, wanted: _cross_entropy(made, wanted, right), right)
    elif found != right:
        check.fail(WRONG_SHIFT[causal].get(found, f"the labels are shifted by {found}, not by {right}"))
    else:
        check_items_in_batch(check, model, batch, loss, int((labels[:, right:] != IGNORED).sum()))


SOFTMAX_TWICE = "the loss is the cross-entropy of the softmax of the logits: cross_entropy takes the logits themselves"
WRONG_SIGN = "the loss is the cross-entropy with the wrong sign: training would increase it"
Reference = Callable[[torch.Tensor, torch.Tensor], float]  # of logits and labels


def _classification_loss(model: Any, logits: torch.Tensor, labels: torch.Tensor) -> Reference | None:
    """The loss for one label, one number or one set of labels per row; None for labels of another shape."""
    if labels.dim() == 1 and not labels.is_floating_point() and len(labels) == len(logits):
        return lambda made, wanted: cross_entropy(made.float(), wanted).item()
    if labels.numel() != logits.numel():
        return None
    if getattr(model.config, "problem_type", None) == "multi_label_classification":
        return lambda made, wanted: binary_cross_entropy_with_logits(made.float(), wanted).item()
    return lambda made, wanted: mse_loss(made.float().reshape(wanted.shape), wanted).item()


@torch.no_grad()
def check_scale(
    check: Any,
    model: Any,
    batch: dict[str, torch.Tensor],
    logits: torch.Tensor,
    loss: float,
    reference: Reference,
    shift: int = 0,
) -> None:
    """Tell a wrongly scaled loss, which fails, from a loss of the model's own, which is a warning.

    The loss is computed for the labels with the highest and with the lowest logits. If it is a multiple of the
    reference loss for both, it is scaled wrongly. A remainder comes from a term of the model's own, such as an
    auxiliary loss of experts or label smoothing.
    """
    if _is_close(loss, reference(logits, batch["labels"])):
        return
    if _is_close(-loss, reference(logits, batch["labels"])):
        check.fail(WRONG_SIGN)
        return
    if _is_close(loss, reference(logits.softmax(-1), batch["labels"])):
        check.fail(SOFTMAX_TWICE)
        return
    several = getattr(model.config, "problem_type", None) == "multi_label_classification"
    if several and _is_close(loss, reference(logits.sigmoid(), batch["labels"])):
        check.fail("the sigmoid is taken twice: binary_cross_entropy_with_logits takes the logits themselves")
        return
    seen, want = [], []
    for best in (True, False):
        labels = _extreme_labels(logits, batch["labels"], shift, best)
        value = _output_field(call(model, {**batch, "labels": labels}), "loss")
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            return
        seen.append(value.item())
        want.append(reference(logits, labels))
    own = "the loss differs from the one that transformers computes from the logits; as a loss of its own it was not checked"
    if abs(want[1] - want[0]) < 1e-2:
        check.warn(own)
        return
    scale = (seen[1] - seen[0]) / (want[1] - want[0])
    rest = seen[0] - scale * want[0]
    if abs(rest) > 2e-3 * max(1.0, *map(abs, seen)) or _is_close(scale, 1.0) or scale <= 0:
        check.warn(own)
        return
    scored = int((batch["labels"][:, shift:] != IGNORED).sum()) if logits.dim() == 3 else len(logits)
    every = logits.shape[0] * (logits.shape[1] - shift) if logits.dim() == 3 else len(logits)
    names = {
        float(scored): f"the loss is the sum over the {scored} labels, not their mean: it grows with the batch",
        scored / len(logits): "the loss is a sum over the tokens of a row, not the mean over all tokens",
        scored / every: "the mean of the loss counts labels of -100, which are to be ignored",
    }
    named = next((text for factor, text in names.items() if _is_close(scale, factor)), "")
    check.fail(named or f"the loss is {scale:.4g} times the one that transformers computes from the logits and labels")


def _extreme_labels(logits: torch.Tensor, labels: torch.Tensor, shift: int, best: bool) -> torch.Tensor:
    """Labels with the highest, or the lowest, logits; -100 where `labels` are."""
    if labels.is_floating_point():
        binary = bool(((labels == 0) | (labels == 1)).all())
        liked = (logits > 0).float() if binary else logits.float()
        other = 1 - liked if binary else liked + 1
        return (liked if best else other).reshape(labels.shape)
    chosen = logits.argmax(-1) if best else logits.argmin(-1)
    if logits.dim() == 2:
        return chosen
    moved = torch.cat([labels[:, :shift], chosen[:, : labels.shape[1] - shift]], 1)
    return torch.where(labels == IGNORED, IGNORED, moved)


@torch.no_grad()
def check_items_in_batch(check: Any, model: Any, batch: dict[str, torch.Tensor], loss: float, scored: int) -> None:
    """The summed loss is divided by `num_items_in_batch`, which the Trainer passes to a forward with **kwargs."""
    parameters = inspect.signature(model.forward).parameters.values()
    if not getattr(model, "accepts_loss_kwargs", any(p.kind is p.VAR_KEYWORD for p in parameters)):
        return
    items = 2 * scored
    try:
        value = _output_field(call(model, {**batch, "num_items_in_batch": torch.tensor(items)}), "loss")
    except Exception as error:
        what = f"forward takes **kwargs, so the Trainer passes num_items_in_batch, and it raises {sentence(error)}"
        check.fail(f"{what}: pass it on to the loss, or set accepts_loss_kwargs = False", innermost(error))
        return
    value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else float("nan")
    if _is_close(value, loss):
        if not type(model).__module__.startswith("transformers_modules"):
            return  # the library's code, which the folder's author cannot change
        check.warn(
            "forward takes **kwargs, so the Trainer passes num_items_in_batch, which the loss ignores: with gradient "
            "accumulation it is too large by the number of steps; pass it on, or set accepts_loss_kwargs = False"
        )
    elif not _is_close(value, loss * scored / items):
        what = f"with num_items_in_batch={items} the loss is {value:.4g}"
        check.fail(f"{what}, but the sum over the labels divided by it is {loss * scored / items:.4g}")


@torch.no_grad()
def check_labels_alone(check: Any, model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Without `decoder_input_ids` the decoder gets the labels shifted right by one."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    labels, alone = batch["labels"], {n: x for n, x in batch.items() if not n.startswith("decoder_")}
    try:
        seen = _output_field(call(model, alone), "logits")
    except Exception as error:
        if prepare is None:
            check.fail(f"labels without decoder_input_ids raise {sentence(error)}: shift them right", innermost(error))
        return
    if not isinstance(seen, torch.Tensor):
        return
    known = {
        getattr(of, "decoder_start_token_id", None) for of in (model.config, getattr(model, "generation_config", 0))
    }
    starts = {*(i for i in known if isinstance(i, int)), pad_id(model)}
    plain = labels.masked_fill(labels == IGNORED, pad_id(model))
    allowed = [torch.cat([torch.full_like(plain[:, :1], start), plain[:, :-1]], 1) for start in sorted(starts)]
    allowed += [prepare(labels=labels)] if prepare is not None else []

    def same(decoder: torch.Tensor) -> bool:
        logits = _output_field(call(model, {**alone, "decoder_input_ids": decoder}), "logits")
        return isinstance(logits, torch.Tensor) and not difference({"logits": seen}, {"logits": logits}, EQUAL)

    copies = same(plain)
    if copies and not any(torch.equal(plain, ids) for ids in allowed[: len(starts)]):
        check.fail("the decoder gets the labels as they are, not shifted to the right: it learns to copy them")
    elif not copies and not any(map(same, allowed)):
        check.fail("without decoder_input_ids the decoder does not get its start token and the labels shifted right")


WRONG_SHIFT = {
    True: {
        0: "the labels are not shifted: the loss compares each token's logits with that token, so the model learns to copy",
        2: "the labels are shifted twice: the loss compares each token's logits with the token after the next",
        -1: "the labels are shifted the wrong way: the loss compares each token's logits with the token before",
    },
    False: {1: "the labels are shifted, as only those of a causal language model are"},
}


def _known_mistake(loss: float, model: Any, logits: torch.Tensor, labels: torch.Tensor, shift: int) -> str:
    """A sentence on the mistake that explains this loss; empty if no known mistake does."""
    if _is_close(loss, _cross_entropy(logits.softmax(-1), labels, shift)):
        return SOFTMAX_TWICE
    config = text_config(model.config)
    special = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "eos", "bos")]
    for token in sorted({0, *(i for i in special if isinstance(i, int) and 0 <= i < logits.shape[-1])}):
        filled = labels.masked_fill(labels == IGNORED, token)
        if (labels == IGNORED).any() and _is_close(loss, _cross_entropy(logits, filled, shift)):
            return f"labels of -100 are not ignored, but count as token {token}: the model is trained on padding"
    return ""


def _causal_head(model: Any) -> bool | None:
    """Whether each token's logits predict the next token: a language model with a causal mask. None if unknown."""
    kind = type(model).__name__
    if "TokenClassification" in kind or "MaskedLM" in kind:
        return False
    if not ("CausalLM" in kind or "LMHead" in kind or getattr(model, "can_generate", bool)()):
        return None
    return bool(getattr(text_config(model.config), "is_decoder", False) or not future_leak(model))


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, shift: int) -> float:
    length = labels.shape[1]
    if length <= abs(shift):
        return float("nan")
    at, to = slice(max(0, -shift), length - max(0, shift)), slice(max(0, shift), length - max(0, -shift))
    return cross_entropy(logits[:, at].flatten(0, 1).float(), labels[:, to].flatten(), ignore_index=IGNORED).item()


def _is_close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-3 * max(1.0, abs(other))


def _describe_value(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _output_field(output: Any, name: str) -> Any:
    if isinstance(output, dict) or hasattr(output, "keys"):
        return output.get(name) if hasattr(output, "get") else None
    if isinstance(output, (tuple, list)):  # in the order of transformers' outputs
        return output[{"loss": 0, "logits": 1}[name]] if len(output) > 1 else None
    return getattr(output, name, None)


def call(model: Any, batch: dict[str, torch.Tensor], seed: int = 0) -> Any:
    seed_all(seed)
    return model(**batch)


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss; for a model without labels the mean square of its outputs."""
    output = call(model, batch)
    loss = _output_field(output, "loss") if set(batch) & {"labels", "start_positions"} else None
    if isinstance(loss, torch.Tensor):
        return loss
    return torch.stack([t.float().square().mean() for _, t in flatten(output) if t.is_floating_point()]).sum()
