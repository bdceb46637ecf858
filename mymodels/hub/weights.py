"""Compare the weights that a clean process loaded with the files, by digests and outside of that process."""

import re
from typing import Any

from ..checkpoints import Checkpoint
from .checks import Check
from .isolated.load_repo import digest

_MAX_NAMES = 3
SET_DTYPE = 'save the weights in the dtype that "dtype" in config.json names, or change it there'
INIT = (
    "let _init_weights touch leaf modules only, by nn.init.* on the parameter itself; no .data writes, and no custom "
    "from_pretrained"
)
KEYS = (
    "rename the keys in the files to those of the model's state_dict, and let from_pretrained be transformers' own; "
    "load_state_dict(strict=False) ignores every key that does not match"
)
TIE = 'declare _tied_weights_keys = {"lm_head.weight": "<embeddings>"} and get/set_output_embeddings, and tie_word_embeddings in the config'


class Files:
    """The tensors of a checkpoint by name, and their digests, computed lazily and once."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._digests: dict[str, str] = {}

    def digest(self, name: str) -> str:
        if name not in self._digests:
            self._digests[name] = digest(self.checkpoint[name])
        return self._digests[name]

    def find(self, name: str, prefix: str) -> str | None:
        """The name of a model's tensor in the files, with or without the base model's prefix; None if absent."""
        candidates = [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")] if prefix else [name]
        return next((candidate for candidate in candidates if candidate in self.checkpoint), None)


def compare_weights(loaded: dict[str, Any], files: Files, main: bool) -> list[Check]:
    """Compare the tensors that one class loaded with the files.

    Args:
        loaded: the event of the clean process, see `isolated/load_repo.py`.
        files: the folder's checkpoint.
        main: whether this is the class of `architectures`, which must load all its tensors and use all of the files'.

    Returns:
        The checks `"weights"`, `"buffers"` if there are buffers that are not saved, and `"tied"` if there is a head.
    """
    where = loaded["loaded"]
    problems = _problems(loaded, files, main)
    checks = []
    failed = [problem for problem in problems if problem[0] == "failed"]
    for status, what, remedy in failed or problems[:1]:
        checks.append(Check("weights", status, what, where, remedy))
    if not checks:
        count = sum(1 for tensor in loaded["tensors"].values() if tensor["persistent"])
        checks.append(Check("weights", "ok", f"{count} tensors equal those of the files bit for bit", where))
    return checks + _buffers(loaded) + _tied(loaded)


def _names(names: list[str]) -> str:
    listed = ", ".join(sorted(names)[:_MAX_NAMES])
    return listed if len(names) <= _MAX_NAMES else f"{listed} and {len(names) - _MAX_NAMES} more"


def _problems(loaded: dict[str, Any], files: Files, main: bool) -> list[tuple[str, str, str]]:
    """(status, message, remedy) of every difference from the files."""
    tensors, missing, tie = loaded["tensors"], set(loaded["missing"]), loaded["tie"]
    untied = set(tie["head"]) if tie and tie["wanted"] and not tie["tied"] else set()  # reported by the check "tied"
    problems = []
    meta = [name for name, tensor in tensors.items() if tensor["meta"] and name not in untied]
    if meta:
        remedy = "store no plain tensors as attributes and no tensors computed in __init__: compute them in forward"
        problems.append(("failed", f"left on the meta device, without data: {_names(meta)}", remedy))
    if loaded["mismatched"]:
        remedy = "set the sizes in config.json to those of the weights"
        problems.append(("failed", f"of another shape than in the files: {_names(loaded['mismatched'])}", remedy))

    homes = {
        name: files.find(name, loaded["prefix"])
        for name, tensor in tensors.items()
        if tensor["persistent"] and not tensor["meta"] and name not in missing | untied
    }
    wide = re.compile(
        "|".join(map(re.escape, loaded["kept_wide"])) or r"(?!)"
    )  # kept in float32 by design, whatever dtype is stored
    found = [(name, home) for name, home in homes.items() if home is not None]
    found = [(n, home) for n, home in found if not (wide.search(n) and tensors[n]["dtype"] == "float32")]
    casts = [name for name, home in found if _stored_dtype(files, home) != tensors[name]["dtype"]]
    if casts:
        stored, now = _stored_dtype(files, homes[casts[0]]), tensors[casts[0]]["dtype"]
        problems.append(("failed", f"loaded as {now}, but {stored} in the files: {_names(casts)}", SET_DTYPE))
    changed = [name for name, home in found if name not in set(casts) and files.digest(home) != tensors[name]["digest"]]
    if changed:
        what = f"differ from the files, because they were overwritten or initialised after loading: {_names(changed)}"
        problems.append(("failed", what, INIT))

    new, more = _not_in_files(loaded, files, homes, found, main)
    return problems + more + _missing_or_unexpected(loaded, (missing | new) - untied, files, main)


def _not_in_files(
    loaded: dict[str, Any], files: Files, homes: dict[str, str | None], found: list[tuple[str, str]], main: bool
) -> tuple[set[str], list[tuple[str, str, str]]]:
    """Examine the tensors whose names are not in the files.

    Tied, renamed and split tensors are recognised by their bytes. Converted tensors change with the values in the
    files and not with the seed, see `isolated/origins.py`.

    Returns:
        The tensors that were not loaded from the files, and problems as in `_problems`.
    """
    tensors, origins = loaded["tensors"], loaded.get("origins") or {}
    unnamed = [name for name, home in homes.items() if home is None]
    known = {files.digest(name) for name in files.checkpoint} if unnamed else set()
    known |= {tensors[name]["digest"] for name, _ in found}  # as they are after a cast
    new = [name for name in unnamed if tensors[name]["digest"] not in known]
    follow = set() if "random" not in origins else set(new) - {*origins["random"], *origins["unmoved"]}
    problems = []
    if follow:
        what = f"converted from tensors of the files, so not compared bit for bit: {_names(list(follow))}"
        problems.append(("warning", what, ""))
    lost = set(new) - follow - set(origins.get("computed", []))
    used = {*homes.values(), *loaded["unexpected"]}
    seen = {tensor.get("digest") for tensor in tensors.values()}
    accounted = loaded.get("accounted", True)  # whether transformers reported missing and unexpected keys
    check_unused = not follow and (lost or not accounted)
    unused = [n for n in files.checkpoint if n not in used and files.digest(n) not in seen] if check_unused else []
    if lost and not main:  # a newly initialised head is right, unless the files have tensors for it
        shapes = {tuple(tensors[name]["shape"]) for name in lost}
        unused = [name for name in unused if tuple(files.checkpoint.info[name].shape) in shapes]
    if lost and (unused or follow or not accounted) and (main or unused):
        why = f" (loading again was not tried: {origins['error']})" if "error" in origins else ""
        example = f", while {_names(unused)} of the files are not used" if unused else ""
        what = f"not found to come from the files{why}: {_names(list(lost))}{example}"
        return set(), [("failed", what, KEYS)]
    if main and unused and not lost:
        problems.append(("failed", f"in the files but not in the model: {_names(unused)}", KEYS))
    return lost, problems


def _stored_dtype(files: Files, name: str | None) -> str:
    return str(files.checkpoint.info[name].dtype).removeprefix("torch.") if name else ""


def _missing_or_unexpected(
    loaded: dict[str, Any], missing: set[str], files: Files, main: bool
) -> list[tuple[str, str, str]]:
    problems = []
    unexpected = set(loaded["unexpected"])
    if main:
        if missing:
            remedy = "save the weights again with all of them, or set architectures to the class that was saved"
            problems.append(("failed", f"not in the files, so initialised at random: {_names(list(missing))}", remedy))
        if unexpected:
            remedy = "save the weights again from this class, or set architectures to the class that was saved"
            problems.append(("failed", f"in the files but not in the model: {_names(list(unexpected))}", remedy))
        return problems
    shapes = {name: tuple(loaded["tensors"][name]["shape"]) for name in missing if name in loaded["tensors"]}
    misnamed = [
        name
        for name in shapes
        for other in unexpected
        if other in files.checkpoint
        and files.checkpoint.info[other].shape == shapes[name]
        and (other.endswith(f".{name}") or name.endswith(f".{other}"))
    ]
    if misnamed:
        remedy = "set base_model_prefix to the attribute that holds the base model in classes with a head"
        what = f"in the files under another prefix, so initialised at random: {_names(sorted(set(misnamed)))}"
        problems.append(("failed", what, remedy))
    elif missing:  # a missing head is normal before fine-tuning; missing tensors of the base model are a warning
        inner = f"{loaded['prefix']}."
        has_head = any(name.startswith(inner) for name in loaded["tensors"])
        of_base = [name for name in missing if not has_head or name.startswith(inner)]
        what = f"not in the files, this class needs training first: {_names(of_base or list(missing))}"
        problems.append(("warning" if of_base else "ok", what, ""))
    return problems


def _buffers(loaded: dict[str, Any]) -> list[Check]:
    where = loaded["loaded"]
    if loaded.get("fresh_error"):
        what = (
            f"buffers that are not saved were not compared, because no new model can be built: {loaded['fresh_error']}"
        )
        return [Check("buffers", "failed", what, where, "make the class work with from_config")]
    fresh = loaded.get("fresh_buffers", {})
    if not fresh:
        return []
    wrong = [n for n, tensor in fresh.items() if tensor["digest"] != loaded["tensors"][n]["digest"]]
    if wrong:
        what = f"not saved, and after loading different from what __init__ computes: {_names(wrong)}"
        remedy = "compute them in forward, fill them in _init_weights, or save them (persistent=True)"
        return [Check("buffers", "failed", what, where, remedy)]
    return [Check("buffers", "ok", f"{len(fresh)} buffers that are not saved equal what __init__ computes", where)]


def _tied(loaded: dict[str, Any]) -> list[Check]:
    tie, where = loaded["tie"], loaded["loaded"]
    if tie is None:
        return []
    if tie["wanted"] and not tie["tied"]:
        what = "the config ties the head to the input embeddings, but after loading they are two tensors"
        return [Check("tied", "failed", what, where, TIE)]
    if tie["tied"] and not tie["wanted"]:
        what = "the config does not tie the head to the input embeddings, but after loading they are one tensor"
        return [Check("tied", "failed", what, where, "set tie_word_embeddings in config.json to what the model does")]
    return [
        Check(
            "tied", "ok", "head and embeddings are one tensor" if tie["tied"] else "head is a tensor of its own", where
        )
    ]
