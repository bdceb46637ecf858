"""An independent reader of the same files, without transformers, computes the same logits for every switch."""

from pathlib import Path

import pytest
import torch
from plain_gpt2 import PlainGPT2
from tiny import SWITCHES, largest_difference, mygpt2_config
from transformers import AutoModelForCausalLM

from mymodels import MyGPT2ForCausalLM

HUB_REPO = Path(__file__).parents[2] / "hub_repo"


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_same_logits(switches: dict, tmp_path: Path) -> None:
    model = MyGPT2ForCausalLM(mygpt2_config(**switches)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero in a new model
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokens = torch.randint(2, 97, (15,))
    assert largest_difference(PlainGPT2(tmp_path).logits(tokens), model(tokens[None]).logits[0]) <= 1e-5


def test_the_committed_repo() -> None:
    model = AutoModelForCausalLM.from_pretrained(HUB_REPO / "mygpt2")
    tokens = torch.randint(0, model.config.vocab_size, (100,))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    assert largest_difference(PlainGPT2(HUB_REPO / "mygpt2").logits(tokens), expected) <= 1e-4


def test_the_reader_is_short_and_imports_no_transformers() -> None:
    source = (Path(__file__).parents[1] / "plain_gpt2.py").read_text()
    assert len(source.splitlines()) <= 150
    assert "import transformers" not in source and "from transformers" not in source and "mymodels" not in source
