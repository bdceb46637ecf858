"""Checks of preprocessing: the folder's processors, the tokenizer's output as input of the model, pipelines."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from .comparing import run_model
from .generating import generate
from .inputs import accepted_inputs, generates, max_positions
from .load_repo import accepts, place_of_forward
from .signals import wave
from .stages import innermost, sentence

TEXTS = ["Hello, world! How are you?", "The second one is a little longer."]
PROCESSORS = ("AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor")
PIPELINE: Any = transformers.pipeline  # its overloads list the library's own tasks only
SAMPLES = 64  # values of each output of a processor that the golden file records
SAME = 0.03  # times the largest value: the libraries' methods of resizing differ by as much
TASKS = {  # a class that ends like this: its pipeline
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}


# ---- processors


class NoProcessorInputs(Exception):
    """No input for a processor could be generated."""


def processor_names(job: dict[str, Any]) -> list[str]:
    """The Auto classes of the folder's processors, from its auto_map or the files that processors save."""
    folder, named = Path(job["folder"]), []
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            held = json.loads((folder / file).read_text(encoding="utf-8"))
            mapped = held.get("auto_map", {}) if isinstance(held, dict) else {}
            named += [name for name in mapped if name in PROCESSORS]
            if file.startswith("processor") or "processor_class" in held:
                named.append("AutoProcessor")
            elif "image_processor_type" in held:
                named.append("AutoImageProcessor")
            elif "feature_extractor_type" in held:
                named.append("AutoFeatureExtractor")
    return list(dict.fromkeys([*(name for name in job["companions"] if name in PROCESSORS), *named]))


def run_processor(processor: Any) -> dict[str, torch.Tensor]:
    """The tensors that a processor returns for images, audio or a time series, whichever it takes.

    Raises:
        NoProcessorInputs: it takes none of them.
        Exception: the error of its own code, if all inputs raise the same one at the same line.
    """
    parts = [processor, *(getattr(processor, part, None) for part in ("image_processor", "feature_extractor"))]
    rate = next((part.sampling_rate for part in parts if isinstance(getattr(part, "sampling_rate", None), int)), None)
    picture = smooth_picture()
    pictures = [picture, 255 - picture[::-1] // 2]  # mixing of rows is detected only where they differ
    calls: list[dict[str, Any]] = []
    if rate is None:
        calls = [{"images": pictures}, {"images": pictures, "text": TEXTS, "padding": True}]
    else:
        sounds = list(wave((2, rate)).numpy())
        calls = [
            {"raw_speech": sounds, "sampling_rate": rate},
            {"audio": sounds, "sampling_rate": rate},
        ]
    series = wave((2, 64)).numpy()
    ways: list[tuple[tuple, dict[str, Any]]] = [((), call) for call in calls]
    if rate is None and "pixel_values" not in (getattr(processor, "model_input_names", None) or []):
        ways += [((list(series),), {}), ((series,), {}), ((series[0],), {})]
    raised: list[Exception] = []
    for given, call in ways:
        try:
            made = processor(*given, **call, return_tensors="pt")
            return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        except Exception as error:
            raised.append(error)
    own = [error for error in raised if innermost(error)]
    if own and len({(innermost(error), type(error)) for error in own}) == 1:
        raise own[0]
    raise NoProcessorInputs(
        f"no input for it could be generated; of {len(raised)} that were tried, the first raises {sentence(raised[0])}"
    )


def processed_inputs(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The output of the folder's processor for images or audio; empty if there is none, or it fails."""
    for name in processor_names(job):
        try:
            processor = getattr(transformers, name).from_pretrained(job["folder"], trust_remote_code=True)
            return run_processor(processor)
        except Exception:  # the check "processor" reports it
            continue
    return {}


def smooth_picture() -> Any:
    """An image with a smooth gradient in each channel, on which methods of resizing hardly differ."""
    down, right = torch.linspace(0, 255, 96)[:, None], torch.linspace(0, 255, 120)[None]
    channels = [down.expand(96, 120), right.expand(96, 120), (510 - down - right) / 3]
    return torch.stack(channels, -1).to(torch.uint8).numpy()


def record_processors(job: dict[str, Any]) -> dict[str, Any]:
    """Shapes and sampled values of the processors' outputs, for the golden file; empty without processors."""
    found = {}
    for name in processor_names(job):
        with contextlib.suppress(Exception):  # the check "processor" reports it
            processor = getattr(transformers, name).from_pretrained(job["folder"], trust_remote_code=True)
            found[name] = {key: [list(x.shape), _sample(x)] for key, x in run_processor(processor).items()}
    return {"processed": found} if found else {}


def _sample(tensor: torch.Tensor) -> list[float]:
    values = tensor.reshape(-1).double()
    places = torch.linspace(0, max(values.numel() - 1, 0), SAMPLES).long()
    return [round(value, 6) for value in values[places].tolist()] if values.numel() else []


def _difference_from_recorded(made: dict[str, torch.Tensor], recorded: dict[str, Any]) -> str:
    """A sentence on the first difference between a processor's outputs and the recorded ones, or ""."""
    for name, (shape, sample) in recorded.items():
        if name not in made:
            return f"the processor returns no {name}, which is in the golden file"
        if list(made[name].shape) != shape:
            return f"the processor returns {name} of shape {tuple(made[name].shape)}; {tuple(shape)} was recorded"
        want = torch.tensor(sample, dtype=torch.float64)
        apart = (torch.tensor(_sample(made[name]), dtype=torch.float64) - want).abs().max().item() if sample else 0.0
        if not apart <= SAME * max(1e-3, want.abs().max().item() if sample else 0.0):
            return f"for the same input the processor returns other {name} than was recorded, by up to {apart:.3g}"
    return ""


def check_processors(job: dict[str, Any], events: Any, model: Any, recorded: dict[str, Any]) -> None:
    """Every processor loads, gives the recorded outputs, and the model accepts them."""
    for name in processor_names(job):
        if not hasattr(transformers, name):
            continue
        with events.check("load", name) as check:
            processor = getattr(transformers, name).from_pretrained(job["folder"], trust_remote_code=True)
        if check.failed:
            continue
        with events.check("processor", name) as check:
            try:
                made = run_processor(processor)
            except (NoProcessorInputs, ImportError) as error:
                check.skip(f"it was not tried: {error}")
                continue
            check_processed(check, model, made)
            known = recorded.get("processed", {}).get(name)
            if known:
                check.fail_if(_difference_from_recorded(made, known))
            elif recorded:
                check.skip("the golden file has no outputs of the processor, so none were compared: record it again")


def check_processed(check: Any, model: Any, made: dict[str, torch.Tensor]) -> None:
    """The model accepts the processor's output."""
    main = getattr(model, "main_input_name", "")
    known = {key: value for key, value in made.items() if accepts(model, key)}
    returned = ", ".join(f"{key} of shape {tuple(value.shape)}" for key, value in made.items()) or "no tensor"
    if not known:
        check.fail(f"the processor returns {returned}, none of which forward takes")
        return
    if main not in known:
        check.skip(f"the processor returns {returned}; the model also needs {main}, so its output was not tried")
        return
    if getattr(model.config, "is_encoder_decoder", False):
        known["decoder_input_ids"] = torch.ones((len(known[main]), 2), dtype=torch.long)
    try:
        run_model(model, known)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        check.fail(f"the processor returns {returned}, on which forward raises {sentence(error)}", innermost(error))


# ---- tokenizers


def check_tokenizer_output(check: Any, job: dict[str, Any], model: Any) -> None:
    """forward accepts the tokenizer's output unchanged, `token_type_ids` included."""
    if not accepts(model, "input_ids"):
        check.not_applicable("forward takes no input_ids")
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=True)
    how = {"return_tensors": "pt", "truncation": True, "max_length": max(3, (max_positions(model) or 512) - 2)}
    batch = tokenizer(TEXTS, padding=True, **how) if tokenizer.pad_token else None
    for given in ([batch] if batch is not None else []) + [tokenizer(TEXTS[0], **how)]:
        given = {name: value for name, value in given.items() if name != "overflow_to_sample_mapping"}
        if getattr(model.config, "is_encoder_decoder", False):
            given["decoder_input_ids"] = given["input_ids"][:, :2]
        elif set(_other_modalities(model)):
            check.not_applicable(f"the model also takes {', '.join(_other_modalities(model))}")
            return
        unknown = [name for name in given if name not in accepted_inputs(model, given)]
        if unknown:
            names = [name for name in tokenizer.model_input_names if name not in unknown]
            check.fail(
                f"the tokenizer gives {', '.join(unknown)}, which forward of {type(model).__name__} does not take: add "
                f'{unknown[0]}=None to its arguments, or set "model_input_names": {json.dumps(names)} in '
                "tokenizer_config.json",
                place_of_forward(model),
            )
            return
        run_model(model, given)
        if generates(model) and given["input_ids"].shape[0] == 1:
            generate(model, given, max_new_tokens=2, min_new_tokens=2)


def _other_modalities(model: Any) -> list[str]:
    return [name for name in ("pixel_values", "input_features", "input_values") if accepts(model, name)]


# ---- pipelines


def check_pipelines(job: dict[str, Any], events: Any, name: str, model: Any) -> None:
    """The folder's own pipelines, and the standard one for its class if it has a tokenizer."""
    own = getattr(model.config, "custom_pipelines", None)
    for task in own if isinstance(own, dict) else {}:
        with events.check("pipeline", task) as check:
            made = PIPELINE(task, model=job["folder"], trust_remote_code=True)
            _try_pipeline(check, made)
    task = next((task for ending, task in TASKS.items() if type(model).__name__.endswith(ending)), None)
    if task is None or not job["tokenizer"] or task == "image-classification" or own:
        return
    with events.check("pipeline", task) as check:
        tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=True)
        made = PIPELINE(task, model=model, tokenizer=tokenizer, device=torch.device("cpu"))
        how = {"max_new_tokens": 2} if task == "text-generation" else {}
        made(TEXTS[0], **how)


def _try_pipeline(check: Any, pipeline: Any) -> None:
    """Call a custom pipeline, whose input is not known, with a text, an image, audio and numbers until one works."""
    given: list[Any] = [TEXTS[0], TEXTS, {"text": TEXTS[0], "text_pair": TEXTS[1]}]
    given += [((wave((96, 120, 3)) + 1) * 127).to(torch.uint8).numpy(), wave((16_000,)).numpy(), wave((1, 16))]
    raised: list[Exception] = []
    for value in given:
        try:
            pipeline(value)
            return
        except Exception as error:
            raised.append(error)
    if len({(sentence(error), innermost(error)) for error in raised}) == 1:
        check.fail(f"it raises the same error for every input: {sentence(raised[0])}", innermost(raised[0]))
    else:
        check.skip(
            f"no input for it could be generated; of {len(raised)} that were tried, the first raises {sentence(raised[0])}"
        )
