"""A script to run in another process: unpickle a file, running its code, and save its plain data.

`python unpickle_script.py SOURCE DESTINATION`. A module becomes its state dict; what is neither a tensor nor plain
data becomes its `repr`.
"""

import os
import sys
from collections.abc import Mapping

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def plain(value):
    """`value` in a form that `torch.load(weights_only=True)` reads."""
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):
            raise SystemExit(f"a tensor in it is a {type(value).__name__}, which has no plain values")
        return value.detach().as_subclass(torch.Tensor)
    if isinstance(value, Mapping):
        return {plain(key) if isinstance(key, (str, int)) else repr(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return value
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (bool, type(None)):
        return value
    if isinstance(value, str):  # also a subclass, such as an enum
        return str.__str__(value)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    return repr(value)


if __name__ == "__main__":
    source, destination = sys.argv[1:]
    sys.path[0] = os.getcwd()  # import the user's modules, not those beside this script
    torch.save(plain(torch.load(source, map_location="cpu", weights_only=False)), destination)
