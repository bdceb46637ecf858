"""A module as its author wrote it, a plain `nn.Module` or a `PreTrainedModel`, becomes a Hub repo folder."""

from .adopt import Adopted, adopt

__all__ = ["Adopted", "adopt"]
