"""A script for the box: unpickle a file, running its code, and save its plain data as safetensors and JSON.

`python unpickle_script.py SOURCE FOLDER [PATH…]`: code is imported from each PATH. A module becomes its state dict; what
is neither a tensor nor plain data becomes its `repr`. `unpickling.py` reads the two files.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

DEEPEST = 40  # levels of lists and mappings
LARGEST_INTEGER = 2**63


class Plain:
    """The plain form of nested objects: JSON, and the tensors that it names."""

    def __init__(self):
        self.tensors, self._known = {}, {}

    def of(self, value, depth=0):
        """A value as JSON, in which every value but null, true, false, texts and integers is an object with one key."""
        if isinstance(value, torch.nn.Module):
            value = value.state_dict()
        if isinstance(value, torch.Tensor):
            if is_traceable_wrapper_subclass(value):
                raise SystemExit(f"a tensor in it is a {type(value).__name__}, which has no plain values")
            return {"tensor": self._name(value.detach().as_subclass(torch.Tensor))}
        if depth > DEEPEST:
            raise SystemExit(f"its objects are nested deeper than {DEEPEST} levels")
        if isinstance(value, Mapping):
            return {"mapping": [[self._key(key), self.of(item, depth + 1)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"list": [self.of(item, depth + 1) for item in value]}
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            return {"array": self._name(_from_numpy(value))}
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) is bool:
            return value
        if isinstance(value, str):  # also a subclass, such as an enum
            return str.__str__(value)
        if isinstance(value, int):
            return int(value) if abs(int(value)) < LARGEST_INTEGER else repr(int(value))
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        return repr(value)

    def _key(self, key):
        if isinstance(key, str):
            return str.__str__(key)
        return int(key) if isinstance(key, int) and abs(int(key)) < LARGEST_INTEGER else repr(key)

    def _name(self, tensor):
        """The name under which a tensor is saved; the same for one that shares its memory in the same way."""
        if tensor.is_sparse or tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided:
            raise SystemExit("a tensor in it is sparse, nested or quantised, which has no plain values")
        if tensor.is_meta:
            raise SystemExit("a tensor in it was saved from the meta device and has no data")
        place = tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)
        same = (place, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if same not in self._known:
            self._known[same] = name = str(len(self._known))
            self.tensors[name] = tensor.contiguous().clone()
        return self._known[same]


def _from_numpy(array):
    try:
        return torch.from_numpy(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("=")))
    except TypeError:
        raise SystemExit(f"an array in it is of {array.dtype}, which torch has not") from None


if __name__ == "__main__":
    source, folder, *paths = sys.argv[1:]
    sys.path[:0] = paths
    plain = Plain()
    found = plain.of(torch.load(source, map_location="cpu", weights_only=False))
    save_file(plain.tensors, Path(folder, "tensors.safetensors"))
    Path(folder, "objects.json").write_text(json.dumps(found))
