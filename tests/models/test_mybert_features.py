"""MyBert's switches: poolings against plain loops, losses against the papers' formulas, the rest a library model does."""

from pathlib import Path

import pytest
import torch
from tiny import batch, largest_difference, mybert_config
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from mymodels import MyBertForMaskedLM, MyBertForSequenceClassification, MyBertForTokenClassification, MyBertModel
from mymodels.models.losses import classification_loss

POOLINGS = ["pooler", "cls", "mean", "max", "attention"]


def classifier(**changes) -> MyBertForSequenceClassification:
    return MyBertForSequenceClassification(mybert_config(**{"num_labels": 3, **changes})).eval()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_pooling_against_a_loop_over_unpadded_rows(pooling: str, padding: str) -> None:
    model = MyBertModel(mybert_config(pooling=pooling)).eval()
    inputs = batch(padding)
    outputs = model(**inputs)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        tokens = outputs.last_hidden_state[row]
        if pooling in ("mean", "max", "attention"):
            tokens = tokens[mask]
        expected = {
            "pooler": lambda t: torch.tanh(model.pooler.dense(t[0])),
            "cls": lambda t: t[0],
            "mean": lambda t: t.mean(dim=0),
            "max": lambda t: t.max(dim=0).values,
            "attention": lambda t: model.pooler.score(t)[:, 0].softmax(dim=0) @ t,
        }[pooling](tokens)
        assert largest_difference(outputs.pooler_output[row], expected) <= 1e-5


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_row_of_nothing_but_padding_stays_finite(pooling: str) -> None:
    inputs = batch("right")
    inputs["attention_mask"][1] = 0
    for dtype in (torch.float32, torch.bfloat16):
        outputs = classifier(pooling=pooling).to(dtype)(**inputs)
        assert outputs.logits.isfinite().all() and outputs.logits.abs().max() < 1e3


def test_bare_cls_has_no_pooling_parameters() -> None:
    assert not [name for name in classifier(pooling="cls").state_dict() if "pooler" in name]


def test_pooling_refuses_a_mask_that_does_not_name_tokens() -> None:
    inputs = batch()
    mask = torch.zeros(3, 1, 11, 11)
    with pytest.raises(
        ValueError, match=r"pooling='mean' needs attention_mask of shape \[batch, length\].*3, 1, 11, 11"
    ):
        classifier(pooling="mean")(input_ids=inputs["input_ids"], attention_mask=mask)
    classifier(pooling="cls")(input_ids=inputs["input_ids"], attention_mask=mask)


def test_layer_mix() -> None:
    model = MyBertModel(mybert_config(layer_mix=2)).eval()
    inputs = batch()
    outputs = model(**inputs, output_hidden_states=True)
    last, before = outputs.hidden_states[-1], outputs.hidden_states[-2]
    assert largest_difference(outputs.last_hidden_state, (last + before) / 2) <= 1e-6
    with torch.no_grad():
        model.layer_mix.weights.copy_(torch.tensor([0.0, 1.0]))
    share = torch.tensor(1.0).sigmoid()
    mixed = model(**inputs).last_hidden_state
    assert largest_difference(mixed, share * last + (1 - share) * before) <= 1e-6


class TestLosses:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, -0.3], [-1.5, 3.0, 0.0]])
    labels = torch.tensor([0, 2, 1])

    def loss(self, labels: torch.Tensor | None = None, **switches) -> torch.Tensor:
        config = mybert_config(num_labels=3, **switches)
        return classification_loss(config, self.logits, self.labels if labels is None else labels)

    def test_label_smoothing_and_class_weights_are_torch_s(self) -> None:
        weights = [0.5, 2.0, 1.0]
        expected = F.cross_entropy(self.logits, self.labels, torch.tensor(weights), label_smoothing=0.1)
        assert largest_difference(self.loss(label_smoothing=0.1, class_weights=weights), expected) <= 1e-6

    def test_ignored_labels(self) -> None:
        labels = torch.tensor([0, -100, 1])
        for switches in ({}, {"class_weights": [0.5, 2.0, 1.0]}, {"focal_gamma": 2.0}):
            kept = classification_loss(
                mybert_config(num_labels=3, **switches), self.logits[[0, 2]], self.labels[[0, 2]]
            )
            assert largest_difference(self.loss(labels, **switches), kept) <= 1e-6

    @pytest.mark.parametrize("gamma", [0.5, 2.0])
    def test_focal_single_label(self, gamma: float) -> None:
        p = self.logits.softmax(-1)[torch.arange(3), self.labels]  # arXiv 1708.02002, equation 4
        assert largest_difference(self.loss(focal_gamma=gamma), (-((1 - p) ** gamma) * p.log()).mean()) <= 1e-6

    def test_focal_multi_label(self) -> None:
        labels = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]])
        p = self.logits.sigmoid()
        p = torch.where(labels == 1, p, 1 - p)
        assert largest_difference(self.loss(labels, focal_gamma=2.0), (-((1 - p) ** 2) * p.log()).mean()) <= 1e-6

    def test_multi_label_smoothing_and_weights(self) -> None:
        labels, weights = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]]), [0.5, 2.0, 1.0]
        smooth = torch.where(labels == 1, 0.95, 0.05)
        expected = F.binary_cross_entropy_with_logits(self.logits, smooth, pos_weight=torch.tensor(weights))
        assert largest_difference(self.loss(labels, label_smoothing=0.1, class_weights=weights), expected) <= 1e-6


def test_multi_sample_dropout() -> None:
    model = classifier(multi_sample_dropout=64, classifier_dropout=0.5, hidden_dropout_prob=0.0)
    model.bert.eval()
    inputs, labels = batch(), torch.tensor([0, 1, 2])
    still = model(**inputs, labels=labels)
    assert torch.equal(still.logits, classifier_logits_once(model, inputs))
    model.dropout.train()
    model.training = True  # the head only: the encoder stays without dropout
    many = model(**inputs, labels=labels)
    assert largest_difference(many.logits, still.logits) < 0.5
    model.config.multi_sample_dropout = 1
    singles = torch.stack([model(**inputs, labels=labels).loss for _ in range(64)])
    spread = (singles.std() / 8).item()
    assert abs(many.loss.item() - singles.mean().item()) < 6 * spread  # the mean of losses, not the loss of the mean


def classifier_logits_once(model: MyBertForSequenceClassification, inputs: dict) -> torch.Tensor:
    return model.classifier(model.bert(**inputs).pooler_output)


@pytest.mark.parametrize(
    "switches",
    [{"pooling": pooling} for pooling in POOLINGS] + [{"layer_mix": 3}, {"focal_gamma": 1.0, "label_smoothing": 0.1}],
    ids=str,
)
def test_save_load_and_train(switches: dict, tmp_path: Path) -> None:
    model = classifier(**switches)
    inputs = batch("right")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    for name, value in switches.items():
        assert getattr(loaded.config, name) == value
    loaded.train()(**inputs, labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, parameter in loaded.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    inputs = {**batch("right"), "labels": torch.tensor([0, 1, 2])}
    model(**inputs).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert largest_difference(parameter.grad, expected[name]) <= 1e-6, name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_sequences(implementation: str) -> None:
    model = MyBertForTokenClassification(mybert_config()).eval()
    model.set_attn_implementation(implementation)
    lengths = [7, 1, 9]
    pieces = [torch.randint(2, 97, (1, length)) for length in lengths]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(input_ids=torch.cat(pieces, dim=1), position_ids=position_ids).logits[0]
    alone = torch.cat([model(input_ids=piece).logits[0] for piece in pieces])
    assert largest_difference(packed, alone) <= 1e-5


def test_attention_is_not_causal_without_a_mask() -> None:
    model = MyBertModel(mybert_config()).eval()
    ids = torch.randint(2, 97, (1, 9))
    changed = ids.clone()
    changed[0, -1] = 2 if ids[0, -1] != 2 else 3
    assert largest_difference(model(ids).last_hidden_state[0, 0], model(changed).last_hidden_state[0, 0]) > 1e-4


@pytest.mark.parametrize("size", [105, 80])
def test_resize_takes_the_bias_along(size: int, tmp_path: Path) -> None:
    model = MyBertForMaskedLM(mybert_config()).eval()
    torch.nn.init.normal_(model.cls.predictions.bias)
    ids = torch.randint(2, 80, (2, 9))
    before = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    kept = min(size, 97)
    assert largest_difference(model(ids).logits[..., :kept], before[..., :kept]) <= 1e-5
    assert not model.cls.predictions.bias[kept:].any()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    model.save_pretrained(tmp_path)
    loaded = MyBertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_encoder_checkpoint_into_a_masked_lm_starts_the_head_fresh(tmp_path: Path) -> None:
    encoder = MyBertModel(mybert_config())
    encoder.save_pretrained(tmp_path)
    model, loading = MyBertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert "cls.predictions.bias" in loading["missing_keys"]
    assert not model.cls.predictions.bias.any()
    for name, tensor in model.bert.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name
    assert (model.cls.predictions.transform.LayerNorm.weight == 1).all()


def test_inputs_embeds() -> None:
    model = classifier()
    inputs = batch("right")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits, model(**inputs).logits
    )


def test_offload_under_a_tight_memory_limit(tmp_path: Path) -> None:
    model = classifier(num_hidden_layers=8)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    size = sum(p.numel() * 4 for p in model.parameters())
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in loaded.hf_device_map.values()
    inputs = batch("right")
    assert largest_difference(loaded(**inputs).logits, model(**inputs).logits) <= 1e-5


def test_trainer_scales_the_loss_once_under_gradient_accumulation(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    examples = [{"input_ids": torch.randint(2, 97, (9,)), "labels": torch.tensor(i % 3)} for i in range(8)]
    losses = []
    for accumulation in (1, 4):
        torch.manual_seed(1)
        model = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.0,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=examples)
        trainer.train()
        losses.append(next(row for row in trainer.state.log_history if "loss" in row))
    assert abs(losses[0]["loss"] - losses[1]["loss"]) < 1e-3
    assert abs(losses[0]["grad_norm"] - losses[1]["grad_norm"]) < 1e-3


@pytest.mark.slow
def test_compile() -> None:
    model = classifier(pooling="attention", layer_mix=2)
    inputs = batch("right")
    expected = model(**inputs).logits
    assert largest_difference(torch.compile(model, fullgraph=True)(**inputs).logits, expected) <= 1e-5


@pytest.mark.slow
def test_flex_attention() -> None:
    model = MyBertModel(mybert_config(hidden_size=64)).eval()
    inputs = batch("right", length=32)
    shown = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state[shown]
        model.set_attn_implementation("flex_attention")
        assert largest_difference(model(**inputs).last_hidden_state[shown], expected) <= 1e-4


def test_a_subclass_of_any_name_has_its_parent_s_loss() -> None:
    class Filler(MyBertForMaskedLM):
        pass

    model = Filler(mybert_config()).eval()
    parent = MyBertForMaskedLM(mybert_config()).eval()
    parent.load_state_dict(model.state_dict())
    inputs = batch()
    assert torch.equal(
        model(**inputs, labels=inputs["input_ids"]).loss, parent(**inputs, labels=inputs["input_ids"]).loss
    )


def test_an_untied_stock_head_s_own_bias_is_loaded(tmp_path: Path) -> None:
    from tiny import stock_bert_config
    from transformers import BertForMaskedLM

    stock = BertForMaskedLM(stock_bert_config(tie_word_embeddings=False))
    torch.nn.init.normal_(stock.cls.predictions.decoder.bias)
    stock.save_pretrained(tmp_path)
    mine = MyBertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(mine.cls.predictions.bias, stock.cls.predictions.decoder.bias)


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean", "max", "attention"])
def test_training_under_autocast(pooling: str) -> None:
    config = mybert_config(pooling=pooling, num_labels=3, layer_mix=2)
    model = MyBertForSequenceClassification(config).train()
    inputs = {**batch("right"), "labels": torch.tensor([0, 1, 2])}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
