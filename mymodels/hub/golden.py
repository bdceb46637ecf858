"""`golden.safetensors`: recorded inputs and outputs, with which later loads of the folder are compared."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.atomic_write import replace_file
from ..checkpoints.errors import CheckpointError
from ..sandbox.results import UntrustedResult, open_regular
from .clean_process import TIME_LIMIT, clean_process, failure_reason

if TYPE_CHECKING:
    from .given_inputs import Inputs
    from .isolated.golden_outputs import Golden

GOLDEN = "golden.safetensors"


def record_golden(
    folder: str | os.PathLike,
    *,
    inputs: "Inputs | None" = None,
    release: Path | None = None,
    time_limit: float = TIME_LIMIT,
    memory_limit: int | None = None,
) -> Path:
    """Run a folder's models in a clean process and record their inputs and outputs as `golden.safetensors`.

    For each Auto class whose weights are all in the folder, its outputs (logits or hidden states) are recorded, and for
    a model that generates, the tokens. Record while the folder is known to be correct: later verifications compare
    with the file. It is written atomically, and a `manifest.json` is updated.

    Args:
        folder: a local Hub repo folder; its code is run.
        inputs: arguments of `forward` by name, or a file of them, see `given_inputs.read_inputs`. Default: generated
            from the config; for text, two rows of which one is padded.
        release: a folder with another transformers release, see `releases.install`.
        time_limit, memory_limit: as in `clean_process`.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: the models do not load or run, weights are missing, or the folder has a golden file already;
            nothing is written.

    Examples:
        >>> record_golden("my-model")
        PosixPath('my-model/golden.safetensors')
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a local folder: golden outputs are recorded in the folder of a model on this machine"
        )
    if (folder / GOLDEN).exists():
        raise CheckpointError(f"{folder} has {GOLDEN} already: remove it first if the model was changed on purpose")
    with temporary_golden(
        folder, inputs=inputs, release=release, time_limit=time_limit, memory_limit=memory_limit
    ) as made:
        with replace_file(folder / GOLDEN) as file:
            shutil.copyfile(made, file)
        from ..checkpoints.integrity import update_manifest

        update_manifest(folder, GOLDEN)
    return folder / GOLDEN


@contextlib.contextmanager
def temporary_golden(
    folder: Path,
    *,
    inputs: "Inputs | None" = None,
    release: Path | None = None,
    time_limit: float = TIME_LIMIT,
    memory_limit: int | None = None,
) -> Iterator[Path]:
    """A golden file of the folder in a temporary folder, deleted after the `with` block; see `record_golden`."""
    limits: dict[str, Any] = {"time_limit": time_limit, "memory_limit": memory_limit}
    with tempfile.TemporaryDirectory(prefix="mymodels-golden-") as own:
        job: dict[str, Any] = {}
        if inputs is not None:
            from .given_inputs import write_inputs

            job["inputs"] = write_inputs(inputs, Path(own))
        with clean_process(folder, ["record"], release=release, **limits, **job) as run:
            made = run.scratch / GOLDEN
            if any("ended" in event for event in run.events) or not made.is_file():
                last = str(run.one("last"))
                if wrong := re.match(r"mymodels_clean\.inputs\.(?:WrongInputs|FailedOnInputs): (.*)", last):
                    raise CheckpointError(f"{folder}: golden outputs cannot be recorded, {wrong[1]}")
                unsuitable = re.match(r"mymodels_clean\.inputs\.NoSuitableInputs: (.*)", last)
                if unsuitable:
                    raise CheckpointError(
                        f"{folder}: golden outputs cannot be recorded, {unsuitable[1]}: leave them out (golden=False, "
                        "--no-golden), or pass --inputs FILE (inputs=)"
                    )
                raise CheckpointError(
                    f"{folder}: golden outputs cannot be recorded, {_without_internals(failure_reason(run))}"
                )
            try:
                os.close(open_regular(made))
            except UntrustedResult as error:
                raise CheckpointError(f"{folder}: golden outputs cannot be recorded: {error}") from None
            read_golden(made)
            yield made


def _without_internals(reason: str) -> str:
    """The last message of a process without temporary paths and internal module names."""
    reason = re.sub(r"[^\s'\"]*/mymodels-(clean|golden)-\w+/([^\s'\"]*/)?", "", reason)
    return re.sub(r"\b(mymodels_clean|transformers_modules)(\.\w+)*\.(?=[A-Z])", "", reason)


def read_golden(path: str | os.PathLike) -> "Golden":
    """The content of a golden file.

    Raises:
        CheckpointError: the file is damaged or is not a golden file.
    """
    from ..checkpoints.safetensors_files import read_header  # imports torch
    from .isolated.golden_outputs import read

    path = Path(path)
    read_header(path)
    try:
        return read(path)
    except Exception as error:  # also what the safetensors library raises
        raise CheckpointError(f"{path}: {error}; record it again with `mymodels verify --record`") from error
