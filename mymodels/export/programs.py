"""`torch.export`, AOTInductor and TorchScript: files that torch loads without other packages."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils._sympy.value_ranges import ValueRanges

from .graphs import Graph
from .products import fast_for_one_token

FILES = {"pt2": "model.pt2", "aoti": "model_aoti.pt2", "torchscript": "model_torchscript.pt"}


@contextlib.contextmanager
def without_tracing_logs() -> Iterator[None]:
    """Silence warnings, logs and prints of tracing, which concern torch's internals, such as the graph of a failure."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def causal_masks_unread() -> Iterator[None]:
    """Within it, `nn.TransformerEncoder` and its kind do not read a mask's values to see if it is causal.

    They would only replace it by torch's own causal mask; reading values cannot be traced.
    """
    from torch.nn.modules import transformer as layers

    def detect(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    before = getattr(layers, "_detect_is_causal_mask", None)  # a private function, which may go
    if before is not None:
        layers._detect_is_causal_mask = detect
    try:
        yield
    finally:
        if before is not None:
            layers._detect_is_causal_mask = before


Shapes = dict[str, Any]  # input → {axis: its size}; `past_key_values` → a list of these


def _looser(shapes: Shapes, message: str) -> Shapes | None:
    """`shapes` for a second trial after an error, or None: with the limits that torch.export suggests, or without any.

    A table of positions limits the length; a slice of a whole table excludes the one length at which it is no slice.
    """
    heading = "Suggested fixes:"
    if heading not in message:
        excluded = "Not all values of" in message
        return tree_map_only(Dim, lambda _: Dim.DYNAMIC, shapes) if excluded else None
    fixes = [line for line in message.split(heading)[1].splitlines() if " = " in line]  # advice follows
    named = tree_map(lambda size: size if isinstance(size, Dim) else None, shapes)
    found = refine_dynamic_shapes_from_suggested_fixes("\n".join([heading, *fixes]), named)
    if any(isinstance(size, int) for size in tree_leaves(found)):
        return None
    return tree_map(lambda size: Dim.DYNAMIC if size is None else size, found)


def _shapes(graph: Graph) -> Shapes:
    """The sizes that each input's axes may have."""
    config = graph.model.config
    learned = getattr(config, "position_embedding_type", "learned") in ("learned", "absolute")
    limit = getattr(config, "max_position_embeddings", None) if learned else None
    axes = graph.axes()
    names = {name for axis in axes.values() for name in axis.values()}
    dims: dict[str, Any] = {
        name: Dim(name, min=1, max=None if name == "batch_size" else limit) for name in sorted(names)
    }
    # the sum of two others, which torch.export finds out
    dims |= {
        "total_sequence_length": Dim.DYNAMIC,
        "past_sequence_length": Dim("past_sequence_length", min=0, max=limit),
    }
    shapes: Shapes = {name: {number: dims[dim] for number, dim in axis.items()} for name, axis in axes.items()}
    if graph.past:
        past = {0: dims["batch_size"], 2: dims["past_sequence_length"]}
        shapes["past_key_values"] = [past] * len(graph.past)
    return shapes


def export_program(graph: Graph) -> ExportedProgram:
    """The graph by `torch.export`, for any batch and length."""
    shapes = _shapes(graph)
    with without_tracing_logs(), causal_masks_unread(), torch.no_grad(), fast_for_one_token(graph):
        try:
            program = torch.export.export(graph, (), graph.example(), dynamic_shapes=shapes)
        except Exception as error:
            if (looser := _looser(shapes, str(error))) is None:
                raise
            program = torch.export.export(graph, (), graph.example(), dynamic_shapes=looser)
    if graph.past:
        # torch takes every size for at least 2 while it traces, so the sum of two for at least 4: one token is allowed
        for symbol, sizes in program.range_constraints.items():
            if sizes.lower == 4:
                program.range_constraints[symbol] = ValueRanges(1, sizes.upper)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it contains paths of this machine
    return program


def write_pt2(graph: Graph, folder: Path) -> Path:
    """Write `model.pt2`: `torch.export.load(file).module()(input_ids=…, attention_mask=…)` returns a dict.

    With a cache it also takes `past_key_values=[key, value, key, …]` and returns `present.0.key`, `present.0.value`, ….
    """
    target = folder / FILES["pt2"]
    torch.export.save(export_program(graph), target)
    return target


def write_aoti(graph: Graph, folder: Path) -> Path:
    """`model_aoti.pt2`, compiled for this kind of processor: `torch._inductor.aoti_load_package(file)`.

    Raises:
        ValueError: there is no C++ compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        with without_tracing_logs():
            get_cpp_compiler()
    except Exception as error:  # InvalidCxxCompiler, whose module varies by torch release
        raise ValueError("AOTInductor compiles C++: install g++ or clang++, or set CXX to a compiler") from error
    target = folder / FILES["aoti"]
    program = export_program(graph)
    with without_tracing_logs(), torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(target))
    return target


@contextlib.contextmanager
def _readable_class_names(model: torch.nn.Module) -> Iterator[None]:
    """Within it, every class has a module name that TorchScript can parse; that of remote code holds a hash."""
    before = {type(part): type(part).__module__ for part in model.modules()}
    try:
        for cls, name in before.items():
            readable = ".".join(re.sub(r"\W|^(?=\d)", "_", part) for part in name.split("."))
            if readable != name:
                cls.__module__ = readable
        yield
    finally:
        for cls, name in before.items():
            if cls.__module__ != name:
                cls.__module__ = name


def write_torchscript(graph: Graph, folder: Path) -> Path:
    """Write `model_torchscript.pt`: `torch.jit.load(file)`. Legacy: PyTorch recommends `torch.export` instead."""
    target = folder / FILES["torchscript"]
    example: dict[str, Any] = graph.example()
    with without_tracing_logs(), causal_masks_unread(), torch.no_grad(), _readable_class_names(graph):
        # strict=False permits a dict as output
        traced = torch.jit.trace(graph, example_kwarg_inputs=example, strict=False, check_trace=False)
        torch.jit.save(traced, target)
    return target
