"""ONNX: export by `torch.onnx.export`, and int8 quantisation by onnxruntime."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from .graphs import Graph
from .programs import causal_masks_unread, without_tracing_logs

FILE, DATA_FILE = "model.onnx", "model.onnx_data"
DEFAULT_OPSET = 20  # the first with Gelu; needs onnxruntime 1.18 or newer
PROTOBUF_LIMIT = 2**31 - 2**24  # bytes of weights in one file; the rest is left for the nodes


def write_onnx(
    graph: Graph,
    folder: Path,
    *,
    opset: int = DEFAULT_OPSET,
    int8: bool = False,
    external_data_above: int = PROTOBUF_LIMIT,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write `model.onnx` into `folder`, beside it `model.onnx_data` if the weights exceed `external_data_above` bytes.

    Raises:
        ValueError: an operation of the model has no ONNX form, or `onnx.checker` rejects the file.
    """
    import onnx
    import onnxscript  # noqa: F401  needed by torch.onnx.export; a clear ImportError here

    target = folder / FILE
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as scratch:
        raw = Path(scratch, "raw.onnx")
        _trace(graph, opset).save(str(raw), external_data=True)
        if int8:
            _quantize(raw, quantized := Path(scratch, "int8.onnx"))
            raw = quantized
        model = onnx.load(raw)
    written = next(entry.version for entry in model.opset_import if not entry.domain)
    if written != opset:  # torch falls back to another opset with a warning
        raise ValueError(f"torch cannot write opset {opset} for it, but {written}: pass that or a newer one, or none")
    model.producer_name = "mymodels"
    onnx.helper.set_model_props(model, {**(metadata or {}), "opset": str(opset)})
    _remove_source_lines(model.graph)
    weights = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    if weights > external_data_above:
        onnx.save_model(model, target, save_as_external_data=True, location=DATA_FILE, size_threshold=1024)
    else:
        onnx.save_model(model, target)
    onnx.checker.check_model(str(target), full_check=True)
    return target


def _trace(graph: Graph, opset: int) -> Any:
    example = graph.example()
    shapes: dict[str, Any] = dict(graph.axes())
    if graph.past:
        shapes["past_key_values"] = [{0: "batch_size", 2: "past_sequence_length"}] * len(graph.past)
    with without_tracing_logs(), causal_masks_unread():
        with torch.no_grad():
            outputs = list(graph(**example))
        program = torch.onnx.export(
            graph,
            kwargs=example,
            input_names=[*graph.inputs, *graph.past],
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    return program


def _remove_source_lines(graph: Any) -> None:
    """Remove each node's source lines, which contain paths of this machine."""
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _remove_source_lines(attribute.g)
    for value in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del value.metadata_props[:]


def _quantize(source: Path, target: Path) -> None:
    """Quantise weights of matrix products and embeddings to int8 per column, and activations dynamically.

    Weights use seven of the eight bits, because on x86 processors without VNNI the sum of two products overflows.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # onnxruntime recommends a pre-processing that was done already
    try:
        quantize_dynamic(
            source,
            target,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,  # may exceed 2 GB too
        )
    finally:
        logging.disable(before)
