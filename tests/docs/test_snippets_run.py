"""Every snippet of README and docs/ that can run here does, page by page, in the order in which a reader meets them.

The Chinese README has the English one's snippets, which `test_pages.py` compares.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_python
from docs.pages import PAGES, ROOT, Block, blocks_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

pytestmark = pytest.mark.slow

_TEXTS = ("the film was good", "the film was bad", "a good day at sea", "a bad day at sea")


def _runs(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language in ("python", "bash") and block.reason is None]


def _tokenizer(special: dict[str, str]) -> PreTrainedTokenizerFast:
    words = [*special.values(), *sorted({word for text in _TEXTS for word in text.split()})]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special["unk_token"]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **special)


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder where the names that the pages use are: small stock models under their Hub ids, data, the shipped folders."""
    desk = tmp_path_factory.mktemp("desk")
    torch.manual_seed(0)
    decoder = _tokenizer({"unk_token": "<unk>", "eos_token": "<end>", "pad_token": "<pad>"})
    config = GPT2Config(vocab_size=len(decoder), n_positions=64, n_embd=48, n_layer=3, n_head=12)
    GPT2LMHeadModel(config).save_pretrained(desk / "gpt2")
    decoder.save_pretrained(desk / "gpt2")
    special = {
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
    }
    encoder = _tokenizer(special)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=len(encoder), max_position_embeddings=64, **sizes)).save_pretrained(
        desk / "bert-base-uncased"
    )
    encoder.save_pretrained(desk / "bert-base-uncased")
    (desk / "reviews.csv").write_text("text,label\n" + "".join(f"{t},{'bad' in t}\n" for t in _TEXTS * 8))
    (desk / "book.txt").write_text("\n\n".join(_TEXTS * 60))
    (desk / "texts.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in _TEXTS))
    shutil.copytree(ROOT / "hub_repo", desk / "hub_repo")
    return desk


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if _runs(page) and page.suffixes != [".zh-CN", ".md"]],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_snippets_of_a_page_run(page: Path, desk: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(desk, here)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "EDITOR": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for block in _runs(page):
        # exit code 1 of `inspect --diff` and 3 of `verify` have meanings that a page may show
        if block.language == "bash":
            command = ["bash", "-euc", block.code]
            done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)
        else:
            done = warm_python.run([sys.executable, "-c", block.code], cwd=here, env=env)
        assert done.returncode == 0, f"{block.place}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
