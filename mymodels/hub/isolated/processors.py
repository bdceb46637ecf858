"""Checks of what stands before a model: its processor, its tokenizer's own output, pipelines."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from .comparing import run_model
from .generating import generate
from .inputs import generates, max_positions, wave
from .load_repo import accepts
from .stages import innermost, sentence

TEXTS = ["Hello, world! How are you?", "The second one is a little longer."]
PROCESSORS = ("AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor")
PIPELINE: Any = transformers.pipeline  # its overloads list the library's own tasks only
SAMPLES = 64  # values of each of its outputs that the golden file keeps of a processor
SAME = 0.03  # times the largest: two libraries resize by methods that differ so much
TASKS = {  # a class that ends like this: its pipeline
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}


# ---- processors


class NoProcessorInputs(Exception):
    """A processor takes something else than what can be made up."""


def processor_names(job: dict[str, Any]) -> list[str]:
    """The Auto classes of processors that the folder serves: by its auto_map, or by the files they save."""
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
    """What a processor makes of a picture and of a sound, whichever it takes.

    Raises:
        NoProcessorInputs: it takes neither, nor a series of numbers.
        Exception: whatever its own code raises at the same place, whatever it is given.
    """
    parts = [processor, *(getattr(processor, part, None) for part in ("image_processor", "feature_extractor"))]
    rate = next((part.sampling_rate for part in parts if isinstance(getattr(part, "sampling_rate", None), int)), None)
    picture = smooth_picture()
    pictures = [picture, 255 - picture[::-1] // 2]  # what mixes the rows of a batch shows only where they differ
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
        f"it takes something that cannot be made up; the first of {len(raised)} inputs gives {sentence(raised[0])}"
    )


def processed_inputs(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the folder's processor makes of a picture or a sound; nothing if there is none, or it does not work."""
    for name in processor_names(job):
        try:
            processor = getattr(transformers, name).from_pretrained(job["folder"], trust_remote_code=True)
            return run_processor(processor)
        except Exception:  # the check of the processor tells it
            continue
    return {}


def smooth_picture() -> Any:
    """A picture in which each channel rises another way, so that methods of resizing hardly differ on it."""
    down, right = torch.linspace(0, 255, 96)[:, None], torch.linspace(0, 255, 120)[None]
    channels = [down.expand(96, 120), right.expand(96, 120), (510 - down - right) / 3]
    return torch.stack(channels, -1).to(torch.uint8).numpy()


def record_processors(job: dict[str, Any]) -> dict[str, Any]:
    """Shapes and some of the values that the processors make, to go into the golden file; nothing without any."""
    found = {}
    for name in processor_names(job):
        with contextlib.suppress(Exception):  # the check of the processor reports it
            processor = getattr(transformers, name).from_pretrained(job["folder"], trust_remote_code=True)
            found[name] = {key: [list(x.shape), _sample(x)] for key, x in run_processor(processor).items()}
    return {"processed": found} if found else {}


def _sample(tensor: torch.Tensor) -> list[float]:
    values = tensor.reshape(-1).double()
    places = torch.linspace(0, max(values.numel() - 1, 0), SAMPLES).long()
    return [round(value, 6) for value in values[places].tolist()] if values.numel() else []


def _difference_from_recorded(made: dict[str, torch.Tensor], recorded: dict[str, Any]) -> str:
    """What a processor makes otherwise than when the golden outputs were recorded, in words."""
    for name, (shape, sample) in recorded.items():
        if name not in made:
            return f"the processor makes no {name}, which it made when the golden outputs were recorded"
        if list(made[name].shape) != shape:
            return f"the processor makes {name} of shape {tuple(made[name].shape)}; {tuple(shape)} was recorded"
        want = torch.tensor(sample, dtype=torch.float64)
        apart = (torch.tensor(_sample(made[name]), dtype=torch.float64) - want).abs().max().item() if sample else 0.0
        if not apart <= SAME * max(1e-3, want.abs().max().item() if sample else 0.0):
            return f"of the same input the processor makes other {name} than was recorded, by up to {apart:.3g}"
    return ""


def check_processors(job: dict[str, Any], events: Any, model: Any, recorded: dict[str, Any]) -> None:
    """Every processor loads, works as recorded, and the model takes what it makes."""
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
                check.skip(
                    "the golden file records nothing that the processor makes, so it was not compared: record it anew"
                )


def check_processed(check: Any, model: Any, made: dict[str, torch.Tensor]) -> None:
    """The model takes what a processor makes."""
    main = getattr(model, "main_input_name", "")
    known = {key: value for key, value in made.items() if accepts(model, key)}
    shown = ", ".join(f"{key} of shape {tuple(value.shape)}" for key, value in made.items()) or "no tensor"
    if not known:
        check.fail(f"the processor makes {shown}, none of which forward takes")
        return
    if main not in known:
        check.skip(f"the processor makes {shown}; the model's {main} besides was not made up, so this was not tried")
        return
    if getattr(model.config, "is_encoder_decoder", False):
        known["decoder_input_ids"] = torch.ones((len(known[main]), 2), dtype=torch.long)
    try:
        run_model(model, known)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        check.fail(f"the processor makes {shown}, which the model refuses: {sentence(error)}", innermost(error))


# ---- tokenizers


def check_tokenizer_output(check: Any, job: dict[str, Any], model: Any) -> None:
    """What the tokenizer gives goes into the model as it is, `token_type_ids` included."""
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
            check.not_applicable(f"the model takes {', '.join(_other_modalities(model))} besides")
            return
        run_model(model, given)
        if generates(model) and given["input_ids"].shape[0] == 1:
            generate(model, given, max_new_tokens=2, min_new_tokens=2)


def _other_modalities(model: Any) -> list[str]:
    return [name for name in ("pixel_values", "input_features", "input_values") if accepts(model, name)]


# ---- pipelines


def check_pipelines(job: dict[str, Any], events: Any, name: str, model: Any) -> None:
    """The folder's own pipelines, and the usual one of its class if it has a tokenizer."""
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
    """A pipeline of the folder's own takes what it likes: a text, a picture, a sound, numbers."""
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
        check.fail(f"it raises whatever it is given: {sentence(raised[0])}", innermost(raised[0]))
    else:
        check.skip(
            f"it takes something that cannot be made up; of {len(raised)} inputs the first gives {sentence(raised[0])}"
        )
