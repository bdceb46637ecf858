"""torch's norms as classes that the reading of constructors understands: they are made of ones and zeros."""

import ast
import re
from functools import cache

from .code_tree import Klass
from .repo_snapshot import CodeFile

_NORM = re.compile(r"torch\.nn\.(?:LayerNorm|RMSNorm|GroupNorm|BatchNorm[123]d|InstanceNorm[123]d|SyncBatchNorm)$")
_SIGNATURES = {
    "LayerNorm": "shape, eps=0, affine=True, bias=True, elementwise_affine=True",
    "RMSNorm": "shape, eps=0, affine=True, bias=False, elementwise_affine=True",
    "GroupNorm": "groups, channels, eps=0, affine=True, bias=True, elementwise_affine=True",
    "InstanceNorm": "size, eps=0, momentum=0, affine=False, bias=True, elementwise_affine=True",
    "BatchNorm": "size, eps=0, momentum=0, affine=True, bias=True, elementwise_affine=True",
}
_SOURCE = """
class {name}(torch.nn.{name}):
    def __init__(self, {signature}):
        if affine and elementwise_affine:
            self.weight = torch.nn.Parameter(torch.ones(1))
            if bias:
                self.bias = torch.nn.Parameter(torch.zeros(1))
"""


def torch_norm(file: CodeFile, dotted: str) -> Klass | None:
    """A class with the parameters of a norm of torch, or None for any other class.

    Args:
        file: the file that names it.
        dotted: its full name, such as `"torch.nn.LayerNorm"`.
    """
    node = _definition(dotted.rpartition(".")[2]) if _NORM.match(dotted) else None
    return Klass(file, node) if node is not None else None


def is_torch_norm(klass: Klass) -> bool:
    """Whether a class stands for one of torch."""
    return klass.node is _definition(klass.name)


@cache
def _definition(name: str) -> ast.ClassDef | None:
    kind = re.sub(r"^Sync|\dd$", "", name)
    if kind not in _SIGNATURES:
        return None
    (made,) = ast.parse(_SOURCE.format(name=name, signature=_SIGNATURES[kind])).body
    assert isinstance(made, ast.ClassDef)
    return made
