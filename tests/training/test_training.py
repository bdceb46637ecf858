"""The loop learns, repeats itself exactly, and stops on a bad loss; tokenizers and sample text are what they say."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killable_runs import model as small_model
from killable_runs import pack, pad
from tiny import gpt2_pair, mygpt2_config

from mymodels import MyGPT2ForCausalLM
from mymodels.training.evaluation import evaluate, mean_loss
from mymodels.training.loop import parameter_groups, train
from mymodels.training.sample_text import load_sample_text
from mymodels.training.tokenizers import train_bert_tokenizer, train_gpt2_tokenizer
from mymodels.training.training_state import Progress


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


def of_lengths(*lengths: int) -> list[dict]:
    return [{"input_ids": list(range(5, 5 + length))} for length in lengths]


@pytest.mark.parametrize("collate", [pack, pad])
def test_accumulated_batches_are_one_large_batch(collate) -> None:
    """Long and short examples: every label weighs alike, in whichever batch it is."""
    runs = []
    for size, accumulate in ((4, 1), (1, 4), (3, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate, "max_steps": 4}
        data = of_lengths(30, 2, 30, 2) if size * accumulate == 4 else of_lengths(30, 2, 9, 30, 2, 4)
        runs.append(train(small_model(dropout=0.0), data, data_collator=collate, learning_rate=1e-2, **options))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=1e-5)
    whole = train(
        *(small_model(dropout=0.0), of_lengths(30, 2, 9, 30, 2, 4)),
        **{"data_collator": collate, "per_device_train_batch_size": 6, "max_steps": 4, "learning_rate": 1e-2},
    )
    torch.testing.assert_close(runs[2], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("off", [0, None])
def test_no_clipping(off) -> None:
    free, huge = (
        train(small_model(), dataset(), max_steps=3, learning_rate=1e-2, max_grad_norm=limit) for limit in (off, 1e9)
    )
    assert free == huge and free[-1] < free[0]


@pytest.mark.parametrize("make", [small_model, lambda: gpt2_pair()[0]], ids=["MyGPT2", "stock"])
def test_held_out_loss_does_not_depend_on_the_batch_size(make) -> None:
    model, data = make().eval(), of_lengths(2, 2, 2, 2, 40)
    losses = [mean_loss(model, data, pad, size) for size in (1, 4, 5)]
    assert max(losses) - min(losses) < 1e-6
    assert abs(losses[0] - model(**pad(data)).loss.item()) < 1e-6


def test_a_held_out_loss_that_is_no_number_is_never_the_best() -> None:
    progress = Progress(fixed={})
    for loss in (math.nan, 3.0, math.nan, 2.0, math.inf, 4.0):
        progress.add(1.0)
        progress.note_held_out(loss)
    assert (progress.best_metric, progress.best_step) == (2.0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": []}, "dataset is empty"),
        ({"eval_dataset": []}, "eval_dataset is empty"),
        ({"save_steps": 0}, "save_steps=0: it must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: it must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: it must be at least 1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused_at_once(change, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        train(small_model(), **{"dataset": dataset(), "output_dir": str(tmp_path / "run"), **change})
    assert not (tmp_path / "run").exists()


def test_nothing_to_predict_is_reported() -> None:
    with pytest.raises(ValueError, match=r"nothing to predict at step 1 of 3: .* dataset\[i\] for i in \d: leave"):
        train(small_model(), of_lengths(1, 1, 1), data_collator=pack, per_device_train_batch_size=1)


def test_afterwards_the_model_is_not_in_autocast_and_another_precision_can_follow() -> None:
    model, inputs = small_model(), pad(of_lengths(9))
    train(model, dataset(), max_steps=1, mixed_precision="bf16")
    fresh = MyGPT2ForCausalLM(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)
    plain = [train(small_model(), dataset(), max_steps=2, mixed_precision=name) for name in (None, "no", "bf16")]
    assert plain[0] == plain[1] != plain[2]


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
