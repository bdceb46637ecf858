"""Rows by token: another tokenizer, and pretrained word vectors."""

import gzip
from pathlib import Path

import pytest
import torch
from tiny import largest_difference
from warmstart.random_stock_models import stock_model

from mymodels import MyBertForMaskedLM, MyGPT2ForCausalLM, load_sample_text, warm_start
from mymodels.checkpoints import CheckpointError
from mymodels.training.tokenizers import train_bert_tokenizer, train_gpt2_tokenizer
from mymodels.warmstart.vocabulary import match_tokens, vector_name

TEXTS = [document.text for document in load_sample_text("train")]


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "old": train_gpt2_tokenizer(TEXTS[:40], vocab_size=400, model_max_length=64),
        "new": train_gpt2_tokenizer(TEXTS[60:], vocab_size=500, model_max_length=64),
        "bert": train_bert_tokenizer(TEXTS, vocab_size=300, model_max_length=64),
    }


@pytest.fixture
def gpt2(tokenizers, tmp_path: Path) -> Path:
    stock = stock_model("GPT2LMHeadModel", vocab_size=400, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    stock.save_pretrained(tmp_path / "gpt2")
    tokenizers["old"].save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_another_tokenizer(gpt2: Path, tokenizers) -> None:
    old, new = tokenizers["old"], tokenizers["new"]
    report = warm_start("mygpt2", gpt2, tokenizer=new)
    model = report.model
    assert isinstance(model, MyGPT2ForCausalLM) and model.config.vocab_size == len(new) == 500
    table, before = model.lm_head.weight, warm_start("mygpt2", gpt2).model.lm_head.weight
    same = pieces = 0
    for token, number in new.get_vocab().items():
        if token in old.get_vocab():
            assert torch.equal(table[number], before[old.get_vocab()[token]]), token
            same += 1
        else:
            cut = old(new.convert_tokens_to_string([token]), add_special_tokens=False).input_ids
            assert len(cut) > 1 and largest_difference(table[number], before[cut].mean(dim=0)) <= 1e-6, token
            pieces += 1
    assert report.coverage == {
        "tokens, same token": same, "tokens, same role": 0, "tokens, mean of old pieces": pieces, "tokens, mean of all": 0,
    }  # fmt: skip
    assert same > 250 and pieces > 50
    row = next(row for row in report.rows if "model.embed_tokens.weight" in row.targets)
    assert row.status == "resized" and row.kind == "approximate" and f"{same} of 500 kept" in row.how
    assert report.tokenizer is new


def test_tokens_of_another_kind_by_text_and_role(tokenizers) -> None:
    old, new = tokenizers["old"], tokenizers["bert"]
    rows, coverage = match_tokens(old, new, len(old), len(new))
    vocabulary = new.get_vocab()
    assert rows[vocabulary["[CLS]"]] == rows[vocabulary["[SEP]"]] == [old.bos_token_id]  # <|endoftext|> begins and ends
    word = next(token for token in vocabulary if token.startswith("##") and len(token) > 3)
    assert rows[vocabulary[word]] == old(word[2:], add_special_tokens=False).input_ids
    assert coverage["tokens, same role"] >= 3 and sum(coverage.values()) == len(new)


def test_a_larger_table_than_the_tokenizer_needs(gpt2: Path, tokenizers) -> None:
    report = warm_start("mygpt2", gpt2, tokenizer=tokenizers["new"], overrides={"vocab_size": 512})
    assert report.coverage["tokens, mean of all"] == 12
    table = report.model.lm_head.weight
    assert largest_difference(table[511], warm_start("mygpt2", gpt2).model.lm_head.weight.mean(dim=0)) <= 1e-6


def test_the_sources_own_tokenizer_goes_along(gpt2: Path, tokenizers, tmp_path: Path) -> None:
    report = warm_start("mygpt2", gpt2)
    assert len(report.tokenizer) == 400
    report.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file() and (tmp_path / "out" / "warm_start.json").is_file()


def test_no_tokenizer_to_compare_with(tokenizers) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer to match tokens with: pass source_tokenizer="):
        warm_start("mygpt2", stock_model("GPT2LMHeadModel"), tokenizer=tokenizers["new"])
    with pytest.raises(CheckpointError, match=r"no tokenizer could be loaded from nowhere"):
        warm_start("mygpt2", stock_model("GPT2LMHeadModel"), tokenizer="nowhere")


def vectors_file(folder: Path, words: list[str], width: int, header: bool, packed: bool) -> tuple[Path, torch.Tensor]:
    table = torch.randn(len(words), width)
    lines = [f"{len(words)} {width}"] if header else []
    lines += [" ".join([word, *(repr(value) for value in row.tolist())]) for word, row in zip(words, table)]
    data = ("\n".join(lines) + "\n").encode()
    path = folder / ("vectors.txt.gz" if packed else "vectors.txt")
    path.write_bytes(gzip.compress(data) if packed else data)
    return path, table


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("header", [False, True])
def test_word_vectors_alone(header: bool, packed: bool, tokenizers, tmp_path: Path) -> None:
    words = ["the", "and", "zebra-fish", "was", ". . ."]
    path, table = vectors_file(tmp_path, words, 32, header, packed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    report = warm_start("mybert", None, head="ForMaskedLM", word_vectors=path, tokenizer=tokenizers["bert"], overrides={**sizes, "vocab_size": 300})  # fmt: skip
    assert isinstance(report.model, MyBertForMaskedLM)
    embeddings, vocabulary = report.model.get_input_embeddings().weight, tokenizers["bert"].get_vocab()
    for i, word in enumerate(words):
        if word in vocabulary:
            assert torch.equal(embeddings[vocabulary[word]], table[i]), word
    assert report.coverage == {f"tokens with a vector in {path.name}": 3, f"tokens without one in {path.name}": 297}
    row = next(row for row in report.rows if row.sources == (path.name,))
    assert "3 of 300 rows" in row.how and "bert.embeddings.word_embeddings.weight" in row.targets
    assert 0.01 < embeddings[vocabulary["she"]].std() < 0.03  # the others start as usual


def test_word_vectors_over_a_checkpoint(gpt2: Path, tokenizers, tmp_path: Path) -> None:
    path, table = vectors_file(tmp_path, ["The", "the", "of"], 32, False, False)
    report = warm_start("mygpt2", gpt2, word_vectors=path, freeze_loaded=True)
    embeddings, vocabulary = report.model.get_input_embeddings().weight, tokenizers["old"].get_vocab()
    assert torch.equal(embeddings[vocabulary["Ġthe"]], table[1])
    before = warm_start("mygpt2", gpt2).model.get_input_embeddings().weight
    changed = [i for i in range(400) if not torch.equal(before[i], embeddings[i])]
    expected = [i for token, i in vocabulary.items() if vector_name(tokenizers["old"], token, {"The", "the", "of"})]
    assert changed == sorted(expected) and vocabulary["Ġof"] in changed
    assert not embeddings.requires_grad


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "the 1 2 3\n",
            r"vectors\.txt, line 1: a word and 32 numbers are needed for hidden_size=32, there are 4 parts",
        ),
        ("2 50\nthe 1\n", r"vectors\.txt has vectors of width 50, but hidden_size=32: they must be equal"),
        (
            "the " + "1 " * 31 + "x\n",
            r"vectors\.txt, line 1: the vector of 'the' has a value that is not a finite number",
        ),
        (
            "the " + "1 " * 31 + "nan\n",
            r"vectors\.txt, line 1: the vector of 'the' has a value that is not a finite number",
        ),
        ("zzz " + "1 " * 31 + "1\n", r"vectors\.txt has vectors for no word of the tokenizer"),
        ("", r"vectors\.txt has vectors for no word of the tokenizer"),
    ],
)
def test_bad_vectors(text: str, sentence: str, gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "vectors.txt").write_text(text)
    with pytest.raises(CheckpointError, match=sentence):
        warm_start("mygpt2", gpt2, word_vectors=tmp_path / "vectors.txt")


def test_damaged_vectors(gpt2: Path, tmp_path: Path) -> None:
    packed = vectors_file(tmp_path, ["the", *map(str, range(500))], 32, False, True)[0].read_bytes()
    (tmp_path / "vectors.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(CheckpointError, match=r"vectors\.gz, after line \d+: cannot be read"):
        warm_start("mygpt2", gpt2, word_vectors=tmp_path / "vectors.gz")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing of word vectors"):
        warm_start("mygpt2", gpt2, word_vectors=tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="there is no source"):
        warm_start("mygpt2", None)
