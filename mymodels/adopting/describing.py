"""Put together what the trials of a module show: a `Probe`."""

import inspect
from typing import Any

import torch
from torch import nn

from ..checkpoints import CheckpointError
from .author_file import AuthorFile
from .probing import LENGTH, Call, Probe, Prober, example_ids, find_outputs, take

KINDS = {  # how the head of the wrapper is called → its Auto class
    "causal": ("ForCausalLM", "AutoModelForCausalLM"),
    "masked": ("ForMaskedLM", "AutoModelForMaskedLM"),
    "tokens": ("ForTokenClassification", "AutoModelForTokenClassification"),
    "sequence": ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    "seq2seq": ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    "image": ("ForImageClassification", "AutoModelForImageClassification"),
    "body": ("Model", "AutoModel"),
}


def probe(
    module: nn.Module, file: AuthorFile, place: str, fields: dict[str, Any], auto_class: str | None = None
) -> Probe:
    """Run a module on small inputs and say what it is.

    Args:
        fields: the config's fields and their values; sizes among them are tried as the longest input.
        auto_class: what it is for, where that is known.

    Raises:
        CheckpointError: no inputs could be made up for it, or it cannot be for `auto_class`.
    """
    prober = Prober(module, file, place)
    call, inputs, output = prober.find_call()
    vocab, embeddings, decoder_vocab = None, "", None
    if call.main == "input_ids":
        embeddings, vocab = prober.embeddings(call, inputs)
        if vocab is None:
            vocab = next(
                (v for n, v in fields.items() if ("vocab" in n or "token" in n) and isinstance(v, int) and v > 2), None
            )
        if vocab is None:
            raise CheckpointError(
                f"{place}: no nn.Embedding takes the token ids, and no argument is called vocab_size: name it so"
            )
        inputs["input_ids"] = example_ids(vocab)
        if "decoder_input_ids" in inputs:
            decoder_vocab = _decoder_vocab(prober, call, inputs) or vocab
            inputs["decoder_input_ids"] = example_ids(decoder_vocab, seed=1)[:, : LENGTH - 2]
        output = _run(prober, call, inputs)
    path, logits = _main_output(output)
    dummy = False
    if (
        call.main == "input_ids"
        and logits.dim() == 3
        and logits.shape[1] == 1 != LENGTH
        and "decoder_input_ids" not in inputs
    ):
        for name in [
            n
            for n in prober.signature
            if n not in call.arguments and n in ("labels", "targets", "target", "y", "label")
        ]:
            full = call._replace(arguments={**call.arguments, name: "input_ids"})
            found = [
                (p, v) for p, v in find_outputs(_run(prober, full, inputs)) if v.shape[:2] == inputs["input_ids"].shape
            ]
            if found:
                call, dummy, (path, logits) = full, True, found[0]
    head = prober.head(call, inputs, logits, vocab)
    kind = _kind(prober, call, inputs, path, logits, vocab, decoder_vocab, head, auto_class)
    width = logits.shape[-1]
    if kind == "seq2seq":
        head = ""  # the tables of source and target are two: one size for both would be wrong
    padding = "none"
    if call.main == "input_ids" and vocab is not None:
        masked = prober.mask(call, path, vocab)
        if masked is not None:
            call, padding = masked, "mask"
        if kind == "causal":
            padding = "moved"
    limit = None
    if vocab is not None:
        sizes = [value for value in fields.values() if isinstance(value, int) and not isinstance(value, bool)]
        limit = prober.limit(call, vocab, sizes)
    labels, own_loss, note = prober.find_loss(_without_labels(call) if dummy else call, inputs, path, kind, width)
    if dummy:
        labels = next(n for n in call.arguments if call.arguments[n] == "input_ids" and n != next(iter(call.arguments)))
        if own_loss:  # its loss would be that of the inputs
            raise CheckpointError(
                f"{place}: forward returns the outputs of all tokens only with {labels}, and its loss is not the cross-entropy of "
                "the logits: return all logits without it too"
            )
    if padding != "none" or any(isinstance(role, list) for role in call.arguments.values()):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if padding == "mask":
            inputs["attention_mask"][1, LENGTH - 2 :] = 0
    name = "last_hidden_state" if kind == "body" else "logits"
    reference = take(_run(prober, call, inputs), path)
    return Probe(
        call=call,
        logits=path,
        kind=kind,
        width=width,
        vocab=vocab,
        limit=limit,
        embeddings=embeddings,
        head=head if kind in ("causal", "masked") else "",
        labels=labels,
        own_loss=own_loss,
        loss_note=note,
        dummy=dummy,
        padding=padding,
        encode=False,
        left=[n for n, p in prober.signature.items() if n not in call.arguments and n != labels and _named(p)],
        inputs=inputs,
        outputs={name: reference.contiguous()},
    )


def _named(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _without_labels(call: Call) -> Call:
    first = next(iter(call.arguments))
    return call._replace(arguments={n: r for n, r in call.arguments.items() if n == first or r != "input_ids"})


def _run(prober: Prober, call: Call, inputs: dict[str, torch.Tensor]) -> Any:
    from .build_module import in_words, line_in

    try:
        return call.run(prober.module, inputs)
    except Exception as error:
        raise CheckpointError(
            f"{prober.file.path}{line_in(error, prober.file.path)}: forward raises on made-up inputs: {in_words(error)}"
        ) from None


def _main_output(output: Any) -> tuple[str, torch.Tensor]:
    found = find_outputs(output)
    for key in ("logits", "last_hidden_state"):
        for path, value in found:
            if path == f'["{key}"]':
                return path, value
    return found[0]


def _decoder_vocab(prober: Prober, call: Call, inputs: dict[str, torch.Tensor]) -> int | None:
    """How many ids the table of the decoder's tokens knows."""
    return prober.embeddings(call, {**inputs, "looked_for": inputs["decoder_input_ids"]})[1]


def _kind(
    prober: Prober,
    call: Call,
    inputs: dict[str, torch.Tensor],
    path: str,
    logits: torch.Tensor,
    vocab: int | None,
    decoder_vocab: int | None,
    head: str,
    auto_class: str | None,
) -> str:
    kind = "body"
    if "decoder_input_ids" in call.arguments.values():
        kind = "seq2seq" if logits.dim() == 3 and logits.shape[-1] == decoder_vocab else "body"
    elif call.main == "input_ids" and logits.dim() == 3 and logits.shape[1] == LENGTH:
        if logits.shape[-1] == vocab and _is_vocabulary(prober, head, vocab):
            kind = "causal" if prober.is_causal(call, inputs, path, "input_ids", vocab) else "masked"
        elif head:
            kind = "tokens"
    elif call.main == "input_ids" and logits.dim() == 2 and head:
        kind = "sequence"
    elif call.main == "pixel_values" and logits.dim() == 2:
        kind = "image"
    if auto_class is None:
        return kind
    wanted = next((k for k, (_, auto) in KINDS.items() if auto == auto_class), None)
    if wanted is None:
        raise CheckpointError(
            f"{prober.place}: {auto_class!r} is none of {', '.join(auto for _, auto in KINDS.values())}"
        )
    dims = {"causal": 3, "masked": 3, "tokens": 3, "sequence": 2, "image": 2, "seq2seq": 3}.get(wanted)
    if dims is not None and logits.dim() != dims:
        raise CheckpointError(
            f"{prober.place}: its outputs have {logits.dim()} dimensions, those of {auto_class} have {dims}"
        )
    return wanted


def _is_vocabulary(prober: Prober, head: str, vocab: int | None) -> bool:
    """Whether outputs as wide as the vocabulary are logits: a linear layer of that width made them, or no width is equal."""
    table = [m for m in prober.module.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == vocab]
    return bool(head) or not any(part.embedding_dim == vocab for part in table)
