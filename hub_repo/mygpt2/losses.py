"""The loss of language models, without a second matrix of the logits' size, or any that is kept.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

from typing import Any

import torch
from torch import nn

from .kernels import ONE_DNN, differentiated, is_plain, one_dnn, recordable


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row, `[rows]`, which keeps nothing of the size of the logits but the logits themselves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = max(1, 2**22 // logits.shape[-1])
        norms = torch.cat([part.float().logsumexp(-1) for part in logits.split(rows)])
        return norms - logits.gather(1, labels[:, None])[:, 0].float(), norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor, None]:
        logits, labels, norms = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more
            hits = labels[:, None] == torch.arange(logits.shape[-1], device=labels.device)
            return ((logits.float().softmax(-1) - hits.float()) * gradient[:, None]).to(logits.dtype), None
        result, rows = torch.empty_like(logits), max(1, 2**22 // logits.shape[-1])
        for into, *part in zip(*(tensor.split(rows) for tensor in (result, logits, norms, labels, gradient))):
            states, norm, label, weight = part
            shares = (states.float() - norm[:, None]).exp_().mul_(weight[:, None])
            into.copy_(shares.scatter_add_(1, label[:, None], -weight[:, None]))
        return result, None


class _HeadCrossEntropy(torch.autograd.Function):
    """The same from what the logits were made of, `head(states)`: logits are not kept, but made again piece by piece.

    `logits` are only looked at: what depends on them otherwise has its gradient through them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        logits: torch.Tensor,
        labels: torch.Tensor,
        cap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _CrossEntropy.forward(logits, labels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        states, weight, bias, _, labels, ctx.cap = inputs
        ctx.save_for_backward(states, weight, bias, labels, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple:
        states, weight, bias, labels, norms = ctx.saved_tensors
        cap, wanted = ctx.cap, ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated once more
            # seen through views: `states` may themselves depend on a weight that is tied
            inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in (states, weight, bias)]
            logits = soft_cap(nn.functional.linear(*inputs), cap).float()
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            return *differentiated(losses, inputs, wanted[:3], gradient), None, None, None
        product = one_dnn if ONE_DNN and states.dtype is torch.float32 else nn.functional.linear
        for_states = torch.zeros_like(states) if wanted[0] else None
        for_weight = torch.empty_like(weight) if wanted[1] else None
        for_bias = torch.empty_like(bias) if wanted[2] else None
        for start in range(0, len(weight), 4096):  # a part of the vocabulary
            part = slice(start, start + 4096)
            some = weight[part]
            logits = soft_cap(product(states, some, None if bias is None else bias[part]), cap)
            shares = (logits.float() - norms[:, None]).exp_().mul_(gradient[:, None])
            place = labels - start
            here = (place >= 0) & (place < len(some))
            hits = torch.where(here, gradient, 0.0)[:, None]
            shares = shares.scatter_add_(1, place.clamp(0, len(some) - 1)[:, None], -hits).to(states.dtype)
            if cap is not None:
                shares = shares * (1 - (logits / cap).square())
            if for_states is not None:
                for_states += product(shares, some.t())
            if for_weight is not None:
                for_weight[part] = product(shares.t(), states.t())
            if for_bias is not None:
                for_bias[part] = shares.sum(0)
        return for_states, for_weight, for_bias, None, None, None


def soft_cap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """`cap * tanh(logits / cap)`, as in Gemma 2 (arXiv 2408.00118); None: as they are."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    made_of: tuple[torch.Tensor, nn.Module, float | None] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' loss of causal language models, same arguments, in less memory: no second matrix of logits' size.

    Args:
        logits: `[batch, length, vocab_size]`, taken to float32 piece by piece.
        labels: `[batch, length]`, shifted by one here; or `shift_labels`, already shifted.
        num_items_in_batch: what the sum is divided by; None: the number of labels that count.
        ignore_index: the label that does not count.
        made_of: what gave the logits: states `[batch, length, width]`, head and soft cap. Then no logits are kept for
            the backward pass either, where the head's product, a tenth of a step's work, is made once more, and the loss
            depends on the states, not on `logits`.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    logits = logits.view(-1, vocab_size)
    labels = shift_labels.reshape(-1).to(logits.device)
    counted = labels != ignore_index
    known = torch.where(counted, labels, 0)
    if made_of is not None and made_of[0].shape[:-1].numel() == len(known) and is_plain(made_of[1], made_of[0]):
        states, head, cap = made_of
        losses = _HeadCrossEntropy.apply(states.flatten(0, -2), head.weight, head.bias, logits.detach(), known, cap)[0]
    elif recordable():
        losses = _CrossEntropy.apply(logits, known)[0]
    else:
        losses = nn.functional.cross_entropy(logits.float(), known, reduction="none")
    total = torch.where(counted, losses, 0.0).sum()
    if num_items_in_batch is None:
        return total / counted.sum()
    return total / torch.as_tensor(num_items_in_batch, device=total.device)
