"""Export: load a model, write its graph and companion files, compare the outputs, and put the folder in place."""

import contextlib
import copy
import inspect
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.atomic_write import replace_folder
from ..checkpoints.checkpoint import resolve_dtype
from ..checkpoints.load_errors import (
    clear_load_errors,
    refuse_mismatched,
    refuse_other_class,
    refuse_plain_module,
)
from ..checkpoints.opening import locate
from ..checkpoints.safetensors_files import read_json
from ..checkpoints.writing import save_tokenizer_files
from ..extras import install_command
from ..forward_calls import takes
from ..hub.auto_class_names import auto_class_of
from ..hub.given_inputs import Inputs, read_inputs
from ..hub.golden import GOLDEN, read_golden
from ..library_logging import only_errors_logged, without_progress_bars
from ..messages import first_line
from . import onnx_files, parity, programs
from .graphs import OTHER, TASKS, Graph, graph_of_inputs, reads_text, task_of
from .readme import snippet, write_readme
from .result import Exported

# format → function that writes it
WRITERS: dict[str, Callable[..., Path]] = {
    "onnx": onnx_files.write_onnx,
    "pt2": programs.write_pt2,
    "aoti": programs.write_aoti,
    "torchscript": programs.write_torchscript,
}


def export_model(
    pretrained_model_name_or_path: PreTrainedModel | str | os.PathLike,
    to: str,
    out: str | os.PathLike | None = None,
    *,
    task: str | None = None,
    int8: bool = False,
    dtype: str | torch.dtype | None = "float32",
    opset: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    texts: Sequence[str] | None = None,
    inputs: Inputs | None = None,
    tolerance: float | None = None,
    external_data_above: int = onnx_files.PROTOBUF_LIMIT,
) -> Exported:
    """Export a model as a graph that runs without mymodels, compare its outputs with torch, and write a folder.

    The folder contains the graph, `config.json`, the tokenizer, `generation_config.json`, and a `README.md` with code to
    run it. It is written only if the graph gives torch's outputs in a new process, on batches of several sizes and
    lengths.

    The graph of a language model has keys and values as inputs and outputs (for sliding windows too all of them, because
    the mask applies the window), so that one graph computes the prompt, with a past of length 0, and each step. In ONNX
    they are `past_key_values.N.key`, …, and `present.N.key`, …; `"pt2"` and `"aoti"` take them as one list,
    `past_key_values=[key, value, key, …]`. TorchScript, models without a cache and encoder-decoders have none: each step
    of generation computes all tokens.

    Token ids are generated for the trace and the comparison. The inputs of other models, such as images, are `inputs`, or
    those that `golden.safetensors` of the folder was recorded with; only their number of rows may change.

    Args:
        pretrained_model_name_or_path: a folder or Hub repo that an Auto class loads; MyGPT2 and MyBert need no
            `trust_remote_code`. Or a model in memory, which is copied; the exported folder then has no tokenizer.
        to: `"onnx"`, `"pt2"` (`torch.export`), `"aoti"` (AOTInductor) or `"torchscript"` (legacy).
        out: the output folder, which must be empty or not exist. Default: `NAME-onnx` or the like in the current folder.
        task: a key of `graphs.TASKS`; default: by the class in the config's `architectures`.
        int8: quantise the weights (ONNX only). The loss of quality is measured on texts and returned.
        dtype: dtype of weights and outputs, or its name; `"auto"`: the checkpoint's.
        opset: of ONNX; default 20.
        revision: branch, tag or commit of a Hub repo.
        trust_remote_code: run custom code of the folder.
        texts: texts to measure int8 on; default: the sample text that ships with mymodels.
        inputs: arguments of `forward` by name, or a `.safetensors`, `.npz` or JSON file of them, see
            `mymodels.hub.given_inputs.read_inputs`: images, sounds, or what else cannot be generated.
        tolerance: largest accepted difference, relative to an output's largest value if that exceeds 1. Default: 1e-4 in
            float32, 1e-2 in float16, 5e-2 in bfloat16.
        external_data_above: ONNX weights of more bytes are stored in `model.onnx_data` beside the graph; default: close
            to the limit of 2 GB for one file.

    Returns:
        The files and the results of the comparison.

    Raises:
        ParityError: the graph's outputs differ from torch's; nothing is written.
        ValueError: unknown format or task, a head without weights, a missing package, or a model that cannot be exported.
        OSError: the model does not exist, or `out` cannot be written.

    Examples:
        >>> export_model("hub_repo/mygpt2", "onnx", "mygpt2-onnx").differences["logits"] < 1e-4
        True
    """
    _check_options(to, task, int8, opset, texts, inputs)
    given = None if inputs is None else _checked(read_inputs(inputs))
    wanted = resolve_dtype(dtype)
    refuse_plain_module(pretrained_model_name_or_path, "export")
    path, given_model = None, None
    if isinstance(pretrained_model_name_or_path, PreTrainedModel):
        given_model = pretrained_model_name_or_path
        name = type(given_model).__name__.lower()
    else:
        path = locate(pretrained_model_name_or_path, revision=revision)
        name = Path(pretrained_model_name_or_path).expanduser().resolve().name
    target = Path(out) if out is not None else Path(f"{name}-{to}{'-int8' if int8 else ''}")
    with (
        replace_folder(target, overwrite=False) as folder,
        tqdm(
            total=4, desc="loading", leave=False, disable=None, bar_format="{desc}: {bar} {n}/{total} {elapsed}"
        ) as bar,
    ):
        if given_model is None:
            assert path is not None
            model, task = _load(path, task, wanted, trust_remote_code, given is not None)
        else:
            model, task = _copy(given_model, task, wanted, given is not None)
        if getattr(model, "is_quantized", False):
            raise ValueError(
                f"{name} is quantised: export the model that it was made from (to ONNX with int8), or what "
                "model.dequantize() returns"
            )
        if to == "onnx" and model.dtype in (torch.bfloat16, torch.float64):
            raise ValueError("ONNX Runtime has no CPU kernels for bfloat16 and few for float64: use float32 or float16")
        if int8 and model.dtype is not torch.float32:
            raise ValueError("int8 quantises float32 weights: leave out dtype")
        tokenizer = None if path is None else _tokenizer(path, trust_remote_code)
        _save_companions(model, tokenizer, folder)
        if given is None and not reads_text(model, task):
            given = _recorded_inputs(model, path)
        for name in given or ():
            if not takes(model, name):
                arguments = ", ".join(inspect.signature(model.forward).parameters)
                raise ValueError(f"{type(model).__name__}.forward takes no {name}, but {arguments}: rename the input")
        if given is not None and int8:
            raise ValueError("int8 is measured on texts: leave it out for a model of other inputs")
        with _as_value_error(model, to):
            graph = (
                Graph(model, task, cache=to != "torchscript" and task == "text-generation")
                if given is None
                else graph_of_inputs(model, task, given)
            )
        cases = _make_cases(graph, tokenizer, texts) if int8 else parity.make_cases(graph)
        _advance(bar, "running torch")
        with _as_value_error(model, to):
            parity.compute_expected(model, graph, cases)
        _advance(bar, "tracing")
        options: dict[str, Any] = {}
        if to == "onnx":
            opset = opset or onnx_files.DEFAULT_OPSET
            options = {"opset": opset, "int8": int8, "external_data_above": external_data_above}
            options["metadata"] = {"task": task, "model_type": str(model.config.model_type)}
        with _as_value_error(model, to):
            if to == "onnx":
                model.set_attn_implementation("eager")  # basic operations, which every runtime supports
            file = WRITERS[to](graph, folder, **options)
        _advance(bar, "comparing")
        parity.run_in_new_process(to, file, graph, cases)
        quality, differences = None, {}
        limit = parity.TOLERANCES[model.dtype] if tolerance is None else tolerance
        if int8:
            quality = parity.measure_quality(cases, model.config, task)
            parity.check_quality(quality)
        else:
            differences = parity.check(cases, limit)
        exported = Exported(
            folder=target,
            file=target / file.name,
            kind=to,
            task=task,
            dtype=str(model.dtype).removeprefix("torch."),
            inputs=[*graph.inputs, *(graph.past if to == "onnx" else ["past_key_values"] if graph.past else [])],
            outputs=list(cases[0].expected),
            differences=differences,
            tolerance=limit,
            quality=quality,
            shapes=list(dict.fromkeys(case.shape for case in cases)),
            size=sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith(file.name)),
            opset=opset if to == "onnx" else None,
        )
        has_tokenizer = (folder / "tokenizer.json").is_file()
        about: dict[str, Any] = {
            "inputs": exported.inputs,
            "outputs": exported.outputs,
            "dtype": exported.dtype,
            "tokenizer": has_tokenizer,
            "examples": None if given is None else graph.example(),
            "past": graph.past_shapes,
        }
        code = snippet(to, task, file.name, model.config, **about)
        write_readme(folder, name, to, task, exported.compared, code)
        _advance(bar, "done")
    return exported


def _check_options(
    to: str, task: str | None, int8: bool, opset: int | None, texts: Sequence[str] | None, inputs: Any
) -> None:
    if to not in WRITERS:
        raise ValueError(f"to={to!r}: choose one of {', '.join(WRITERS)}")
    if task is not None and task not in TASKS:
        raise ValueError(f"task={task!r} is not known: choose one of {', '.join(TASKS)}")
    if to != "onnx" and (int8 or opset):
        raise ValueError(f"{'int8' if int8 else 'opset'} is for ONNX: leave it out, or export to onnx")
    if inputs is not None and int8:
        raise ValueError("int8 is measured on texts: leave out inputs or int8")
    if texts is not None and not int8:
        raise ValueError("texts are only used to measure int8: leave them out, or pass int8 too")
    for module in ("onnx", "onnxscript", "onnxruntime") if to == "onnx" else ():
        if find_spec(module) is None:
            raise ValueError(f"this needs the package {module}: run {install_command('onnx')}")


def _checked(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs whose names can be arguments and which have one number of rows."""
    if wrong := [name for name in inputs if not name.isidentifier()]:
        raise ValueError(f"inputs: {wrong[0]!r} can be no argument of forward")
    if len({len(tensor) for tensor in inputs.values()}) > 1:
        sizes = ", ".join(f"{name} {len(tensor)}" for name, tensor in inputs.items())
        raise ValueError(f"inputs have different numbers of rows ({sizes}): the first dimension is the batch")
    return inputs


def _recorded_inputs(model: PreTrainedModel, path: Path | None) -> dict[str, torch.Tensor]:
    """The inputs that a folder's `golden.safetensors` was recorded with.

    Raises:
        ValueError: there are none.
    """
    if path is not None and (path / GOLDEN).is_file() and (found := read_golden(path / GOLDEN).inputs):
        return _checked(found)
    raise ValueError(
        f"the inputs of {type(model).__name__} ({model.main_input_name}) cannot be generated: pass --inputs FILE (inputs=)"
    )


@contextlib.contextmanager
def _as_value_error(model: PreTrainedModel, to: str) -> Iterator[None]:
    """Turn errors of torch and custom code into a `ValueError` with one sentence; `OSError` is not changed."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be exported to {to}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first line of what went wrong; torch.onnx wraps it in advice with colour codes."""
    while type(error).__module__.startswith("torch.onnx") and error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if "data-dependent expression" in text:
        return (
            f"forward branches on the values of a tensor{_author_line(error)}, and a graph has one path: "
            "compute every branch and choose by torch.where, or multiply by a mask"
        )
    if "Constraints violated" in text or "user-specified ranges and inferred ranges" in text:
        sizes = re.findall(r"constant \((\d+)\)|static shape of (\d+)", text)
        only = f", which is {''.join(sizes[0])} here" if sizes else ""
        return (
            f"the graph would hold for one size of its inputs only{only}, as where forward takes len() of a tensor, loops over "
            "the tokens in Python or calls nn.LSTM: take .size(), and work on all tokens at once"
        )
    return first_line(Exception(text or type(error).__name__))


def _author_line(error: BaseException) -> str:
    """` (FILE:LINE)` of the last code in a traceback that is of no library, or `""`."""
    libraries = [str(Path(module.__file__ or "").parent) for module in (torch, transformers, contextlib)]
    libraries.append(str(Path(__file__).parents[1]))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(tuple(libraries))]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _advance(bar: tqdm, stage: str) -> None:
    bar.set_description_str(stage)
    bar.update()


def _load(
    path: Path, task: str | None, dtype: torch.dtype | None, trust_remote_code: bool, given: bool
) -> tuple[PreTrainedModel, str]:
    """The model and its task."""
    raw = read_json(path / "config.json") if (path / "config.json").is_file() else None
    if raw is None:
        raise ValueError(f"{path} has no config.json: name the folder of a model")
    architecture = str((raw.get("architectures") or [""])[0])
    task = task or task_of(architecture, raw.get("auto_map"))
    auto_class = TASKS[task].auto_class if task else ""
    if task is None and given:
        own = {name: str(target).rpartition(".")[2] for name, target in (raw.get("auto_map") or {}).items()}
        named = [name for name, target in own.items() if target == architecture and hasattr(transformers, name)]
        task, auto_class = OTHER, next(iter(named), auto_class_of(architecture))
    if task is None or not auto_class:
        what = f"is a {architecture}" if architecture else "has a config without architectures"
        raise ValueError(f"{path} {what}, so its task is not known: pass task=, one of {', '.join(TASKS)}")
    with only_errors_logged(), without_progress_bars(), clear_load_errors(path):
        model, info = getattr(transformers, auto_class).from_pretrained(
            path,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `refuse_mismatched` raises with their names
        )
    refuse_other_class(model, raw.get("auto_map"), auto_class, path)
    refuse_mismatched(info, path)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{path} has no weights for {missing[0]}{' and others' if len(missing) > 1 else ''}, which {task} needs: "
            f"its class is {architecture or 'not named'}"
        )
    return model, task


def _copy(
    model: PreTrainedModel, task: str | None, dtype: torch.dtype | None, given: bool
) -> tuple[PreTrainedModel, str]:
    """A copy of a model in memory, whose attention implementation is changed for the graph, and its task."""
    name = type(model).__name__
    auto_class = getattr(type(model), "_auto_class", None)
    task = task or task_of(name, {auto_class: name} if auto_class else None) or (OTHER if given else None)
    if task is None:
        raise ValueError(
            f"the task of {name} cannot be determined from its name: pass task=, one of {', '.join(TASKS)}"
        )
    copied = copy.deepcopy(model).cpu()
    if dtype is not None:
        copied.to(dtype=dtype)  # type: ignore[call-arg]
    return copied, task


def _tokenizer(path: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, None if it has none."""
    if all(file.suffix == ".py" for file in [*path.glob("*token*"), *path.glob("vocab*")]):
        return None
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def _make_cases(
    graph: Graph, tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str] | None
) -> list[parity.Case]:
    if texts is not None and tokenizer is None:
        raise ValueError("the folder has no tokenizer for texts: leave out texts=")
    if tokenizer is None:
        return parity.make_cases(graph)
    if texts is None:
        from ..training.sample_text import load_sample_text, passages

        texts = [text for text, _ in passages(load_sample_text("held_out"), words=48)][:64]
    cases = parity.text_cases(graph, tokenizer, texts)
    if not cases:
        raise ValueError("none of the texts has two tokens: pass longer ones")
    return cases


def _save_companions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Save config, generation config and tokenizer; of custom code only that of the config."""
    config = model.config
    if getattr(config, "auto_map", None):
        config.auto_map = {name: value for name, value in config.auto_map.items() if name == "AutoConfig"}
    config.save_pretrained(folder)
    if tokenizer is not None:
        save_tokenizer_files(tokenizer, folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
