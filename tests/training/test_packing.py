"""Packed batches: loss, logits and gradients of the padded batch, which a stock model computes too."""

import pytest
import torch
from tiny import MODERN, SWITCHES, gpt2_pair, largest_difference, mybert_config, mygpt2_config
from tiny import batch as padded_batch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithFlattening
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mymodels import (
    MyBertForMaskedLM,
    MyBertForSequenceClassification,
    MyBertForTokenClassification,
    MyGPT2ForCausalLM,
    MyGPT2ForSequenceClassification,
)
from mymodels.training.packing import DataCollatorForPacking

LENGTHS = [7, 1, 12, 7, 3]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def examples(labels: str) -> list[dict]:
    made = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(2, 97, (length,))
        label = {"next_token": ids, "token": ids % 3, "sequence": torch.tensor(number % 3)}[labels]
        made.append({"input_ids": ids.tolist(), "labels": label.tolist()})
    return made


def padded(features: list[dict]) -> dict[str, torch.Tensor]:
    def rows(name: str, filler: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(f[name]) for f in features], True, filler)

    per_token = isinstance(features[0]["labels"], list)
    labels = rows("labels", -100) if per_token else torch.tensor([f["labels"] for f in features])
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(f["input_ids"])) for f in features], True).long()
    return {"input_ids": rows("input_ids", 0), "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_packing_changes_nothing(model, labels: str) -> None:
    features = examples(labels)
    model.set_attn_implementation("eager")  # the padded computation, written out
    expected_loss, expected = loss_and_gradients(model, padded(features))
    packed = DataCollatorForPacking(labels)(features)
    assert packed["input_ids"].shape == (1, sum(LENGTHS))
    cases = [("eager", packed), ("sdpa", packed), ("sdpa", padded(features))]  # the last: packed inside the model
    for implementation, batch in cases:
        model.set_attn_implementation(implementation)
        loss, gradients = loss_and_gradients(model, batch)
        assert largest_difference(loss, expected_loss) <= 1e-5
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert largest_difference(gradient, expected[name]) <= 1e-5, (implementation, name)


@pytest.mark.parametrize("name", ["stock", "rope", "sliding", "sliding-mixed", "grouped-query", "modern", "everything"])
def test_language_model(name: str) -> None:
    model = MyGPT2ForCausalLM(mygpt2_config(**SWITCHES[name], **NO_GPT2_DROPOUT)).train()
    assert_packing_changes_nothing(model, "next_token")


@pytest.mark.parametrize("head", [MyBertForMaskedLM, MyBertForTokenClassification])
def test_labels_per_token(head: type) -> None:
    assert_packing_changes_nothing(head(mybert_config(num_labels=3, **NO_DROPOUT)).train(), "token")


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean", "max", "attention"])
def test_classifier(pooling: str) -> None:
    config = mybert_config(num_labels=3, pooling=pooling, layer_mix=2, **NO_DROPOUT)
    assert_packing_changes_nothing(MyBertForSequenceClassification(config).train(), "sequence")


def test_gpt2_classifier() -> None:
    config = mygpt2_config(**MODERN, num_labels=3, **NO_GPT2_DROPOUT)
    assert_packing_changes_nothing(MyGPT2ForSequenceClassification(config).train(), "sequence")


def test_flash_attention_gets_one_sequence_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no mask that would keep the sequences of a row apart; here one that asserts it gets none."""

    def flash(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None and "position_ids" not in kwargs
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("flash_stand_in", flash)
    model = MyBertForSequenceClassification(mybert_config(num_labels=3)).eval()
    packed = DataCollatorForPacking("sequence")(examples("sequence"))
    rows = {name: packed[name].repeat(2, 1) for name in ("input_ids", "position_ids")}
    expected = model(**rows).logits
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_stand_in")
    assert largest_difference(model(**rows).logits, expected) <= 1e-5


def test_gpt2_classifier_passes_over_end_tokens_that_pad() -> None:
    config = mygpt2_config(num_labels=3, pad_token_id=1, eos_token_id=1)
    model = MyGPT2ForSequenceClassification(config).eval()
    features = [{"input_ids": ids, "labels": 0} for ids in ([5, 6, 7, 1], [8, 9, 1])]
    packed = DataCollatorForPacking("sequence")(features)
    inputs = {**padded(features), "input_ids": torch.tensor([[5, 6, 7, 1], [8, 9, 1, 1]])}
    assert largest_difference(model(**packed).logits, model(**inputs).logits) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("make", [MyBertForSequenceClassification, MyGPT2ForSequenceClassification])
def test_a_compiled_classifier_tells_packed_sequences_apart(make: type) -> None:
    config = (mybert_config if make is MyBertForSequenceClassification else mygpt2_config)(num_labels=3)
    model = make(config).eval()
    packed = DataCollatorForPacking("sequence")(examples("sequence"))
    compiled = torch.compile(model, backend="eager")
    assert largest_difference(compiled(**packed).logits, model(**packed).logits) <= 1e-5


def test_two_packed_rows_are_pooled_in_order() -> None:
    model = MyBertForSequenceClassification(mybert_config(num_labels=3, pooling="mean")).eval()
    ids, positions = torch.randint(2, 97, (2, 10)), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], list(range(10))])
    together = model(input_ids=ids, position_ids=positions).logits
    alone = [model(input_ids=piece[None]).logits for piece in (ids[0, :4], ids[0, 4:], ids[1])]
    assert largest_difference(together, torch.cat(alone)) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("switches", ["stock", "everything"])
def test_a_padded_batch_without_cache_is_what_eager_computes(side: str, switches: str) -> None:
    model = MyGPT2ForCausalLM(mygpt2_config(**SWITCHES[switches])).eval()
    mask = torch.arange(12)[None] < torch.tensor(LENGTHS)[:, None]
    mask = (mask.flip(1) if side == "left" else mask).long()
    inputs = {"input_ids": torch.randint(2, 97, mask.shape), "attention_mask": mask, "use_cache": False}
    fast = model(**inputs, skip_padding=True).logits
    model.set_attn_implementation("eager")
    assert largest_difference(fast[mask.bool()], model(**inputs).logits[mask.bool()]) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("masked", [True, False])
def test_labels_at_padding_count_as_in_the_stock_model(side: str, masked: bool) -> None:
    """With padding on the left even the first token's label is: it is predicted from padding."""
    stock, mine = (model.train() for model in gpt2_pair(**NO_GPT2_DROPOUT))
    inputs = padded_batch(side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100) if masked else inputs["input_ids"]
    assert largest_difference(mine(**inputs, labels=labels).loss, stock(**inputs, labels=labels).loss) <= 1e-5


class Rows(TorchDispatchMode):
    """Rows of each product with the matrix of an MLP: what the models compute, seen from below their modules."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.seen = width, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        product = any(name in function.name() for name in ("_linear_pointwise", "addmm", "aten::linear"))
        if product and output.shape[-1] == self.width:
            self.seen.append(output.shape[:-1].numel())
        return output


def rows_computed(model, **inputs) -> set[int]:
    with Rows(model.config.intermediate_size) as rows, torch.no_grad():
        model(**inputs)
    return set(rows.seen)


def test_padding_is_not_computed() -> None:
    model = MyBertForSequenceClassification(mybert_config(num_labels=3)).eval()
    batch, every = padded(examples("sequence")), len(LENGTHS) * max(LENGTHS)
    assert rows_computed(model, **batch) == {sum(LENGTHS)}
    assert rows_computed(model, **batch, output_hidden_states=True) == {every}
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda module, args, output: None)
    assert rows_computed(model, **batch) == {every}


def test_same_batches_as_transformers_for_language_models() -> None:
    features = examples("next_token")
    theirs = DataCollatorWithFlattening()(features)
    ours = DataCollatorForPacking()(features)
    assert ours.keys() <= theirs.keys()
    assert all(torch.equal(ours[name], torch.as_tensor(theirs[name])) for name in ours)


def test_padded_examples_lose_their_padding() -> None:
    example = {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0], "labels": 1}
    batch = DataCollatorForPacking("sequence")([example, example])
    assert batch["input_ids"].tolist() == [[5, 6, 5, 6]] and batch["position_ids"].tolist() == [[0, 1, 0, 1]]
    assert batch["labels"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["label", "label_ids"])
def test_other_names_of_labels(name: str) -> None:
    batch = DataCollatorForPacking("sequence")([{"input_ids": [5, 6], name: 1}, {"input_ids": [7], name: 2}])
    assert batch["labels"].tolist() == [1, 2]


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="no examples to pack"):
        DataCollatorForPacking()([])
    with pytest.raises(ValueError, match="labels='tokens', but it must be one of 'next_token', 'token', 'sequence'"):
        DataCollatorForPacking("tokens")
    with pytest.raises(ValueError, match="example 1 of the batch has 0 input_ids"):
        DataCollatorForPacking("sequence")([{"input_ids": [4], "labels": 0}, {"input_ids": [], "labels": 0}])
    with pytest.raises(ValueError, match="example 0 of the batch has 1 labels for 2 tokens"):
        DataCollatorForPacking("token")([{"input_ids": [4, 5], "labels": [1]}])
