"""Run the author's module to find out its inputs, its outputs, and what the outputs depend on.

Names only determine what is tried first; every result is confirmed by running the module.
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoints import CheckpointError
from .author_file import AuthorFile, is_unpacked, keys_read
from .build_module import error_text, line_in, no_output

ROWS, LENGTH = 2, 7
PER_ROW = ("sequence", "image", "audio")  # kinds with labels of rows
_DECODER = re.compile(r"^(tgt|trg|target(_ids)?|decoder_input_ids|tgt_ids|trg_ids|dec\w*|y|output_ids)$")
_LABELS = re.compile(r"^(labels?|targets?|tgt|y|y_true|gold|tags)$")
_SEGMENTS = re.compile(r"^(token_type_ids|segment(s|_ids|_info|_label)?|seg(_ids)?|token_types?)$")
_IMAGE_SIZE = re.compile(r"(image|img|input)_?(size|res|resolution)|size|res|resolution")
MASK_FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # the forms of a mask that has ones at tokens
    "attention_mask": lambda mask: mask,
    "attention_mask == 0": lambda mask: mask == 0,
    "attention_mask.bool()": lambda mask: mask.bool(),
    "attention_mask.to(self.dtype)": lambda mask: mask.float(),
    "attention_mask[:, None, None, :]": lambda mask: mask[:, None, None, :],
    "attention_mask[:, None, None, :].bool()": lambda mask: mask[:, None, None, :].bool(),
}


def is_mask(name: str) -> bool:
    return "mask" in name


def is_segments(name: str) -> bool:
    return bool(_SEGMENTS.match(name))


def is_labels(name: str) -> bool:
    return bool(_LABELS.match(name))


class Call(NamedTuple):
    """How the module is called.

    Attributes:
        arguments: name of the module's parameter → its value, in terms of the wrapper's `forward`:
            `input_ids`, `decoder_input_ids`, `token_type_ids`, `pixel_values`, `input_values`, a key of `MASK_FORMS`, or
            a list of keys of a dictionary.
        main: the first input.
    """

    arguments: dict[str, Any]
    main: str

    def run(self, module: nn.Module, inputs: dict[str, torch.Tensor], grad: bool = False) -> Any:
        given: dict[str, Any] = {}
        for name, role in self.arguments.items():
            if isinstance(role, list):
                given[name] = {key: inputs[key] for key in role if key in inputs}
            elif role in MASK_FORMS:
                given[name] = MASK_FORMS[role](inputs["attention_mask"]) if "attention_mask" in inputs else None
            else:
                given[name] = inputs.get(role)
        with no_output(), torch.set_grad_enabled(grad):
            return module(**{name: value for name, value in given.items() if value is not None})


class Loss(NamedTuple):
    """How the wrapper gets a loss.

    Attributes:
        kind: `made` (cross-entropy of the logits), `own` (the module's, passed on) or `none`.
        note: a description for the report.
        argument: the module's own argument for labels, or "".
        path: for `own`, the path of the loss in the output with labels.
        logits: for `own`, the path of the logits.
        ignored: the label that the module ignores, if any.
        shifted: for `own`, whether the wrapper must shift the labels by one token.
    """

    kind: str
    note: str = ""
    argument: str = ""
    path: str = ""
    logits: str = ""
    ignored: int | None = None
    shifted: bool = False


class Probe(NamedTuple):
    """The results of probing a module; see the comments of the attributes."""

    call: Call
    logits: str  # path of the main output in what the module returns: "", "[0]", "['logits']" or ".logits"
    second: str  # of spans, the path of the logits of the ends; `logits` has those of the starts
    kind: str  # a key of describing.KINDS
    width: int  # last dimension of the outputs
    vocab: int | None  # number of token ids, None without token inputs
    limit: int | None  # longest input, if a longer one raises
    embeddings: str  # path of the input embeddings, or ""
    head: str  # path of the output embeddings, or ""
    resizes: bool  # whether the embeddings can be exchanged: source and target have no tables of their own
    loss: Loss  # how the loss is made
    generates: bool  # whether no output depends on a later token, of the target if there are two
    encoder: str  # path of the module whose output is all that a decoder gets of the source, or ""
    dummy: bool  # whether all positions are returned only if labels are given
    padding: (
        str  # "mask" (one that works), "moved" (causal: behind the tokens), "ids" (the module knows its id), "none"
    )
    pad: int | None  # the padding id that the module ignores
    required: list[str]  # arguments of forward without a default
    left: list[str]  # optional arguments of forward that are not passed
    unused: list[str]  # outputs that are not passed on
    inputs: dict[str, torch.Tensor]  # the inputs that were run
    outputs: dict[str, torch.Tensor]  # and the outputs, by the wrapper's names


def example_ids(vocab: int, rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = 1 if vocab > 2 else 0  # 0 is often padding
    return torch.randint(low, vocab, (rows, length), generator=generator)


def find_outputs(output: Any) -> list[tuple[str, torch.Tensor]]:
    """The floating-point tensors of an output with more than one element, by path."""
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
    """Runs a module on trial inputs; `describing.probe` collects the results."""

    def __init__(self, module: nn.Module, file: AuthorFile, place: str, fields: Mapping[str, Any]):
        self.module, self.file, self.place, self.fields = module, file, place, fields
        self.signature = inspect.signature(module.forward).parameters
        self.errors: list[str] = []

    # ---- inputs

    def calls(self) -> Iterator[tuple[Call, dict[str, torch.Tensor]]]:
        """Possible calls with inputs, the most likely first."""
        named = [p for p in self.signature.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        required = [p.name for p in named if p.default is p.empty]
        if not named:
            raise CheckpointError(
                f"{self.place}: forward takes no named argument, so nothing can be passed to it: name its inputs"
            )
        first = required[0] if required else named[0].name
        masks = [p.name for p in named if is_mask(p.name) and p.name != first]
        needed = [name for name in masks if name in required]
        segments = {name: "token_type_ids" for name in required if _SEGMENTS.match(name) and name != first}
        others = [name for name in required if name != first and name not in masks and name not in segments]
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
                inputs = {"input_ids": ids}
                inputs |= {"token_type_ids": torch.zeros_like(ids)} if segments else {}
                if not needed:
                    yield Call({first: "input_ids", **segments}, "input_ids"), inputs
                for mask in needed:
                    for form in MASK_FORMS:
                        call = Call({first: "input_ids", mask: form, **segments}, "input_ids")
                        yield call, {**inputs, "attention_mask": torch.ones_like(ids)}
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
        sizes = [
            v if isinstance(v, (list, tuple)) else [v, v] for n, v in self.fields.items() if _IMAGE_SIZE.fullmatch(n)
        ]
        sizes = [v for v in sizes if len(v) == 2 and all(type(side) is int and 4 <= side <= 1024 for side in v)]
        if convolution is None and not sizes:
            return []
        named = next((v for n, v in self.fields.items() if "chan" in n and type(v) is int), 3)
        channels = named if convolution is None else convolution.in_channels
        generator = torch.Generator().manual_seed(0)
        return [
            torch.rand(ROWS, channels, *size, generator=generator) * 2 - 1
            for size in [*sizes, *([side, side] for side in (32, 28, 64, 224))]
        ]

    def _vectors(self) -> list[torch.Tensor]:
        shapes: list[tuple[int, ...]] = []
        for part in self.module.modules():  # the layers that may be first, of each kind the first that is there
            if isinstance(part, nn.Conv1d):  # sounds and series
                shapes += [(ROWS, part.in_channels, size) for size in (64, 1600, 16000)]
                shapes += [(ROWS, size) for size in (1600, 16000)] if part.in_channels == 1 else []
            elif isinstance(part, (nn.RNNBase, nn.Linear)):
                width = part.input_size if isinstance(part, nn.RNNBase) else part.in_features
                shapes += [(ROWS, width), (ROWS, LENGTH, width), (ROWS, width, LENGTH)]
            if len(shapes) > 8:
                break
        generator = torch.Generator().manual_seed(0)
        return [torch.rand(*shape, generator=generator) * 2 - 1 for shape in dict.fromkeys(shapes)]

    def find_call(self) -> tuple[Call, dict[str, torch.Tensor], Any]:
        for call, inputs in self.calls():
            try:
                output = call.run(self.module, inputs)
            except Exception as error:
                self.errors.append(f"{error_text(error)}{_at(error, self.file)}")
                continue
            if find_outputs(output):
                return call, inputs, output
            self.errors.append(f"it returns {type(output).__name__} without a floating-point tensor")
        required = [
            p.name for p in self.signature.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        why = f"; of {len(self.errors)} trials the first gives {self.errors[0]}" if self.errors else ""
        raise CheckpointError(
            f"{self.place}: no working inputs were found for forward({', '.join(required)}): tokens, pictures and vectors were tried{why}"
        )

    def embeddings(self, call: Call, inputs: dict[str, torch.Tensor]) -> tuple[str, int | None]:
        """The embedding that receives the token ids, and its number of ids."""
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

    def head(self, call: Call, inputs: dict[str, torch.Tensor], logits: torch.Tensor) -> str:
        """The linear layer that computes the logits."""
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

    # ---- dependencies of the outputs

    def is_causal(self, call: Call, inputs: dict[str, torch.Tensor], take: Callable[[Any], Any], vocab: int) -> bool:
        """Whether no output depends on a later token, tested at every token."""
        ids = inputs["input_ids"]
        before = take(call.run(self.module, inputs))
        for place in range(1, ids.shape[1]):
            changed = ids.clone()
            changed[:, place] = (changed[:, place] + 1) % vocab
            after = take(call.run(self.module, {**inputs, "input_ids": changed}))
            if not near(before[:, :place], after[:, :place]) or torch.equal(before[:, place], after[:, place]):
                return False
        return True

    def at_forward(self) -> str:
        """`file:line` of the method `forward`; without a line if it is inherited."""
        cls = self.file.classes.get(type(self.module).__name__)
        lines = [n.lineno for n in (cls.body if cls else ()) if isinstance(n, ast.FunctionDef) and n.name == "forward"]
        return f"{self.file.path}:{lines[0]}" if lines else self.place

    def limit(self, call: Call, vocab: int, sizes: list[int]) -> int | None:
        """The longest input, if it is one of `sizes`: that length works, one more raises."""
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
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
            "decoder_input_ids": ids[:, :4],
        }


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal up to rounding, relative to their largest value."""
    return one.shape == other.shape and bool(((one - other).abs() <= 1e-4 * other.abs().max().clamp(min=1e-6)).all())


def _at(error: BaseException, file: AuthorFile) -> str:
    line = line_in(error, file.path)
    return f" ({file.path.name}{line})" if line else ""
