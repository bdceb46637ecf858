"""Models as graphs that run without this package: ONNX, torch.export, AOTInductor, TorchScript; each compared with torch."""

from .exporting import Exported, export_model
from .parity import ParityError

__all__ = ["Exported", "ParityError", "export_model"]
