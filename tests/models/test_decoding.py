"""One token per row in one function: the numbers of the plain modules, and where these were changed, theirs."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny import MODERN, SWITCHES, largest_difference, mygpt2_config
from torch import nn
from torch.nn.utils import prune
from transformers import DynamicCache

from mymodels import MyGPT2ForCausalLM, quantize
from mymodels.models import decode_step, decoding, modeling_mygpt2
from mymodels.models.products import ONE_DNN

pytestmark = pytest.mark.skipif(not ONE_DNN, reason="torch without oneDNN")
IDS = torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["all blocks", "each block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The blocks that were computed in one function, with those before and after or by itself."""
    seen: list[Any] = []
    block, count = decoding._block, decode_step._Plan.count_products
    monkeypatch.setattr(decoding, "_block", lambda self, *a, **k: (seen.append(self), block(self, *a, **k))[1])
    monkeypatch.setattr(decode_step._Plan, "count_products", lambda plan: (seen.extend(plan._layers), count(plan))[1])
    if request.param == "each block":
        monkeypatch.setattr(modeling_mygpt2, "in_one_call", lambda layers, states, *others: (states, layers))
    return seen


def make(**changes: Any) -> MyGPT2ForCausalLM:
    torch.manual_seed(0)
    return MyGPT2ForCausalLM(mygpt2_config(**changes)).eval()


def last_logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits of the last two tokens, one after the other, with a cache."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :-2], past_key_values=cache)
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in (-2, -1 + ids.shape[1])], 1)


def check(model: nn.Module, blocks: list[Any], expected: bool, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        truth = model(IDS).logits[:, -2:]  # several tokens, hence the plain modules
        blocks.clear()
        assert largest_difference(last_logits(model), truth) <= tolerance
    assert (len(blocks) == 2 * len(model.model.layers)) if expected else not blocks


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_every_switch(switches: dict, blocks: list[Any]) -> None:
    check(make(**switches), blocks, expected=True)


@pytest.mark.parametrize("switches", [{}, MODERN], ids=["stock", "modern"])
@pytest.mark.parametrize("bits", [None, 8, 16])
def test_large_weights_and_int8(switches: dict, bits: int | None, blocks: list[Any]) -> None:
    model = make(**switches, n_embd=256, intermediate_size=2048, n_layer=2)
    # another order of summing 2,048 numbers; in int8, the last digit of a sum decides how a state is rounded
    tolerance = {None: 5e-5, 16: 1e-3, 8: 0.1}[bits]
    assert model.model.layers[0].mlp.up_proj.weight.numel() >= decoding.LARGE
    check(model if bits is None else quantize(model, activation_bits=bits), blocks, True, tolerance)


def test_edited_int8_weights_are_seen(blocks: list[Any]) -> None:
    model = quantize(make(n_embd=64))
    check(model, blocks, expected=True, tolerance=1e-3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[:, :-4].neg_()
            layer.self_attn.v_proj.bias.add_(1.0)
            layer.mlp.up_proj.weight.neg_()
    check(model, blocks, expected=True, tolerance=1e-3)
    model.load_state_dict(quantize(make(n_embd=64, initializer_range=0.3)).state_dict())
    check(model, blocks, expected=True, tolerance=1e-3)


def test_repacked_layers_and_their_joint_copy(blocks: list[Any]) -> None:
    model = quantize(make(n_embd=64))
    check(model, blocks, expected=True, tolerance=1e-3)
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.data[:, :-4].neg_()  # not noticed, as documented
            projection.repack()
    check(model, blocks, expected=True, tolerance=1e-3)
    for layer in model.model.layers:
        layer.self_attn.v_proj.bias.data.add_(1.0)
    check(model, blocks, expected=True, tolerance=1e-3)
    with torch.inference_mode():
        bias = nn.Parameter(torch.ones(model.config.num_key_value_heads * model.config.head_dim), requires_grad=False)
    model.model.layers[0].self_attn.v_proj.bias = bias
    check(model, blocks, expected=True, tolerance=1e-3)


def double(module: Any, args: Any, output: Any) -> Any:
    return (
        tuple(2 * part if torch.is_tensor(part) else part for part in output) if type(output) is tuple else 2 * output
    )


class Scaled(nn.Linear):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(states)


class Attention(modeling_mygpt2.MyGPT2Attention):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(2 * hidden_states, *args, **kwargs)


def replaced(layer: Any) -> None:
    original = layer.self_attn.q_proj.forward
    layer.self_attn.q_proj.forward = lambda states: 2 * original(states)


def of_a_subclass(layer: Any) -> None:
    scaled = Scaled(32, 32)
    scaled.load_state_dict(layer.self_attn.o_proj.state_dict())
    layer.self_attn.o_proj = scaled


def another_attention(layer: Any) -> None:
    layer.self_attn.__class__ = Attention


class CalledTwice(modeling_mygpt2.MyGPT2Attention):
    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(2 * hidden_states, *args, **kwargs)


def no_parameter(layer: Any) -> None:
    """As where another network computes the weights."""
    for name in ("weight", "bias"):
        value = 2 * getattr(layer.mlp.up_proj, name).detach() + 1
        delattr(layer.mlp.up_proj, name)
        setattr(layer.mlp.up_proj, name, value)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook of a projection": lambda layer: layer.self_attn.k_proj.register_forward_hook(double),
    "hook of a norm": lambda layer: layer.input_layernorm.register_forward_hook(double),
    "hook of the MLP": lambda layer: layer.mlp.register_forward_hook(double),
    "hook of attention": lambda layer: layer.self_attn.register_forward_hook(double),
    "pre-hook": lambda layer: layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "replaced forward": replaced,
    "layer of a subclass": of_a_subclass,
    "attention of a subclass": another_attention,
    "attention with its own call": lambda layer: setattr(layer.self_attn, "__class__", CalledTwice),
    "another module for dropout": lambda layer: setattr(layer, "dropout", nn.Tanh()),
    "no projection": lambda layer: setattr(layer.self_attn, "o_proj", nn.Tanh()),
    "weights that are no parameters": no_parameter,
    "pruned": lambda layer: prune.l1_unstructured(layer.mlp.up_proj, "weight", amount=0.5),
    "adapter": lambda layer: inject_adapter_in_model(
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False), layer
    ),
    "norm of a subclass": lambda layer: setattr(
        layer, "input_layernorm", type("Norm", (nn.LayerNorm,), {"forward": lambda self, x: 2 * x})(32)
    ),
    "another activation": lambda layer: setattr(
        layer.mlp, "act_fn", type("Act", (nn.Module,), {"forward": lambda s, x: x})()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_block_does_what_it_does(change: str, blocks: list[Any]) -> None:
    model = make()
    with torch.no_grad():
        before = model(IDS).logits
        for layer in model.model.layers:
            CHANGES[change](layer)
        assert largest_difference(model.eval()(IDS).logits, before) > 1e-3
    check(model, blocks, expected=False)


@pytest.mark.parametrize("name", ["MyGPT2Attention", "MyGPT2DenseMLP"])
def test_a_patched_class(name: str, blocks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(modeling_mygpt2, name)
    original = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda self, states, *args, **kwargs: original(self, 2 * states, *args, **kwargs)
    )
    check(make(), blocks, expected=False)


@pytest.mark.parametrize("name", ["MyGPT2Attention", "MyGPT2DenseMLP", "MyGPT2Block"])
def test_a_class_patched_by_a_decorator(name: str, blocks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`functools.wraps` keeps the source that `inspect` finds."""
    kind = getattr(modeling_mygpt2, name)
    original = kind.forward

    @functools.wraps(original)
    def doubled(self: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, 2 * states, *args, **kwargs)

    model = make()
    with torch.no_grad():
        before = model(IDS).logits
        monkeypatch.setattr(kind, "forward", doubled)
        assert largest_difference(model(IDS).logits, before) > 1e-3
    check(model, blocks, expected=name == "MyGPT2Block")


@pytest.mark.parametrize("name", ["apply_rotary", "norm_heads", "eager_attention_forward"])
def test_a_patched_function_of_the_modeling_file(name: str, blocks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(modeling_mygpt2, name)
    model = make(**MODERN, attn_implementation="eager")
    with torch.no_grad():
        before = model(IDS).logits
        monkeypatch.setattr(
            modeling_mygpt2, name, lambda *args, **kwargs: original(args[0], args[1] * 2, *args[2:], **kwargs)
        )
        if name == "norm_heads":
            monkeypatch.setattr(modeling_mygpt2, name, lambda norm, states: 2 * states)
        assert largest_difference(model(IDS).logits, before) > 1e-3
    check(model, blocks, expected=False)


def test_a_gated_mlp_with_the_dense_forward(blocks: list[Any]) -> None:
    kind = type("Dense", (modeling_mygpt2.MyGPT2GatedMLP,), {"forward": modeling_mygpt2.MyGPT2DenseMLP.forward})
    model = make(mlp_type="gated")
    for layer in model.model.layers:
        layer.mlp.__class__ = kind
    check(model, blocks, expected=False)


def test_a_patched_linear(blocks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, states: 2 * original(self, states))
    check(make(), blocks, expected=False)


def test_a_global_hook(blocks: list[Any]) -> None:
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if isinstance(module, nn.LayerNorm) else None
    )
    try:
        check(make(), blocks, expected=False)
    finally:
        hook.remove()


def test_precision_training_and_gradients(blocks: list[Any]) -> None:
    model = make()
    last_logits(model)  # with gradients
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        last_logits(model)
    with torch.no_grad():
        last_logits(make().to(torch.bfloat16))
        model(IDS[:, :1], output_attentions=True)
        model.model.layers[0].dropout.train()
        last_logits(model)
    assert not [block for block in blocks if block is model.model.layers[0]]


def test_the_digests_are_those_of_the_source() -> None:
    kinds = ("MyGPT2Block", "MyGPT2Attention", "MyGPT2DenseMLP", "MyGPT2GatedMLP")
    found = {decoding.digest(getattr(modeling_mygpt2, kind).forward) for kind in kinds}
    assert found == set(decoding.FORWARDS), (
        "a `forward` was edited: edit `_block` likewise, then write its digest there"
    )
