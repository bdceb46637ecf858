"""Inputs at the edges: function transforms, nothing at all, more than there are positions."""

import pytest
import torch
from tiny import batch, largest_difference, mybert_config, mygpt2_config
from torch.func import functional_call, grad, vmap

from mymodels import MyBertForSequenceClassification, MyBertForTokenClassification, MyGPT2ForCausalLM

MODELS = {
    "mygpt2": lambda: MyGPT2ForCausalLM(mygpt2_config()),
    "sliding": lambda: MyGPT2ForCausalLM(mygpt2_config(sliding_window=3, position_embedding_type="rope")),
    "mybert": lambda: MyBertForSequenceClassification(mybert_config(pooling="mean")),
    "tokens": lambda: MyBertForTokenClassification(mybert_config()),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_each_example(name: str, masked: bool) -> None:
    model = MODELS[name]().eval()
    inputs = batch("right" if masked else "none")
    if not masked:
        del inputs["attention_mask"]
    ids = inputs["input_ids"]
    inputs["labels"] = {"mybert": torch.tensor([0, 1, 1]), "tokens": ids % 2}.get(name, ids)
    weights = {key: tensor.detach() for key, tensor in model.named_parameters()}

    def loss(weights: dict, given: dict) -> torch.Tensor:
        given = {key: tensor[None] for key, tensor in given.items()}
        return functional_call(model, weights, kwargs=given).loss

    found = vmap(grad(loss), in_dims=(None, 0))(weights, inputs)
    for row in range(len(ids)):
        model.zero_grad()
        model(**{key: tensor[row : row + 1] for key, tensor in inputs.items()}).loss.backward()
        for key, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert largest_difference(found[key][row], expected) <= 1e-5, key


@pytest.mark.parametrize("shape", [(1, 0), (0, 5)])
@pytest.mark.parametrize("name", ["mygpt2", "mybert"])
def test_an_empty_input_says_so(name: str, shape: tuple[int, int]) -> None:
    model = MODELS[name]().eval()
    ids = torch.zeros(shape, dtype=torch.long)
    for given in ({"input_ids": ids}, {"inputs_embeds": torch.zeros(*shape, 32)}):
        with pytest.raises(ValueError, match=rf"the input is empty, of shape \[{shape[0]}, {shape[1]}"):
            model(**given)


def test_an_empty_prompt_says_so() -> None:
    with pytest.raises(ValueError, match="empty"):
        MODELS["mygpt2"]().generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)


def test_a_prompt_that_is_too_long_is_reported() -> None:
    model = MODELS["mygpt2"]().eval()  # 64 positions
    with pytest.raises(
        ValueError, match=r"the input is 70 tokens long, .*max_position_embeddings=64: shorten"
    ) as refused:
        model.generate(torch.randint(2, 97, (2, 70)), max_new_tokens=2)
    assert "position_ids" not in str(refused.value)
    with pytest.raises(ValueError, match=r"shorten the prompt or max_new_tokens"):
        model.generate(torch.randint(2, 97, (1, 60)), max_new_tokens=20, min_new_tokens=20)
    with pytest.raises(ValueError, match="position_ids contains -1"):
        model(torch.ones(1, 2, dtype=torch.long), position_ids=torch.tensor([[-1, 0]]))
