"""Compare an exported graph with its model: the graph runs in a new process, on batches of several shapes."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..messages import one_line
from ..sandbox import results, run
from .graphs import TASKS, GivenGraph, Graph, named_outputs, run_forward, vocab_size_of

Tensors = dict[str, torch.Tensor]

# relative to the largest value of an output if that exceeds 1
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
KL_LIMIT, COSINE_LIMIT = 0.1, 0.95  # the limits for int8
SHAPES = ((1, 1, ""), (1, 9, ""), (2, 12, "left"), (4, 6, "right"), (3, 32, "right"))  # batch, length, padding
_SCRATCH, _COPIES = 4 * 10**9, 4  # bytes that the other process may write: these, and so many times the graph
RUNNER = Path(__file__).with_name("run_graph.py")


class ParityError(ValueError):
    """The outputs of a graph differ from the model's."""


@dataclass
class Case:
    """A batch: its `[batch, length]` inputs, and the lengths of the pieces in which a graph with a cache gets it."""

    inputs: Tensors
    pieces: list[int]
    expected: Tensors = field(default_factory=dict)
    found: Tensors = field(default_factory=dict)

    @property
    def mask(self) -> torch.Tensor:
        """`[batch, length]`, true for the outputs' tokens that are not padding; for an encoder-decoder the decoder's."""
        if "decoder_input_ids" in self.inputs:
            return torch.ones_like(self.inputs["decoder_input_ids"], dtype=torch.bool)
        if "attention_mask" in self.inputs:
            return self.inputs["attention_mask"].bool()
        return torch.ones(self.shape[:2], dtype=torch.bool)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first input."""
        first = "attention_mask" if "attention_mask" in self.inputs else next(iter(self.inputs))
        return tuple(self.inputs[first].shape)


def make_cases(graph: Graph) -> list[Case]:
    """Batches of random tokens, of other shapes than the traced one, padded on the task's side.

    Raises:
        ValueError: neither the config nor the embeddings have a size of the vocabulary.
    """
    if isinstance(graph, GivenGraph):
        return given_cases(graph)
    config: Any = graph.model.config
    vocabulary = vocab_size_of(graph.model)
    if vocabulary is None:
        raise ValueError(f"the config of {type(graph.model).__name__} has no vocab_size, so no inputs can be generated")
    limit = getattr(config, "max_position_embeddings", None) or 64
    window = getattr(config, "sliding_window", None) or 0
    longest = max(32, window + 4 if window < 1024 else 0)  # some tokens are outside of the window
    generator = torch.Generator().manual_seed(0)
    cases = []
    for rows, length, padding in SHAPES:
        if padding == "left" and graph.task != "text-generation":
            padding = "right"
        length = min(longest if length == 32 else length, limit - 2)  # RoBERTa's positions start at 2
        mask = torch.ones(rows, length, dtype=torch.long)
        for row in range(1, rows if padding and "attention_mask" in graph.inputs else 0):
            hidden = slice(None, row) if padding == "left" else slice(-row, None)
            mask[row, hidden] = 0
        ids = torch.randint(vocabulary, (rows, length), generator=generator)
        cases.append(_make_case(graph, ids, mask, generator))
    return cases


def given_cases(graph: GivenGraph) -> list[Case]:
    """The given rows, the first of them alone, the last alone, and all of them twice."""
    rows = len(next(iter(graph.given.values())))
    batches = {"all": range(rows), "first": [0], "last": [rows - 1], "twice": [*range(rows), *range(rows)]}
    chosen = list(dict.fromkeys(tuple(batch) for batch in batches.values()))
    return [Case({name: tensor[list(batch)] for name, tensor in graph.given.items()}, [0]) for batch in chosen]


def text_cases(graph: Graph, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Case]:
    """Batches of texts, up to 64 tokens of each."""
    side = "left" if graph.task == "text-generation" else "right"
    longest = min(64, getattr(graph.model.config, "max_position_embeddings", None) or 64)
    rows = [tokenizer(text, truncation=True, max_length=longest).input_ids[:longest] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    cases = []
    for start in range(0, len(rows), 8):
        batch = rows[start : start + 8]
        length = max(map(len, batch))
        ids, mask = torch.zeros(len(batch), length, dtype=torch.long), torch.zeros(len(batch), length, dtype=torch.long)
        for i, row in enumerate(batch):
            place = slice(length - len(row), None) if side == "left" else slice(len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), 1
        cases.append(_make_case(graph, ids, mask))
    return cases


def _make_case(graph: Graph, ids: torch.Tensor, mask: torch.Tensor, generator: torch.Generator | None = None) -> Case:
    config, length = graph.model.config, ids.shape[1]
    padding = getattr(config, "pad_token_id", None)
    if padding is not None:  # some models detect padding by the token
        other = (padding + 1) % (vocab_size_of(graph.model) or padding + 2)
        ids = torch.where((ids == padding) & (mask == 1), other, ids).masked_fill(mask == 0, padding)
    inputs = {"input_ids": ids} | ({"attention_mask": mask} if "attention_mask" in graph.inputs else {})
    if "decoder_input_ids" in graph.inputs:
        start = getattr(config, "decoder_start_token_id", None) or 0
        begun = torch.full_like(ids[:, :1], start)
        inputs["decoder_input_ids"] = torch.cat((begun, ids[:, : length // 2]), dim=1)
    if "token_type_ids" in graph.inputs:
        kinds = torch.zeros_like(ids)
        if generator is not None:
            kinds = torch.randint(config.type_vocab_size, ids.shape, generator=generator)
        inputs["token_type_ids"] = kinds
    if "position_ids" in graph.inputs:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    last = length // 3 if graph.past else 0  # a prompt, a single token, the rest
    pieces = [length - last - 1, 1, last] if graph.past else [length]
    return Case(inputs, [piece for piece in pieces if piece])


@torch.no_grad()
def compute_expected(model: PreTrainedModel, graph: Graph, cases: Sequence[Case]) -> None:
    """Compute the model's own outputs, each batch in one call."""
    for case in cases:
        case.expected = named_outputs(graph.task, run_forward(model, graph.task, case.inputs))
        if graph.past:
            cache = model(**case.inputs, use_cache=True, past_key_values=DynamicCache()).past_key_values
            states = [part for layer in cache.layers for part in (layer.keys, layer.values)]
            case.expected |= dict(zip(graph.present, states))


def run_in_new_process(kind: str, file: Path, graph: Graph, cases: Sequence[Case]) -> None:
    """Run the exported `file` in a new process, which must not need mymodels or transformers, and fill in `found`.

    Raises:
        ParityError: the graph cannot be run there.
    """
    calls: Tensors = {}
    for number, case in enumerate(cases):
        end = 0
        for step, piece in enumerate(case.pieces):
            start, end = end, end + piece
            for name, value in case.inputs.items():
                part = value
                if graph.past:
                    part = value[:, :end] if name == "attention_mask" else value[:, start:end]
                calls[f"{number}/{step}/{name}"] = part.clone(memory_format=torch.contiguous_format)
    with results.scratch_folder("mymodels-parity-") as folder:
        inputs, outputs = folder / "inputs.safetensors", folder / "outputs.safetensors"
        dtype = str(graph.model.dtype).removeprefix("torch.")
        save_file(calls, inputs, metadata={"past": json.dumps(graph.past_shapes), "dtype": dtype})
        size = sum(part.stat().st_size for part in file.parent.rglob("*") if part.is_file())
        done = run(
            [RUNNER, kind, file.resolve(), inputs, outputs],
            readable=[file.parent],
            scratch=folder,
            scratch_size=_SCRATCH + _COPIES * size,
        )
        if done.returncode:
            reason = done.why or _reason(done.stderr.decode("utf-8", errors="replace"), done.returncode)
            more = "; a trace keeps loops, branches and len() as on its example" if kind == "torchscript" else ""
            raise ParityError(f"{file.name} cannot be run in another process: {reason}{more}")
        try:
            found = results.read_tensors(outputs)
            with safe_open(outputs, "pt") as opened:
                unwanted = results.parse_json((opened.metadata() or {})["unwanted"])
        except (results.UntrustedResult, KeyError) as error:
            raise ParityError(f"{file.name} left no outputs that can be read: {one_line(error, 300)}") from None
        if unwanted:
            raise ParityError(f"{file.name} needs {' and '.join(unwanted)} to run, so it is not self-contained")
    for number, case in enumerate(cases):
        last = len(case.pieces) - 1
        case.found = {}
        for name in case.expected:
            steps = (
                range(last + 1) if last and name in TASKS[graph.task].outputs else [last]
            )  # the last cache holds all tokens
            parts = [found[f"{number}/{step}/{name}"] for step in steps]
            case.found[name] = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _reason(stderr: str, code: int) -> str:
    """The message of a process's last error: TorchScript's is followed by lines of code."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    messages = [found[1] for line in lines if (found := re.match(r"[A-Za-z_][\w.]*: (\S.*)", line))]
    return one_line((messages or lines or [f"exit code {code}"])[-1], 300)


def largest_difference(cases: Sequence[Case]) -> dict[str, float]:
    """Output → largest difference at a token, relative to the largest value there if that exceeds 1; NaN if one is."""
    worst: dict[str, float] = {}
    for case in cases:
        for name, expected in case.expected.items():
            found, expected = case.found[name].float(), expected.float()
            if found.shape != expected.shape:
                raise ParityError(
                    f"{name} has the shape {list(found.shape)}, but the model's has {list(expected.shape)}"
                )
            if name.startswith("present."):  # [batch, heads, length, width]
                found, expected = found.transpose(1, 2), expected.transpose(1, 2)
            if expected.shape[:2] == case.mask.shape and name != "pooler_output":
                found, expected = found[case.mask], expected[case.mask]
            scale = expected.abs().max().clamp(min=1.0)
            difference = float((found - expected).abs().max() / scale)
            kind = "present" if name.startswith("present.") else name
            worst[kind] = difference if not difference <= worst.get(kind, -1.0) else worst[kind]
    return worst


def check(cases: Sequence[Case], tolerance: float) -> dict[str, float]:
    """`largest_difference`.

    Raises:
        ParityError: a difference exceeds `tolerance`; the message names the output and the shape of the batch.
    """
    worst = largest_difference(cases)
    for name, difference in worst.items():
        if not difference <= tolerance:
            for case in cases:
                here = largest_difference([case])[name]
                if not here <= tolerance:
                    text = "input_ids" in case.inputs
                    size = (
                        f"{case.shape[0]} rows of {case.shape[1]} tokens" if text else f"the shape {list(case.shape)}"
                    )
                    raise ParityError(
                        f"{name} differs from torch's by {here:.2g}, more than {tolerance:g}, in a batch of {size}"
                    )
    return worst


@dataclass
class Quality:
    """The loss of quality by quantisation.

    Attributes:
        agreement: share of equal decisions: labels, next tokens, starts and ends of answers.
        kl: mean Kullback-Leibler divergence from the model's distribution to the graph's, in nats per decision.
        cosine: mean cosine of vectors, for outputs that are not distributions.
        decisions: number of decisions or vectors compared.
    """

    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None
    decisions: int = 0

    @property
    def sentence(self) -> str:
        if self.cosine is not None:
            return f"mean cosine {self.cosine:.4f} over {self.decisions} vectors"
        return f"{self.agreement:.2%} of {self.decisions} decisions the same, KL {self.kl:.2g} nats"


def measure_quality(cases: Sequence[Case], config: object, task: str) -> Quality:
    """Compare the distributions, or else the vectors, of all cases."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for case in cases:
        for name in TASKS[task].outputs:
            if name in case.expected:
                expected, found = case.expected[name].float(), case.found[name].float()
                if task == "question-answering":  # a distribution over the tokens
                    hidden = ~case.mask
                    expected, found = expected.masked_fill(hidden, -1e9), found.masked_fill(hidden, -1e9)
                elif expected.ndim == 3:
                    expected, found = expected[case.mask], found[case.mask]
                pairs += list(zip(expected, found))
    if task == "feature-extraction" or pairs[0][0].numel() == 1:  # a regression: all numbers as one vector
        if task != "feature-extraction":
            pairs = [(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))]
        cosines = [torch.cosine_similarity(a, b, dim=-1) for a, b in pairs]
        return Quality(cosine=float(torch.stack(cosines).mean()), decisions=len(pairs))
    if getattr(config, "problem_type", None) == "multi_label_classification":  # each label for itself, yes or no
        pairs = [(torch.stack((a, a * 0), -1), torch.stack((b, b * 0), -1)) for a, b in pairs]
    else:
        pairs = [(a[None], b[None]) for a, b in pairs]
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).float() for a, b in pairs])
    kl = torch.cat([(a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1) for a, b in pairs])
    return Quality(agreement=float(same.mean()), kl=float(kl.mean()), decisions=len(same))


def check_quality(quality: Quality) -> None:
    """Check the quality against the limits.

    Raises:
        ParityError: quantisation changes the outputs too much.
    """
    if quality.cosine is not None and not quality.cosine >= COSINE_LIMIT:
        raise ParityError(f"int8 changes the vectors too much ({quality.sentence}, the limit is {COSINE_LIMIT})")
    if quality.kl is not None and not quality.kl <= KL_LIMIT:
        raise ParityError(f"int8 changes the answers too much ({quality.sentence}, the limit is {KL_LIMIT} nats)")
