"""Whoever looks into the models sees each row of the batch as in stock: hooks of every kind, replaced modules."""

from collections.abc import Callable
from types import MethodType

import accelerate
import pytest
import torch
from tiny import batch, gpt2_pair, largest_difference, mybert_config, stock_bert_config
from torch import nn
from torch.nn.modules import module as every_module
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification

from mymodels import MyBertForSequenceClassification


def bert_pair() -> tuple[nn.Module, nn.Module]:
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    stock = BertForSequenceClassification(stock_bert_config(**no_dropout)).eval()
    mine = MyBertForSequenceClassification(mybert_config(**no_dropout)).eval()
    mine.load_state_dict(stock.state_dict())
    return stock, mine


def decoder_pair() -> tuple[nn.Module, nn.Module]:
    return gpt2_pair(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


# the pair, padding, and the paths of the same module in both
FAMILIES = {
    "mygpt2": (decoder_pair, "left", "transformer.h.1.mlp", "model.layers.1.mlp"),
    "mybert": (bert_pair, "right", "bert.encoder.layer.1.intermediate", "bert.encoder.layer.1.intermediate"),
}


def first_zeroed(output: torch.Tensor) -> torch.Tensor:
    return torch.cat((torch.zeros_like(output[:, :1]), output[:, 1:]), dim=1)


class Watch:
    """Registers one kind of hook, which zeroes the first position of each row, or notes what it sees."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def forward_hook(self, module: nn.Module) -> Callable:
        return module.register_forward_hook(lambda m, args, output: first_zeroed(output)).remove

    def forward_pre_hook(self, module: nn.Module) -> Callable:
        return module.register_forward_pre_hook(lambda m, args: (first_zeroed(args[0]),)).remove

    def backward_hook(self, module: nn.Module) -> Callable:
        return module.register_full_backward_hook(lambda m, given, got: self.seen.append(got[0])).remove

    def backward_pre_hook(self, module: nn.Module) -> Callable:
        return module.register_full_backward_pre_hook(lambda m, got: self.seen.append(got[0])).remove

    def global_hook(self, module: nn.Module) -> Callable:
        hook = every_module.register_module_forward_hook(
            lambda m, args, output: first_zeroed(output) if m is module else None
        )
        return hook.remove

    def global_pre_hook(self, module: nn.Module) -> Callable:
        hook = every_module.register_module_forward_pre_hook(
            lambda m, args: (first_zeroed(args[0]),) if m is module else None
        )
        return hook.remove

    def global_backward_hook(self, module: nn.Module) -> Callable:
        hook = every_module.register_module_full_backward_hook(
            lambda m, given, got: self.seen.append(got[0]) if m is module else None
        )
        return hook.remove

    def replaced_forward(self, module: nn.Module) -> Callable:
        plain = module.forward
        module.forward = lambda states: first_zeroed(plain(states))  # type: ignore[method-assign]
        return lambda: vars(module).pop("forward")

    def accelerate_hook_of_ones_own(self, module: nn.Module) -> Callable:
        class Zeroing(accelerate.hooks.ModelHook):
            def post_forward(self, module, output):
                return first_zeroed(output)

        accelerate.hooks.add_hook_to_module(module, Zeroing())
        return lambda: accelerate.hooks.remove_hook_from_module(module)


class Zeroing(nn.Module):
    """A module around another one, as libraries for interpretability build them."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return first_zeroed(self.inner(states))


KINDS = [name for name in vars(Watch) if not name.startswith("_")]


def run(model: nn.Module, inputs: dict, path: str, kind: str, train: bool) -> list[torch.Tensor]:
    watch = Watch()
    if kind == "replaced_module":
        inner = model.get_submodule(path)
        model.set_submodule(path, Zeroing(inner))
        remove: Callable = lambda: model.set_submodule(path, inner)  # noqa: E731
    else:
        remove = getattr(watch, kind)(model.get_submodule(path))
    with torch.set_grad_enabled(train):
        output = model.train(train)(**inputs)
        results = [output.logits, output.loss]
        if train:
            model.zero_grad()
            output.loss.backward()
            results += [output.logits.detach(), model.get_input_embeddings().weight.grad.clone()]
    remove()
    return results + watch.seen


@pytest.mark.parametrize("kind", [*KINDS, "replaced_module"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_see_the_rows_that_stock_shows(family: str, kind: str) -> None:
    pair, side, *paths = FAMILIES[family]
    inputs = batch(side, rows=4)
    if family == "mybert":
        inputs["labels"] = torch.tensor([0, 1, 1, 0])
    else:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        inputs["use_cache"] = False
    models = pair()
    # what is right at padding too, where gradients are 0 in stock and in mine
    for train in (False, True):
        stock, mine = (run(model, inputs, path, kind, train) for model, path in zip(models, paths))
        assert len(stock) == len(mine)
        for theirs, found in zip(stock, mine):
            assert theirs.shape == found.shape
            assert largest_difference(theirs, found) <= 1e-5


@pytest.mark.parametrize("train", [False, True])
def test_a_hook_on_bert_s_encoder_changes_what_follows(train: bool) -> None:
    """The stack of layers is a module of its own in stock BERT, whose output is steered or patched as a whole."""

    def zero_first(module, args, output):
        output.last_hidden_state = first_zeroed(output.last_hidden_state)
        return output

    inputs = batch("right", rows=4) | {"labels": torch.tensor([0, 1, 1, 0])}
    results = []
    for model in bert_pair():
        plain = model.train(train)(**inputs).logits
        model.bert.encoder.register_forward_hook(zero_first)
        output = model(**inputs)
        output.loss.backward()
        assert largest_difference(plain, output.logits) > 1e-4
        results.append((output.logits, output.loss, model.get_input_embeddings().weight.grad))
    for theirs, mine in zip(*results):
        assert largest_difference(theirs, mine) <= 1e-5


class RowsOfProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.rows: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if "_linear_pointwise" in function.name() or "addmm" in function.name():
            self.rows.add(output.shape[:-1].numel())
        return output


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_map_is_not_a_hook(family: str) -> None:
    """accelerate replaces every `forward` to move tensors; padding is skipped all the same, and values stay."""
    pair, side, *_ = FAMILIES[family]
    stock, mine = pair()
    inputs = batch(side, rows=4)
    del stock
    base = mine.base_model
    with torch.no_grad():
        expected = base(**inputs, output_hidden_states=True)[0]  # padded
        parts = {name: "cpu" for name, module in base.named_modules() if not list(module.children())}
        base = accelerate.dispatch_model(base, parts, main_device="cpu", force_hooks=True)
        assert any("_hf_hook" in vars(module) for module in base.modules())
        kept = inputs["attention_mask"].bool()
        options = {"use_cache": False} if family == "mygpt2" else {}
        with RowsOfProducts() as seen:
            found = base(**inputs, **options)[0]
    assert kept.numel() not in seen.rows
    assert largest_difference(found[kept], expected[kept]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_is_no_hook_that_looks(family: str) -> None:
    """transformers hooks the embeddings for it; padding is skipped all the same."""
    pair, side, *_ = FAMILIES[family]
    base, inputs = pair()[1].base_model, batch(side, rows=4)
    kept = inputs["attention_mask"].bool()
    options = {"use_cache": False} if family == "mygpt2" else {}
    base.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with RowsOfProducts() as seen:
        base(**inputs, **options)
    assert kept.numel() not in seen.rows


def test_a_recorder_of_transformers_sees_the_rows() -> None:
    """`_can_record_outputs` in a subclass: transformers replaces or hooks `forward` to collect what modules give."""
    generic = pytest.importorskip("transformers.utils.output_capturing")
    from mymodels.models.modeling_mybert import MyBertLayer, MyBertModel

    class Recorded(MyBertModel):
        _can_record_outputs = {"recorded": generic.OutputRecorder(MyBertLayer, index=0)}

    model, inputs = Recorded(mybert_config()).eval(), batch("right", rows=4)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
        seen: list[torch.Tensor] = []
        generic.maybe_install_capturing_hooks(model)
        model.encoder.layer[1].register_forward_hook(lambda module, args, output: seen.append(output[0]))
        model(**inputs)
    assert any(layer._forward_hooks for layer in model.encoder.layer)
    assert largest_difference(seen[0], expected[2]) <= 1e-5


def class_method(layer: nn.Module, mixing: Callable) -> None:
    type(layer).feed_forward = mixing


def instance_method(layer: nn.Module, mixing: Callable) -> None:
    layer.feed_forward = MethodType(mixing, layer)


def class_forward(layer: nn.Module, mixing: Callable) -> None:
    type(layer.intermediate).forward = lambda self, states: states
    type(layer.output).forward = lambda self, states, residual: mixing(layer, residual)


def function_in_place_of_a_module(layer: nn.Module, mixing: Callable) -> None:
    del layer.intermediate
    layer.intermediate = lambda states: mixing(layer, states).repeat(1, 1, layer.output.dense.in_features // 32)


PATCHES = [class_method, instance_method, class_forward, function_in_place_of_a_module]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_what_is_patched_after_a_first_call_is_seen(patch: Callable, monkeypatch) -> None:
    """Each of these reads the token before; what was found out about the classes earlier does not count any more."""
    from mymodels.models.modeling_mybert import MyBertIntermediate, MyBertLayer, MyBertOutput

    for kind, name in ((MyBertLayer, "feed_forward"), (MyBertIntermediate, "forward"), (MyBertOutput, "forward")):
        monkeypatch.setattr(kind, name, vars(kind)[name])  # put back afterwards
    model, inputs = MyBertForSequenceClassification(mybert_config(hidden_size=32)).eval(), batch("right", rows=4)
    with torch.no_grad():
        plain = model(**inputs).logits
        patch(model.bert.encoder.layer[0], lambda layer, states: states + states.roll(1, dims=-2))
        found = model(**inputs).logits
        padded = model(**inputs, skip_padding=False).logits
    assert largest_difference(found, padded) <= 1e-5
    assert largest_difference(found, plain) > 1e-4


def test_a_function_in_place_of_an_activation_sees_all_rows() -> None:
    """A wide MLP is computed in parts of the rows, in inference alone; what reads the row before needs all of them."""
    model = MyBertForSequenceClassification(mybert_config(intermediate_size=16384, num_hidden_layers=1)).eval()
    inputs = {"input_ids": torch.arange(600).view(15, 40) % 90 + 5}
    for later in (False, True):
        if later:
            intermediate = model.bert.encoder.layer[0].intermediate
            del intermediate.intermediate_act_fn
            intermediate.intermediate_act_fn = lambda states: states.sin() + states.roll(1, dims=-2)
        with torch.no_grad():
            found = model(**inputs).logits
        assert largest_difference(found, model(**inputs).logits.detach()) <= 1e-5
