"""Models as graphs that run without this package: ONNX, torch.export, AOTInductor, TorchScript; each compared with torch."""

from .exporting import export_model
from .parity import ParityError
from .result import Exported

__all__ = ["Exported", "ParityError", "export_model"]
