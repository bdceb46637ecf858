"""The result of an export, and its table."""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..tables import print_table
from .parity import Quality
from .readme import RUNS_WITH


@dataclass
class Exported:
    """The result of an export.

    Attributes:
        folder: the output folder.
        file: the graph.
        kind: `"onnx"`, `"pt2"`, `"aoti"` or `"torchscript"`.
        task: a key of `graphs.TASKS`.
        dtype: dtype of weights and outputs before quantisation.
        inputs, outputs: names of the graph's inputs and outputs, in order.
        differences: output (`present`: all keys and values) → largest difference from torch, relative to the largest
            value if that exceeds 1. Empty for int8.
        tolerance: the largest accepted difference.
        quality: the loss of quality by int8.
        shapes: the compared `(batch, length)`, or shapes of the first input.
        size: bytes of the graph with its weights.
        opset: of ONNX.
    """

    folder: Path
    file: Path
    kind: str
    task: str
    dtype: str
    inputs: list[str]
    outputs: list[str]
    differences: dict[str, float]
    tolerance: float
    quality: Quality | None
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    size: int = 0
    opset: int | None = None

    @property
    def compared(self) -> str:
        """A sentence on the comparison."""
        if self.quality is not None:
            return f"int8 weights: against float32, {self.quality.sentence}."
        worst = max(self.differences.values())
        return f"Its outputs differ from torch's by at most {worst:.1e}, of the largest value where that exceeds 1."

    def _runs_with(self) -> str:
        text = RUNS_WITH[self.kind].replace("`", "")
        if self.task == "text-generation":
            cached = any(name.startswith("past") for name in self.inputs)
            kept = "keys and values are kept, one graph for the prompt and each step after it"
            text += f"; {kept if cached else 'no cache: each step computes all tokens'}"
        if self.task == "text2text-generation":
            text += "; one graph of encoder and decoder, no cache: each step computes all tokens"
        if "input_ids" not in self.inputs:
            text += "; inputs of these shapes, any number of rows"
        if self.kind == "torchscript":
            text += f"; fixed by the trace: {self.dtype}, the CPU; inputs are not checked"
        return text

    def show(self, console: Console | None = None) -> None:
        """Print a small table."""
        table = Table(show_header=False, title=Text(str(self.folder)), title_justify="left")
        text = "input_ids" in self.inputs
        rows = {
            "graph": f"{self.file.name}, {self.size / 1e6:,.1f} MB" + (f", opset {self.opset}" if self.opset else ""),
            "task": self.task,
            "inputs": _shortened(self.inputs),
            "outputs": _shortened(self.outputs),
            "runs with": self._runs_with(),
            "compared": f"in a fresh process, {'batch × length' if text else self.inputs[0]} "
            + ", ".join("×".join(map(str, shape)) for shape in self.shapes[:8]),
        }
        if self.quality is not None:
            rows["int8 against torch"] = self.quality.sentence
        for name, difference in self.differences.items():
            rows[f"{name}: off by"] = f"{difference:.1e} (at most {self.tolerance:g})"
        for name, value in rows.items():
            table.add_row(name, Text(value))
        print_table(table, console or Console())


def _shortened(names: list[str]) -> str:
    return ", ".join(names if len(names) < 6 else [*names[:5], f"… {len(names)} in all"])
