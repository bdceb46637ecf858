"""Names that say nothing: the share of parameters placed as the known mapping says, and nothing wrong called exact."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from warmstart.stock_families import family

from mymodels import warm_start

FAMILIES = ("gpt2", "llama", "qwen2", "gpt_neox", "phi", "phi3", "opt", "bert", "distilbert", "modernbert")


def scrambled(names, seed: int, numbers: bool) -> dict[str, str]:
    """Each module a random name, the same wherever it stands; with `numbers` those of lists too."""
    rng = random.Random(seed)
    words: dict[tuple, str] = {}

    def word(path: tuple) -> str:
        if path[-1].isdigit() and not numbers:
            return path[-1]
        key = path if numbers else tuple("#" if part.isdigit() else part for part in path)
        return words.setdefault(key, "".join(rng.choice("bdfghjlmnprstz") for _ in range(7)))

    found = {}
    for name in names:
        *path, leaf = name.split(".")
        found[name] = ".".join([*(word(tuple(path[: i + 1])) for i in range(len(path))), leaf])
    return found


def placed(report, target, tensors: dict, names: dict) -> tuple[float, int]:
    """The share of parameters with the tensor of the known mapping, and how many with another are called exact."""
    right = total = wrong_exact = 0
    parameters = dict(target.named_parameters(remove_duplicate=False))
    for row in report.rows:
        for name in row.targets:
            total += parameters[name].numel()
            same = torch.equal(parameters[name], tensors[names[name]])
            right += parameters[name].numel() * same
            wrong_exact += bool(row.sources) and not same and row.kind == "exact"
    return right / total, wrong_exact


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_share_that_is_placed(kind: str) -> None:
    source = family(kind)
    names = scrambled(source.state_dict(), seed=len(kind), numbers=kind in ("llama", "bert"))
    tensors = {names[name]: tensor.clone() for name, tensor in source.state_dict().items()}
    target = family(kind)
    report = warm_start(target, tensors)
    share, wrong = placed(report, target, tensors, names)
    assert share >= 0.99 and wrong == 0, share
    assert not report.is_exact  # the tensors alone cannot be run, and an order is not proof
    assert any(row.unproven for row in report.rows)


@pytest.mark.parametrize("kind", ["mistral", "bert"])
def test_without_an_order_what_is_alike_is_not_guessed(kind: str, tmp_path: Path) -> None:
    source = family(kind)
    names = scrambled(source.state_dict(), seed=1, numbers=False)
    tensors = {names[name]: tensor.clone() for name, tensor in source.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    target = family(kind)
    report = warm_start(target, tmp_path / "model.safetensors")
    parameters = dict(target.named_parameters(remove_duplicate=False))
    for row in report.rows:
        for name in row.targets:
            assert not row.sources or torch.equal(parameters[name], tensors[names[name]]), name
    notes = [note for note in report.notes if note.startswith("ambiguous, so not loaded")]
    assert notes and all("candidates" in note and "rename=" in note for note in notes)
    alike = {"mistral": ("k_proj", "v_proj"), "bert": ("query", "key", "value")}[kind]
    new = {name for row in report.rows if row.status == "new" for name in row.targets}
    assert all(any(part in name for name in new) for part in alike)


def test_a_wrong_order_is_never_called_exact() -> None:
    source = family("llama")
    state = dict(source.state_dict())
    names = scrambled(state, seed=2, numbers=False)
    swapped = {}
    for name, tensor in state.items():  # key and query change places
        other = name.replace("q_proj", "\0").replace("k_proj", "q_proj").replace("\0", "k_proj")
        swapped[names[other]] = state[other]
        assert tensor.shape == state[other].shape
    target = family("llama")
    report = warm_start(target, swapped)
    query = next(row for row in report.rows if any("0.self_attn.q_proj" in name for name in row.targets))
    assert query.kind != "exact" and not report.is_exact
    assert any("placed by their order alone" in note and "rename=" in note for note in report.notes)


class Renamed(torch.nn.Module):
    """A model whose parts have other names, and that can be run."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(31, 12)
        self.parts = torch.nn.ModuleList(torch.nn.ModuleList([torch.nn.Linear(12, 12), torch.nn.Linear(12, 20), torch.nn.Linear(20, 12)]) for _ in range(3))  # fmt: skip
        self.last = torch.nn.Linear(12, 31)

    def forward(self, ids):
        x = self.table(ids)
        for a, b, c in self.parts:
            x = x + c(torch.tanh(b(a(x))))
        return self.last(x)


class Original(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(31, 12)
        blocks = []
        for _ in range(3):
            block = torch.nn.ModuleDict({"mix": torch.nn.Linear(12, 12), "wide": torch.nn.Linear(12, 20)})
            block["narrow"] = torch.nn.Linear(20, 12)
            blocks.append(block)
        self.layers_of_mine = torch.nn.ModuleList(blocks)
        self.read_out = torch.nn.Linear(12, 31)

    def forward(self, ids):
        x = self.words(ids)
        for block in self.layers_of_mine:
            x = x + block["narrow"](torch.tanh(block["wide"](block["mix"](x))))
        return self.read_out(x)


def test_a_run_proves_what_the_structure_placed() -> None:
    source, target = Original().eval(), Renamed().eval()
    report = warm_start(target, source)
    ids = torch.arange(31)[None]
    with torch.no_grad():
        assert torch.equal(target(ids), source(ids))
    assert report.checked.agrees and all(row.kind == "exact" for row in report.rows)
    assert "matched by structure, confirmed by a check" in report.rows[0].how and report.is_exact
    alone = warm_start(Renamed().eval(), source.state_dict())
    assert not alone.checked.ran and not alone.is_exact
    assert {row.kind for row in alone.rows} == {"approximate"}


class TwoOutputs(torch.nn.Module):
    """Returns a second output only if it has the layer for it."""

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        for name in names:
            self.add_module(name, torch.nn.Linear(6, 6 + len(name)))

    def forward(self, x):
        return {f"out_{len(name)}": child(x) for name, child in self.named_children()}


def test_a_run_proves_only_what_was_compared() -> None:
    source, target = TwoOutputs(("aa", "bbb")), TwoOutputs(("xx", "yyy"))
    with torch.no_grad():  # an output of the target that the source has not
        source.forward = lambda x: {"out_2": source.aa(x)}
    report = warm_start(target, source)
    kinds = {name: row.kind for row in report.rows for name in row.targets}
    assert report.checked.agrees and kinds["xx.weight"] == "exact" and kinds["yyy.weight"] == "approximate"
    assert not report.is_exact
