"""MyGPT2 with default switches is stock GPT-2: the oracle is transformers' own model with the same weights."""

import pytest
import torch
from tiny import batch, from_stock_gpt2, gpt2_pair, largest_difference, mygpt2_config, stock_gpt2_config
from transformers import GPT2ForSequenceClassification

from mymodels import MyGPT2ForSequenceClassification

PADDINGS = ["none", "left", "right"]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_logits_loss_and_gradients(padding: str, implementation: str) -> None:
    stock, mine = gpt2_pair(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    stock.set_attn_implementation(implementation)
    mine.set_attn_implementation(implementation)
    inputs = batch(padding)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    ours, theirs = mine(**inputs, labels=labels), stock(**inputs, labels=labels)
    shown = inputs["attention_mask"].bool()
    assert largest_difference(ours.logits[shown], theirs.logits[shown]) <= 1e-5
    assert largest_difference(ours.loss, theirs.loss) <= 1e-5

    ours.loss.backward()
    theirs.loss.backward()
    gradients = from_stock_gpt2({name: p.grad for name, p in stock.named_parameters()})
    for name, parameter in mine.named_parameters():
        assert largest_difference(parameter.grad, gradients[name]) <= 1e-5, name


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"num_beams": 3},
        {"do_sample": False, "repetition_penalty": 1.5},
    ],
    ids=["greedy", "no-cache", "static", "beams", "penalty"],
)
def test_generation_token_for_token(padding: str, how: dict) -> None:
    stock, mine = gpt2_pair()
    inputs = batch(padding)
    how = {**how, "max_new_tokens": 20}
    assert torch.equal(mine.generate(**inputs, **how), stock.generate(**inputs, **how))


def test_assisted_decoding_gives_the_greedy_tokens() -> None:
    _, mine = gpt2_pair()
    _, helper = gpt2_pair(n_layer=1)
    inputs = batch(rows=1)
    greedy = mine.generate(**inputs, do_sample=False, max_new_tokens=20)
    assert torch.equal(mine.generate(**inputs, do_sample=False, max_new_tokens=20, assistant_model=helper), greedy)


@pytest.mark.parametrize("changes", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_stock_switches(changes: dict) -> None:
    stock, mine = gpt2_pair(**changes)
    inputs = batch()
    assert largest_difference(mine(**inputs).logits, stock(**inputs).logits) <= 1e-5


def test_hidden_states_attentions_and_token_types() -> None:
    stock, mine = gpt2_pair()
    stock.set_attn_implementation("eager")
    mine.set_attn_implementation("eager")
    inputs = batch(rows=2)
    how = {"output_hidden_states": True, "output_attentions": True, "token_type_ids": inputs["input_ids"] % 5}
    ours, theirs = mine(**inputs, **how), stock(**inputs, **how)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 4
    assert len(ours.attentions) == len(theirs.attentions) == 3
    for a, b in zip(ours.hidden_states + ours.attentions, theirs.hidden_states + theirs.attentions):
        assert largest_difference(a, b) <= 1e-5


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_sequence_classification(problem: str, padding: str) -> None:
    num_labels = 1 if problem == "regression" else 3
    stock = GPT2ForSequenceClassification(stock_gpt2_config(num_labels=num_labels)).eval()
    mine = MyGPT2ForSequenceClassification(mygpt2_config(num_labels=num_labels)).eval()
    mine.load_state_dict(from_stock_gpt2(stock.state_dict()))
    inputs = batch(padding)
    labels = {
        "regression": torch.randn(3),
        "single_label_classification": torch.tensor([0, 2, 1]),
        "multi_label_classification": torch.randint(0, 2, (3, 3)).float(),
    }[problem]
    ours, theirs = mine(**inputs, labels=labels), stock(**inputs, labels=labels)
    assert largest_difference(ours.logits, theirs.logits) <= 1e-5
    assert largest_difference(ours.loss, theirs.loss) <= 1e-5
    assert mine.config.problem_type == problem


def test_classifier_without_pad_token_reads_the_mask() -> None:
    model = MyGPT2ForSequenceClassification(mygpt2_config(pad_token_id=None)).eval()
    inputs = batch("right")
    one_by_one = [
        model(input_ids=ids[mask.bool()][None]).logits
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])
    ]
    assert largest_difference(model(**inputs).logits, torch.cat(one_by_one)) <= 1e-5
    with pytest.raises(ValueError, match=r"set config.pad_token_id or pass attention_mask"):
        model(input_ids=inputs["input_ids"])


def test_new_weights_have_the_stock_distribution() -> None:
    stock = from_stock_gpt2(gpt2_pair(n_embd=256, n_layer=2, initializer_range=0.02)[0].state_dict())
    mine = MyGPT2ForSequenceClassification(mygpt2_config(n_embd=256, n_layer=2, initializer_range=0.02)).state_dict()
    compared = 0
    for name, tensor in mine.items():
        if name in stock and tensor.ndim == 2:
            assert abs(tensor.std() / stock[name].std() - 1) < 0.05, name
            compared += 1
    assert compared == 2 + 2 * 6
    assert abs(mine["model.layers.0.mlp.down_proj.weight"].std() - 0.02 / 2) < 0.001  # 1/√(2 × 2 layers)
