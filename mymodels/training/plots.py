"""Metrics, tables and plots of a fine-tuning."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..messages import shorten
from .datasets_io import require_module

_INK, _BLUE, _ORANGE, _GRID = (
    "#333333",
    "#0072b2",
    "#d55e00",
    "#d9d9d9",
)  # by Okabe and Ito, distinguishable with colour blindness


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, and the mean F1 score of the classes that occur (0 for a class that is never predicted).

    Args:
        logits: `[examples, classes]`.
        labels: `[examples]` class numbers.
    """
    sklearn = require_module("sklearn.metrics", "finetune")
    predictions = logits.argmax(-1)
    macro = sklearn.f1_score(labels, predictions, average="macro", zero_division=0)
    return {"accuracy": float((predictions == labels).mean()), "f1_macro": float(macro)}


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`[classes, classes]` counts: row the true class, column the predicted one."""
    sklearn = require_module("sklearn.metrics", "finetune")
    return sklearn.confusion_matrix(labels, logits.argmax(-1), labels=range(logits.shape[-1]))


def class_table(matrix: np.ndarray, names: Sequence[str], title: str) -> Table:
    """Precision, recall and F1 of each class, and the class it is most often confused with."""
    table = Table(
        "class", "examples", "precision", "recall", "F1", "most often confused with", title=title, title_justify="left"
    )
    for column in table.columns[1:5]:
        column.justify = "right"
    for number, name in enumerate(names):
        right, true, predicted = matrix[number, number], matrix[number].sum(), matrix[:, number].sum()
        precision, recall = right / max(predicted, 1), right / max(true, 1)
        f1 = 2 * right / max(true + predicted, 1)
        wrong = matrix[number].copy()
        wrong[number] = 0
        taken = f"{names[wrong.argmax()]} ({wrong.max()})" if wrong.max() else ""
        table.add_row(name, str(true), f"{precision:.3f}", f"{recall:.3f}", f"{f1:.3f}", taken)
    return table


def metric_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """A row of metrics for each split."""
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    table = Table("measured on", *names)
    for where, metrics in rows.items():
        table.add_row(where, *(f"{metrics[name]:.4f}" if name in metrics else "" for name in names))
    return table


def draw_loss_curve(history: Sequence[Mapping[str, Any]], path: Path, best_step: int | None = None) -> None:
    """Write a PNG of training and validation loss by step.

    Args:
        history: the Trainer's `log_history`.
        best_step: the step of the best weights, marked by a line.
    """
    figure, axes = _figure(6.4, 3.8)
    for key, label, color, style in (
        ("loss", "training", _BLUE, {"linewidth": 1.6}),
        ("eval_loss", "validation", _ORANGE, {"linewidth": 1.6, "linestyle": "--", "marker": "o", "markersize": 4.5}),
    ):
        points = {entry["step"]: entry[key] for entry in history if key in entry}
        if points:
            axes.plot(list(points), list(points.values()), label=label, color=color, **style)
    if best_step:
        axes.axvline(best_step, color=_INK, linewidth=0.9, linestyle=":", label=f"kept: step {best_step}")
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.set_xlim(left=0)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    _save(figure, path)


def draw_confusion_matrix(matrix: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Write a PNG with the share of each true class (row) that was predicted as each class (column).

    Up to 40 classes, each cell that is not 0 contains its count, so that it can be read without colour.
    """
    count = len(names)
    side = max(3.2, 0.36 * count + 1.0)
    longest = max(map(len, names))
    ticks = [shorten(name, 24) for name in names]
    figure, axes = _figure(side + 0.08 * min(longest, 24) + 0.9, side + (0.08 * min(longest, 24) if count > 4 else 0.3))
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = 10 if count <= 10 else 9 if count <= 20 else 8
    if count <= 40:
        for row, column in zip(*np.nonzero(matrix)):
            color = "white" if share[row, column] > 0.55 else _INK
            axes.text(column, row, f"{matrix[row, column]}", ha="center", va="center", color=color, fontsize=size)
    rotation = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if count > 4 or longest > 12 else {}
    axes.set_xticks(range(count), ticks, fontsize=size, **rotation)
    axes.set_yticks(range(count), ticks, fontsize=size)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_xticks(np.arange(-0.5, count), minor=True)
    axes.set_yticks(np.arange(-0.5, count), minor=True)
    axes.grid(which="minor", color=_GRID, linewidth=0.6)
    axes.tick_params(which="both", length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("share of the true class", fontsize=9)
    bar.outline.set_visible(False)
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    require_module("matplotlib", "finetune")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(width, height), layout="constrained"
    )  # without pyplot, which would keep figures and choose a window system
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for spine in axes.spines.values():
        spine.set_color(_GRID)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})  # the same data give the same bytes
