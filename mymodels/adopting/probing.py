"""Run the author's module to see what it is: what it takes, what it returns, what its outputs depend on.

Nothing is taken from a name alone: a name only says what is tried first. What a trial does not show is left out.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ..checkpoints import CheckpointError
from .author_file import AuthorFile, is_unpacked, keys_read
from .build_module import in_words, line_in, quiet

ROWS, LENGTH = 2, 7
_DECODER = re.compile(r"^(tgt|trg|target(_ids)?|decoder_input_ids|tgt_ids|trg_ids|dec\w*|y|output_ids)$")
_LABELS = re.compile(r"^(labels?|targets?|tgt|y|y_true|gold|tags)$")
_MASK = re.compile(r"mask")
_IDS = re.compile(r"^(input_ids|ids|idx|x|tokens?|token_ids|src|source|inputs?|input_seq|text|seq|batch_inputs|batch)$")
_PASSED_ON = (
    "token_type_ids",
    "position_ids",
)  # of transformers' arguments, those that an author's forward may name too
MASK_FORMS: dict[
    str, Callable[[torch.Tensor], torch.Tensor]
] = {  # how a mask of ones at tokens is written for the module
    "attention_mask": lambda mask: mask,
    "attention_mask == 0": lambda mask: mask == 0,
    "attention_mask.bool()": lambda mask: mask.bool(),
    "attention_mask.to(self.dtype)": lambda mask: mask.float(),
    "attention_mask[:, None, None, :]": lambda mask: mask[:, None, None, :],
    "attention_mask[:, None, None, :].bool()": lambda mask: mask[:, None, None, :].bool(),
}


class Call(NamedTuple):
    """How the module is called.

    Attributes:
        arguments: name of the module's parameter → what it is given, in terms of the wrapper's `forward`:
            `input_ids`, `decoder_input_ids`, `pixel_values`, `input_values`, a key of `MASK_FORMS`, or a list of keys
            of a dictionary.
        main: which input comes first.
        first: whether the first argument is passed by its place.
    """

    arguments: dict[str, Any]
    main: str

    def run(self, module: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
        given: dict[str, Any] = {}
        for name, role in self.arguments.items():
            if isinstance(role, list):
                given[name] = {key: inputs[key] for key in role if key in inputs}
            elif role in MASK_FORMS:
                given[name] = MASK_FORMS[role](inputs["attention_mask"]) if "attention_mask" in inputs else None
            else:
                given[name] = inputs.get(role)
        with quiet(), torch.no_grad():
            return module(**{name: value for name, value in given.items() if value is not None})


class Probe(NamedTuple):
    """What was found out about a module; see the attributes' comments."""

    call: Call
    logits: str  # how the outputs are taken from what the module returns: "", "[0]", "['logits']" or ".logits"
    kind: str  # causal, masked, tokens, sequence, seq2seq, image, body
    width: int  # last dimension of the outputs
    vocab: int | None  # ids that the embeddings know, None for no tokens
    limit: int | None  # longest input, where a longer one raises
    embeddings: str  # path of the input embeddings, or ""
    head: str  # path of the output embeddings, or ""
    labels: str  # the module's own argument for labels, or ""
    own_loss: str  # "" if the loss is the usual cross-entropy or none; else how it is taken from what is returned
    loss_note: str  # what is known of the module's loss, for the report
    dummy: bool  # whether all positions are returned only if labels are given
    padding: str  # "mask" (the module takes one that works), "moved" (causal: padding goes behind the tokens), "none"
    encode: bool  # whether decode(tgt, encode(src)) is forward(src, tgt)
    left: list[str]  # optional arguments of forward that are not passed
    inputs: dict[str, torch.Tensor]  # what was run
    outputs: dict[str, torch.Tensor]  # and what came out, by the wrapper's names


def example_ids(vocab: int, rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = 1 if vocab > 2 else 0  # 0 is often padding
    return torch.randint(low, vocab, (rows, length), generator=generator)


def take(output: Any, path: str) -> Any:
    """What `path` (`""`, `[0]`, `['logits']`) names in an output."""
    if not path:
        return output
    key = path[1:-1]
    return output[int(key)] if key.lstrip("-").isdigit() else output[key.strip("'\"")]


def find_outputs(output: Any) -> list[tuple[str, torch.Tensor]]:
    """The floating-point tensors that a module returns with more than one number, by path."""
    if isinstance(output, torch.Tensor):
        items: list[tuple[str, Any]] = [("", output)]
    elif isinstance(output, (tuple, list)):
        items = [(f"[{number}]", value) for number, value in enumerate(output)]
    elif hasattr(output, "items"):
        items = [(f'["{key}"]', value) for key, value in output.items()]
    else:
        items = []
    return [(p, v) for p, v in items if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() > 0]


class Prober:
    """Finds out what a built module is; `probe` is the result."""

    def __init__(self, module: nn.Module, file: AuthorFile, place: str, task: str | None = None):
        self.module, self.file, self.place, self.task = module, file, place, task
        self.signature = inspect.signature(module.forward).parameters
        self.errors: list[str] = []

    # ---- what it takes

    def calls(self) -> Iterator[tuple[Call, dict[str, torch.Tensor]]]:
        """Ways to call it, with inputs, the likeliest first."""
        named = [p for p in self.signature.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        required = [p.name for p in named if p.default is p.empty]
        if not named:
            raise CheckpointError(
                f"{self.place}: forward takes no named argument, so nothing can be passed to it: name its inputs"
            )
        first = required[0] if required else named[0].name
        masks = [p.name for p in named if _MASK.search(p.name) and p.name != first]
        others = [name for name in required if name != first and name not in masks]
        text = any(isinstance(part, nn.Embedding) for part in self.module.modules())
        for ids in self._ids() if text or not self._pictures() else ():
            keys = sorted(keys_read(self.file, first)) or ["input_ids", "attention_mask"]
            if keys_read(self.file, first) or is_unpacked(self.file, first):
                keys = sorted(
                    {"input_ids", "attention_mask", *keys} & {"input_ids", "attention_mask", "token_type_ids"}
                )
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                yield Call({first: keys}, "input_ids"), inputs
            if len(others) == 1 and (_DECODER.match(others[0]) or not _LABELS.match(others[0])):
                decoder = {"input_ids": ids, "decoder_input_ids": ids[:, : LENGTH - 2].flip(1)}
                yield Call({first: "input_ids", others[0]: "decoder_input_ids"}, "input_ids"), decoder
            if not others:
                yield Call({first: "input_ids"}, "input_ids"), {"input_ids": ids}
                for mask in [name for name in masks if name in required]:
                    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                    for form in MASK_FORMS:
                        yield Call({first: "input_ids", mask: form}, "input_ids"), inputs
            elif len(others) == 1 and _LABELS.match(others[0]):
                yield Call({first: "input_ids", others[0]: "input_ids"}, "input_ids"), {"input_ids": ids}
        if not others:
            for pixels in self._pictures():
                yield Call({first: "pixel_values"}, "pixel_values"), {"pixel_values": pixels}
            for values in self._vectors():
                yield Call({first: "input_values"}, "input_values"), {"input_values": values}

    def _ids(self) -> Iterator[torch.Tensor]:
        yield example_ids(3)

    def _pictures(self) -> list[torch.Tensor]:
        convolution = next((part for part in self.module.modules() if isinstance(part, nn.Conv2d)), None)
        if convolution is None:
            return []
        generator = torch.Generator().manual_seed(0)
        return [
            torch.rand(ROWS, convolution.in_channels, side, side, generator=generator) * 2 - 1
            for side in (32, 28, 64, 224)
        ]

    def _vectors(self) -> list[torch.Tensor]:
        linear = next((part for part in self.module.modules() if isinstance(part, nn.Linear)), None)
        width = getattr(linear, "in_features", None) or getattr(
            next((p for p in self.module.modules() if isinstance(p, (nn.LSTM, nn.GRU))), None), "input_size", None
        )
        if width is None:
            return []
        generator = torch.Generator().manual_seed(0)
        shapes = ((ROWS, width), (ROWS, LENGTH, width), (ROWS, width, LENGTH))
        return [torch.rand(*shape, generator=generator) * 2 - 1 for shape in shapes]

    def find_call(self) -> tuple[Call, dict[str, torch.Tensor], Any]:
        for call, inputs in self.calls():
            try:
                output = call.run(self.module, inputs)
            except Exception as error:
                self.errors.append(f"{in_words(error)}{_at(error, self.file)}")
                continue
            if find_outputs(output):
                return call, inputs, output
            self.errors.append(f"it returns {type(output).__name__} without a floating-point tensor")
        required = [
            p.name for p in self.signature.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        why = f"; of {len(self.errors)} trials the first gives {self.errors[0]}" if self.errors else ""
        raise CheckpointError(
            f"{self.place}: no inputs could be made up for forward({', '.join(required)}): tokens, pictures and vectors were tried{why}"
        )

    def embeddings(self, call: Call, inputs: dict[str, torch.Tensor]) -> tuple[str, int | None]:
        """The module that the token ids go into, and how many ids it knows."""
        found: list[str] = []
        ids = inputs.get("looked_for", inputs["input_ids"])

        def look(name: str) -> Callable:
            def hook(part: nn.Module, args: tuple, output: Any) -> None:
                if (
                    args
                    and isinstance(args[0], torch.Tensor)
                    and args[0].shape == ids.shape
                    and torch.equal(args[0], ids)
                ):
                    found.append(name)

            return hook

        hooks = [
            part.register_forward_hook(look(name))
            for name, part in self.module.named_modules()
            if isinstance(part, nn.Embedding)
        ]
        try:
            call.run(self.module, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        if not found:
            return "", None
        return found[0], self.module.get_submodule(found[0]).num_embeddings  # type: ignore[return-value]

    def head(self, call: Call, inputs: dict[str, torch.Tensor], logits: torch.Tensor, vocab: int | None) -> str:
        """The linear layer whose output the logits are."""
        found: list[str] = []

        def look(name: str) -> Callable:
            def hook(part: nn.Module, args: tuple, output: torch.Tensor) -> None:
                if isinstance(output, torch.Tensor) and output.shape == logits.shape and torch.equal(output, logits):
                    found.append(name)

            return hook

        hooks = [
            part.register_forward_hook(look(name))
            for name, part in self.module.named_modules()
            if isinstance(part, nn.Linear)
        ]
        try:
            call.run(self.module, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return found[-1] if found else ""

    # ---- what it depends on

    def is_causal(self, call: Call, inputs: dict[str, torch.Tensor], path: str, main: str, vocab: int) -> bool:
        changed = {name: tensor.clone() for name, tensor in inputs.items()}
        changed[main][:, -1] = (changed[main][:, -1] + 1) % vocab
        before, after = (take(call.run(self.module, x), path) for x in (inputs, changed))
        return bool(torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(before[:, -1], after[:, -1]))

    def mask(self, call: Call, path: str, vocab: int, seed: int = 3) -> Call | None:
        """The call with a mask that makes a padded row give what it gives alone; None if there is none."""
        ids = example_ids(vocab, ROWS, LENGTH, seed)
        alone = {"input_ids": ids[:1, : LENGTH - 3], "attention_mask": torch.ones(1, LENGTH - 3, dtype=torch.long)}
        padded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        padded["attention_mask"][0, LENGTH - 3 :] = 0
        if "decoder_input_ids" in call.arguments.values():
            alone["decoder_input_ids"], padded["decoder_input_ids"] = ids[:1, :4], ids[:, :4]
        taken = [name for name, role in call.arguments.items() if isinstance(role, list) or role in MASK_FORMS]
        candidates = [call] if taken else []
        free = [n for n in self.signature if _MASK.search(n) and n not in call.arguments]
        for name in sorted(free, key=lambda n: (n != "attention_mask", "pad" not in n)):
            candidates += [call._replace(arguments={**call.arguments, name: form}) for form in MASK_FORMS]
        torch_own = {n for n in free if "memory" in n}
        for candidate in candidates:
            try:
                want = take(candidate.run(self.module, alone), path)
                got = take(candidate.run(self.module, padded), path)[:1]
                plain = take(
                    call.run(self.module, {**alone, "attention_mask": torch.ones_like(alone["attention_mask"])}), path
                )
                other = padded | {"input_ids": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, 1)}
                moved = take(candidate.run(self.module, other), path)[:1]
            except Exception:
                continue
            if got.shape[1:2] == (LENGTH,) and want.shape[1:2] == (LENGTH - 3,):
                got, moved = got[:, : LENGTH - 3], moved[:, : LENGTH - 3]
            if got.shape != want.shape or not got.isfinite().all():
                continue
            if _near(got, want) and _near(plain, want) and _near(moved, want):
                names = set(candidate.arguments) - set(call.arguments)
                if torch_own and names:  # the mask of what the decoder attends to is the encoder's
                    both = candidate.arguments | dict.fromkeys(torch_own, next(candidate.arguments[n] for n in names))
                    candidate = candidate._replace(arguments=both)
                return candidate
        return None

    def limit(self, call: Call, vocab: int, sizes: list[int]) -> int | None:
        """The longest input, among the numbers that the constructor takes: that long works, one more raises."""
        for size in sorted({size for size in sizes if 4 <= size <= 8192}, reverse=True):
            try:
                call.run(self.module, self._long(call, vocab, size))
            except Exception:
                continue
            try:
                call.run(self.module, self._long(call, vocab, size + 1))
            except Exception:
                return size
            return None
        return None

    def _long(self, call: Call, vocab: int, length: int) -> dict[str, torch.Tensor]:
        ids = example_ids(vocab, 1, length)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :4]}

    # ---- its loss

    def find_loss(
        self, call: Call, inputs: dict[str, torch.Tensor], path: str, kind: str, width: int
    ) -> tuple[str, str, str]:
        """The module's argument for labels, how its own loss is taken, and a note."""
        names = [n for n in self.signature if _LABELS.match(n) and n not in call.arguments]
        for name in names:
            logits = take(call.run(self.module, inputs), path)
            for labels in self._labels(kind, inputs, width):
                try:
                    with quiet(), torch.no_grad():
                        output = self._with(call, inputs, {name: labels})
                    found = _losses(output)
                except Exception:
                    continue
                if not found:
                    continue
                where, loss = found[0]
                full = [v for p, v in find_outputs(output) if v.shape[:-1] == labels.shape and v.dim() > 1]
                logits = full[0] if full else logits
                flat, target = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
                if target.is_floating_point() or len(flat) != len(target):
                    return name, where, "the module's own, which is passed on"
                if _near(loss, cross_entropy(flat, target)):
                    return name, "", "equal to the module's own: cross-entropy of the labels"
                if kind == "causal" and _near(
                    loss, cross_entropy(logits[:, :-1].reshape(-1, width), labels[:, 1:].reshape(-1))
                ):
                    return name, "", "equal to the module's own: cross-entropy of the next token"
                return name, where, "the module's own, which is not the cross-entropy of its logits; it is passed on"
        return "", "", "made by the wrapper: cross-entropy of the logits" if kind != "body" else ""

    def _labels(self, kind: str, inputs: dict[str, torch.Tensor], width: int) -> list[torch.Tensor]:
        first = next(iter(inputs.values()))
        if kind in ("sequence", "image"):
            return [torch.arange(len(first)) % width]
        ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        return [] if ids is None else [ids.flip(1) % width]

    def _with(self, call: Call, inputs: dict[str, torch.Tensor], more: dict[str, torch.Tensor]) -> Any:
        roles = {name: f"<{name}>" for name in more}
        extended = call._replace(arguments={**call.arguments, **roles})
        return extended.run(self.module, {**inputs, **{roles[name]: value for name, value in more.items()}})


def _losses(output: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(output, torch.Tensor):
        return [("", output)] if output.dim() == 0 else []
    if isinstance(output, (tuple, list)):
        items: list[tuple[str, Any]] = [(f"[{n}]", v) for n, v in enumerate(output)]
    else:
        items = [(f'["{k}"]', v) for k, v in output.items()] if hasattr(output, "items") else []
    return [(p, v) for p, v in items if isinstance(v, torch.Tensor) and v.numel() == 1 and v.is_floating_point()]


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(((one - other).abs() <= 1e-4 * other.abs().max().clamp(min=1.0)).all())


def _at(error: BaseException, file: AuthorFile) -> str:
    line = line_in(error, file.path)
    return f" ({file.path.name}{line})" if line else ""
