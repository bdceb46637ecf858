"""Old dict checkpoints go on training as they would have, or say which parameter does not fit."""

import copy

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from mymodels import import_checkpoint
from mymodels.checkpoints import CheckpointError


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler=None) -> None:
    model(torch.ones(5, 3) * torch.arange(5)[:, None]).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if scheduler:
        scheduler.step()


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(3):
        step(model, optimizer, scheduler)
    return model, optimizer, scheduler


def assert_goes_on(a, b) -> None:
    step(*a)
    step(*b)
    for x, y in zip(a[0].parameters(), b[0].parameters()):
        assert torch.equal(x, y)


def fresh() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=7.0)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)


@pytest.mark.parametrize("wrapped", [False, True])
def test_it_goes_on(wrapped, tmp_path) -> None:
    old = trained()
    weights = nn.DataParallel(old[0]).state_dict() if wrapped else old[0].state_dict()
    states = {"optimizer_state_dict": old[1].state_dict(), "scheduler_state_dict": old[2].state_dict()}
    torch.save({"epoch": 7, "model_state_dict": weights, "loss": 0.25, **states}, tmp_path / "old.pt")
    new = fresh()
    assert import_checkpoint(tmp_path / "old.pt", *new) == {"epoch": 7, "loss": 0.25}
    assert_goes_on(old, new)


def test_one_of_several_models(tmp_path) -> None:
    runs = {name: trained(seed) for name, seed in (("A", 1), ("B", 2))}
    saved = {f"model{name}_state_dict": run[0].state_dict() for name, run in runs.items()}
    saved |= {f"optimizer{name}_state_dict": run[1].state_dict() for name, run in runs.items()}
    torch.save(saved, tmp_path / "two.pt")
    new = fresh()
    with pytest.raises(CheckpointError, match="several models: choose section='modelA_state_dict' or 'modelB_state"):
        import_checkpoint(tmp_path / "two.pt", *new[:2])
    for name, run in runs.items():
        new = fresh()
        import_checkpoint(tmp_path / "two.pt", *new[:2], section=f"model{name}_state_dict")
        assert_goes_on(run[:2], new[:2])


def test_names_beat_the_order(tmp_path) -> None:
    model, _, _ = trained()
    optimizer = torch.optim.AdamW(reversed(list(model.named_parameters())), lr=0.1)
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "named.pt")
    new = network()
    other = torch.optim.AdamW(new.named_parameters(), lr=7.0)
    import_checkpoint(tmp_path / "named.pt", new, other)
    assert_goes_on((model, optimizer), (new, other))


def test_what_does_not_fit_changes_nothing(tmp_path) -> None:
    model, optimizer, _ = trained()
    path = tmp_path / "old.pt"
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}, path)
    new = network()
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    parameters = list(new.parameters())
    for given, message in (
        (
            [parameters[1], parameters[0], *parameters[2:]],
            r"exp_avg of parameter 0 has shape \(4, 3\), but '0.bias' has \(4,\)",
        ),
        (parameters[:3], "group 0 has 4 parameters, the optimizer's has 3"),
        ([{"params": parameters[:2]}, {"params": parameters[2:]}], "has 1 parameter groups, the optimizer has 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(path, new, torch.optim.AdamW(given))
    with pytest.raises(CheckpointError, match="no state of a scheduler for the model 'model_state_dict'"):
        import_checkpoint(path, new, None, object())
    with pytest.raises(CheckpointError, match=r"shape"):
        import_checkpoint(path, nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in new.state_dict().items())


def snapshot(model: nn.Module, *others) -> list:
    """Copies of weights and of what optimizer and scheduler hold."""
    return [copy.deepcopy(part.state_dict()) for part in (model, *others)]


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_unchanged(before: list, *parts) -> None:
    for old, part in zip(before, parts):
        assert same(old, part.state_dict())


OPTIMIZERS = {name: getattr(torch.optim, name) for name in ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adamax")}


@pytest.mark.parametrize("saved", OPTIMIZERS)
def test_an_optimizer_of_another_kind_is_refused(saved, tmp_path) -> None:
    model = network()
    optimizer = OPTIMIZERS[saved](model.parameters(), lr=0.1)
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "old.pt")
    for name, kind in OPTIMIZERS.items():
        new = network()
        other = kind(new.parameters(), lr=0.1)
        before = snapshot(new, other)
        if name == saved or {name, saved} == {"Adam", "AdamW"}:
            import_checkpoint(tmp_path / "old.pt", new, other)
            step(new, other)
        else:
            with pytest.raises(
                CheckpointError, match=f"is of another kind of optimizer than {name}, only one of them "
            ):
                import_checkpoint(tmp_path / "old.pt", new, other)
            assert_unchanged(before, new, other)


def test_a_scheduler_of_another_kind_changes_nothing(tmp_path) -> None:
    model, optimizer, scheduler = trained()
    states = {"optimizer_state_dict": optimizer.state_dict(), "scheduler_state_dict": scheduler.state_dict()}
    torch.save({"model_state_dict": model.state_dict(), **states}, tmp_path / "old.pt")
    new = network()
    other = torch.optim.AdamW(new.parameters(), lr=7.0)
    linear = get_scheduler("linear", other, 2, 10)
    before = snapshot(new, other, linear)
    with pytest.raises(CheckpointError, match="another kind of scheduler than LambdaLR, only one of them has 'gamma'"):
        import_checkpoint(tmp_path / "old.pt", new, other, linear)
    assert_unchanged(before, new, other, linear)


def test_whatever_a_scheduler_raises_changes_nothing(tmp_path) -> None:
    class Picky(torch.optim.lr_scheduler.StepLR):
        def load_state_dict(self, state) -> None:
            if state["last_epoch"]:
                raise RuntimeError("no")
            super().load_state_dict(state)

    model, optimizer, scheduler = trained()
    states = {"optimizer_state_dict": optimizer.state_dict(), "scheduler_state_dict": scheduler.state_dict()}
    torch.save({"model_state_dict": model.state_dict(), **states}, tmp_path / "old.pt")
    new, other, _ = fresh()
    picky = Picky(other, 2)
    before = snapshot(new, other, picky)
    with pytest.raises(CheckpointError, match=r"scheduler_state_dict is not a state of Picky: RuntimeError\('no'\)"):
        import_checkpoint(tmp_path / "old.pt", new, other, picky)
    assert_unchanged(before, new, other, picky)


def test_named_groups_in_another_order(tmp_path) -> None:
    def made(order: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = network()
        named = list(model.named_parameters())
        groups = [{"params": [(n, p) for n, p in named if p.ndim == d], "weight_decay": d / 10} for d in (1, 2)]
        return model, torch.optim.AdamW(groups[::order], lr=0.1)

    model, optimizer = made(1)
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "named.pt")
    new = made(-1)
    import_checkpoint(tmp_path / "named.pt", *new)
    assert_goes_on((model, optimizer), new)


def test_no_state_of_an_optimizer(tmp_path) -> None:
    torch.save({"model_state_dict": network().state_dict(), "epoch": 1}, tmp_path / "old.pt")
    new = fresh()
    with pytest.raises(CheckpointError, match="no state of an optimizer for the model"):
        import_checkpoint(tmp_path / "old.pt", *new[:2])


@pytest.mark.parametrize("name", ["opt", "optG", "adam", "optimizer_states", "optim"])
def test_an_optimizer_under_any_name(name, tmp_path) -> None:
    old = trained()
    state = [old[1].state_dict()] if name == "optimizer_states" else old[1].state_dict()  # Lightning's
    schedulers = [old[2].state_dict()] if name == "optimizer_states" else old[2].state_dict()
    saved = {"state_dict": old[0].state_dict(), name: state, "lr_schedulers": schedulers, "epoch": 2}
    torch.save(saved, tmp_path / "old.pt")
    new = fresh()
    assert import_checkpoint(tmp_path / "old.pt", *new) == {"epoch": 2}
    assert_goes_on(old, new)


def test_optimizers_of_two_models_by_their_letters(tmp_path) -> None:
    one, two = trained(0), trained(1)
    torch.save(
        {
            "netG": one[0].state_dict(),
            "netD": two[0].state_dict(),
            "optG": one[1].state_dict(),
            "optD": two[1].state_dict(),
        },
        tmp_path / "gan.pt",
    )
    new = fresh()
    import_checkpoint(tmp_path / "gan.pt", *new[:2], section="netD")
    assert_goes_on(two[:2], new[:2])


def test_a_distributed_checkpoint_goes_on(tmp_path) -> None:
    import torch.distributed.checkpoint as dcp

    old = trained()
    saved = {"model": old[0].state_dict(), "optimizer": old[1].state_dict(), "epoch": 3, "seen": [1, 2]}
    dcp.save(saved, checkpoint_id=tmp_path / "dcp", no_dist=True)
    new = fresh()
    assert import_checkpoint(tmp_path / "dcp", *new[:2]) == {"epoch": 3, "seen": [1, 2]}
    assert_goes_on(old[:2], new[:2])


@pytest.mark.parametrize("pattern", ["_forward_module.{}", "_fsdp_wrapped_module.{}", "module._orig_mod.{}", "{}"])
def test_names_of_wrappers(pattern, tmp_path) -> None:
    model = network()
    stored = {pattern.format(name).replace("0.", "0._orig_mod."): value for name, value in model.state_dict().items()}
    torch.save({"model": stored, "epoch": 1}, tmp_path / "old.pt")
    import_checkpoint(tmp_path / "old.pt", new := network())
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in model.state_dict().items())


def test_not_strict_gives_an_account(tmp_path) -> None:
    torch.save(
        {"model": {"0.weight": torch.ones(4, 3), "1.bias": torch.ones(5), "x": torch.ones(1)}}, tmp_path / "old.pt"
    )
    with pytest.raises(CheckpointError, match="strict=False"):
        import_checkpoint(tmp_path / "old.pt", model := network())
    with pytest.warns(UserWarning, match="0.bias"):
        rest = import_checkpoint(tmp_path / "old.pt", model, strict=False)
    assert rest["loading_info"] == {
        "missing_keys": ["0.bias", "1.weight"],
        "unexpected_keys": ["x"],
        "mismatched_keys": ["1.bias"],
    }
    assert torch.equal(model[0].weight, torch.ones(4, 3))
    torch.save({"model": {"y.weight": torch.ones(4, 3)}}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="none of its 1 tensors"):
        import_checkpoint(tmp_path / "none.pt", model, strict=False)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.int64])
def test_numbers_that_a_weight_cannot_hold(dtype, tmp_path) -> None:
    model = network()
    weights = model.state_dict()
    torch.save({"model": {name: value.to(dtype) for name, value in weights.items()}}, tmp_path / "old.pt")
    before = copy.deepcopy(weights)
    with pytest.raises(CheckpointError, match=r"cannot store|quantised"):
        import_checkpoint(tmp_path / "old.pt", model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


TORCH_OPTIMIZERS = {
    name: getattr(torch.optim, name)
    for name in (
        *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD"),
        *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
    )
}
OPTIONS = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9, "centered": True}}


def stepped(kind: str, *, reverse: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = network()
    parameters = list(model.parameters())
    optimizer = TORCH_OPTIMIZERS[kind](parameters[::-1] if reverse else parameters, lr=0.01, **OPTIONS.get(kind, {}))
    step(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("saved", TORCH_OPTIMIZERS)
def test_a_state_is_taken_by_the_kind_of_optimizer_that_wrote_it(saved: str, tmp_path) -> None:
    """Of torch's, each to each; Adam takes AdamW's state and goes on as AdamW; AdamW takes Adam's without weight decay."""
    model, optimizer = stepped(saved)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "old.pt")
    taken = []
    for kind in TORCH_OPTIMIZERS:
        other = network()
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        theirs = TORCH_OPTIMIZERS[kind](other.parameters(), lr=3.0, **OPTIONS.get(kind, {}))
        before = copy.deepcopy(theirs.state_dict())
        try:
            import_checkpoint(tmp_path / "old.pt", other, theirs)
        except CheckpointError as error:
            assert "is of another kind of optimizer than" in str(error) or "is not a state of" in str(error)
            assert not any(parameter.any() for parameter in other.parameters())
            assert str(theirs.state_dict()) == str(before)
        else:
            taken.append(kind)
            assert_goes_on(stepped(saved), (other, theirs))
    assert taken == (["Adam", "AdamW"] if saved in ("Adam", "AdamW") else [saved])


def test_an_adamw_does_not_take_adams_weight_decay(tmp_path) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "old.pt")
    other = network()
    theirs = torch.optim.AdamW(other.parameters())
    before = snapshot(other, theirs)
    with pytest.raises(
        CheckpointError, match=r"than AdamW, which decouples the weight decay, 0\.1 in the file, as the"
    ):
        import_checkpoint(tmp_path / "old.pt", other, theirs)
    assert_unchanged(before, other, theirs)


@pytest.mark.parametrize("kind", TORCH_OPTIMIZERS)
def test_states_of_parameters_in_another_order_are_not_taken(kind: str, tmp_path) -> None:
    model, optimizer = stepped(kind, reverse=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "old.pt")
    other, theirs = stepped(kind)
    with pytest.raises(CheckpointError, match="pass the optimizer its parameters in the saved order"):
        import_checkpoint(tmp_path / "old.pt", other, theirs)


def test_a_state_of_before_torch_2_7_has_no_word_on_decoupled_decay(tmp_path) -> None:
    model, optimizer = stepped("AdamW")
    state = optimizer.state_dict()
    del state["param_groups"][0]["decoupled_weight_decay"]
    torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / "old.pt")
    other = network()
    theirs = torch.optim.AdamW(other.parameters())
    import_checkpoint(tmp_path / "old.pt", other, theirs)
    assert theirs.param_groups[0]["decoupled_weight_decay"]
    assert_goes_on((model, optimizer), (other, theirs))


def saved_state() -> dict:
    return stepped("AdamW")[1].state_dict()


BROKEN = {
    "a list": (lambda state: [state, state], "no state of an optimizer"),
    "no groups": (lambda state: {"state": {}}, "no 'state' and 'param_groups'"),
    "a group without parameters": (
        lambda state: {"state": {}, "param_groups": [{"lr": 1.0}]},
        "group 0 has no list of",
    ),
    "a number as a group": (lambda state: {"state": {}, "param_groups": [3]}, "group 0 has no list of 'params'"),
    "a number as parameters": (
        lambda state: state | {"param_groups": [{"params": 3}]},
        "group 0 has no list of 'params'",
    ),
    "a number as a state": (
        lambda state: state | {"state": {0: 5}},
        "the state of parameter 0 is of type int, not a dict",
    ),
    "a state of no parameter": (
        lambda state: state | {"state": {key + 90: value for key, value in state["state"].items()}},
        "has a state for parameter 90, which is in none of its groups",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_state_is_refused_in_a_sentence(name: str, tmp_path) -> None:
    """A state of no parameter would be dropped, and the optimizer would begin anew."""
    change, message = BROKEN[name]
    torch.save({"model": network().state_dict(), "optimizer": change(saved_state())}, tmp_path / "old.pt")
    model, optimizer, _ = fresh()
    before = snapshot(model, optimizer)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(tmp_path / "old.pt", model, optimizer)
    assert_unchanged(before, model, optimizer)


def test_of_several_candidates_the_one_that_is_a_state_is_taken(tmp_path) -> None:
    """As fairseq names them."""
    model, optimizer, _ = trained()
    state = {"optimizer_history": [{"optimizer_name": "AdamW"}], "last_optimizer_state": optimizer.state_dict()}
    torch.save({"model": model.state_dict(), **state, "extra_state": {"epoch": 2}}, tmp_path / "old.pt")
    other, theirs, _ = fresh()
    rest = import_checkpoint(tmp_path / "old.pt", other, theirs)
    assert set(rest) == {"optimizer_history", "extra_state"}
    assert_goes_on((model, optimizer), (other, theirs))
