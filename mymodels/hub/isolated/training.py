"""Stage: loss, gradients, gradient checkpointing, an optimizer step and resized embeddings of the main class."""

from typing import Any

import torch
from torch import nn

from .comparing import EQUAL, difference, floating, run_model
from .golden_outputs import read_inputs
from .load_repo import in_float, load
from .losses import check_loss, loss_of, make_labels
from .stages import sentence

LARGEST = 3e9  # bytes of weights; with gradients and AdamW's moments, float32 training takes four times as much
RATES = (1e-3, 1e-4, 1e-5, 1e-6)


def run(job: dict[str, Any], events: Any) -> None:
    name = job["classes"][0]
    inputs = read_inputs(job)
    with events.check("training loss", name) as check:
        if not inputs:
            check.skip("forward was not run, so there are no inputs to train on")
            return
        if job["weights_size"] > LARGEST:
            check.skip("the weights are too large for a training check")
            return
        model = in_float(load(job, name, dtype=torch.float32)[0])
        labels = make_labels(name, model, inputs)
        check_loss(check, model, inputs, labels)
    if check.failed:
        return
    batch = {**inputs, **labels}
    with events.check("backward", name) as check:
        check_backward(check, model, batch)
    if check.failed:
        return
    with events.check("gradient checkpointing", name) as check:
        check_checkpointing(check, model, batch)
    with events.check("optimizer step", name) as check:
        check_step(check, model, batch)
    with events.check("resize", name) as check:
        check_resize(check, model, inputs, labels)


# ---- gradients


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step; the model's gradients are cleared afterwards."""
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        loss = loss_of(model, batch)
        if not loss.requires_grad:
            raise RuntimeError("the loss has no gradient: forward detaches it, or every parameter is frozen")
        loss.backward()
    found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def check_backward(check: Any, model: Any, batch: dict[str, torch.Tensor]) -> None:
    """A backward pass in train mode raises nothing, and every parameter that affects the loss gets a gradient."""
    model.train()
    _, found = gradients(model, batch)
    model.eval()
    _, still = gradients(model, batch)
    for name, gradient in found.items():
        if not gradient.isfinite().all():
            check.fail(f"the gradient of {name} is not finite", name)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    without = [n for n, p in model.named_parameters() if n not in found and n not in still and p.requires_grad]
    lost = [name for name in without if _affects_loss(model, batch, name)]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        check.fail(f"{lost[0]}{more} changes the loss, but gets no gradient: it is never trained", lost[0])
    elif without:
        check.warn(f"{len(without)} parameters do not affect the loss and get no gradient, the first is {without[0]}")
    learned = [name for name in frozen if _affects_loss(model, batch, name)]
    if learned and not check.failed:
        check.warn(f"{len(frozen)} parameters are frozen (requires_grad=False), the first is {learned[0]}")


@torch.no_grad()
def _affects_loss(model: Any, batch: dict[str, torch.Tensor], name: str) -> bool:
    """Whether changing a parameter changes the loss."""
    parameter, before = model.get_parameter(name), loss_of(model, batch).item()
    kept = parameter.detach().clone()
    generator = torch.Generator().manual_seed(0)
    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    after = loss_of(model, batch).item()
    parameter.copy_(kept)
    return before != after


def check_checkpointing(check: Any, model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Gradient checkpointing computes the same loss and gradients."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        check.not_applicable("the class does not set supports_gradient_checkpointing")
        return
    model.train()
    loss, want = gradients(model, batch)
    again = gradients(model, batch)[0]
    if again != loss:
        check.not_applicable("training is random in spite of a fixed seed, so two steps cannot be compared")
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing") and not module.gradient_checkpointing:
                check.fail(f"gradient_checkpointing_enable does not enable it in {type(module).__name__}")
        other_loss, seen = gradients(model, batch)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    if set(seen) != set(want):
        lost = sorted(set(want) ^ set(seen))
        check.fail(f"with gradient checkpointing other parameters get a gradient, such as {lost[0]}", lost[0])
        return
    for name, gradient in {"the loss": torch.tensor(loss), **want}.items():
        other = torch.tensor(other_loss) if name == "the loss" else seen[name]
        if not (other - gradient).abs().max().item() <= 1e-4 * max(gradient.abs().max().item(), 1e-3):
            check.fail(f"gradient checkpointing changes {name}", name if name in want else "")
            return


def check_step(check: Any, model: Any, batch: dict[str, torch.Tensor]) -> None:
    """One step of AdamW lowers the loss on its own batch, with at least one of the learning rates `RATES`."""
    model.eval()  # without dropout, which would make the losses incomparable
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    before = gradients(model, batch)[0]
    lowest = before
    for rate in RATES:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, foreach=False)
        with torch.enable_grad():
            loss_of(model, batch).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            lowest = min(lowest, loss_of(model, batch).item())
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
        if lowest < before:
            return
    check.fail(f"a step of AdamW does not lower the loss of {before:.4g} on its own batch, at any learning rate tried")


# ---- the vocabulary


def _refuses_resizing(error: Exception) -> str:
    """Why transformers itself refuses to resize: no setter of embeddings, or a head that is no `nn.Linear`; else ""."""
    text = sentence(error)
    if isinstance(error, NotImplementedError) and "set_input_embeddings" in text:
        return "the class has no set_input_embeddings"
    if isinstance(error, TypeError) and "language model head is of type" in text:
        return "the head is of a class of its own, not an nn.Linear, which transformers refuses to resize"
    return ""


def check_resize(
    check: Any, model: Any, inputs: dict[str, torch.Tensor], labels: dict[str, torch.Tensor] | None = None
) -> None:
    """Added tokens change no outputs of the old ones; the head is resized, a tie is kept, and the loss still works."""
    try:
        old, head = model.get_input_embeddings(), getattr(model, "get_output_embeddings", bool)()
    except NotImplementedError:
        old = head = None
    if not isinstance(old, nn.Embedding) or "input_ids" not in inputs:
        check.not_applicable("the model has no nn.Embedding of tokens")
        return
    count, tied = old.num_embeddings, getattr(head, "weight", None) is old.weight
    before = floating(run_model(model, inputs))
    try:
        model.resize_token_embeddings(count + 8, mean_resizing=False)
    except (NotImplementedError, TypeError) as error:
        if not (refused := _refuses_resizing(error)):
            raise
        check.warn(f"the vocabulary cannot be extended: {refused}")
        return
    new = model.get_input_embeddings()
    if new.weight.shape[0] != count + 8:
        check.fail(f"resize_token_embeddings({count + 8}) leaves {new.weight.shape[0]} embeddings")
        return
    if tied and model.get_output_embeddings().weight is not new.weight:
        check.fail("resize_token_embeddings unties the head from the embeddings")
    after = floating(run_model(model, inputs))
    seen = {}
    for name, tensor in before.items():
        if name not in after:
            check.fail(f"after resize_token_embeddings the output {name!r} is missing")
            return
        of_tokens = "logits" in name and tensor.shape[-1] == count
        if of_tokens and after[name].shape[-1] != count + 8:
            what = f"after resize_token_embeddings({count + 8}) {name} has {after[name].shape[-1]} values a token"
            check.fail(f"{what}: the head was not resized (does get_output_embeddings return it?)")
            return
        seen[name] = after[name][..., :count] if of_tokens else after[name]
    wrong = difference(seen, before, EQUAL)
    if wrong:
        check.fail(f"resize_token_embeddings changes the outputs of the existing tokens: {wrong}")
    if labels and not check.failed:
        try:
            loss_of(model, {**inputs, **labels})
        except (RuntimeError, ValueError, IndexError) as error:
            raise RuntimeError(f"after resize_token_embeddings the loss raises {sentence(error)}") from error
