"""Export models to ONNX, torch.export, AOTInductor and TorchScript, each compared with the original in torch."""

from .exporting import export_model
from .parity import ParityError
from .result import Exported

__all__ = ["Exported", "ParityError", "export_model"]
