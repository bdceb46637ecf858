"""What each stage of a clean process would have checked, to name what a crash in the middle of it left out."""

from collections.abc import Iterator
from pathlib import Path

from ..checkpoints.errors import CheckpointError
from .clean_process import describe_folder
from .golden import GOLDEN

_GENERATION = ["cached generation", "generation config", "beams", "static cache"]
_STAGES = {  # in the order they run
    "outputs": [
        *("load", "auto_map", "tokenizer", "forward", "golden", "generation", "save", "processor", "tokenizer output"),
        *("pipeline", *_GENERATION, "batch", "padding", "inputs_embeds", "last position", "eager = sdpa"),
    ],
    "placement": ["meta", "no split", "device map"],
    "training": ["training loss", "backward", "gradient checkpointing", "optimizer step", "resize"],
    "workers": ["pickle", "forked worker", "spawned worker"],
}
_SIDE_EFFECTS = ["import and load", "forward", "training and generation"]


def rest_of_stage(stage: str, check: str, where: str, folder: Path) -> list[tuple[str, str]]:
    """The checks (name, where) that would have come after one of a stage; those that the folder has no use for left out.

    Args:
        stage: as in `isolated/stages.py`.
        check: the check that was running when the process ended.
        where: what it was about: for the stage of the other classes, the class.
        folder: the folder, of which files are read, not run.
    """
    if stage == "side effects":
        after = _SIDE_EFFECTS[_SIDE_EFFECTS.index(where) + 1 :] if where in _SIDE_EFFECTS else []
        return [("side effects", place) for place in after]
    try:
        about = describe_folder(folder)
    except (CheckpointError, OSError):
        return []
    if stage == "other classes":
        others = about["classes"][1:]
        return [("load", name) for name in (others[others.index(where) + 1 :] if where in others else [])]
    names = _STAGES.get(stage, [])
    after = names[names.index(check) + 1 :] if check in names else []
    without = set(_unused(folder, bool(about["tokenizer"]), about["classes"][0]))
    return [(name, "") for name in after if name not in without]


def _unused(folder: Path, tokenizer: bool, main: str) -> Iterator[str]:
    """The checks that are about something that the folder does not hold."""
    if not tokenizer:
        yield from ("tokenizer", "tokenizer output", "pipeline")
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        yield "processor"
    generates = (folder / "generation_config.json").is_file() or main == "AutoModelForCausalLM"
    if not generates:
        yield from ("generation", *_GENERATION)
    if not (folder / GOLDEN).is_file():
        yield from ("golden", "generation")
