"""Parameters that the checkpoint lacks: which ones have no value after loading, and what gives them one."""

from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
from incomplete_folders import INIT, KEYS, PART, line_of, repaired, write

from mymodels.hub.static.check_parameters import parameters
from mymodels.hub.static.repo_snapshot import read_folder
from mymodels.hub.upgrading.left_faults import parameters_without_value


@pytest.mark.parametrize(
    ("steps", "arguments", "head", "call"),
    [
        ("self.x = nn.Parameter(torch.zeros(4))", "config", "", "nn.init.zeros_(module.x)"),
        ("self.register_parameter('x', nn.Parameter(torch.ones(4)))", "config", "", "nn.init.ones_(module.x)"),
        (
            "self.x: nn.Parameter = torch.nn.Parameter(torch.full((4,), 2.5))",
            "config",
            "",
            "nn.init.constant_(module.x, 2.5)",
        ),
        ("self.x = nn.Parameter(torch.randn(1, 1, 4))", "config", "", "nn.init.normal_(module.x)"),
        ("self.x = nn.Parameter(0.02 * torch.randn(4))", "config", "", "nn.init.normal_(module.x, std=0.02)"),
        ("self.x = nn.Parameter(torch.randn(4) / 8)", "config", "", "nn.init.normal_(module.x, std=1.0 / 8)"),
        ("self.x = nn.Parameter(torch.rand(4))", "config", "", "nn.init.uniform_(module.x)"),
        (
            "self.x = nn.Parameter(torch.randn(4) * config.hidden_size**-0.5)",
            "config",
            "",
            "nn.init.normal_(module.x, std=self.config.hidden_size ** (-0.5))",
        ),
        (
            "self.dim = dim\nself.x = nn.Parameter(torch.ones(dim) / math.sqrt(self.dim))",
            "dim",
            "self.head = Head(len(str(config)))",
            "nn.init.constant_(module.x, 1.0 / module.dim ** 0.5)",
        ),
        (
            "self.x = nn.Parameter(init_values * torch.ones(dim))",
            "dim, init_values=1e-5",
            "self.head = Head(config.hidden_size)",
            "nn.init.constant_(module.x, 1e-05)",
        ),
        (
            "self.x = nn.Parameter(init_values * torch.ones(dim), requires_grad=True)",
            "dim, init_values=1e-5",
            "self.head = Head(config.hidden_size, init_values=config.scale)",
            "nn.init.constant_(module.x, self.config.scale)",
        ),
        (
            "self.x = nn.Parameter(torch.ones([]) * np.log(1 / 0.5))",
            "config",
            "",
            "nn.init.constant_(module.x, 0.6931471805599453)",
        ),
        ("self.x = nn.Parameter(torch.tensor([0.1, 0.1]))", "config", "", "nn.init.constant_(module.x, 0.1)"),
        (
            "self.x = nn.Parameter(torch.empty(2, 4))\nself.reset()\n\ndef reset(self):\n"
            "    nn.init.kaiming_uniform_(self.x, a=math.sqrt(4))",
            "config",
            "",
            "nn.init.kaiming_uniform_(module.x, a=2.0)",
        ),
        (
            "self.x = nn.Parameter(torch.Tensor(4))\nself.x.data.normal_(mean=0.0, std=config.scale)",
            "config",
            "",
            "nn.init.normal_(module.x, mean=0.0, std=self.config.scale)",
        ),
        (
            "size = config.hidden_size\nweight = torch.zeros(size)\nself.x = nn.Parameter(weight)",
            "config",
            "",
            "nn.init.zeros_(module.x)",
        ),
        (
            "self.x = nn.Parameter(torch.zeros(4))\nself.decoder = nn.Linear(4, 4)\nself.decoder.bias = self.x",
            "config",
            "",
            "nn.init.zeros_(module.x)",
        ),
    ],
)
def test_what_the_constructor_writes_is_written_again(
    steps: str, arguments: str, head: str, call: str, tmp_path: Path
) -> None:
    if "def reset" in steps:
        steps = steps.replace("\n\ndef reset(self):\n    ", "\n\n    def reset(self):\n        ").replace(
            "\n    def", "\ndef"
        )
        first, _, method = steps.partition("\n\n")
        classes = PART.format(arguments=arguments, steps=indent(first, " " * 8)) + "\n" + indent(method, "    ")
        folder = write(tmp_path / "toy", classes=classes)
    else:
        folder = write(tmp_path / "toy", steps=steps, arguments=arguments, head=head or "self.head = Head(config)")
    (found,) = parameters(read_folder(folder))
    assert (found.status, found.remedy.partition(": ")[2]) == ("warning", call)
    assert "the parameter x of Head (head.x)" in found.what
    assert found.where == f"modeling_toy.py:{line_of(folder, 'self.x' if 'self.x' in steps else 'register_parameter')}"
    edited = repaired(folder)
    assert (
        f"        if isinstance(module, Head):\n            {call}\n        if isinstance(module, nn.Emb"
        in (edited.texts["modeling_toy.py"])
    )
    assert not list(parameters(read_folder(folder))) and not parameters_without_value(read_folder(folder))


@pytest.mark.parametrize(
    "steps",
    [
        "self.x = nn.Parameter(torch.log(torch.arange(1.0, 5.0)))",
        "self.x = nn.Parameter(torch.empty(4))",
        "self.x = nn.Parameter(torch.zeros(4))\nwith torch.no_grad():\n    self.x[0] = 1",
        "self.x = nn.Parameter(torch.zeros(4))\nself.x.data.copy_(torch.arange(4.0))",
        "weight = torch.ones(4)\nweight[0] = 0\nself.x = nn.Parameter(weight)",
        "self.x = nn.Parameter(torch.zeros(4))\nfor p in self.parameters():\n    nn.init.normal_(p)",
        "self.x = nn.Parameter(torch.zeros(4) if len(str(config)) else torch.ones(4))",
        "self.x = nn.Parameter(torch.ones(4) * torch.rand(4))",
        "self.x = nn.ParameterList([nn.Parameter(torch.zeros(4)) for _ in range(2)])",
    ],
)
def test_what_cannot_be_expressed_is_left_and_named(steps: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "toy", steps=steps)
    edited = repaired(folder)
    assert not edited.changes and not edited.refused
    (left,) = parameters_without_value(read_folder(folder))
    assert left.where == f"modeling_toy.py:{line_of(folder, 'self.x = ')}" and "the parameter x of Head" in left.what
    assert len(list(parameters(read_folder(folder)))) == 1


LISTED = """
class Scale(nn.Module):
    def __init__(self, dim, init_values=1e-5):
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(dim))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.scale = Scale(config.hidden_size)
        self.gate = nn.Parameter(torch.ones(1)) if config.use_gate else None
"""
BLOCKS = "self.blocks = nn.ModuleList([Block(config) for _ in range(2)])"
GAMMAS = {f"toy.blocks.{i}.scale.gamma": (4,) for i in range(2)}
TIED = "\n    _tied_weights_keys = {}\n"


@pytest.mark.parametrize(
    "made",
    [
        {"keys": KEYS | {"head.x": (4,)}},
        {"keys": {}},  # no checkpoint
        {"classes": LISTED, "model": BLOCKS, "head": "pass", "keys": KEYS | GAMMAS},
        {"classes": LISTED, "model": BLOCKS, "head": "pass", "keys": {k[4:]: v for k, v in (KEYS | GAMMAS).items()}},
        {
            "classes": LISTED,
            "model": "self.blocks = nn.ModuleList()\n        for _ in range(2):\n            self.blocks.append(Block(config))",
            "head": "pass",
            "keys": KEYS | GAMMAS,
        },
        {"model": "self.x = nn.Parameter(torch.zeros(4))", "head": "pass", "keys": KEYS | {"toy.x": (4,)}},
        {"head": "self.head = Head(config) if config.use_gate else None"},  # not made with these settings
        {"steps": "if bias:\n    self.x = nn.Parameter(torch.zeros(4))", "arguments": "config, bias=False"},
        {"head": "pass"},  # no model has one
        {"head": "if len(str(config)) > 5:\n            self.head = Head(config)"},  # not known
        {"head": "self.list = [Head(config)]\n        self.add_module('0', self.list[0])", "keys": KEYS | {"0.x": (4,)}},
        {"init": INIT + "        elif isinstance(module, Head):\n            nn.init.zeros_(module.x)\n"},
        {"init": INIT + "        elif hasattr(module, 'x'):\n            nn.init.zeros_(module.x)\n"},
        {"init": INIT + "        for p in module.parameters():\n            nn.init.zeros_(p)\n"},
        {"init": INIT + "        for name, p in module.named_parameters():\n            if name == 'x':\n                p.zero_()\n"},
        {"init": INIT + "        if type(module).__name__ == 'Head':\n            module.fill()\n",
         "steps": "self.x = nn.Parameter(torch.zeros(4))\n\n    def fill(self):\n        nn.init.zeros_(self.x)"},
        {"init": INIT + "        self._fill(module)\n\n    def _fill(self, part):\n        if isinstance(part, Head):\n            part.x.zero_()\n"},
        {"classes": "class HeadLayerNorm(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
         "        self.weight = nn.Parameter(torch.ones(4))\n", "head": "self.norm = HeadLayerNorm()", "init": ""},
        {"classes": "class Head(nn.Linear):\n    def __init__(self):\n        super().__init__(4, 4)\n"
         "        self.weight = nn.Parameter(torch.ones(4, 4))\n", "head": "self.head = Head()", "init": ""},
        {"steps": "self.weight = nn.Parameter(torch.empty(8, 4))",
         "head": "self.head = Head(config)\n\n    def get_output_embeddings(self):\n        return self.head"},
        {"steps": "self.decoder = nn.Linear(4, 4)\nself.x = nn.Parameter(torch.zeros(4))\nself.decoder.bias = self.x",
         "init": TIED.format('{"head.x": "head.decoder.bias"}') + INIT, "keys": KEYS | {"head.decoder.bias": (4,)}},
        {"steps": "self.decoder = nn.Linear(4, 4)\nself.x = nn.Parameter(torch.zeros(4))\nself.decoder.bias = self.x",
         "init": TIED.format('["head.x"]') + INIT, "keys": KEYS | {"head.decoder.bias": (4,)}},
    ],
)  # fmt: skip
def test_what_has_a_value_is_left_alone(made: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "toy", **made)
    if not made.get("keys", KEYS):
        (folder / "model.safetensors").unlink()
    assert not list(parameters(read_folder(folder)))
    assert not repaired(folder).changes


@pytest.mark.parametrize(
    ("made", "named"),
    [
        ({"classes": LISTED, "model": BLOCKS, "head": "pass"}, ["gamma"]),
        ({"classes": LISTED, "model": BLOCKS, "head": "pass", "use_gate": True}, ["gate", "gamma"]),
        ({"init": INIT + "        elif isinstance(module, Head):\n            nn.init.zeros_(module.other)\n"}, ["x"]),
        ({"init": INIT + "            return\n        if not isinstance(module, Head):\n            nn.init.zeros_(module.x)\n"}, ["x"]),
        ({"init": INIT + "        for name, p in module.named_parameters():\n            if name == 'c_proj.x':\n                p.zero_()\n"}, ["x"]),
        ({"keys": KEYS | {"other.head.x.y": (4,), "toy.x": (4,), "head.x.weight": (4,)}}, ["x"]),
        ({"steps": "self.x, self.bias = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))",
          "keys": KEYS | {"head.x": (4,)}}, ["bias"]),
        ({"head": "self.first, self.second = Head(config), Head(config)", "keys": KEYS | {"first.x": (4,)}}, ["x"]),
        ({"model": "self.queries = nn.Parameter(torch.randn(2, 4))", "head": "pass"}, ["queries"]),
        ({"head": "self.bias = nn.Parameter(torch.zeros(8))",  # a model is no nn.Linear
          "init": INIT + "        elif isinstance(module, (nn.Linear, nn.LayerNorm)):\n            module.bias.data.zero_()\n"}, ["bias"]),
        ({"steps": "self.decoder = nn.Linear(4, 4)\nself.x = nn.Parameter(torch.zeros(4))\nself.decoder.bias = self.x",
          "init": TIED.format('{"head.x": "head.decoder.bias"}') + INIT}, ["x"]),
    ],
)  # fmt: skip
def test_what_has_none_is_named(made: dict[str, Any], named: list[str], tmp_path: Path) -> None:
    folder = write(tmp_path / "toy", **made)
    found = [finding.what.split()[2] for finding in parameters(read_folder(folder))]
    assert sorted(found) == sorted(named)
    assert repaired(folder).changes and not list(parameters(read_folder(folder)))


NORM = "self.x = nn.LayerNorm(4)"
NORMS = """
class Norm(nn.GroupNorm):
    pass


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.first = nn.LayerNorm(4)
        self.second = nn.BatchNorm1d(4, affine=False)
        self.third = Norm(2, 4)
"""


def test_norms_of_torch_are_filled_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "toy", classes=NORMS)
    found = [(one.what.split(" is not in")[0], one.where) for one in parameters(read_folder(folder))]
    first, third = (f"modeling_toy.py:{line_of(folder, f'self.{name} =')}" for name in ("first", "third"))
    assert sorted(found) == [
        ("the parameter bias of GroupNorm (head.third.bias)", third),
        ("the parameter bias of LayerNorm (head.first.bias)", first),
        ("the parameter weight of GroupNorm (head.third.weight)", third),
        ("the parameter weight of LayerNorm (head.first.weight)", first),
    ]
    text = repaired(folder).texts["modeling_toy.py"]
    assert (
        """
        if isinstance(module, nn.LayerNorm):
            if getattr(module, "weight", None) is not None:
                nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
"""
        in text
    )
    assert not list(parameters(read_folder(folder))) and "BatchNorm1d)" not in text


@pytest.mark.parametrize(
    "made",
    [
        {"keys": KEYS | {"head.x.weight": (4,), "head.x.bias": (4,)}},
        {"keys": KEYS | {"head.x.gamma": (4,), "head.x.beta": (4,)}},
        {"init": INIT + "        elif isinstance(module, nn.LayerNorm):\n            module.bias.zero_(); module.weight.fill_(1)\n"},
        {"init": INIT + "        elif 'LayerNorm' in module.__class__.__name__:\n            module.bias.zero_(); module.weight.fill_(1)\n"},
        {"init": INIT + "        else:\n            super()._init_weights(module)\n"},
        {"init": ""},
        {"steps": "self.x = nn.LayerNorm(4, elementwise_affine=False)"},
        {"head": "self.head = Head(config)\n        for m in self.modules():\n            m.register_parameter('bias', None)",
         "keys": KEYS | {"head.x.weight": (4,)}},
    ],
)  # fmt: skip
def test_norms_that_have_values_are_left_alone(made: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "toy", **{"steps": NORM, **made})
    assert not list(parameters(read_folder(folder))) and not repaired(folder).changes


def test_a_part_of_another_file_and_a_model_without_init_weights(tmp_path: Path) -> None:
    steps = "if config.use_gate:\n    self.x = nn.Parameter(torch.ones(4))"
    edited = repaired(write(tmp_path / "toy", steps=steps, init="", use_gate=True, other_file=True))
    assert list(edited.texts) == ["modeling_toy.py"]
    assert edited.texts["modeling_toy.py"].count("def _init_weights") == 1
    assert """
    def _init_weights(self, module):
        if isinstance(module, Head):
            if getattr(module, "x", None) is not None:
                nn.init.ones_(module.x)
        super()._init_weights(module)
""" in edited.texts["modeling_toy.py"]


def test_an_init_weights_of_another_file_asks_for_the_class_by_its_name(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "toy",
        classes=PART.format(arguments="config", steps=" " * 8 + "self.x = nn.Parameter(-torch.ones(4))")
        + """

class WideHead(Head):
    pass
""",
        head="self.head, self.wide = Head(config), WideHead(config)",
        model="self.y = nn.Parameter(torch.zeros(4))",
    )
    text = (folder / "modeling_toy.py").read_text()
    start, end = text.index("class ToyPreTrainedModel"), text.index("class ToyModel(")
    (folder / "base.py").write_text(
        "from transformers import PreTrainedModel\nfrom torch import nn\n\n\n"
        + text[start:end].replace("    config_class = ToyConfig\n", "")
    )
    text = text[:start] + text[end:].replace("    def __init__", "    config_class = ToyConfig\n\n    def __init__", 1)
    (folder / "modeling_toy.py").write_text(
        text.replace("import math\n", "import math\n\nfrom .base import ToyPreTrainedModel\n")
    )
    edited = repaired(folder)
    assert list(edited.texts) == ["base.py"]
    assert """
        if type(module).__name__ in ("Head", "WideHead"):
            nn.init.constant_(module.x, -1.0)
""" in edited.texts["base.py"]
    assert "nn.init.zeros_(module.y)" in edited.texts["base.py"]
