"""The text of the wrapper's `forward`."""

from typing import Any

from .probing import MASK_FORMS, PER_ROW, Probe
from .write_generation import within_encoder_kept


def write_forward(probe: Probe, output: str) -> str:
    """The method's text, not indented.

    Args:
        output: name of the `ModelOutput` class.
    """
    call = probe.call
    roles = list(call.arguments.values())
    has_loss = probe.loss.kind != "none"
    masks = {name: role for name, role in call.arguments.items() if isinstance(role, str) and role in MASK_FORMS}
    in_dict = sorted(
        {key for role in roles if isinstance(role, list) for key in role} - {"input_ids", "attention_mask"}
    )
    more = in_dict + (["token_type_ids"] if "token_type_ids" in roles else [])
    takes_mask = probe.padding != "none" or bool(masks) or any(isinstance(role, list) for role in roles)
    two = "decoder_input_ids" in roles
    names = [*(["attention_mask"] if takes_mask else []), *more, *(["decoder_input_ids"] if two else [])]
    labels = ["start_positions", "end_positions"] if probe.kind == "span" else ["labels"]
    names += labels if has_loss else []
    lines = ["@can_return_tuple", "def forward(", "    self,"]
    lines += [f"    {call.main}: torch.Tensor" + (" | None = None," if _keeps_source(probe) else ",")]
    lines += [f"    {name}: torch.Tensor | None = None," for name in names]
    if _keeps_source(probe):
        lines.append("    encoder_outputs: EncoderOutput | None = None,")
        names.append("encoder_outputs")
    lines += ["    **kwargs: Any,", f") -> {output}:"]
    body = [*_docstring(probe, names), *_refusals(probe, takes_mask), *_inputs(probe, masks)]
    values, setup = _values(probe, masks, in_dict)
    body += setup
    if probe.kind == "span":
        body += _spans(probe, values, has_loss)
    elif probe.loss.kind == "own":
        body += _own_loss(probe, values)
    else:
        comment = "  # with targets, it returns every token's logits" if probe.dummy else ""
        name = "hidden_states" if probe.kind == "body" else "logits"
        body += _in_encoder(probe, _call(f"{name} = self.net(", values, f"){probe.logits}", comment))
    result = "last_hidden_state=hidden_states"
    if probe.kind == "span":
        result = f"{'loss=loss, ' if has_loss else ''}start_logits=start_logits, end_logits=end_logits"
    elif probe.kind != "body":
        body += _moved_back(probe) + (_loss(probe) if probe.loss.kind == "made" else [])
        result = "loss=loss, logits=logits" if has_loss else "logits=logits"
    body.append(f"return {output}({result})")
    return "\n".join([*lines, *(f"    {line}" if line else "" for line in body)])


def _keeps_source(probe: Probe) -> bool:
    """Whether generation hands the source on in `encoder_outputs`."""
    return probe.kind == "seq2seq" and probe.generates


def _in_encoder(probe: Probe, lines: list[str]) -> list[str]:
    return within_encoder_kept(lines, dotted(probe.encoder)) if probe.encoder else lines


def dotted(path: str) -> str:
    """A path of modules as Python writes it; children of a list by number."""
    first, *rest = path.split(".")
    return first + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in rest)


def _inputs(probe: Probe, masks: dict[str, str]) -> list[str]:
    """The lines that prepare the arguments of the module's call."""
    roles, lines = list(probe.call.arguments.values()), []
    if _keeps_source(probe):
        lines += ["if encoder_outputs is not None:", "    input_ids = encoder_outputs.input_ids"]
    if any(isinstance(role, list) for role in roles) or set(masks) & set(probe.required):
        lines += ["if attention_mask is None:", "    attention_mask = torch.ones_like(input_ids)"]
    segments = [name for name, role in probe.call.arguments.items() if role == "token_type_ids"]
    if set(segments) & set(probe.required):
        lines += ["if token_type_ids is None:", "    token_type_ids = torch.zeros_like(input_ids)"]
    if "decoder_input_ids" in roles:
        if probe.kind == "seq2seq" and probe.loss.kind != "none":
            lines += [
                "if decoder_input_ids is None and labels is not None:",
                "    decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)",
            ]
        lines += [
            "if decoder_input_ids is None:",
            '    raise ValueError("give decoder_input_ids, the target up to the token before each label")',
        ]
    if probe.padding == "ids":
        lines += [
            "if attention_mask is not None:  # the module leaves out this id",
            f"    input_ids = input_ids.masked_fill(attention_mask == 0, {probe.pad})",
        ]
    if probe.padding == "moved":
        lines += [
            "places = None if attention_mask is None else padding_last(attention_mask)",
            "if places is not None:  # padding behind the tokens, where no token sees it",
            "    input_ids = input_ids.scatter(1, places, input_ids)",
        ]
        lines += ["    attention_mask = attention_mask.scatter(1, places, attention_mask)"] if masks else []
        if "token_type_ids" in roles:
            missing = "" if set(segments) & set(probe.required) else "None if token_type_ids is None else "
            lines.append(f"    token_type_ids = {missing}token_type_ids.scatter(1, places, token_type_ids)")
    for form in dict.fromkeys(form for form in masks.values() if form != "attention_mask"):
        always = set(masks) & set(probe.required)
        lines.append(f"mask = {form}" if always else f"mask = None if attention_mask is None else {form}")
    return lines


def _values(probe: Probe, masks: dict[str, str], in_dict: list[str]) -> tuple[list[str], list[str]]:
    """The arguments of the module's call, and lines before it."""
    written, setup = [], []
    for number, (name, role) in enumerate(probe.call.arguments.items()):
        value: Any = "mask" if name in masks and role != "attention_mask" else role
        if isinstance(role, list):
            value = "{" + ", ".join(f'"{key}": {key}' for key in role) + "}"
            if in_dict:
                setup = [
                    f"{name} = {value}",
                    f"{name} = {{key: value for key, value in {name}.items() if value is not None}}",
                ]
                value = name
        if number and role == "input_ids":  # what stands for the labels may be viewed as a flat row
            value = "input_ids.contiguous()"
        written.append(str(value) if number == 0 else f"{name}={value}")
    return written, setup


def _call(start: str, values: list[str], end: str, comment: str = "") -> list[str]:
    line = f"{start}{', '.join(values)}{end}{comment}"
    if len(line) <= 108:
        return [line]
    return [start.rstrip(), *(f"    {value}," for value in values), f"{end}{comment}"]


def _own_loss(probe: Probe, values: list[str]) -> list[str]:
    loss, lines = probe.loss, ["targets = labels"]
    steps = []
    if probe.padding == "moved":
        steps += ["if places is not None:", "    targets = targets.scatter(1, places, targets)"]
    if loss.shifted:
        steps.append("targets = nn.functional.pad(targets[:, 1:], (0, 1), value=-100)")
    if loss.ignored is not None and loss.ignored != -100:
        steps.append(f"targets = targets.masked_fill(targets == -100, {loss.ignored})  # what the module leaves out")
    if loss.ignored is None and probe.kind not in PER_ROW:
        steps += [
            "if (targets == -100).any():",
            '    raise ValueError("the loss of this model leaves no label out: give rows of one length, without -100")',
        ]
    if steps:
        lines += ["if targets is not None:", *(f"    {step}" for step in steps)]
    lines += _in_encoder(probe, _call("outputs = self.net(", [*values, f"{loss.argument}=targets"], ")"))
    if loss.logits == probe.logits:
        lines += [f"logits = outputs{probe.logits}", f"loss = None if labels is None else outputs{loss.path}"]
    else:  # what is returned has another form with labels
        lines += [
            f"logits = outputs{probe.logits} if labels is None else outputs{loss.logits}",
            f"loss = None if labels is None else outputs{loss.path}",
        ]
    return lines


def _spans(probe: Probe, values: list[str], has_loss: bool) -> list[str]:
    lines = _call("outputs = self.net(", values, ")")
    lines.append(f"start_logits, end_logits = outputs{probe.logits}, outputs{probe.second}")
    if has_loss:
        lines += [
            "loss = None",
            "if start_positions is not None and end_positions is not None:",
            "    first = nn.functional.cross_entropy(start_logits, start_positions)",
            "    last = nn.functional.cross_entropy(end_logits, end_positions)",
            "    loss = (first + last) / 2",
        ]
    return lines


def _moved_back(probe: Probe) -> list[str]:
    if probe.padding != "moved":
        return []
    return [
        "if places is not None:",
        "    logits = logits.gather(1, places[..., None].expand_as(logits))",
    ]


def _loss(probe: Probe) -> list[str]:
    ignored, lines = probe.loss.ignored, []
    if ignored is not None and ignored != -100:
        lines.append(f"labels = labels.masked_fill(labels == {ignored}, -100)  # as the module's own loss does")
    if probe.kind in ("causal", "masked"):
        lines.append("loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)")
    else:
        flat, target = ("logits", "labels") if probe.kind in PER_ROW else ("logits.flatten(0, 1)", "labels.flatten()")
        lines += [
            "# the mean over all labels of a step that is accumulated, where the trainer says how many there are",
            'count = kwargs.get("num_items_in_batch")',
            'reduction = "mean" if count is None else "sum"',
            f"loss = nn.functional.cross_entropy({flat}, {target}, reduction=reduction)",
            "loss = loss if count is None else loss / count",
        ]
    return ["loss = None", "if labels is not None:", *(f"    {line}" for line in lines)]


def _refusals(probe: Probe, takes_mask: bool) -> list[str]:
    lines = []
    if probe.padding == "none" and probe.call.main == "input_ids":
        name = "attention_mask" if takes_mask else "mask"
        lines += [] if takes_mask else ['mask = kwargs.pop("attention_mask", None)']
        lines += [
            f"if {name} is not None and not {name}.all():",
            '    raise ValueError("this model cannot leave out padding: give rows of one length")',
        ]
    return [*lines, "refuse_unknown(self, kwargs)"]


def _docstring(probe: Probe, names: list[str]) -> list[str]:
    image = list(next(iter(probe.inputs.values())).shape)
    labels = {
        "causal": "`input_ids` itself, shifted inside; -100 is left out",
        "image": "a class per image",
        "audio": "a class per row",
        "sequence": "a class per row",
    }.get(probe.kind, "a class per token, -100 is left out")
    if probe.loss.kind == "own" and probe.kind in PER_ROW:
        labels = "as the module's own loss takes them"
    what = {
        "input_ids": "token ids `[batch, length]`.",
        "pixel_values": f"images `{image}`, or as many and as large as the module takes.",
        "input_values": "numbers of the shape that the module takes.",
        "attention_mask": "1 at tokens, 0 at padding.",
        "token_type_ids": "which segment a token is of, `[batch, length]`.",
        "decoder_input_ids": "token ids of the target `[batch, target length]`, one place before the labels; made of these if there are any.",
        "labels": f"{labels}.",
        "start_positions": "the first token of each answer, `[batch]`.",
        "end_positions": "the last token of each answer, `[batch]`.",
        "encoder_outputs": "what `get_encoder()` gives for the source, instead of `input_ids`.",
    }
    given = [probe.call.main, *names]
    return ['"""', "Args:", *(f"    {name}: {what.get(name, 'passed on')}" for name in given), '"""']
