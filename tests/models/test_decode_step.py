"""A decoding step as one call: where it is used, and that it sees every change between two steps of a generation."""

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny import MODERN, SWITCHES, largest_difference, mygpt2_config
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mymodels import MyGPT2ForCausalLM, quantize
from mymodels.models import attention, decode_step, decoding, int8_products, modeling_mygpt2
from mymodels.models.int8_products import top_level
from mymodels.models.products import ONE_DNN, compiled

pytestmark = pytest.mark.skipif(not ONE_DNN, reason="torch without oneDNN")
IDS = torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plan of each step that was one call."""
    seen: list[Any] = []
    count = decode_step._Plan.count_products
    monkeypatch.setattr(decode_step._Plan, "count_products", lambda plan: (seen.append(plan), count(plan))[1])
    return seen


@pytest.fixture
def row_tables(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tables for one row that were made, as where they are faster."""
    if not top_level():
        pytest.skip("torch without FBGEMM")
    made: list[Any] = []
    make = int8_products.row_table
    monkeypatch.setattr(int8_products, "row_table", lambda *args: (made.append(make(*args)), made[-1])[1])
    monkeypatch.setattr(int8_products, "LARGE", 0)
    monkeypatch.setattr(int8_products, "table_pays", lambda *args: True)
    return made


def make(**changes: Any) -> MyGPT2ForCausalLM:
    torch.manual_seed(0)
    model = MyGPT2ForCausalLM(mygpt2_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def by_modules(function: Callable[[], Any]) -> Any:
    """What a call returns without the fast paths of one token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "is_one_token", lambda *args: False)
        patch.setattr(decode_step, "is_one_token", lambda *args: False)
        return function()


@torch.no_grad()
def logits(model: nn.Module, change: Callable[[Any], Any] = lambda model: None, cache: Any = None) -> torch.Tensor:
    """Logits of the last three tokens, with a change after the first of them."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(IDS[:, :-3], past_key_values=cache)
    found = [model(IDS[:, -3:-2], past_key_values=cache).logits]
    change(model)
    found += [model(IDS[:, -2:-1], past_key_values=cache).logits, model(IDS[:, -1:], past_key_values=cache).logits]
    return torch.cat(found, 1)


def test_it_is_compiled() -> None:
    assert isinstance(compiled(decode_step._step).__wrapped__, torch.jit.ScriptFunction), "Python is slower"


@pytest.mark.parametrize("name", SWITCHES)
def test_where_it_is_used(name: str, plans: list[Any]) -> None:
    model = make(**SWITCHES[name])
    truth = by_modules(lambda: logits(model))
    assert largest_difference(logits(model), truth) < 1e-5
    windows = any(layer.self_attn.sliding_window for layer in model.model.layers)
    assert len(plans) == (0 if windows else 3)
    assert len(set(map(id, plans))) <= 1, "nothing was changed"


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "silu", "relu", "relu2", "gelu_pytorch_tanh", "quick_gelu"])
@pytest.mark.parametrize("mlp", ["dense", "gated"])
def test_activations(activation: str, mlp: str, plans: list[Any]) -> None:
    model = make(activation_function=activation, mlp_type=mlp, initializer_range=0.5)
    assert largest_difference(logits(model), by_modules(lambda: logits(model))) < 1e-4
    assert bool(plans) == (activation != "quick_gelu")


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
@pytest.mark.parametrize("bits", [None, 8, 16])
@pytest.mark.parametrize("switches", [{}, MODERN], ids=["stock", "modern"])
def test_large_weights(rows: int, bits: int | None, switches: dict, plans: list[Any]) -> None:
    if bits and not top_level():
        pytest.skip("torch without FBGEMM")
    model = make(**switches, n_embd=256, intermediate_size=2048, n_layer=2)
    model = model if bits is None else quantize(model, activation_bits=bits)
    ids = torch.randint(1, 97, (rows, 5), generator=torch.Generator().manual_seed(1))

    def last() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
            return model(ids[:, -1:], past_key_values=cache).logits

    truth = by_modules(last)
    assert largest_difference(last(), truth) < {None: 5e-5, 16: 1e-3, 8: 0.1}[bits]
    assert len(plans) == 1


@pytest.mark.parametrize("product", ["linear", "one_dnn", "batched", "turned"])
@pytest.mark.parametrize("bias", [True, False])
def test_each_product(product: str, bias: bool, plans: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    function = getattr(decode_step, product, nn.functional.linear)
    monkeypatch.setattr(decode_step, "fastest", lambda *args: function)
    model = make(n_embd=256, intermediate_size=2048, n_layer=2, mlp_bias=bias, attention_bias=bias)
    assert largest_difference(logits(model), by_modules(lambda: logits(model))) < 5e-5
    assert len(plans) == 3


def each(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda model: [change(layer) for layer in model.model.layers] and None


def optimized(model: Any) -> None:
    parameters = [parameter for name, parameter in model.named_parameters() if "down_proj" in name]
    for parameter in parameters:
        parameter.grad = 10 * parameter.detach().roll(1)
    torch.optim.SGD(parameters, lr=0.1).step()


def double(module: Any, args: Any, output: Any) -> Any:
    return 2 * output


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: 1.5 * tensor for name, tensor in model.state_dict().items()}


def merged(model: Any) -> None:
    for name, module in list(model.named_modules()):
        if name.endswith("q_proj"):
            module.weight = nn.Parameter(3 * module.weight.detach())


class Skip(nn.Module):
    layer_type = "full_attention"

    def forward(self, states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return 2 * states, None


def adapted(model: Any) -> None:
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model)


class Doubled(nn.LayerNorm):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(states)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": each(lambda layer: layer.mlp.up_proj.weight.mul_(2)),
    "data": each(lambda layer: setattr(layer.self_attn.v_proj.weight, "data", 2 * layer.self_attn.v_proj.weight.data)),
    "transposed data": each(
        lambda layer: setattr(layer.self_attn.o_proj.weight, "data", layer.self_attn.o_proj.weight.data.t())
    ),
    "bias": each(lambda layer: layer.mlp.up_proj.bias.data.add_(1)),
    "no bias": each(lambda layer: setattr(layer.self_attn.v_proj, "bias", None)),
    "norm": each(lambda layer: layer.input_layernorm.weight.mul_(2)),
    "epsilon": each(lambda layer: setattr(layer.input_layernorm, "eps", 10.0)),
    "scaling": each(lambda layer: setattr(layer.self_attn, "scaling", 3.0)),
    "optimizer": optimized,
    "state dict": lambda model: model.load_state_dict(state(model)),
    "assigned state dict": lambda model: model.load_state_dict(state(model), assign=True),
    "new parameters": merged,
    "adapter": adapted,
    "hook": each(lambda layer: layer.mlp.up_proj.register_forward_hook(double)),
    "hook of a block": each(
        lambda layer: layer.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    ),
    "forward of an activation": each(lambda layer: setattr(layer.mlp.act_fn, "forward", torch.tanh)),
    "forward of a block": each(lambda layer: setattr(layer, "forward", lambda states, **kwargs: (2 * states, None))),
    "block of one's own": lambda model: model.model.layers.__setitem__(1, Skip()),
    "precision of a norm": each(lambda layer: layer.self_attn.q_norm.bfloat16()),
    "another activation": each(lambda layer: setattr(layer.mlp, "act_fn", nn.Tanh())),
    "function of an activation": each(lambda layer: setattr(layer.mlp.act_fn, "act", torch.tanh)),
    "class of a norm": each(lambda layer: setattr(layer.input_layernorm, "__class__", Doubled)),
    "training": lambda model: each(lambda layer: layer.dropout.train())(model),
    "fewer layers": lambda model: setattr(model.config, "num_hidden_layers", 1),
    "layers in another order": lambda model: setattr(
        model.model, "layers", nn.ModuleList([*model.model.layers][::-1][:1] * 2)
    ),
    "another implementation": lambda model: model.set_attn_implementation("scaled"),
    "float64": lambda model: model.double(),
}


def scaled_attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    mixed, weights = sdpa_attention_forward(module, *args, **kwargs)
    return 2 * mixed, weights


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_two_steps(name: str, plans: list[Any]) -> None:
    AttentionInterface.register("scaled", scaled_attention)
    given = MODERN if name == "precision of a norm" else {}
    model = make(resid_pdrop=0.0, **given)
    same = copy.deepcopy(model)
    truth = by_modules(lambda: logits(same, CHANGES[name]))
    found = logits(model, CHANGES[name])
    assert plans, "the first step is one call"
    assert largest_difference(found.double(), truth.double()) < 1e-5
    unchanged = by_modules(lambda: logits(make(resid_pdrop=0.0, **given)))
    if name not in ("training", "float64", "precision of a norm"):
        assert largest_difference(unchanged.double()[:, 1:], truth.double()[:, 1:]) > 1e-3


INT8_CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": each(lambda layer: layer.mlp.up_proj.weight[:, :-4].neg_()),
    "one of a joint product": each(lambda layer: layer.self_attn.v_proj.weight[:, :-4].neg_()),
    "bias": each(lambda layer: layer.self_attn.v_proj.bias.data.add_(1)),
    "data and repack": each(lambda layer: (layer.mlp.up_proj.weight.data[:, :-4].neg_(), layer.mlp.up_proj.repack())),
    "joint data and repack": each(
        lambda layer: (layer.self_attn.k_proj.weight.data[:, :-4].neg_(), layer.self_attn.k_proj.repack())
    ),
    "state dict": lambda model: model.load_state_dict(quantize(make(n_embd=64, initializer_range=0.3)).state_dict()),
    "precision of the states": each(lambda layer: setattr(layer.mlp.up_proj, "activation_bits", 8)),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", INT8_CHANGES)
def test_changes_of_int8_weights(
    name: str, rows: int, plans: list[Any], row_tables: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "IDS", IDS[:rows])
    model = quantize(make(n_embd=64))
    truth = by_modules(lambda: logits(copy.deepcopy(model), INT8_CHANGES[name]))
    row_tables.clear()
    found = logits(model, INT8_CHANGES[name])
    assert bool(row_tables) == (rows == 1)
    assert largest_difference(found, truth) < 1e-3
    assert len(plans) == 3


@pytest.mark.parametrize(
    "switches", [{}, MODERN, {"attention_bias": False, "mlp_bias": False}], ids=["stock", "modern", "plain"]
)
def test_int8_with_tables(
    switches: dict, plans: list[Any], row_tables: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "IDS", IDS[:1])
    model = quantize(make(**switches))
    found = logits(model)
    layers = len(model.model.layers)
    assert len(row_tables) == 4 * layers + 1, "a joint one, output, up (and gate), down; the head"
    assert largest_difference(found, logits(model)) == 0
    assert len(row_tables) == 4 * layers + 1, "made once"
    assert len(plans) == 6
    assert largest_difference(found, by_modules(lambda: logits(model))) < 1e-4
    assert largest_difference(found, logits(model.dequantize())) < 1e-4


PATCHES: dict[str, tuple[Any, str, Any]] = {
    "LayerNorm": (nn.LayerNorm, "forward", lambda self, states: 2 * states),
    "Linear": (nn.Linear, "forward", lambda self, states: nn.functional.linear(states, 2 * self.weight, self.bias)),
    "block": (modeling_mygpt2.MyGPT2Block, "forward", lambda self, states, **kwargs: (2 * states, None)),
    "call of a block": (modeling_mygpt2.MyGPT2Block, "__call__", lambda self, states, **kwargs: (2 * states, None)),
    "rotary": (modeling_mygpt2, "apply_rotary", lambda states, cos, sin: 2 * states),
    "attend": (attention, "attend", lambda function, module, query, *args, **kwargs: (2 * query, None)),
    "attention of torch": (
        nn.functional,
        "scaled_dot_product_attention",
        lambda query, *args, **kwargs: 2 * query,
    ),
    "call of Linear": (nn.Linear, "__call__", lambda self, states: 2 * self.forward(states)),
    "cache": (DynamicCache, "update", lambda self, key, value, *args: (2 * key, 2 * value)),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patches_between_two_steps(name: str, plans: list[Any]) -> None:
    model = make(position_embedding_type="rope")

    def found() -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            return logits(model, lambda model: patch.setattr(*PATCHES[name]))

    truth = by_modules(found)
    plans.clear()
    assert largest_difference(found(), truth) < 1e-5
    assert len(plans) == 1
    assert largest_difference(by_modules(lambda: logits(model))[:, 1:], truth[:, 1:]) > 1e-3


def test_attention_registered_by_the_same_name(plans: list[Any]) -> None:
    model = make()
    try:
        AttentionInterface.register("sdpa", scaled_attention)
        truth = by_modules(lambda: logits(model))
        assert largest_difference(logits(model), truth) < 1e-5
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert not plans
    assert largest_difference(logits(model), truth) > 1e-3


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


def test_modes_gradients_and_requests(plans: list[Any]) -> None:
    model = make()
    with Seen() as seen:
        logits(model)
    assert "scaled_dot_product_attention" in seen.names
    cache = DynamicCache(config=model.config)
    model(IDS[:, :4], past_key_values=cache)
    assert model(IDS[:, 4:5], past_key_values=cache).logits.requires_grad
    with torch.no_grad():
        assert len(model(IDS[:, 5:6], past_key_values=cache, output_hidden_states=True).hidden_states) == 4
        assert model(IDS[:, 6:7], past_key_values=cache, output_attentions=True).attentions[0] is not None
        assert model(IDS[:, 7:8], past_key_values=cache.__class__(config=model.config)).logits is not None
        model(IDS[:, 7:8])
    assert not plans


def test_other_caches(plans: list[Any]) -> None:
    model = make()
    truth = by_modules(lambda: logits(model))
    assert largest_difference(logits(model, cache=StaticCache(model.config, max_cache_len=16)), truth) < 1e-5
    assert largest_difference(logits(model, cache=DynamicCache(config=model.config, offloading=False)), truth) < 1e-5
    own = type("Own", (DynamicCache,), {})
    assert largest_difference(logits(model, cache=own(config=model.config)), truth) < 1e-5
    assert len(plans) == 3


@pytest.mark.parametrize("switches", [{}, MODERN], ids=["stock", "modern"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}], ids=str
)
def test_generation_with_padding(switches: dict, options: dict, plans: list[Any]) -> None:
    model = make(**switches, initializer_range=0.3)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    mask[0, :4] = mask[1, :1] = 0
    given = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None, **options}

    def found() -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(ids, **given)

    assert torch.equal(found(), by_modules(found))
    assert plans


def test_caches_with_their_own_update(plans: list[Any]) -> None:
    model = make()

    def found(of_layer: bool) -> torch.Tensor:
        cache = DynamicCache(config=model.config)

        def patch(model: Any) -> None:
            changed = cache.layers[1] if of_layer else cache
            update = changed.update
            changed.update = lambda key, value, *args: update(2 * key, 3 * value, *args)

        return logits(model, patch, cache)

    for of_layer in (True, False):
        truth = by_modules(lambda: found(of_layer))  # noqa: B023
        plans.clear()
        assert largest_difference(found(of_layer), truth) < 1e-5
        assert len(plans) == 1


def test_crop_copy_and_reuse(plans: list[Any]) -> None:
    model = make()
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(IDS[:, :5], past_key_values=cache)
        model(IDS[:, 5:6], past_key_values=cache)
        other = copy.deepcopy(cache)
        expected = model(IDS[:, 6:7], past_key_values=cache).logits
        assert torch.equal(model(IDS[:, 6:7], past_key_values=other).logits, expected)
        cache.crop(-1)
        assert torch.equal(model(IDS[:, 6:7], past_key_values=cache).logits, expected)
        another = make(initializer_range=0.5)  # the same cache for another model
        twice = copy.deepcopy(cache)
        truth = by_modules(lambda: another(IDS[:, 7:8], past_key_values=twice).logits)
        assert largest_difference(another(IDS[:, 7:8], past_key_values=cache).logits, truth) < 1e-4
    assert len(plans) == 5


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tensors with room of each step that had some, also for small caches."""
    used: list[Any] = []
    of = attention.CacheRooms.of

    def noted(own: attention.CacheRooms, past: list[torch.Tensor]) -> list[torch.Tensor]:
        found = of(own, past)
        used.extend([list(found)] if found else [])
        return found

    monkeypatch.setattr(attention, "LARGE_PAST", 0)
    monkeypatch.setattr(attention.CacheRooms, "of", noted)
    return used


@pytest.mark.parametrize("switches", [{}, MODERN], ids=["stock", "modern"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_generation_with_room_in_the_cache(switches: dict, options: dict, rooms: list[Any]) -> None:
    model = make(**switches, initializer_range=0.3, n_positions=128)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    given = {"attention_mask": mask, "max_new_tokens": 80, "pad_token_id": 0, "eos_token_id": None, **options}

    def found() -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(IDS, **given)

    truth = by_modules(found)
    assert not rooms and torch.equal(found(), truth)
    steps = 0 if "num_beams" in options else 78  # beams are reordered at each step, which copies anyway
    assert len(rooms) == steps and len({id(each) for step in rooms for each in step}) == (
        3 * 2 * model.config.num_hidden_layers if steps else 0  # made anew when they are full
    )


CACHE_CHANGES: dict[str, Callable[[DynamicCache], Any]] = {
    "nothing": lambda cache: None,
    "values in place": lambda cache: cache.layers[1].keys.mul_(2),
    "memory": lambda cache: setattr(cache.layers[1].keys, "data", cache.layers[1].keys * 2),
    "a tensor": lambda cache: setattr(cache.layers[1], "values", cache.layers[1].values * 2),
    "cropped": lambda cache: cache.crop(-2),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])),
    "one layer cropped and padded": lambda cache: setattr(
        cache.layers[1], "keys", nn.functional.pad(cache.layers[1].keys[:, :, :-1], (0, 0, 1, 0))
    ),
}


@pytest.mark.parametrize("name", CACHE_CHANGES)
@torch.no_grad()
def test_changes_of_a_cache_with_room(name: str, rooms: list[Any]) -> None:
    model = make()

    def found() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        model(IDS[:, :3], past_key_values=cache)
        steps = [model(IDS[:, [n]], past_key_values=cache).logits for n in (3, 4, 5)]
        CACHE_CHANGES[name](cache)
        steps += [model(IDS[:, [n]], past_key_values=cache).logits for n in (6, 7, 8)]
        return torch.cat(steps, 1)

    truth = by_modules(found)
    assert not rooms and largest_difference(found(), truth) < 1e-4 and rooms


@torch.no_grad()
def test_what_was_taken_from_a_cache_with_room_stays(rooms: list[Any]) -> None:
    model, cache = make(), DynamicCache(config=make().config)
    model(IDS[:, :3], past_key_values=cache)
    taken = []
    for n in (3, 4, 5, 6):
        model(IDS[:, [n]], past_key_values=cache)
        taken.append((cache.layers[0].keys, cache.layers[0].keys.clone()))
    other = copy.deepcopy(cache)
    first = model(IDS[:, [7]], past_key_values=cache).logits
    assert torch.equal(model(IDS[:, [7]], past_key_values=other).logits, first)
    cache.crop(-3)
    for n in (1, 1, 1):
        model(IDS[:, [n]], past_key_values=cache)
    assert rooms and all(torch.equal(keys, before) for keys, before in taken)
    with torch.inference_mode():
        fast = DynamicCache(config=model.config)
        for part in (IDS[:, :4], *IDS[:, 4:7].split(1, 1)):
            model(part, past_key_values=fast)
    after = model(IDS[:, [7]], past_key_values=fast).logits  # the tensors with room cannot be written any more
    assert largest_difference(after, first) < 1e-5


def test_plans_end_with_their_generation() -> None:
    model = make()
    model.generate(IDS, max_new_tokens=3, pad_token_id=0)
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    gc.collect()
    before = len(decode_step._PLANS)
    cache = DynamicCache(config=model.config)
    logits(model, cache=cache)
    assert len(decode_step._PLANS) == before + 1
    del cache, model
    gc.collect()
    assert len(decode_step._PLANS) == before
    assert weight() is None


def test_threads(plans: list[Any]) -> None:
    model, threads = make(n_embd=256, intermediate_size=2048, n_layer=2), torch.get_num_threads()
    truth = by_modules(lambda: logits(model))
    try:
        found = logits(model, lambda model: torch.set_num_threads(threads + 1))
    finally:
        torch.set_num_threads(threads)
    assert largest_difference(found, truth) < 5e-5
    assert len(set(map(id, plans))) == 2


def test_random_models(plans: list[Any]) -> None:
    """Switches together that have no test of their own."""
    choices: dict[str, list[Any]] = {
        "norm_type": ["layernorm", "rmsnorm"],
        "qk_norm": [False, True],
        "num_key_value_heads": [4, 2, 1],
        "position_embedding_type": ["learned", "rope"],
        "mlp_type": ["dense", "gated"],
        "attention_bias": [True, False],
    }
    for values in itertools.islice(itertools.product(*choices.values()), 0, None, 5):
        model = make(**dict(zip(choices, values)), initializer_range=0.3)
        assert largest_difference(logits(model), by_modules(lambda: logits(model))) < 1e-4, values  # noqa: B023
    assert plans
