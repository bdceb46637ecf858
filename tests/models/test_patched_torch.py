"""Functions and layers of torch that somebody replaced, as for Monte Carlo dropout: every path must call the new ones.

The truth is the same model with oneDNN turned off, which turns every path of ours off.
"""

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import MODERN, largest_difference, mybert_config, mygpt2_config
from torch import nn
from transformers import DynamicCache

from mymodels import MyBertForSequenceClassification, MyGPT2ForCausalLM, quantize
from mymodels.models import base

IDS = torch.randint(1, 97, (1, 9), generator=torch.Generator().manual_seed(0))
WIDE = {"vocab_size": 1100, "initializer_range": 0.05}  # large products
GPT2_WIDTH = {"n_embd": 512, "n_inner": 1536, "n_head": 8}
BERT_WIDTH = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
PLACES: list[tuple[Any, str]] = [
    *((kind, name) for kind in (nn.Linear, nn.Dropout, nn.LayerNorm) for name in ("forward", "__call__")),
    (nn.RMSNorm, "forward"),
    (nn.Embedding, "forward"),
    *((nn.functional, name) for name in ("linear", "dropout", "layer_norm", "rms_norm", "embedding", "gelu", "silu")),
    (nn.functional, "scaled_dot_product_attention"),
    (nn.functional, "cross_entropy"),
]


def patched(function: Callable, calls: list[str], factor: float) -> Callable:
    @functools.wraps(function)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        calls.append(function.__name__)
        return function(*args, **kwargs) * factor

    return replaced


def steps(model: Any) -> torch.Tensor:
    """Logits of a prompt, and of two steps with a cache."""
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        parts = IDS.split([7, 1, 1], dim=1)
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


def loss_and_gradients(model: Any) -> torch.Tensor:
    model.zero_grad()
    labels = IDS if isinstance(model, MyGPT2ForCausalLM) else IDS[:, 0] % 2
    loss = model(IDS, labels=labels).loss
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


def classified(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.expand(16, -1), attention_mask=torch.ones(16, 9)).logits


def make_gpt2(**changes: Any) -> Any:
    torch.manual_seed(0)
    return MyGPT2ForCausalLM(mygpt2_config(**WIDE, **GPT2_WIDTH, **changes)).eval()


def make_bert() -> Any:
    torch.manual_seed(0)
    return MyBertForSequenceClassification(mybert_config(**WIDE, **BERT_WIDTH)).eval()


WORK: dict[str, tuple[Callable, Callable]] = {
    "steps": (make_gpt2, steps),
    "steps of the modern shape": (lambda: make_gpt2(**MODERN), steps),
    "steps in int8": (lambda: quantize(make_gpt2()), steps),
    "training": (make_gpt2, loss_and_gradients),
    "training of the modern shape": (lambda: make_gpt2(**MODERN), loss_and_gradients),
    "classification": (make_bert, classified),
    "training of a classifier": (make_bert, loss_and_gradients),
}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0].__name__.rpartition('.')[2]}.{place[1]}")
@pytest.mark.parametrize("work", WORK)
def test_it_is_called_once_wherever_the_plain_model_calls_it(work: str, place: tuple[Any, str]) -> None:
    make, run = WORK[work]
    model = make()
    run(model)  # plans and choices of products are made
    with pytest.MonkeyPatch.context() as patch, torch.backends.mkldnn.flags(enabled=False):
        calls: list[str] = []
        patch.setattr(*place, patched(getattr(*place), calls, 1.5))
        truth, expected = run(model), len(calls)
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        patch.setattr(*place, patched(getattr(*place), calls, 1.5))
        found = run(model)
    if place[1] == "cross_entropy":  # a path of ours that oneDNN does not turn off
        expected = int("training" in work)
    assert len(calls) == expected
    assert largest_difference(found, truth) <= 1e-4 * max(1.0, truth.abs().max().item())


BEFORE = """
import torch
from torch import nn
plain = nn.Dropout.forward
nn.Dropout.forward = lambda self, states: plain(self, states) * 1.5
from mymodels import MyGPT2Config, MyGPT2ForCausalLM
shape = dict(hidden_size=512, num_hidden_layers=2, num_attention_heads=8, vocab_size=99)
model = MyGPT2ForCausalLM(MyGPT2Config(**shape)).eval()
ids = torch.arange(8)[None]
with torch.no_grad():
    past = model(ids[:, :7], use_cache=True).past_key_values
    found = model(ids[:, 7:], past_key_values=past).logits[0, -1]
    print((found - model(ids).logits[0, -1]).abs().max().item() < 1e-4)
"""


def test_a_package_beside_torch_is_not_torch() -> None:
    found: dict[str, Any] = {}
    exec(compile("def linear(): pass", f"{torch.__path__[0]}ao/ops.py", "exec"), found)
    assert not base._is_torchs(found["linear"])
    assert base._is_torchs(nn.functional.dropout) and not base.torch_is_patched()


def test_what_is_replaced_before_the_import_is_called_too() -> None:
    ended = subprocess.run([sys.executable, "-c", BEFORE], capture_output=True, text=True)
    assert ended.stdout == "True\n", ended.stderr
