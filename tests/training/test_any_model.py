"""Training of models that are not classes of transformers or mymodels: of a file of one's own, or plain modules."""

from pathlib import Path

import pytest
import torch
from own_models.plain_net import Output, PlainNet
from torch import nn

from mymodels import train
from mymodels.checkpoints import CheckpointError, open_checkpoint
from mymodels.forward_calls import accepted, as_mapping, check_loss, logits_of, loss_of

OPTIONS = {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 3}


def examples(count: int = 24) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(60, (count, 7), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3, "attention_mask": torch.ones_like(row)} for row in rows]


def plain_net() -> PlainNet:
    torch.manual_seed(0)
    return PlainNet()


class Returning(nn.Module):
    """Returns what `form` makes of loss and logits."""

    def __init__(self, form):
        super().__init__()
        self.net, self.form = plain_net(), form

    def forward(self, input_ids, labels=None):
        outputs = self.net(input_ids, labels)
        return self.form(outputs.loss, outputs.logits)


FORMS = {
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "loss first": lambda loss, logits: (loss, logits),
    "logits first": lambda loss, logits: (logits, loss),
    "dataclass": Output,
    "bare loss": lambda loss, logits: loss,
}


def test_a_plain_module_trains_saves_its_weights_and_resumes_exactly(tmp_path: Path) -> None:
    whole, again = plain_net(), plain_net()
    losses = train(whole, examples(), output_dir=str(tmp_path / "run"), **OPTIONS)
    files = {path.name for path in (tmp_path / "run" / "checkpoint-6").iterdir()}
    assert "model.safetensors" in files and "config.json" not in files
    assert losses[-1] < losses[0]
    resumed = train(again, examples(), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"), **OPTIONS)
    assert resumed == losses
    saved = open_checkpoint(tmp_path / "run" / "checkpoint-6")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) and torch.equal(tensor, saved[name])


def test_the_form_of_the_outputs_changes_nothing() -> None:
    found = {name: train(Returning(form), examples(), **OPTIONS) for name, form in FORMS.items()}
    assert all(losses == found["dict"] for losses in found.values())
    logits, loss = torch.rand(2, 3), torch.tensor(1.0)
    for name, form in FORMS.items():
        assert loss_of(form(loss, logits)) is loss, name
        assert logits_of(form(loss, logits)) is (None if name == "bare loss" else logits), name
    assert as_mapping((loss, logits, loss)).keys() == {"logits", "0", "2"}  # two numbers: neither is taken for the loss
    assert accepted(plain_net(), examples()[0]).keys() == {"input_ids", "labels"}


def test_untrainable_models_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    class WithState(PlainNet):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    cases = [
        (Returning(lambda loss, logits: logits), ValueError, "Returning.forward returns no loss for input_ids, labels, but logits"),
        (Returning(lambda loss, logits: (loss, loss, logits)), ValueError, "returns no loss"),
        (Returning(lambda loss, logits: {"loss": loss.detach()}), ValueError, "does not depend on any parameter"),
        (Returning(lambda loss, logits: 1 / 0), ValueError, r"forward fails on a batch of the data \(input_ids \[2, 7\].*division by zero"),
        (WithState(), ValueError, "WithState cannot be saved, so nothing was trained: .*_extra_state"),
    ]  # fmt: skip
    for model, kind, message in cases:
        before = {name: tensor.clone() for name, tensor in model.named_parameters()}
        with pytest.raises(kind, match=message) as caught:
            train(model, examples(), output_dir=str(tmp_path / "run"), **OPTIONS)
        assert not (tmp_path / "run").exists() and str(tmp_path) not in str(caught.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert issubclass(CheckpointError, ValueError)


def test_the_trial_batch_leaves_model_and_random_numbers_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    model.forward = lambda x, f=model.forward: {"loss": f(x).mean() + torch.rand(())}  # type: ignore[method-assign]
    before, state = model[0].running_mean.clone(), torch.get_rng_state()
    check_loss(model.train(), {"x": torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) + 5})
    assert torch.equal(model[0].running_mean, before) and model.training and torch.equal(torch.get_rng_state(), state)
