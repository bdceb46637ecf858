"""The seven modules of `authors`, each with small sizes."""

from pathlib import Path

AUTHORS = Path(__file__).parent / "authors"
BERT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
# file → class, the constructor's arguments, the Auto class it is for
CASES = {
    "gpt": (
        "GPT",
        {"context": 32, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 32},
        "AutoModelForCausalLM",
    ),
    "bert_cls": (
        "BertForCLS",
        {**BERT, "num_classes": 3, "dropout": 0.1, "cls_hidden": 24},
        "AutoModelForSequenceClassification",
    ),
    "encoder": ("Tagger", {"vocab": 50, "hidden": 32}, "AutoModelForTokenClassification"),
    "cnn": ("SmallCNN", {}, "AutoModelForImageClassification"),
    "my_gpt2": (
        "MyGPT2Model",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "AutoModel",
    ),
    "decoder": ("StoryDecoder", {"ntoken": 60, "d_model": 32, "nlayers": 2, "max_len": 64}, "AutoModelForCausalLM"),
    "seq2seq": ("Translator", {"src_vocab": 50, "tgt_vocab": 60, "dim": 32}, "AutoModelForSeq2SeqLM"),
}


def job(file: str | Path, name: str, config: dict, **more) -> dict:
    return {
        "file": str(file),
        "class": name,
        "config": config,
        "weights": None,
        "auto_class": None,
        "section": None,
        "allow_pickle": False,
        **more,
    }
