"""Losses: cross-entropy that stores no copy of the logits; classification with smoothing, class weights, focal loss.

This file is copied as it is into Hub repos and runs there without mymodels.
"""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from .base import torch_is_patched
from .cpu_kernels import gradients_of, is_plain, recordable
from .products import ONE_DNN, one_dnn


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row, `[rows]`, which stores no other tensor of the size of the logits."""

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
        if torch.is_grad_enabled():  # for second derivatives
            hits = labels[:, None] == torch.arange(logits.shape[-1], device=labels.device)
            return ((logits.float().softmax(-1) - hits.float()) * gradient[:, None]).to(logits.dtype), None
        result, rows = torch.empty_like(logits), max(1, 2**22 // logits.shape[-1])
        for into, *part in zip(*(tensor.split(rows) for tensor in (result, logits, norms, labels, gradient))):
            states, norm, label, weight = part
            shares = (states.float() - norm[:, None]).exp_().mul_(weight[:, None])
            into.copy_(shares.scatter_add_(1, label[:, None], -weight[:, None]))
        return result, None


class _HeadCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `head(states)`, whose logits are not stored but computed again piece by piece for the gradient.

    `logits` are read only in the forward pass; no gradient goes to them.
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
        if torch.is_grad_enabled():  # for second derivatives
            # views, because `states` may depend on a tied weight
            inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in (states, weight, bias)]
            logits = soft_cap(nn.functional.linear(*inputs), cap).float()
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            return *gradients_of(losses, inputs, wanted[:3], gradient), None, None, None
        product = one_dnn if ONE_DNN and states.dtype is torch.float32 else nn.functional.linear
        for_states = torch.zeros_like(states) if wanted[0] else None
        for_weight = torch.empty_like(weight) if wanted[1] else None
        for_bias = torch.empty_like(bias) if wanted[2] else None
        for start in range(0, len(weight), 4096):  # one part of the vocabulary at a time
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
    """`cap * tanh(logits / cap)`, as in Gemma 2 (arXiv 2408.00118); None returns `logits` unchanged."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def next_labels(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor | None:
    """The label that each position predicts, `[batch, length]`: `shift_labels`, or `labels` shifted by one."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


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
    """transformers' `ForCausalLMLoss`, with the same arguments, without a second matrix of the size of the logits.

    Args:
        logits: `[batch, length, vocab_size]`, converted to float32 piece by piece.
        labels: `[batch, length]`, shifted by one here; or `shift_labels`, already shifted.
        num_items_in_batch: divisor of the sum; None: the number of labels that are not ignored.
        ignore_index: the label that is ignored.
        made_of: what the logits were computed from: states `[batch, length, width]`, head and soft cap. Then the logits
            are not stored for the backward pass, which computes the head's product again (about a tenth of a training
            step), and the gradient goes to the states, not to `logits`.
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
    elif recordable() and not torch_is_patched():
        losses = _CrossEntropy.apply(logits, known)[0]
    else:
        losses = nn.functional.cross_entropy(logits.float(), known, reduction="none")
    total = torch.where(counted, losses, 0.0).sum()
    if num_items_in_batch is None:
        return total / counted.sum()
    return total / torch.as_tensor(num_items_in_batch, device=total.device)


def classification_loss(config: PretrainedConfig, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss of `logits` `[B, L]` for `config.problem_type`, with the config's smoothing, class weights and focal loss.

    With these at their defaults, it is the loss of every stock sequence classifier.
    """
    if config.problem_type is None:  # inferred once and stored in the config, as in stock models: pipelines read it
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    labels = labels.to(logits.device)
    logits = logits.float()
    if config.problem_type == "regression":
        return nn.functional.mse_loss(logits.view(-1), labels.view(-1).float())

    weights = None if config.class_weights is None else logits.new_tensor(config.class_weights)
    if config.problem_type == "multi_label_classification":
        targets = labels.float() * (1 - config.label_smoothing) + config.label_smoothing / 2
        losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
        total: int | torch.Tensor = losses.numel()
        truth = torch.where(labels > 0.5, logits, -logits).sigmoid()  # probability of the true answer
    else:
        labels = labels.view(-1).long()
        losses = nn.functional.cross_entropy(
            logits, labels, weight=weights, label_smoothing=config.label_smoothing, reduction="none"
        )
        counted, label_or_0 = labels != -100, labels.clamp(min=0)
        total = (counted if weights is None else counted * weights[label_or_0]).sum()
        truth = logits.softmax(dim=-1).gather(1, label_or_0[:, None])[:, 0]
    if config.focal_gamma:
        losses = losses * (1 - truth) ** config.focal_gamma
    return losses.sum() / total


LOSS_FIELDS = {"label_smoothing": 0, "class_weights": None, "focal_gamma": 0, "multi_sample_dropout": 1}  # off


def check_loss_fields(config: PretrainedConfig) -> None:
    """Raise a `ValueError` if the config has settings for a loss that is not computed, as no labels were passed.

    transformers' Trainer passes no labels and computes another loss with `label_smoothing_factor` or
    `compute_loss_func`.
    """
    on = [f"{name}={getattr(config, name)}" for name, off in LOSS_FIELDS.items() if getattr(config, name) != off]
    if on:
        raise ValueError(
            f"config.{', config.'.join(on)} would have no effect: they apply to the loss that this model computes, "
            "but no labels were passed in training. The Trainer withholds labels with label_smoothing_factor (set "
            "config.label_smoothing instead) and with compute_loss_func (remove one of the two)"
        )
