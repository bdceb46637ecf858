"""The report of a warm start: what became of every parameter and tensor, as an object, tables and JSON."""

import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_model
from transformers import PreTrainedModel

from ..checkpoints import CheckpointError, replace_file, replace_folder, write_manifest
from ..checkpoints.inspection_tables import ranges
from ..checkpoints.integrity import is_weight_file
from ..checkpoints.writing import parse_size, save_model_files, save_tokenizer_files
from ..messages import printable
from ..tables import print_table, print_text
from .checking import Check

REPORT_NAME = "warm_start.json"
STATUSES = ("loaded", "transformed", "resized", "new", "unused")
_LAYER = re.compile(r"\blayers?\.(\d+)\.")
AMBIGUOUS = "ambiguous, so not loaded"  # how notes on tensors that can go to several places begin
UNPROVEN = "matched by structure: exact only if a check confirms it"
_STYLES = {"new": "yellow", "unused": "yellow", "resized": "cyan", "transformed": "cyan", "loaded": "green"}


@dataclass(frozen=True)
class Row:
    """One step of a warm start: which tensors of the source became which parameters of the target, and how.

    Attributes:
        status: `"loaded"` (bit-identical), `"transformed"`, `"resized"`, `"new"` (no source), `"unused"` (no target).
        kind: `"exact"`: the step preserves the function; `"approximate"`: it does not; `"new"`: initial values.
        targets: the target's parameters, with all names of a tied one; empty if unused.
        sources: the source's tensors; empty if new.
        how: what was done; for a new parameter its initial value, for an unused tensor the reason.
        parameters: number of elements of the targets, or of an unused tensor.
        steps: target → what was done for it, in order.
        constant: an unused tensor that is not a weight: a mask, an optimizer's state, a second name.
        frozen: whether `freeze_loaded` made the targets untrainable.
        unproven: whether the step is approximate only because no check has confirmed that the right tensor was used.
    """

    status: str
    kind: str
    targets: tuple[str, ...]
    sources: tuple[str, ...]
    how: str
    parameters: int
    steps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    constant: bool = False
    frozen: bool = False
    unproven: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.targets, *self.sources)


@dataclass
class WarmStartReport:
    """The report of a warm start. Each parameter of the target and each tensor of the source is in exactly one row.

    Attributes:
        model: the model with its new weights; None if the warm start was only planned.
        source, target: name of the source, and of the target's class.
        rows: see `Row`.
        notes: differences that are not in tensors, such as another activation, and assumptions.
        coverage: name → number of tokens, if tokens or word vectors were matched.
        tokenizer: the model's tokenizer, if one was given or is in the source's folder.
        source_parameters: number of elements of the source's tensors.
        checked: the result of `check`; None before it.
        checker: runs the check.
    """

    source: str
    target: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    coverage: dict[str, int] = field(default_factory=dict)
    model: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    source_parameters: int = 0
    checked: Check | None = None
    checker: Any = field(default=None, repr=False)

    def check(self, inputs: Mapping[str, Any] | None = None) -> Check:
        """Run source and target on the same inputs, in eval mode and float32, and compare their outputs.

        `warm_start` does this itself, on generated inputs, if neither has more than 50 million parameters. The source is
        the given model, or a model of its original transformers class made from its config and tensors. Compared are
        the logits, or the last hidden states if the two have no common head. If outputs differ although every row is
        exact, the rows where the difference begins are marked as approximate, and a note is added.

        Args:
            inputs: what a tokenizer returns: `input_ids` `[batch, length]`, `attention_mask` and so on, in the target's
                tokens. Default: generated rows of several lengths, padded on the right and on the left.

        Returns:
            the largest difference of each output, or why the check could not run; also in `checked`.

        Raises:
            CheckpointError: the given inputs cannot be run.
        """
        if self.model is None or self.checker is None:
            self.checked = Check(what="this report has no source and model to run")
            return self.checked
        exact = all(row.kind == "exact" for row in self.rows)
        new = {name for row in self.rows if row.kind == "new" for name in row.targets}
        self.checked, where = self.checker.run(self.model, new, inputs, exact=exact)
        if self.checked.agrees:
            self._prove(self.checker.proven)
        elif exact and self.checked.ran:
            self._mark_inexact(self.checked, where)
        self._note_unverified()
        return self.checked

    def set_not_checked(self, why: str) -> None:
        """Note that source and target were not run."""
        self.checked = Check(what=why)
        self._note_unverified()

    def _note_unverified(self) -> None:
        """Keep the note that the classes may differ until a check has confirmed that they do not."""
        unshown = self.checker.unshown if self.checker is not None else ""
        self.notes = [note for note in self.notes if note != unshown]
        shown = self.checked is not None and self.checked.agrees and self.checker.compared_all
        if unshown and not shown:
            self.notes.append(unshown)

    def _prove(self, proven: Collection[str]) -> None:
        """Mark the rows that a check confirmed as exact, and drop the notes that only doubted them."""
        confirmed = {note for note, names in self.checker.until_proven.items() if names <= set(proven)}
        self.notes = [note for note in self.notes if note not in confirmed]
        self.rows = [
            replace(
                row,
                kind="exact",
                unproven=False,
                how=row.how.replace(UNPROVEN, "matched by structure, confirmed by a check"),
            )
            if row.unproven and all(name in proven for name in row.targets)
            else row
            for row in self.rows
        ]

    def _mark_inexact(self, check: Check, where: int | None) -> None:
        """Mark rows as approximate where a check found differences; `where`: see `Checker.run`."""
        assert self.model is not None
        layers = getattr(getattr(self.model, "config", None), "num_hidden_layers", 0)
        base = f"{getattr(self.model, 'base_model_prefix', '')}."

        def concerned(row: Row) -> bool:
            found = [_LAYER.search(name) for name in row.targets]
            in_layers = {int(match[1]) for match in found if match}
            embeddings = any("embed" in name for name in row.targets)
            if where is None:
                return bool(row.targets)
            if where == 0:
                return embeddings
            if where <= layers:  # the last hidden state is after the last norm
                return where - 1 in in_layers or (
                    where == layers and any(n.endswith("norm.weight") for n in row.targets)
                )
            return any(not name.startswith(base) or "pooler" in name for name in row.targets)

        step = "outputs differ from the source's from here on"
        self.rows = [
            replace(row, kind="approximate", how=f"{row.how}; {step}".removeprefix("; ")) if concerned(row) else row
            for row in self.rows
        ]
        place = ""
        if where is not None:
            place = ", from the embeddings on" if where == 0 else f", from layer {where - 1} on"
            place = ", after the layers" if where > layers else place
        self.notes.append(f"the steps are not exact{place}: {check}")

    @property
    def totals(self) -> dict[str, dict[str, float]]:
        """Status → `tensors`, `parameters` and `percent`: of the target's parameters; for `unused`, of the source's."""
        tensors, parameters = Counter[str](), Counter[str]()
        for row in self.rows:
            tensors[row.status] += len(row.targets) or len(row.sources)
            parameters[row.status] += row.parameters
        all_parameters = sum(count for status, count in parameters.items() if status != "unused") or 1
        everything = self.source_parameters or 1
        return {
            status: {
                "tensors": tensors[status],
                "parameters": parameters[status],
                "percent": round(100 * parameters[status] / (everything if status == "unused" else all_parameters), 4),
            }
            for status in STATUSES
        }

    @property
    def is_exact(self) -> bool:
        """Whether the target gives the source's outputs, for the inputs and outputs that both have.

        `checked` has the result of running both, if that was done.
        """
        return not self.notes and all(row.kind == "exact" for row in self.rows)

    def not_allowed(self, allow: Iterable[str] = ()) -> list[Row]:
        """The rows that `strict` refuses: new or unused, not constant, and with a name that no pattern of `allow` matches.

        This includes new values that preserve the function, such as zeros in an added block; see `is_exact`.
        """
        patterns = [re.compile(pattern) for pattern in ([allow] if isinstance(allow, str) else allow)]
        return [
            row
            for row in self.rows
            if row.status in ("new", "unused") and not row.constant
            if not all(any(pattern.search(name) for pattern in patterns) for name in row.names)
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data.

        Keys: `source`, `target` (text); `exact` (bool, see `is_exact`); `totals` (status → `tensors`, `parameters`,
        `percent`); `rows` (list of objects with the fields of `Row`); `notes` (list of text); `coverage` (name → count);
        `check` (`ran`, `agrees`, `differences`: output → largest, `what`; null before a check).
        """
        rows = [{k: v for k, v in asdict(row).items() if k != "unproven"} for row in self.rows]
        described = {"source": self.source, "target": self.target, "exact": self.is_exact, "totals": self.totals}
        check = None if self.checked is None else self.checked.to_dict()
        return {**described, "rows": rows, "notes": self.notes, "coverage": self.coverage, "check": check}

    def save_pretrained(self, save_directory: str | os.PathLike, *, max_shard_size: int | str = "2GB") -> Path:
        """Save the model with its code, the tokenizer if there is one, and `warm_start.json`, atomically.

        Args:
            save_directory: created if it does not exist; weights in it are replaced, other files are kept.
            max_shard_size: bytes, or text such as `"500MB"`.

        Raises:
            OSError: the disk is full or the folder read-only; the folder is unchanged.
        """
        size = parse_size(max_shard_size)
        if self.model is None:
            raise CheckpointError("this report has no model, as the warm start was only planned")
        with replace_folder(
            save_directory, keep=lambda name: not is_weight_file(name), finish=write_manifest
        ) as folder:
            if isinstance(self.model, PreTrainedModel):
                save_model_files(self.model, folder, size)
            else:
                save_model(self.model, str(folder / "model.safetensors"), metadata={"format": "pt"})
            if self.tokenizer is not None:
                save_tokenizer_files(self.tokenizer, folder)
            (folder / REPORT_NAME).write_text(self.to_json() + "\n", encoding="utf-8")
        return Path(save_directory)

    def save_json(self, path: str | os.PathLike) -> Path:
        """Write `to_dict()` as JSON to `path`, crash-safe."""
        with replace_file(path) as staged:
            staged.write_text(self.to_json() + "\n", encoding="utf-8")
        return Path(path)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def tables(self, *, every_tensor: bool = False, only: Iterable[str] = STATUSES) -> list[Table]:
        """The rows and the totals; equal rows of several layers are joined unless `every_tensor`."""
        only = tuple(only)
        table = Table(header_style="bold", box=None, pad_edge=False, title_justify="left", title_style="bold")
        table.title = Text(f"{printable(self.source)} → {self.target}")
        for name in ("", "kind", "source", "target", "how"):
            table.add_column(name)
        for row, targets, sources in _collapsed([row for row in self.rows if row.status in only], every_tensor):
            cells = (
                row.status,
                row.kind,
                sources or "–",
                targets or "–",
                row.how + (" (frozen)" if row.frozen else ""),
            )
            table.add_row(
                *(Text(printable(cell), style=_STYLES[row.status] if i == 0 else "") for i, cell in enumerate(cells))
            )
        totals = Table(header_style="bold", box=None, pad_edge=False)
        for name in ("", "tensors", "parameters", "share"):
            totals.add_column(name, justify="right" if name else "left")
        for status, total in self.totals.items():
            share = f"{total['percent']:.2f} %" + (" of the source" if status == "unused" else "")
            totals.add_row(status, f"{total['tensors']:,}", f"{total['parameters']:,}", share)
        return [table, totals]

    def show(self, console: Console | None = None, *, every_tensor: bool = False) -> None:
        """Print the tables, the notes and the coverage."""
        console = console or Console()
        for table in self.tables(every_tensor=every_tensor):
            print_table(table, console)
        for name, count in self.coverage.items():
            print_text(printable(f"{name}: {count:,}"), console)
        for note in self.notes:
            print_text(Text(printable(f"note: {note}"), style="yellow"), console)
        ran = self.checked is not None and self.checked.ran
        if self.is_exact and ran:
            print_text(Text("Every step is exact: the target gives the outputs of the source.", style="green"), console)
        elif self.is_exact:
            why = "source and target were not run" if self.checked is None else str(self.checked)
            print_text(Text(printable(f"Every step is exact by construction; {why}."), style="green"), console)
        if ran:
            print_text(printable(f"Checked: {self.checked}."), console)

    def __str__(self) -> str:
        """The tables as text, as wide as the terminal that standard output is; 160 columns if it is none."""
        try:
            width = os.get_terminal_size(sys.stdout.fileno()).columns
        except (OSError, ValueError, AttributeError):
            width = 160
        console = Console(width=width, record=True, file=io.StringIO(), force_jupyter=False)
        self.show(console)
        return "".join(f"{line.rstrip()}\n" for line in console.export_text().splitlines())


def mark_unproven(rows: list[Row], unproven: Collection[str]) -> list[Row]:
    """The rows of these targets as approximate, until a check confirms that the right tensors were used."""
    return [
        replace(row, kind="approximate", unproven=row.kind == "exact", how=f"{row.how}; {UNPROVEN}".removeprefix("; "))
        if row.sources and any(name in unproven for name in row.targets)
        else row
        for row in rows
    ]


def _collapsed(rows: list[Row], every: bool) -> list[tuple[Row, str, str]]:
    """Join rows that differ in layer numbers only: a representative row, and the names of targets and sources."""
    groups: dict[tuple, list[Row]] = {}
    for i, row in enumerate(rows):
        targets, sources = ({_pattern(name) for name in names} for names in (row.targets, row.sources))
        key = (i,) if every else (row.status, row.kind, row.how, row.frozen, frozenset(targets), frozenset(sources))
        groups.setdefault(key, []).append(row)
    return [
        (members[0], short_names([row.targets for row in members]), short_names([row.sources for row in members]))
        for members in groups.values()
    ]


_LAYER_NUMBER = re.compile(r"(?<![^./])\d+(?=[./])|(?<=[./]h)\d+(?=/)|(?<=layer_)\d+(?=/)")
_SIBLINGS = re.compile(r"(?<=\.)([qkv](?=_proj\.)|gate(?=_proj\.)|up(?=_proj\.)|query|key|value|weight$|bias$)")


def _pattern(name: str) -> str:
    return _SIBLINGS.sub("*", _LAYER_NUMBER.sub("*", name, count=1))


def short_names(rows: list[tuple[str, ...]]) -> str:
    """`a.0.q_proj.weight`, `a.0.k_proj.weight` and the same of layer 1 as `a.{0–1}.{q,k}_proj.weight`."""
    layers: dict[str, list[int]] = {}  # pattern → numbers
    for name in dict.fromkeys(name for names in rows for name in names):
        number = _LAYER_NUMBER.search(name)
        pattern = f"{name[: number.start()]}*{name[number.end() :]}" if number else name
        layers.setdefault(pattern, []).extend([int(number[0])] if number else [])
    names = [
        pattern.replace("*", ranges(sorted(numbers))) if numbers else pattern for pattern, numbers in layers.items()
    ]
    for _ in range(2):  # once for projections, once for weight and bias
        groups: dict[str, list[str]] = {}
        for name in names:
            found = _SIBLINGS.search(name)
            groups.setdefault(name if found is None else _SIBLINGS.sub("\0", name, count=1), []).append(
                found[0] if found else ""
            )
        names = [
            key.replace("\0", parts[0] if len(parts) == 1 else "{" + ",".join(parts) + "}")
            for key, parts in groups.items()
        ]
    return ", ".join(names)
