"""Run a module on trial inputs and collect the results in a `Probe`."""

import inspect
from typing import Any

import torch
from torch import nn

from ..checkpoints import CheckpointError
from .author_file import AuthorFile
from .build_module import error_text, line_in
from .finding_encoder import find_encoder, is_causal_decoder
from .finding_loss import find_loss, find_span_loss
from .masks import check_meaning, find_mask, find_pad
from .outputs import check_outputs, main_output, parts_of, span_outputs, take
from .probing import LENGTH, MASK_FORMS, Call, Probe, Prober, example_ids, find_outputs, is_labels, is_segments

KINDS = {  # class suffix of the wrapper → its Auto class
    "causal": ("ForCausalLM", "AutoModelForCausalLM"),
    "masked": ("ForMaskedLM", "AutoModelForMaskedLM"),
    "tokens": ("ForTokenClassification", "AutoModelForTokenClassification"),
    "sequence": ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    "seq2seq": ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    "image": ("ForImageClassification", "AutoModelForImageClassification"),
    "audio": ("ForAudioClassification", "AutoModelForAudioClassification"),
    "span": ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    "body": ("Model", "AutoModel"),
}


def probe(
    module: nn.Module,
    trial: nn.Module,
    file: AuthorFile,
    place: str,
    fields: dict[str, Any],
    auto_class: str | None = None,
) -> Probe:
    """Run a module on small inputs and determine its inputs, outputs and kind.

    Args:
        module: the module whose outputs are recorded.
        trial: a second instance, whose weights are changed so that no part, such as a head, is zero.
        fields: the config's fields and values; integers among them are tried as the longest input.
        auto_class: its Auto class, if known.

    Raises:
        CheckpointError: no suitable inputs were found, or its outputs do not fit `auto_class`.
    """
    prober = Prober(trial, file, place, fields)
    _copy_weights(module, trial)
    call, inputs, output = prober.find_call()
    _disturb(prober, call, inputs)
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
    path, logits, unused = main_output(prober, call, inputs, output, vocab)
    spans = (
        span_outputs(output, inputs["input_ids"].shape)
        if vocab is not None and "decoder_input_ids" not in inputs
        else []
    )
    if spans:
        path, logits = spans[0], take(output, spans[0])
        unused = [name for name in parts_of(output) if name not in spans]
    dummy = ""
    if vocab is not None and logits.dim() == 3 and logits.shape[1] == 1 and "decoder_input_ids" not in inputs:
        for name in [n for n in prober.signature if n not in call.arguments and is_labels(n)]:
            full = call._replace(arguments={**call.arguments, name: "input_ids"})
            found = [
                (p, v) for p, v in find_outputs(_run(prober, full, inputs)) if v.shape[:2] == inputs["input_ids"].shape
            ]
            if found:
                call, dummy, (path, logits), unused = full, name, found[0], []
                break
    check_outputs(prober, call, inputs, path, logits)
    head = prober.head(call, inputs, logits)
    if spans and auto_class in (None, KINDS["span"][1]):
        kind = "span"
    else:
        kind, spans = _kind(prober, call, inputs, path, logits, vocab, decoder_vocab, head, auto_class), []
    resizes = True
    if kind == "seq2seq":  # where source and target have tables of their own, one new size for both would be wrong
        target = prober.embeddings(call, {**inputs, "looked_for": inputs["decoder_input_ids"]})[0]
        resizes = bool(embeddings) and _same(prober.module, embeddings, target) and bool(head)
    generates, encoder = kind == "causal", ""
    if kind == "seq2seq" and vocab is not None and is_causal_decoder(prober, call, inputs, path):
        generates, encoder = True, find_encoder(prober, call, inputs, path, vocab)
    call, padding, pad = _padding(prober, call, inputs, path, kind, vocab)
    call = _with_segments(prober, call, inputs)
    limit = None
    if vocab is not None:
        sizes = [value for value in fields.values() if isinstance(value, int) and not isinstance(value, bool)]
        limit = prober.limit(call, vocab, sizes)
    if spans:
        loss = find_span_loss(prober, call, inputs, spans)
    else:
        loss = find_loss(prober, _without_labels(call) if dummy else call, inputs, path, kind, logits.shape[-1], dummy)
    if dummy and loss.kind != "made":  # its loss would be computed for dummy labels
        raise CheckpointError(
            f"{prober.at_forward()}: forward returns the outputs of all tokens only with {dummy}, and its loss is not the "
            "cross-entropy of the logits: return all logits without it too"
        )
    if padding != "none" or any(isinstance(role, list) or role in MASK_FORMS for role in call.arguments.values()):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if padding == "mask":
            inputs["attention_mask"][1, LENGTH - 2 :] = 0
    prober.module = module
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    reference = _run(prober, call, inputs)
    names = ["start_logits", "end_logits"] if spans else ["last_hidden_state" if kind == "body" else "logits"]
    outputs = {name: take(reference, at).contiguous() for name, at in zip(names, spans or [path])}
    return Probe(
        call=call,
        logits=path,
        second=spans[1] if spans else "",
        kind=kind,
        width=logits.shape[-1],
        vocab=vocab,
        limit=limit,
        embeddings=embeddings,
        head=head if kind in ("causal", "masked") or (kind == "seq2seq" and resizes) else "",
        resizes=resizes,
        loss=loss,
        generates=generates,
        encoder=encoder,
        dummy=bool(dummy),
        padding=padding,
        pad=pad,
        required=[n for n, p in prober.signature.items() if p.default is p.empty],
        left=[
            n for n, p in prober.signature.items() if n not in (*call.arguments, *loss.argument.split()) and _named(p)
        ],
        unused=unused,
        inputs=inputs,
        outputs=outputs,
    )


def _same(module: nn.Module, one: str, other: str) -> bool:
    return bool(other) and module.get_submodule(one) is module.get_submodule(other)


def _copy_weights(module: nn.Module, trial: nn.Module) -> None:
    """Copy the weights to the trial in float32, where rounding errors are small."""
    state = module.state_dict()
    trial.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
    trial.float().eval()


@torch.no_grad()
def _disturb(prober: Prober, call: Call, inputs: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    kept = {name: parameter.clone() for name, parameter in prober.module.named_parameters()}
    for parameter in prober.module.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    try:
        finite = all(value.isfinite().all() for _, value in find_outputs(call.run(prober.module, inputs)))
    except Exception:
        finite = False
    if not finite:
        for name, parameter in prober.module.named_parameters():
            parameter.copy_(kept[name])


def _padding(
    prober: Prober, call: Call, inputs: dict[str, torch.Tensor], path: str, kind: str, vocab: int | None
) -> tuple[Call, str, int | None]:
    """The call with a padding mask, how padding is excluded, and the module's own padding id."""
    if call.main != "input_ids" or vocab is None:
        return call, "none", None
    masked = find_mask(prober, call, path, vocab)
    if masked is None:
        check_meaning(prober, call, inputs, path)
    if kind == "causal":
        return masked or call, "moved", None
    if masked is not None:
        return masked, "mask", None
    tables = [part.padding_idx for part in prober.module.modules() if isinstance(part, nn.Embedding)]
    pad = find_pad(prober, call, path, vocab, tables)
    return call, "none" if pad is None else "ids", pad


def _with_segments(prober: Prober, call: Call, inputs: dict[str, torch.Tensor]) -> Call:
    """The call with `token_type_ids`, if forward can take them."""
    for name in [n for n in prober.signature if is_segments(n) and n not in call.arguments]:
        extended = call._replace(arguments={**call.arguments, name: "token_type_ids"})
        try:
            extended.run(prober.module, {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])})
        except Exception:
            continue
        return extended
    return call


def _named(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _without_labels(call: Call) -> Call:
    first = next(iter(call.arguments))
    return call._replace(arguments={n: r for n, r in call.arguments.items() if n == first or r != "input_ids"})


def _run(prober: Prober, call: Call, inputs: dict[str, torch.Tensor]) -> Any:
    try:
        return call.run(prober.module, inputs)
    except Exception as error:
        raise CheckpointError(
            f"{prober.file.path}{line_in(error, prober.file.path)}: forward raises on generated inputs: {error_text(error)}"
        ) from None


def _decoder_vocab(prober: Prober, call: Call, inputs: dict[str, torch.Tensor]) -> int | None:
    """The number of ids in the decoder's token embeddings."""
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
            kind = "causal" if prober.is_causal(call, inputs, lambda output: take(output, path), vocab) else "masked"
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
    if wanted == "span":
        raise CheckpointError(
            f"{prober.at_forward()}: forward returns no start_logits and end_logits, [batch, length] each"
        )
    dims = {"causal": 3, "masked": 3, "tokens": 3, "sequence": 2, "image": 2, "audio": 2, "seq2seq": 3}.get(wanted)
    if dims is not None and logits.dim() != dims:
        raise CheckpointError(
            f"{prober.place}: its outputs have {logits.dim()} dimensions, those of {auto_class} have {dims}"
        )
    return wanted


def _is_vocabulary(prober: Prober, head: str, vocab: int | None) -> bool:
    """Whether outputs as wide as the vocabulary are logits: from a linear layer of that width, or not wide by chance."""
    table = [m for m in prober.module.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == vocab]
    return bool(head) or not any(part.embedding_dim == vocab for part in table)
