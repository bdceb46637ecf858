"""Model cards: the README.md of a Hub repo, with metadata the Hub understands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCardData

from ..checkpoints import open_checkpoint
from ..checkpoints.safetensors_files import read_json
from .auto_class_names import auto_class_of

PIPELINE_TAGS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForVideoClassification": "video-classification",
    "AutoModelForTimeSeriesPrediction": "time-series-forecasting",
    "AutoModel": "feature-extraction",
}
_NEED_PROCESSOR = (
    "image",
    "audio",
    "video",
    "automatic-speech",
    "object",
)  # pipelines for these load one from the folder
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_UNKNOWN = "Not specified by the author."


@dataclass
class Card:
    """The content of a model card that cannot be read from the folder.

    Attributes:
        name: title; default: the folder's name.
        repo_id: the folder or `user/name` in the code example; default: the folder's name.
        license: a license identifier of the Hub, such as `"apache-2.0"`; `"other"` if unknown.
        language: one language code or several.
        base_model: Hub id of the model that this one was derived from.
        datasets: Hub ids of the training data.
        dataset: name of the data on which `metrics` were measured.
        metrics: metric name → value, measured on data held out from training.
        pictures: image file in the folder → caption, shown under the results.
        tags: further tags of the Hub.
        training_data, limits, description: texts.
    """

    name: str = ""
    repo_id: str = ""
    description: str = ""
    training_data: str = _UNKNOWN
    limits: str = _UNKNOWN
    dataset: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    license: str = "other"
    language: str | Sequence[str] | None = None
    base_model: str | None = None
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()


def card_of_folder(folder: Path, card: Card, *, name: str, history: Path | None = None) -> str:
    """The text of a model card: metadata, architecture, code example, training data, results, limits.

    Args:
        folder: a Hub repo folder with config and weights; its architecture determines the task and the Auto class.
        name: the title if the card has none.
        history: a `trainer_state.json` of transformers' Trainer, for metrics and training data that the card lacks.
    """
    config = read_json(folder / "config.json")
    architecture = (config.get("architectures") or ["AutoModel"])[0]
    auto_class = _auto_class(config, architecture)
    parameters = sum(info.numel for info in open_checkpoint(folder).info.values())
    metrics, training = dict(card.metrics), card.training_data
    if history is not None and history.is_file():
        measured, described = _from_trainer_state(read_json(history))
        metrics = metrics or measured
        training = described if training == _UNKNOWN else training
    title, repo_id, task = card.name or name, card.repo_id or name, PIPELINE_TAGS.get(auto_class, "feature-extraction")
    custom = bool(config.get("auto_map"))
    has_processor = any((folder / name).is_file() for name in _PROCESSORS)
    where = card.dataset or (
        "the evaluation data of its training" if not card.metrics else "data not named by the author"
    )
    data = ModelCardData(
        language=card.language if card.language is None or isinstance(card.language, str) else list(card.language),
        license=card.license,
        library_name="transformers",
        pipeline_tag=None if task.startswith(_NEED_PROCESSOR) and not has_processor else task,
        tags=[*dict.fromkeys([str(config.get("model_type")), *(["custom_code"] if custom else []), *card.tags])],
        base_model=card.base_model,
        datasets=list(card.datasets) or None,
        metrics=[_metric_type(metric) for metric in metrics] or None,
        model_name=title if metrics else None,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type="text",
                dataset_name=where,
                metric_type=_metric_type(metric),
                metric_name=metric,
                metric_value=round(value, 4),
            )
            for metric, value in metrics.items()
        ]
        or None,
    )
    trust = ", trust_remote_code=True" if custom else ""
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    rows = "\n".join(f"| {metric} | {value:.4f} |" for metric, value in metrics.items())
    results = f"On {where}:\n\n| metric | value |\n|---|---|\n{rows}" if metrics else _UNKNOWN
    results += "".join(f"\n\n![{caption}]({file})" for file, caption in card.pictures.items())
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}"{trust})\n' if has_tokenizer else ""
    made_from = f" Made from [{card.base_model}](https://huggingface.co/{card.base_model})." if card.base_model else ""
    sections = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {title}",
        card.description,
        f"`{architecture}`, {parameters / 1e6:.2f} million parameters.{made_from}",
        "## Load it",
        f"```python\nfrom transformers import {auto_class}{', AutoTokenizer' if has_tokenizer else ''}\n\n"
        f'{tokenizer}model = {auto_class}.from_pretrained("{repo_id}"{trust})\n```',
        _about_code(config) if custom else "",
        f"## Training data\n\n{training}",
        f"## Results\n\n{results}",
        f"## Limits\n\n{card.limits}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _auto_class(config: Mapping[str, Any], architecture: str) -> str:
    """The Auto class of the saved class, from `auto_map` or else from its name."""
    for auto_class, target in (config.get("auto_map") or {}).items():
        if isinstance(target, str) and target.rpartition(".")[2] == architecture and auto_class.startswith("AutoModel"):
            return auto_class
    if "ForConditionalGeneration" in architecture and config.get("is_encoder_decoder") and "vocab_size" in config:
        return "AutoModelForSeq2SeqLM"
    head = f"AutoModel{architecture[architecture.rfind('For') :]}" if "For" in architecture else ""
    return auto_class_of(architecture) or (head if hasattr(transformers, head or "?") else "AutoModel")


def _about_code(config: Mapping[str, Any]) -> str:
    text = (
        "The model's code is in this folder and is run by `trust_remote_code=True`: read it first, and pin what you read "
        "with `revision=`."
    )
    if config.get("model_type") in ("mygpt2", "mybert"):
        text += (
            " It is made for transformers 4.56 to 5.23. With the Python package mymodels installed, `import mymodels` "
            "registers the model, and no trust is needed."
        )
    return text


def _metric_type(metric: str) -> str:
    return metric.lower().split(" (")[0].replace(" ", "_")


def _from_trainer_state(state: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    """Metrics, and a sentence on the training data, from the Trainer's history."""
    log = [entry for entry in state.get("log_history", []) if isinstance(entry, dict)]
    last = next((entry for entry in reversed(log) if any(key.startswith("eval_") for key in entry)), {})
    skipped = ("runtime", "per_second", "samples", "steps")
    metrics = {
        key.removeprefix("eval_"): float(value)
        for key, value in last.items()
        if key.startswith("eval_") and isinstance(value, (int, float)) and not key.endswith(skipped)
    }
    steps, epochs = state.get("global_step"), state.get("epoch")
    trained = f"Fine-tuned for {steps} steps" + (f" ({epochs:g} epochs)" if isinstance(epochs, (int, float)) else "")
    return metrics, f"{trained} on data not named by the author." if steps else _UNKNOWN
