"""Make a Hub repo folder from an author's module, a plain `nn.Module` or a `PreTrainedModel`, without changing it."""

from .make_folder import Adopted, adopt

__all__ = ["Adopted", "adopt"]
