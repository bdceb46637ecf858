"""`adopt`: from the author's class and weights to a verified Hub repo folder."""

import contextlib
import copy
import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import CheckpointError, replace_folder, write_manifest
from ..hub import build_repo, verify
from ..hub.build import check_output_dir
from ..hub.card import Card
from ..hub.clean_process import clean_process, failure_reason
from ..hub.golden import GOLDEN
from ..hub.verifying import Verification
from ..messages import one_line
from ..sandbox.results import UntrustedResult, copy_file
from .author_file import check_author_file, check_post_init, find_class, read_author_file, split_source
from .build_module import tensors_of
from .examine import INPUTS, OUTPUTS, RESULT, SOURCE
from .outputs import take
from .probing import Call, near


class Adopted(NamedTuple):
    """The result of `adopt`.

    Attributes:
        folder: the Hub repo folder.
        model: name of the wrapper class.
        auto_class: the Auto class that loads it.
        derived: what was found out about the module, as sentences.
        missing: what the model cannot do, and why.
        changed: names and code that differ from the author's.
        verification: the result of `mymodels verify`, or None.
    """

    folder: Path
    model: str
    auto_class: str
    derived: list[str]
    missing: list[str]
    changed: list[str]
    verification: Verification | None

    def show(self, console: Any) -> None:
        """Print it."""
        from rich.text import Text

        console.print(Text(f"{self.folder}: {self.model}, loaded by {self.auto_class}"), soft_wrap=True)
        for title, lines in (("derived", self.derived), ("changed", self.changed), ("missing", self.missing)):
            for line in lines:
                console.print(Text(f"  {title:<8} {line}"), soft_wrap=True)
        console.print("  outputs  the same as the module's, bit for bit, in a process without mymodels")
        if self.verification is None:
            console.print("  verify   was not run")
            return
        left = "" if self.verification.complete else ", some were skipped: mymodels verify names them"
        console.print(Text(f"  verify   no check failed{left}"), soft_wrap=True)


def adopt(
    source: str | type[nn.Module] | nn.Module,
    output_dir: str | os.PathLike,
    *,
    weights: str | os.PathLike | None = None,
    config: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    auto_class: str | None = None,
    card: str | Card | None = None,
    section: str | None = None,
    allow_pickle: bool = False,
    max_shard_size: int | str = "2GB",
    check: bool = True,
    quick: bool = False,
) -> Adopted:
    """Make a Hub repo folder from an author's module, without changing its file.

    The module is built and run in a separate process to find out its inputs and outputs. A config class holds its
    constructor's arguments, and a `PreTrainedModel` wraps it. The folder is written only if its model reproduces the
    module's outputs bit for bit in a process without mymodels, and `mymodels verify` finds no fault.

    Args:
        source: `"my_model.py:MyNet"`, a class, or a module with its weights.
        output_dir: created, or replaced if it is empty or an older Hub repo folder.
        weights: a checkpoint of any format, whose names are the module's but for a prefix; without one a class has the
            weights that it is initialised with.
        config: the constructor's arguments by name, of arguments that are objects also their fields; what is not given
            comes from a training checkpoint (`model_args` and the like) or the author's defaults. Of a module in
            memory, what its attributes hold under these names.
        tokenizer: saved with it; its special tokens become the config's, where the model has none.
        auto_class: what the model is for, such as `"AutoModelForSequenceClassification"`; default: what its outputs show.
        card: as in `build_repo`.
        section, allow_pickle: as in `open_checkpoint`.
        max_shard_size: as in `save_pretrained`.
        check: verify the folder; without it only the outputs are compared.
        quick: skip the slow checks, as `mymodels verify --quick`.

    Returns:
        an `Adopted`.

    Raises:
        CheckpointError: the class cannot be adopted; one sentence with file, line and remedy. Nothing was written.
        FileExistsError: `output_dir` holds something that would be lost.

    Example:
        >>> adopted = adopt("my_model.py:MyNet", "my-net", weights="net.pt", config={"hidden": 256})
        >>> adopted.auto_class
        'AutoModelForCausalLM'
    """
    output_dir = check_output_dir(output_dir)
    with tempfile.TemporaryDirectory(prefix="mymodels-adopt-", ignore_cleanup_errors=True) as name:
        scratch = Path(name).resolve()
        job = _job(source, scratch, weights, dict(config or {}))
        job |= {
            "tokens": _special_tokens(tokenizer),
            "auto_class": auto_class,
            "section": section,
            "allow_pickle": allow_pickle,
        }
        try:
            found = _examine(job, scratch)
            if isinstance(source, nn.Module):
                _check_rebuilt(source, scratch, found)
            folder = scratch / "built" / output_dir.resolve().name
            if tokenizer is not None and (refused := set(tokenizer.model_input_names) - set(found["takes"])):
                tokenizer = copy.deepcopy(tokenizer)
                tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name not in refused]
                found["changed"].append(
                    f"the tokenizer gives no {', '.join(sorted(refused))}, which forward does not take"
                )
            build_repo(
                scratch / SOURCE,
                tokenizer,
                folder,
                card=card or Card(name=output_dir.name),
                max_shard_size=max_shard_size,
                golden=False,
            )
            if found["auto_class"] in ("AutoModelForImageClassification", "AutoModelForAudioClassification"):
                _leave_out_pipeline(folder)
            _check_outputs(folder, scratch, found)
            verification = _verify(folder, quick) if check else None
        except CheckpointError as error:
            text = str(error).replace(f"{scratch}{os.sep}", "")
            raise (error if text == str(error) else CheckpointError(text)) from None
        with replace_folder(output_dir, finish=write_manifest) as final:
            shutil.copytree(folder, final, dirs_exist_ok=True)
    return Adopted(
        folder=output_dir,
        model=found["model"],
        auto_class=found["auto_class"],
        derived=found["derived"],
        missing=found["missing"],
        changed=found["changed"],
        verification=verification,
    )


def _job(source: Any, scratch: Path, weights: Any, config: dict[str, Any]) -> dict[str, Any]:
    if isinstance(source, (str, os.PathLike)):
        path, name = split_source(os.fspath(source))
    else:
        cls = source if isinstance(source, type) else type(source)
        path, name = _file_of(cls), cls.__name__
        if isinstance(source, nn.Module):
            if weights is not None:
                raise CheckpointError("a module in memory already has weights: leave out weights=, or pass its class")
            config = {**_values_of(source), **config}
            weights = scratch / "weights.safetensors"
            _save_module(source, weights)
    file = read_author_file(path)  # checked again in the other process; here it fails early
    name = find_class(file, name)
    check_author_file(file)
    check_post_init(file, name)
    return {
        "file": str(path.absolute()),
        "class": name,
        "config": config,
        "weights": None
        if weights is None
        else os.fspath(weights)
        if not Path(weights).exists()
        else str(Path(weights).absolute()),
    }


def _special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int]:
    """The ids of a tokenizer that generation needs, where it has them."""
    if tokenizer is None:
        return {}
    found = {
        "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id,
        "eos_token_id": tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {name: token for name, token in found.items() if token is not None}


def _file_of(cls: type) -> Path:
    if not issubclass(cls, nn.Module):
        raise CheckpointError(
            f"{cls.__name__} is not an nn.Module or PreTrainedModel: pass a class of modules, or a module"
        )
    try:
        path = inspect.getsourcefile(cls)
    except (OSError, TypeError):
        path = None
    if cls.__module__ == "__main__" or path is None or not Path(path).is_file():
        line = ""
        if path is not None and Path(path).is_file():
            with contextlib.suppress(OSError):  # created by `type`, or its notebook cell was changed
                line = f"{path}:{inspect.getsourcelines(cls)[1]}: "
        raise CheckpointError(
            f"{line}{cls.__name__} is defined in {cls.__module__}, a notebook or script: put it into a .py file and import it from there"
        )
    if cls.__module__.split(".")[0] in ("torch", "transformers"):
        raise CheckpointError(
            f"{cls.__name__} is a class of {cls.__module__.split('.')[0]}: adopt takes a class of your own"
        )
    if "." in cls.__qualname__:
        line = f":{inspect.getsourcelines(cls)[1]}"
        raise CheckpointError(f"{path}{line}: {cls.__qualname__} is not at the top level of its file: move it there")
    return Path(path)


def _values_of(module: nn.Module) -> dict[str, Any]:
    """The constructor's arguments that are attributes of the module with the same name."""
    found: dict[str, Any] = {}
    for name in list(inspect.signature(type(module).__init__).parameters)[1:]:
        value = vars(module).get(name, vars(module).get(f"_{name}"))
        if isinstance(value, PretrainedConfig):
            kept = value.to_diff_dict()
            found |= {
                n: v
                for n, v in kept.items()
                if n not in ("model_type", "transformers_version", "dtype", "torch_dtype", "architectures")
            }
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= dataclasses.asdict(value)
        elif isinstance(value, Namespace):
            found |= {
                f"{name}.{n}": v for n, v in vars(value).items() if isinstance(v, (bool, int, float, str, list, tuple))
            }
        elif isinstance(value, (bool, int, float, str, list, tuple)):
            found[name] = list(value) if isinstance(value, tuple) else value
    if isinstance(module, PreTrainedModel):
        found = {
            **{
                n: v
                for n, v in module.config.to_diff_dict().items()
                if n not in ("model_type", "transformers_version", "dtype", "torch_dtype", "architectures")
            },
            **found,
        }
    return found


def _save_module(module: nn.Module, path: Path) -> None:
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in tensors_of(module).items()}, path)


def _examine(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    try:
        (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    except TypeError as error:
        raise CheckpointError(f"config= holds a value that config.json cannot hold: {error}") from None
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-m", "mymodels.adopting.examine", str(scratch)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if not (scratch / RESULT).is_file():
        last = [line for line in run.stderr.splitlines() if line.strip()][-1:] or [f"exit code {run.returncode}"]
        raise CheckpointError(
            f"{job['file']}: the process that ran {job['class']} ended early: {one_line(last[0], 300)}"
        )
    found = json.loads((scratch / RESULT).read_text(encoding="utf-8"))
    if "error" in found:
        raise CheckpointError(found["error"])
    return found


def _check_rebuilt(module: nn.Module, scratch: Path, found: Mapping[str, Any]) -> None:
    """Check that a module built from the arguments found in the attributes gives the same outputs as the one in memory."""
    inputs, want = (load_file(scratch / name) for name in (INPUTS, OUTPUTS))
    state = [(part, part.training) for part in module.modules()]
    place = next(module.parameters(), torch.empty(0)).device
    try:
        call = Call(found["call"], "")
        output = call.run(module.eval(), {name: tensor.to(place) for name, tensor in inputs.items()})
        got = take(output, found["logits"]).cpu()
    except Exception as error:
        got, why_not = None, f" ({one_line(str(error), 100)})"
    else:
        why_not = ""
    finally:
        for part, training in state:
            part.training = training
    if got is None or not near(got, want.get("start_logits", next(iter(want.values())))):
        raise CheckpointError(
            f"{type(module).__name__}: a module built from the arguments found in its attributes "
            f"gives other outputs{why_not}: give the arguments it was made with, config={{…}}"
        )


def _leave_out_pipeline(folder: Path) -> None:
    """Remove the pipeline from the card if it needs an image processor that the folder lacks."""
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8").split("\n")
    card.write_text("\n".join(line for line in lines if not line.startswith("pipeline_tag:")), encoding="utf-8")


def _check_outputs(folder: Path, scratch: Path, found: Mapping[str, Any]) -> None:
    """Check that the folder's model reproduces the module's outputs bit for bit, and record them as golden outputs."""
    job: dict[str, Any] = {"inputs": str(scratch / INPUTS), "reference": str(scratch / OUTPUTS)}
    with clean_process(folder, ["reference", "record"], **job) as run:
        event = run.one("reference")
        made = run.scratch / "golden.safetensors"
        if event is None:
            raise CheckpointError(f"{found['model']} does not run: {failure_reason(run)}")
        if event:
            raise CheckpointError(f"{found['model']} does not give the module's outputs: {event}")
        if not made.is_file():
            raise CheckpointError(f"the outputs of {found['model']} could not be recorded: {failure_reason(run)}")
        try:
            copy_file(made, folder / GOLDEN)
        except UntrustedResult as error:
            raise CheckpointError(f"the outputs of {found['model']} could not be recorded: {error}") from None
    write_manifest(folder)


def _verify(folder: Path, quick: bool) -> Verification:
    found = verify(folder, quick=quick)
    if not found.passed:
        failed = [check for _, check in found.failed]
        listed = "; ".join(f"{c.name}: {c.what}" + (f" ({c.where})" if c.where else "") for c in failed[:3])
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise CheckpointError(
            f"nothing was written, because mymodels verify finds {len(failed)} faults: {listed}{more}"
        )
    return found
