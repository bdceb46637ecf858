"""The loop learns, repeats itself exactly, and stops on a bad loss; tokenizers and sample text are what they say."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import mygpt2_config

from mymodels import MyGPT2ForCausalLM
from mymodels.training.evaluation import evaluate
from mymodels.training.loop import parameter_groups, train
from mymodels.training.sample_text import load_sample_text
from mymodels.training.tokenizers import train_bert_tokenizer, train_gpt2_tokenizer


def dataset() -> list[dict[str, torch.Tensor]]:
    rows = (torch.arange(12) + torch.arange(20)[:, None]) % 90 + 2  # each token is the one before plus one
    return [{"input_ids": row, "labels": row} for row in rows]


def test_it_learns_and_repeats_itself() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        model = MyGPT2ForCausalLM(mygpt2_config(initializer_range=0.02))
        losses = train(model, dataset(), num_train_epochs=15, per_device_train_batch_size=5, learning_rate=1e-2)
        runs.append((losses, model.state_dict()))
        assert not model.training
    assert len(losses) == 60 and losses[-1] < 0.5 * losses[0]
    assert runs[0][0] == runs[1][0]
    for name, tensor in runs[0][1].items():
        assert torch.equal(tensor, runs[1][1][name]), name


def test_a_bad_loss_stops_it_and_says_where() -> None:
    model = MyGPT2ForCausalLM(mygpt2_config())
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step 1 of 4: lower learning_rate=0.001"):
        train(model, dataset(), per_device_train_batch_size=5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_decay_is_for_matrices_and_tied_weights_count_once() -> None:
    model = MyGPT2ForCausalLM(mygpt2_config())
    decayed, rest = parameter_groups(model, 0.1)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in rest["params"]} == {1}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_evaluate_is_the_mean_loss() -> None:
    model = MyGPT2ForCausalLM(mygpt2_config()).eval()
    batches = [{name: tensor[None] for name, tensor in example.items()} for example in dataset()[:3]]
    loss, logits, labels = evaluate(model, batches)
    assert logits.shape == (3, 12, 97) and labels.shape == (3, 12)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 97), labels[:, 1:].reshape(-1))
    assert abs(loss - expected.item()) < 1e-5


def test_sample_text() -> None:
    training, held_out = load_sample_text("train"), load_sample_text("held_out")
    assert (len(training), len(held_out)) == (112, 28)
    assert not {d.id for d in training} & {d.id for d in held_out}
    assert not {d.text for d in training} & {d.text for d in held_out}
    assert [sum(d.label == "adult" for d in part) for part in (training, held_out)] == [56, 14]
    with pytest.raises(ValueError, match="no split 'test': choose 'train' or 'held_out'"):
        load_sample_text("test")


GPT2_TOKENIZER = train_gpt2_tokenizer([d.text for d in load_sample_text("held_out")], 400, 64)


@given(st.text(max_size=60))
def test_byte_level_tokens_give_any_text_back(text: str) -> None:
    ids = GPT2_TOKENIZER(text).input_ids
    assert GPT2_TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text
    assert all(0 <= i < len(GPT2_TOKENIZER) for i in ids)


def test_wordpiece_frames_and_segments() -> None:
    tokenizer = train_bert_tokenizer(["the cat sat", "a dog"], 100, 64)
    encoded = tokenizer("The CAT", "a dog")
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert (tokens[0], tokens[-1], tokens.count("[SEP]")) == ("[CLS]", "[SEP]", 2)
    assert encoded.token_type_ids == [0] * (tokens.index("[SEP]") + 1) + [1] * (len(tokens) - tokens.index("[SEP]") - 1)
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == "the cat a dog"
