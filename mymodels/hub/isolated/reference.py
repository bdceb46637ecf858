"""Stage: the folder's model reproduces outputs that were computed elsewhere, bit for bit."""

from typing import Any

import torch

from .inputs import read_tensors
from .load_repo import load


@torch.no_grad()
def run(job: dict[str, Any], events: Any) -> None:
    """Report how the outputs for `job["inputs"]` differ from the tensors of `job["reference"]`; `""` if they do not."""
    model, loading = load(job, job["classes"][0])
    lost = sorted(map(str, [*loading.get("missing_keys", []), *loading.get("unexpected_keys", [])]))
    if lost:
        events.write(reference=f"{lost[0]} is missing or unexpected when it is loaded")
        return
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = (
            tensor.data.clone()
        )  # in a mapped file it may lie unaligned, which changes the last bit of a product
    outputs, wrong = model(**read_tensors(job["inputs"])), ""
    for name, want in read_tensors(job["reference"]).items():
        got = getattr(outputs, name, None)
        if not isinstance(got, torch.Tensor) or got.shape != want.shape or got.dtype != want.dtype:
            wrong = wrong or f"{name} is {_describe_tensor(got)}, not {_describe_tensor(want)}"
        elif not torch.equal(got, want):
            apart = (got.double() - want.double()).abs().max().item()
            wrong = wrong or f"{name} differs by up to {apart:.3g}"
    events.write(reference=wrong)


def _describe_tensor(value: Any) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else "not there"
