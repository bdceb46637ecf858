"""A module as its author wrote it, a plain `nn.Module` or a `PreTrainedModel`, becomes a Hub repo folder."""

from .make_folder import Adopted, adopt

__all__ = ["Adopted", "adopt"]
