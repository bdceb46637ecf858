"""The fast ways to compute on the CPU: the numbers and gradients of torch's and transformers' own."""

import pytest
import torch
from tiny import largest_difference, mybert_config, mygpt2_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForCausalLMLoss

from mymodels import MyBertForMaskedLM, MyGPT2ForCausalLM
from mymodels.models.cpu_kernels import ONE_DNN, OneDnnLinear, make_activation, recomputed_linear
from mymodels.models.losses import causal_lm_loss, soft_cap
from mymodels.models.padding import Packing

needs_one_dnn = pytest.mark.skipif(not ONE_DNN, reason="torch without oneDNN")


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def one_dnn_products(call) -> int:
    with Seen() as seen:
        call()
    return sum("_linear_pointwise" in name for name in seen.names)


@needs_one_dnn
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (1, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_its_gradients(shape: tuple[int, ...], bias: bool) -> None:
    layer, states = torch.nn.Linear(8, 6, bias=bias), torch.randn(shape, requires_grad=True)
    weights = [states, *layer.parameters()]

    def results() -> list[torch.Tensor]:
        output = layer(states)
        first = torch.autograd.grad(output.tanh().mean(), weights, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), weights)
        return [output, *first, *second]

    expected = results()
    with OneDnnLinear():
        assert one_dnn_products(lambda: layer(states)) == 1
        for mine, theirs in zip(results(), expected):
            assert largest_difference(mine, theirs) <= 1e-5


@needs_one_dnn
@pytest.mark.parametrize(
    "make", [lambda: MyGPT2ForCausalLM(mygpt2_config()), lambda: MyBertForMaskedLM(mybert_config())]
)
def test_the_models_use_it_only_where_it_may_be(make) -> None:
    model, ids = make().eval(), torch.randint(2, 97, (2, 6))
    assert one_dnn_products(lambda: model(ids)) >= 12
    with torch.backends.mkldnn.flags(enabled=False):
        assert one_dnn_products(lambda: model(ids)) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert one_dnn_products(lambda: model(ids)) == 0
    assert one_dnn_products(lambda: model.double()(ids)) == 0
    model.float().requires_grad_(False)
    traced = torch.jit.trace(lambda ids: model(ids, return_dict=False)[0], ids, check_trace=False)
    assert "_linear_pointwise" not in str(traced.graph)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu", "silu"])
def test_activations(name: str) -> None:
    values = torch.linspace(-9, 9, 997)
    assert largest_difference(make_activation(name)(values), ACT2FN[name](values)) <= 1e-6


LOSSES = {
    "mean": {},
    "divided": {"num_items_in_batch": torch.tensor(7)},
    "divided by a number": {"num_items_in_batch": 7},
    "another label left out": {"ignore_index": 3},
    "shifted": {"labels": None, "shift_labels": torch.arange(14).view(2, 7)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LOSSES)
def test_loss_and_its_gradients(case: str, dtype: torch.dtype) -> None:
    labels = torch.randint(0, 19, (2, 7))
    if case != "another label left out":
        labels[0, :4] = -100
    given = {"labels": labels, "vocab_size": 19, **LOSSES[case]}
    logits = (3 * torch.randn(2, 7, 19)).to(dtype).requires_grad_()
    results = []
    for function in (causal_lm_loss, ForCausalLMLoss):
        loss = function(logits=logits, **given)
        (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (again,) = torch.autograd.grad(loss, logits, create_graph=True)
        (second,) = torch.autograd.grad(again.float().square().sum(), logits)
        results.append((loss, first, again, second))
    for mine, theirs in zip(*results):
        assert mine.dtype == theirs.dtype
        assert largest_difference(mine.float(), theirs.float()) <= (1e-6 if dtype is torch.float32 else 1e-2)


def test_loss_in_several_pieces() -> None:
    logits, labels = torch.randn(1, 300, 30_000), torch.randint(0, 30_000, (1, 300))  # 140 rows at a time
    results = []
    for function in (causal_lm_loss, ForCausalLMLoss):
        leaf = logits.clone().requires_grad_()
        loss = function(logits=leaf, labels=labels, vocab_size=30_000)
        loss.backward()
        results.append((loss, leaf.grad))
    for mine, theirs in zip(*results):
        assert largest_difference(mine, theirs) <= 1e-5


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocab_size", [19, 9000])  # the second: three parts of the vocabulary
def test_loss_that_makes_its_logits_again(vocab_size: int, bias: bool, cap: float | None) -> None:
    """What it was made of and the logits: first and second derivatives, also if the logits serve another loss too."""
    head, states = torch.nn.Linear(8, vocab_size, bias=bias), torch.randn(2, 7, 8, requires_grad=True)
    labels, leaves = torch.randint(0, vocab_size, (2, 7)), [states, *head.parameters()]
    labels[0, :4] = -100
    results = []
    for made_of in ((states, head, cap), None):
        logits = soft_cap(head(states), cap)
        given = {"logits": logits, "labels": labels, "vocab_size": vocab_size}
        loss = causal_lm_loss(**given, made_of=made_of) if made_of else ForCausalLMLoss(**given)
        loss = loss + logits.square().mean()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in again), leaves)
        results.append((loss, *first, *again, *second))
    for mine, theirs in zip(*results):
        assert largest_difference(mine, theirs) <= 1e-5


def kept_for_backward(call) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: shapes.append(tuple(kept.shape)) or kept, lambda it: it):
        call()
    return shapes


def test_training_keeps_no_logits_and_one_state_of_the_mlp() -> None:
    config = mygpt2_config(vocab_size=97, intermediate_size=56)
    model, ids = MyGPT2ForCausalLM(config).train(), torch.randint(2, 97, (3, 11))
    shapes = kept_for_backward(lambda: model(ids, labels=ids))
    assert (3, 11, 97) not in shapes and (33, 97) not in shapes
    # for the activation's gradient and for the product's: the same tensor, kept once
    assert shapes.count((3, 11, 56)) == config.num_hidden_layers
    model.loss_function = ForCausalLMLoss
    assert (33, 97) in kept_for_backward(lambda: model(ids, labels=ids))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count, function", [(1, torch.nn.SiLU()), (2, lambda gate, up: gate.tanh() * up)])
def test_product_of_something_computed_again(count: int, function, bias: bool) -> None:
    layer = torch.nn.Linear(8, 6, bias=bias)
    inputs = [torch.randn(2, 3, 8, requires_grad=True) for _ in range(count)]
    leaves = [*inputs, *layer.parameters()]
    results = []
    for output in (recomputed_linear(function, layer, *inputs), layer(function(*inputs))):
        first = torch.autograd.grad(output.tanh().sum(), leaves, retain_graph=True)
        again = torch.autograd.grad(output.tanh().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in again), leaves)
        results.append((output, *first, *again, *second))
    for mine, theirs in zip(*results):
        assert torch.allclose(mine, theirs, atol=1e-5, rtol=1e-5)
    recomputed_linear(
        function, layer, *(tensor.detach() for tensor in inputs)
    ).sum().backward()  # of the parameters alone
    assert layer.weight.grad is not None


def attended_pairs(call) -> list[int]:
    """Queries × keys of every attention that `call` computes."""

    class Pairs(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "scaled_dot_product" in function.name() and "backward" not in function.name():
                found.append(args[0].shape[0] * args[0].shape[2] * args[1].shape[2])
            return function(*args, **(kwargs or {}))

    found: list[int] = []
    with Pairs():
        call()
    return found


@pytest.mark.parametrize("window, length", [(4, 5), (4, 64), (4, 65), (4, 200), (100, 101), (100, 250), (2, 70)])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_sliding_window_in_blocks(position: str, window: int, length: int) -> None:
    """The states and gradients of attention written out, from whole rows, with a cache, padded and packed."""
    config = mygpt2_config(
        position_embedding_type=position, sliding_window=window, n_positions=256, num_key_value_heads=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], num_hidden_layers=3,
    )  # fmt: skip
    model, ids = MyGPT2ForCausalLM(config).eval(), torch.randint(2, 97, (2, length))
    mask = torch.ones_like(ids)
    padded = mask.clone()
    padded[1, length // 2 :] = 0
    cases = [{}, {"attention_mask": mask}, {"use_cache": True}, {"attention_mask": padded}]
    cases += [{"position_ids": torch.cat([torch.arange(length - 3), torch.arange(3)])[None].expand(2, -1)}]
    cases += [{**cases[-1], "output_hidden_states": True}]
    for given in cases:
        results = []
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            model.zero_grad()
            output = model(ids, **({"use_cache": False} | given))
            logits = output.logits * given.get("attention_mask", mask)[..., None]
            logits.square().mean().backward()
            results.append((logits, model.model.layers[0].self_attn.k_proj.weight.grad))
        for mine, theirs in zip(*results):
            assert largest_difference(mine, theirs) <= 1e-5, given.keys()


def test_sliding_window_grows_with_the_length_alone() -> None:
    model = MyGPT2ForCausalLM(mygpt2_config(sliding_window=16, n_positions=2048)).eval()

    def cost(length: int, use_cache: bool) -> int:
        return sum(attended_pairs(lambda: model(torch.randint(2, 97, (2, length)), use_cache=use_cache)))

    costs = [cost(length, use_cache) for length in (512, 1024) for use_cache in (False, True)]
    assert costs[2:] == [2 * cost for cost in costs[:2]] and costs[0] == costs[1]


def test_wide_layers_in_parts_that_stay_in_the_caches() -> None:
    config = mybert_config(intermediate_size=4096)
    model, ids = MyBertForMaskedLM(config).eval(), torch.randint(2, 97, (31, 37))
    expected = model(ids).logits.detach()  # with gradients: whole
    widths: list[int] = []
    layer = model.bert.encoder.layer[0]
    for found, grad in ((3 * config.num_hidden_layers, False), (config.num_hidden_layers, True)):
        with torch.set_grad_enabled(grad):
            names = [n for n in seen_names(lambda: model(ids)) if "gelu" in n]
            assert len(names) == found + 1  # the head's own
            assert largest_difference(model(ids).logits, expected) <= 1e-5
    hook = layer.intermediate.register_forward_hook(lambda *call: widths.append(call[-1].shape[:-1].numel()))
    with torch.no_grad():
        model(ids)
    assert widths == [31 * 37]
    hook.remove()


def seen_names(call) -> list[str]:
    with Seen() as seen:
        call()
    return seen.names


def test_nothing_to_predict_is_as_in_transformers() -> None:
    given = {"logits": torch.randn(1, 3, 19), "labels": torch.full((1, 3), -100), "vocab_size": 19}
    assert causal_lm_loss(**given).isnan() and ForCausalLMLoss(**given).isnan()


def test_another_loss_may_be_set() -> None:
    model, ids = MyGPT2ForCausalLM(mygpt2_config()), torch.randint(2, 97, (2, 6))
    model.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 42
    assert model(ids, labels=ids).loss.item() == 42


def test_a_part_may_be_compiled_by_itself() -> None:
    model, ids = MyGPT2ForCausalLM(mygpt2_config()).eval(), torch.randint(2, 97, (2, 6))
    expected = model(ids).logits
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    assert largest_difference(model(ids).logits, expected) <= 1e-5


def test_a_bias_may_be_left_out() -> None:
    """As PEFT's LoHa does, which makes its matrices on the way."""
    states, weight = torch.randn(3, 5), torch.randn(4, 5, requires_grad=True)
    with OneDnnLinear():
        torch.nn.functional.linear(states, weight).sum().backward()
    assert torch.allclose(weight.grad, states.sum(0).expand(4, 5), atol=1e-6)


def test_numbers_of_rows_recur_without_gradients() -> None:
    """Each new one makes oneDNN compile kernels, which it keeps."""
    totals = set()
    with torch.no_grad():
        for tokens in range(2, 4000):
            mask = (torch.arange(4096) < tokens)[None]
            mask = torch.cat((mask, torch.ones_like(mask)))
            packing = Packing.find((2, 4096), mask, None)
            assert packing is not None
            row = packing.take(torch.arange(8192).view(2, 4096))
            assert row.shape[1] == sum(length * count for length, count in packing.groups)
            assert torch.equal(packing.put(row[..., None])[..., 0], torch.arange(8192).view(2, 4096) * mask)
            totals.add(row.shape[1])
            assert row.shape[1] <= (tokens + 4096) * 17 // 16
    assert len(totals) < 20


def gradients(model, ids, **given) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, **given).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def same_gradients(model, ids, **given) -> bool:
    """As with torch's own products and transformers' loss."""
    torch.manual_seed(1)
    mine = gradients(model, ids, **given)
    model.loss_function = ForCausalLMLoss
    with torch.backends.mkldnn.flags(enabled=False):
        torch.manual_seed(1)
        theirs = gradients(model, ids, **given)
    return mine.keys() == theirs.keys() and all(largest_difference(mine[k], theirs[k]) <= 1e-5 for k in theirs)


class Seeing(torch.nn.Dropout):
    """An activation with a state of its own."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states.sigmoid())


def hooked() -> torch.nn.Module:
    activation = torch.nn.SiLU()
    activation.register_forward_hook(lambda module, inputs, output: output * 2)
    activation.register_full_backward_hook(lambda module, *gradients: None)
    return activation


ACTS = {
    "with a parameter": torch.nn.PReLU,
    "with dropout": lambda: Seeing(0.5),
    "in place": lambda: torch.nn.SiLU(inplace=True),
    "hooked": hooked,
    "with two parameters": lambda: ACT2FN["xielu"],
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("mlp", ["dense", "gated"])
def test_an_activation_of_ones_own(mlp: str, act: str) -> None:
    model = MyGPT2ForCausalLM(mygpt2_config(mlp_type=mlp)).eval()
    for layer in model.model.layers:
        layer.mlp.act_fn = ACTS[act]().train()
    assert same_gradients(model, torch.randint(2, 97, (2, 6)))


def test_logits_kept_in_another_order() -> None:
    model = MyGPT2ForCausalLM(mygpt2_config()).eval()
    assert same_gradients(model, torch.randint(2, 97, (2, 6)), logits_to_keep=torch.arange(6).flip(0))


@pytest.mark.parametrize("cap", [None, 3.0])
def test_differentiable_gradients_of_a_tied_model(cap: float | None) -> None:
    """A gradient penalty's first derivatives: the head's weight is the embeddings', too."""
    model, ids = MyGPT2ForCausalLM(mygpt2_config(final_logit_softcapping=cap)).eval(), torch.randint(2, 97, (2, 6))
    model.set_attn_implementation("eager")
    found = [
        torch.autograd.grad(model(ids, labels=ids).loss, model.lm_head.weight, create_graph=create_graph)[0]
        for create_graph in (False, True)
    ]
    assert largest_difference(*found) <= 1e-5


def test_what_is_kept_may_be_kept_elsewhere_while_going_back() -> None:
    model, ids = MyGPT2ForCausalLM(mygpt2_config(mlp_type="gated")).eval(), torch.randint(2, 97, (2, 6))
    expected = gradients(model, ids)["model.layers.0.mlp.up_proj.weight"].clone()
    with torch.autograd.graph.save_on_cpu():
        assert largest_difference(gradients(model, ids)["model.layers.0.mlp.up_proj.weight"], expected) <= 1e-6


@pytest.mark.parametrize("trained", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.bias"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_example(trained: str) -> None:
    model, ids = MyGPT2ForCausalLM(mygpt2_config(tie_word_embeddings=False)).eval(), torch.randint(2, 97, (3, 6))
    embeds = model.get_input_embeddings()(ids).detach()

    def loss(parameters, embeds, labels):
        given = {"inputs_embeds": embeds[None], "labels": labels[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, kwargs=given).loss

    parameters = {trained: model.get_parameter(trained).detach()}
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, embeds, ids)[trained]
    for row, found in zip(ids, each):
        assert largest_difference(found, gradients(model, row[None])[trained]) <= 1e-5


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_derivatives(grad: bool) -> None:
    model = MyGPT2ForCausalLM(mygpt2_config(n_embd=512)).eval()  # products of few rows are fast from this size on
    model.set_attn_implementation("eager")
    ids = torch.randint(2, 97, (2, 6))
    embeds = model.get_input_embeddings()(ids).detach()
    direction = torch.randn_like(embeds)

    def loss(embeds: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=embeds, labels=ids).loss

    with torch.set_grad_enabled(grad):
        found = torch.func.jvp(loss, (embeds,), (direction,))[1]
    leaf = embeds.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(found, (gradient * direction).sum(), rtol=1e-3)


class TokenMean(torch.nn.Module):
    """Looks at all tokens of each sequence; knows no `dense`."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + states.mean(1, keepdim=True)


@pytest.mark.parametrize("what", ["intermediate", "output.LayerNorm", "intermediate.intermediate_act_fn"])
def test_a_wide_layer_that_looks_at_all_tokens(what: str) -> None:
    width = 32 if what == "intermediate" else 4096
    model, ids = MyBertForMaskedLM(mybert_config(intermediate_size=width)).eval(), torch.randint(2, 97, (31, 37))
    model.bert.encoder.layer[0].set_submodule(what, TokenMean())
    expected = model(ids).logits.detach()
    with torch.no_grad():
        assert largest_difference(model(ids).logits, expected) <= 1e-5
