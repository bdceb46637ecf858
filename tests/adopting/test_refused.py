"""What cannot be adopted is refused in one sentence with file, line and remedy; nothing is written."""

import itertools
from pathlib import Path

import pytest
import torch
from adopting.cases import AUTHORS, BERT, job
from torch import nn

from mymodels.adopting import adopt
from mymodels.adopting.examine import examine
from mymodels.checkpoints import CheckpointError
from mymodels.cli.adopt import split_fields

NUMBERS = itertools.count()
HEADING = "import torch\nfrom torch import nn\n"
NET = """
class Net(nn.Module):
    def __init__(self, vocab=20, width=8):
        super().__init__()
        self.table = nn.Embedding(vocab, width)
        self.out = nn.Linear(width, vocab)

    def forward(self, x):
        return self.out(self.table(x))
"""
TIED = "        self.table = nn.Embedding(vocab, width)\n"
# what is wrong → the file's text, the number of the line or None, and what the sentence says
READ = {
    "a loop at the top": (
        HEADING + NET + "for step in range(3):\n    print(step)\n",
        12,
        "a loop runs when the file is",
    ),
    "a model at the top": (HEADING + NET + "model = Net()\n", 12, "builds a model when the file is imported"),
    "an optimizer": (HEADING + NET + "o = torch.optim.Adam([torch.zeros(1)])\n", 12, "__name__"),
    "a call": (HEADING + NET + "print('hello')\n", 12, "runs when the file is imported"),
    "a seed": (HEADING + "torch.manual_seed(0)\n" + NET, 3, "changes the process"),
    "data that is read": (HEADING + "DATA = open('train.txt').read()\n" + NET, 3, "runs when the file is imported"),
    "an absolute path": (HEADING + "VOCAB = '/home/me/vocab.txt'\n" + NET, 3, "make it an argument"),
    "cuda()": (HEADING + NET.replace("self.table(x)", "self.table(x.cuda())"), 11, "needs a CUDA device"),
    "a device": (HEADING + NET.replace("self.table(x)", "self.table(x.to('cuda:0'))"), 11, "x.device"),
    "a magic line": (HEADING + "%matplotlib inline\n" + NET, 3, "a line of a notebook"),
    "a shell line": (HEADING + "!pip install einops\n" + NET, 3, "a line of a notebook"),
    "no Python": (HEADING + NET + "def broken(:\n", 12, "is not Python"),
    "another class": (
        HEADING + NET.replace("class Net", "class Nett"),
        None,
        "has no class Net; its modules are: Nett",
    ),
    "no module": (HEADING + "class Net:\n    pass\n", None, "Net is not an nn.Module"),
    "inside a function": (
        HEADING + "def make():\n    class Net(nn.Module):\n        pass\n    return Net\n",
        4,
        "move it to the top level",
    ),
    "init_weights": (
        HEADING + "from transformers import BertPreTrainedModel\nclass Net(BertPreTrainedModel):\n"
        "    def __init__(self, config):\n        super().__init__(config)\n        self.init_weights()\n",
        7,
        "change this line to self.post_init()",
    ),
}
BUILT = {
    "an argument without a value": (
        NET.replace("vocab=20, width=8", "vocab, width"),
        {"vocab": 20},
        "needs its argument 'width'",
    ),
    "an unknown argument": (NET, {"widht": 4}, "has no argument 'widht': did you mean 'width'"),
    "a value of a wrong kind": (NET, {"width": "wide"}, r"py:7: Net cannot be built"),
    "other shapes each time": (
        "SEEN = []\n"
        + NET.replace("super().__init__()\n", "super().__init__()\n        SEEN.append(0)\n").replace(
            "nn.Embedding(vocab, width)", "nn.Embedding(vocab + len(SEEN), width)"
        ),
        {},
        "cannot be built twice from the same arguments: table.weight",
    ),
    "a parameter from outside": (
        "SHARED = nn.Parameter(torch.zeros(20, 8))\n"
        + NET.replace(TIED, TIED + "        self.table.weight = SHARED\n"),
        {},
        "share the parameter table.weight",
    ),
    "state that is not a tensor": (
        NET.replace(
            "    def forward",
            "    def get_extra_state(self):\n        return {'step': 1}\n\n    def set_extra_state(self, state):\n        pass\n\n    def forward",
        ),
        {},
        "_extra_state in its state_dict is a dict and not a tensor",
    ),
    "a module twice": (
        NET.replace(TIED, TIED + "        self.again = self.table\n"),
        {},
        "again and table are one module under two names|table and again are one module",
    ),
    "a module in itself": (
        NET.replace(TIED, TIED + "        self.table.parent = nn.ModuleList([self])\n"),
        {},
        "holds the module that it is part of",
    ),
    "a constructor that calls itself": (
        NET.replace(TIED, TIED + "        self.inner = Net(vocab, width)\n"),
        {},
        "cannot be built: it calls itself without a limit",
    ),
    "forward that calls itself": (
        NET.replace("return self.out(self.table(x))", "return self.forward(x)"),
        {},
        "it calls itself without a limit",
    ),
    "two configs that suit": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    vocab: int = 20\n@dataclass\nclass B:\n    vocab: int = 30\n"
        + NET.replace("self, vocab=20, width=8", "self, config")
        .replace("(vocab, width)", "(config.vocab, 8)")
        .replace("(width, vocab)", "(8, config.vocab)"),
        {},
        "could be A or B: annotate it, `config: A`",
    ),
    "an input that cannot be made up": (
        NET.replace("def forward(self, x)", "def forward(self, x, graph, nodes)"),
        {},
        r"no working inputs were found for forward\(x, graph, nodes\)",
    ),
    "a module as an argument": (
        NET.replace("self, vocab=20, width=8", "self, body: nn.Module, vocab=20, width=8"),
        {},
        "needs its argument 'body', a module, which config.json cannot hold: build it in __init__",
    ),
    "a package that is not there": (
        "import no_such_package\n" + NET,
        {},
        "imports no_such_package, which is not installed",
    ),
}


def write(folder: Path, text: str) -> Path:
    path = folder / f"bad_model_{next(NUMBERS)}.py"  # modules of one name would be one
    path.write_text(text)
    return path


def one_sentence(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text and "Traceback" not in text and "mymodels-adopt-" not in text, text


@pytest.mark.parametrize("what", READ)
def test_what_reading_shows_is_refused_before_anything_runs(what: str, tmp_path: Path) -> None:
    text, line, says = READ[what]
    path, out = write(tmp_path, text), tmp_path / "out"
    with pytest.raises(CheckpointError, match=says) as caught:
        adopt(f"{path}:Net", out)
    one_sentence(caught.value)
    assert str(caught.value).startswith(f"{path}:{line}:" if line else str(path)) or f"{path}:{line} " in str(
        caught.value
    )
    assert not out.exists()


@pytest.mark.parametrize("what", BUILT)
def test_what_running_shows_is_refused(what: str, tmp_path: Path) -> None:
    text, config, says = BUILT[what]
    path = write(tmp_path, HEADING + text)
    with pytest.raises(CheckpointError, match=says) as caught:
        examine(job(path, "Net", config), tmp_path)
    one_sentence(caught.value)
    assert str(path) in str(caught.value) or "Net" in str(caught.value)
    assert not (tmp_path / "source").exists()


def test_a_main_guard_may_hold_all_that(tmp_path: Path) -> None:
    guarded = "if __name__ == '__main__':\n    net = Net().cuda()\n    for _ in range(3):\n        open('/home/me/x')\n"
    harmless = "import re\nWORD = re.compile('[a-z]+')\nSIZES = {'small': 1}\n"
    found = examine(job(write(tmp_path, HEADING + harmless + NET + guarded), "Net", {}), tmp_path)
    assert found["auto_class"] == "AutoModelForCausalLM"


def test_a_notebook_a_missing_file_and_a_class_without_a_name(tmp_path: Path) -> None:
    (tmp_path / "my.ipynb").write_text("{}")
    for source, says in (
        (tmp_path / "my.ipynb", "is a notebook: put the cell"),
        (tmp_path / "none.py:Net", "there is no such file"),
        (write(tmp_path, HEADING + NET + NET.replace("Net", "Other")), "name the class after a colon"),
    ):
        with pytest.raises(CheckpointError, match=says) as caught:
            adopt(str(source), tmp_path / "out")
        one_sentence(caught.value)


def test_classes_in_memory_that_no_file_defines(tmp_path: Path) -> None:
    class Local(nn.Module):
        pass

    in_main = type("Net", (nn.Module,), {"__module__": "__main__"})
    for source, says in (
        (Local(), "not at the top level of its file"),
        (in_main(), "is defined in __main__, a notebook or script"),
        (nn.Linear(2, 2), "is a class of torch"),
        (dict, "is not an nn.Module"),
    ):
        with pytest.raises(CheckpointError, match=says) as caught:
            adopt(source, tmp_path / "out")
        one_sentence(caught.value)


def test_weights_of_another_model(tmp_path: Path) -> None:
    path = write(tmp_path, HEADING + NET)
    for state, says in (
        ({"out.weight": torch.zeros(20, 8)}, "lacks out.bias, table.weight"),
        (
            {"table.weight": torch.zeros(30, 8), "out.weight": torch.zeros(30, 8), "out.bias": torch.zeros(30)},
            "has the shape",
        ),
    ):
        torch.save(state, tmp_path / "net.pt")
        with pytest.raises(CheckpointError, match=says) as caught:
            examine(job(path, "Net", {}, weights=str(tmp_path / "net.pt")), tmp_path)
        one_sentence(caught.value)


def test_a_field_that_two_arguments_have(tmp_path: Path) -> None:
    text = (AUTHORS / "bert_cls.py").read_text().replace("args.dropout", "args.hidden_size")
    text = text.replace("super(BertForCLS, self).__init__(config)", "super().__init__(config)")
    config = {**BERT, "num_classes": 3, "cls_hidden": 24}
    with pytest.raises(CheckpointError, match="'hidden_size' is read from two arguments"):
        examine(job(write(tmp_path, text), "BertForCLS", config), tmp_path)


def test_config_fields_on_the_command_line() -> None:
    assert split_fields("a=1,b=[2,3],c=x,y,d='p,q'") == ["a=1", "b=[2,3]", "c=x,y", "d='p,q'"]
