"""The complete workflow: train both models briefly, save them as Hub repo folders, load them in a new process, compare."""

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .hub import build_repo, load_in_clean_process
from .hub.build import check_output_dir
from .hub.card import Card
from .models.configuration_mybert import MyBertConfig
from .models.configuration_mygpt2 import MyGPT2Config
from .models.modeling_mybert import MyBertForSequenceClassification
from .models.modeling_mygpt2 import MyGPT2ForCausalLM
from .tables import print_table
from .training.evaluation import evaluate
from .training.loop import train
from .training.sample_text import Document, load_sample_text, passages
from .training.tokenizers import train_bert_tokenizer, train_gpt2_tokenizer

WINDOW = 128  # tokens per language-model example
PASSAGE = 96  # words per classifier example
LABELS = ["adult", "children"]
PROMPT = "The little girl looked at the"
DATA_NOTE = (
    "112 of the 140 public-domain book excerpts that ship with mymodels (Project Gutenberg passages written for "
    "children or for adults); results are on the other 28."
)
HELD_OUT = "28 held-out book excerpts"
TOLERANCE = 1e-5

Example = dict[str, torch.Tensor]


class Repo(NamedTuple):
    """A trained model, its folder, and what the check in a new process needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    auto_classes: list[str]
    metrics: list[
        tuple[str, float, str, float, bool]
    ]  # name, value, baseline's name and value, whether higher is better


def batches(examples: list[Example], size: int = 32) -> list[Example]:
    """Stack examples into batches of `size`."""
    chunks = [examples[i : i + size] for i in range(0, len(examples), size)]
    return [{name: torch.stack([example[name] for example in chunk]) for name in chunk[0]} for chunk in chunks]


def windows(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> list[Example]:
    """The documents, each followed by an end token, concatenated and split into windows of `WINDOW` tokens."""
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document.text, verbose=False).input_ids, tokenizer.eos_token_id]
    rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    return [{"input_ids": row, "labels": row} for row in rows]


def _unigram_loss(train_examples: list[Example], held_out: list[Example], vocab_size: int) -> float:
    """The baseline: nats per token of a unigram model with add-one smoothing."""
    counts = torch.ones(vocab_size)
    for example in train_examples:
        counts += torch.bincount(example["input_ids"], minlength=vocab_size)
    log_probabilities = (counts / counts.sum()).log()
    return -torch.cat([log_probabilities[example["input_ids"]] for example in held_out]).mean().item()


def _labelled_examples(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> list[Example]:
    texts, labels = zip(*passages(documents, PASSAGE))
    rows = tokenizer(list(texts), padding="max_length", truncation=True, max_length=WINDOW, return_tensors="pt")
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(LABELS.index(label))}
        for ids, mask, label in zip(rows.input_ids, rows.attention_mask, labels)
    ]


def make_mygpt2(output_dir: Path, num_train_epochs: int = 5, num_shards: int = 3) -> Repo:
    """Train a small MyGPT2 with rotary positions, RMSNorm and a gated MLP, and save it as a Hub repo folder."""
    training, held_out = load_sample_text("train"), load_sample_text("held_out")
    tokenizer = train_gpt2_tokenizer([d.text for d in training], vocab_size=1024, model_max_length=256)
    config = MyGPT2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        max_position_embeddings=256,
        position_embedding_type="rope",
        norm_type="rmsnorm",
        mlp_type="gated",
        activation_function="silu",
        qk_norm=True,
        attention_bias=False,
        mlp_bias=False,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = MyGPT2ForCausalLM(config)
    model.generation_config.no_repeat_ngram_size = 3
    examples, test = windows(tokenizer, training), windows(tokenizer, held_out)
    train(
        model,
        examples,
        num_train_epochs=num_train_epochs,
        per_device_train_batch_size=8,
        learning_rate=6e-3,
        weight_decay=0.01,
        description="MyGPT2, language model",
    )
    loss, _, _ = evaluate(model, batches(test))
    baseline = _unigram_loss(examples, test, len(tokenizer))
    card = Card(
        license="apache-2.0",
        language="en",
        name="MyGPT2 demo",
        repo_id="hub_repo/mygpt2",
        description="A tiny GPT-2 in its modern shape: rotary positions, RMSNorm, a gated MLP, grouped-query attention "
        "and normalised queries and keys. It shows that the code and the files load anywhere.",
        training_data=DATA_NOTE,
        limits=f"It continues English prose badly: it saw {len(examples) * WINDOW:,} tokens, {num_train_epochs} times. "
        "Not for any use beyond demonstration.",
        dataset=HELD_OUT,
        metrics={"loss (nats per token)": loss, "perplexity": math.exp(loss)},
    )
    _save(model, tokenizer, output_dir, card, num_shards)
    auto_classes = ["AutoModelForCausalLM", "AutoModel"]
    return Repo(model, tokenizer, output_dir, auto_classes, [("loss", loss, "token frequencies", baseline, False)])


def make_mybert(output_dir: Path, num_train_epochs: int = 5, num_shards: int = 3) -> Repo:
    """Train a small MyBert classifier of passages on the sample text, and save it as a Hub repo folder."""
    training, held_out = load_sample_text("train"), load_sample_text("held_out")
    tokenizer = train_bert_tokenizer([d.text for d in training], vocab_size=2048, model_max_length=256)
    config = MyBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=256,
        hidden_dropout_prob=0.2,
        pooling="attention",
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
        problem_type="single_label_classification",
    )
    torch.manual_seed(0)
    model = MyBertForSequenceClassification(config)
    examples, test = _labelled_examples(tokenizer, training), _labelled_examples(tokenizer, held_out)
    train(
        model,
        examples,
        num_train_epochs=num_train_epochs,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        description="MyBert, passage classifier",
    )
    loss, logits, labels = evaluate(model, batches(test))
    accuracy = (logits.argmax(dim=-1) == labels).float().mean().item()
    majority = Counter(example["labels"].item() for example in examples).most_common(1)[0][0]
    baseline = (labels == majority).float().mean().item()
    card = Card(
        license="apache-2.0",
        language="en",
        name="MyBert demo",
        repo_id="hub_repo/mybert",
        description="A tiny BERT that tells whether a passage comes from a book for children or for adults, with "
        "attention pooling. It shows that the code and the files load anywhere.",
        training_data=DATA_NOTE,
        limits="It knows 14 books, all from before 1929; the held-out passages are from the same books. "
        "Not for any use beyond demonstration.",
        dataset=HELD_OUT,
        metrics={"accuracy": accuracy, "loss": loss},
    )
    _save(model, tokenizer, output_dir, card, num_shards)
    auto_classes = ["AutoModelForSequenceClassification", "AutoModel"]
    metrics = [
        ("accuracy", accuracy, "majority class", baseline, True),
        ("loss", loss, "even odds", math.log(len(LABELS)), False),
    ]
    return Repo(model, tokenizer, output_dir, auto_classes, metrics)


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: Path, card: Card, num_shards: int
) -> None:
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    build_repo(model, tokenizer, output_dir, card=card, max_shard_size=size // num_shards)


def run_demo(output_dir: Path, console: Console | None = None) -> bool:
    """Create both repo folders in `output_dir`, load each in a new process, and print the checks.

    Args:
        output_dir: gets the folders `mygpt2` and `mybert`.
        console: where to print.

    Returns:
        True if every check held: each held-out result is better than its baseline, no tensor is missing, unexpected or
        mismatched, the code is the folder's, and the logits are equal within 1e-5.
    """
    console = console or Console()
    examples = passages(load_sample_text("held_out"), PASSAGE)[::20]
    texts, truth = [text for text, _ in examples], [label for _, label in examples]
    all_passed = True
    makers = {"mygpt2": make_mygpt2, "mybert": make_mybert}
    for name in makers:
        check_output_dir(output_dir / name)  # before minutes of training
    for name, make in makers.items():
        repo = make(output_dir / name)
        print_table(_file_table(repo.path), console)
        console.print(f"Loading {repo.path} in a new process: no mymodels, empty cache, offline …")
        report, outputs = load_in_clean_process(repo.path, repo.auto_classes, texts=texts, prompt=PROMPT)
        checks = [
            (
                f"held-out {metric}: {value:.3f}, {baseline_name}: {baseline:.3f}",
                value > baseline if higher_is_better else value < baseline,
            )
            for metric, value, baseline_name, baseline, higher_is_better in repo.metrics
        ]
        for auto_class in repo.auto_classes:
            checks += _load_checks(repo, auto_class, report["models"][auto_class], outputs[auto_class], texts)
        all_passed = all_passed and all(passed for _, passed in checks)
        print_table(_check_table(f"{name} under transformers {report['transformers']}", checks), console)
        if name == "mygpt2":
            continuation = report["models"]["AutoModelForCausalLM"]["continuation"]
            console.print(f"[bold]The sentence[/bold], continued there: {continuation!r}\n", highlight=False)
        else:
            print_table(_passage_table(texts, truth, outputs["AutoModelForSequenceClassification"]), console)
    verdict = "[bold green]Every check held.[/]" if all_passed else "[bold red]A check failed, see FAILED above.[/]"
    console.print(verdict)
    return all_passed


def _load_checks(
    repo: Repo, auto_class: str, seen: dict, output: torch.Tensor, texts: list[str]
) -> list[tuple[str, bool]]:
    model = repo.model.base_model if auto_class == "AutoModel" else repo.model
    batch = repo.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        difference = (model(**batch)[0] - output).abs().max().item()
    note = "" if difference == 0 else " (different kernels, because of another memory layout)"
    is_base = auto_class == "AutoModel"  # the base model has no place for the head's tensors
    stray = seen["missing_keys"] + seen["mismatched_keys"] + ([] if is_base else seen["unexpected_keys"])
    module = seen["class"].split(".")[0]
    return [
        (f"{auto_class}: {seen['class'].split('.')[-1]} from the folder's code", module == "transformers_modules"),
        (
            f"{auto_class}: no tensor missing, mismatched{'' if is_base else ' or unexpected'}: {stray or 'none'}",
            not stray,
        ),
        (
            f"{auto_class}: largest difference between its outputs there and here: {difference:.3g}{note}",
            difference <= TOLERANCE,
        ),
    ]


def _file_table(path: Path) -> Table:
    table = Table("file", "bytes", title=Text(str(path)), title_justify="left")
    table.columns[1].justify = "right"
    for file in sorted(path.iterdir()):
        table.add_row(file.name, f"{file.stat().st_size:,}")
    return table


def _check_table(title: str, checks: list[tuple[str, bool]]) -> Table:
    table = Table("check", "", title=title, title_justify="left")
    for text, passed in checks:
        table.add_row(text, "[green]ok[/]" if passed else "[red]FAILED[/]")
    return table


def _passage_table(texts: list[str], truth: list[str], logits: torch.Tensor) -> Table:
    table = Table("held-out passage", "written for", "classified there", title="MyBert", title_justify="left")
    for text, label, probabilities in zip(texts, truth, logits.softmax(dim=-1)):
        guess = int(probabilities.argmax())
        color = "green" if LABELS[guess] == label else "red"
        table.add_row(text[:50] + " …", label, f"[{color}]{LABELS[guess]}[/] {probabilities[guess]:.0%}")
    return table
