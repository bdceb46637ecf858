"""What folders compute under one transformers release, recorded in one clean process, and the comparison of two records."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from ...messages import one_line
from ...sandbox import results
from ..clean_process import LONGEST, TIME_LIMIT, clean_process, failure_reason
from ..isolated.comparing import difference

TOLERANCE = 1e-5  # in float32, times the largest expected value or 1
NO_REORDERING = "the state of this model cannot be reordered"  # what the rule "beams" raises
PROPERTY = "property"  # status of what is true of the original alone, and compared with nothing
IMAGES = 0.03  # of processors: the libraries' methods of resizing differ by as much


class Recorded(NamedTuple):
    """What one folder computed under one release.

    Attributes:
        release: the transformers release.
        classes: class → item, such as `"outputs"` → how it went: `status`, and for a failure `what` and `where`.
        tensors: `class|item|name` → values.
        failure: why there is no record at all; "" if there is one.
    """

    release: str
    classes: dict[str, dict[str, dict[str, Any]]]
    tensors: dict[str, torch.Tensor]
    failure: str = ""

    def of(self, name: str, item: str) -> dict[str, torch.Tensor]:
        """The tensors of one item of a class."""
        start = f"{name}|{item}|"
        return {key[len(start) :]: tensor for key, tensor in self.tensors.items() if key.startswith(start)}

    @property
    def ran(self) -> list[str]:
        """The classes that loaded and gave outputs, or tokens."""
        return [
            name
            for name, items in self.classes.items()
            if any(
                items.get(item, {}).get("status") in ("recorded", "random")
                for item in ("outputs", "tokens", "processed")
            )
        ]

    @property
    def first_failure(self) -> str:
        """A sentence on the first thing that failed, with its place, or ""."""
        if self.failure:
            return self.failure
        for name, items in self.classes.items():
            for item, found in items.items():
                if found["status"] == "failed":
                    return f"{item} of {name}: {found['what']}" + (f" ({found['where']})" if found["where"] else "")
        return ""


class Compared(NamedTuple):
    """One item of the proof under one release.

    Attributes:
        release: the transformers release of the upgraded code.
        name: class, such as `"AutoModelForCausalLM"`.
        item: what was compared, such as `"greedy, with cache"`.
        status: `"equal"`, `"differs"`, `"failed"` (it raises), or `"not compared"` (there is nothing to compare with).
        what: the difference, the error, or why it was not compared.
        where: file and line of an error in the upgraded code.
    """

    release: str
    name: str
    item: str
    status: str
    what: str = ""
    where: str = ""


def record(
    folders: Mapping[str, Path],
    release: Path | None,
    named: str,
    *,
    inputs: Mapping[str, Recorded] | None = None,
    own_inputs: Mapping[str, Path] | None = None,
    time_limit: float = TIME_LIMIT,
    memory_limit: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Recorded]:
    """Run folders under one release in one clean process, each in a fork.

    Args:
        folders: by key, a word.
        release: where the release is installed; None for the installed one.
        named: the release's version.
        inputs: earlier records by the same keys, whose inputs are used again.
        own_inputs: files of the caller's inputs by the same keys.
        time_limit: seconds for each folder.
        memory_limit: bytes of the process; default as in `clean_process`.
        progress: called with what is being done.

    Returns:
        A record for every key. Whatever fails is in it and raises nothing.
    """
    with tempfile.TemporaryDirectory(prefix="mymodels-upgrade-") as own:
        given: dict[str, str] = {}
        for key, earlier in (inputs or {}).items():
            tensors = {name: value for name, value in earlier.tensors.items() if name.split("|")[1].startswith("input")}
            if key in folders and tensors:
                given[key] = str(Path(own, f"{key}.safetensors"))
                save_file(tensors, given[key])
        own_files = {key: str(file) for key, file in (own_inputs or {}).items()}
        job: dict[str, Any] = {"recorded": given, "own_inputs": own_files, "each_limit": time_limit}
        first = next(iter(folders.values()))
        with clean_process(
            first,
            ["numbers"],
            release=release,
            time_limit=time_limit * len(folders),
            memory_limit=memory_limit,
            progress=progress,
            beside=folders,
            readable=map(Path, [*given.values(), *own_files.values()]),
            **job,
        ) as run:
            found = {}
            for key in folders:
                try:
                    if os.path.lexists(run.scratch / f"{key}.json"):
                        found[key] = _read_record(run.scratch, key, named)
                        continue
                except results.UntrustedResult as error:
                    found[key] = Recorded(named, {}, {}, f"its code tampered with the record: {error}")
                    continue
                ended = [e for e in run.events if e.get("ended") == f"numbers of {key}"]
                why = failure_reason(run._replace(events=ended)) if ended else failure_reason(run)
                found[key] = Recorded(named, {}, {}, one_line(why, LONGEST))
            return found


def _read_record(scratch: Path, key: str, release: str) -> Recorded:
    """The record that `isolated/numbers.py` wrote for a folder, whose code may have written anything there.

    Raises:
        UntrustedResult: it is not such a record.
    """
    report = results.read_json(scratch / f"{key}.json")
    tensors = results.read_tensors(scratch / f"{key}.safetensors")
    classes = report.get("classes") if isinstance(report, dict) else None
    if not isinstance(classes, dict) or not all(map(_is_class, classes.values())):
        raise results.UntrustedResult("it has another structure")
    return Recorded(release, classes, tensors)


def _is_class(items: Any) -> bool:
    return isinstance(items, dict) and all(_is_item(name, found) for name, found in items.items())


def _is_item(name: str, found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    texts = {"recorded": (), "random": (), "failed": ("what", "where")}.get(str(found.get("status")), ("what",))
    held = ("weights", "buffers") if (name, found.get("status")) == ("load", "recorded") else ()
    return (
        isinstance(found.get("status"), str)
        and all(isinstance(found.get(key), str) for key in texts)
        and all(isinstance(found.get(key), dict) for key in held)
        and (not held or isinstance(found.get("second names"), list))
    )


def compare(old: Recorded, new: Recorded) -> list[Compared]:
    """Each item of the old record with that of the new one."""
    if new.failure:
        return [Compared(new.release, "", "load", "failed", new.failure)]
    found = []
    for name, items in old.classes.items():
        for item, before in items.items():
            if not item.startswith("input") and before["status"] != PROPERTY:
                found.append(_compare_item(old, new, name, item, before))
    return found


def _compare_item(old: Recorded, new: Recorded, name: str, item: str, before: dict[str, Any]) -> Compared:
    row = Compared(new.release, name, item, "equal")
    after = new.classes.get(name, {}).get(item, {"status": "failed", "what": "it was not run", "where": ""})
    if before["status"] == "failed":
        return row._replace(status="not compared", what=f"the original raises {before['what']} ({before['where']})")
    if before["status"] == "random":
        return row._replace(status="not compared", what="the original gives other outputs each time")
    if before["status"] in ("new weights", "left out"):
        return row._replace(status="not compared", what=before["what"])
    if item == "beams, with cache" and (apart := _beams_apart(old, name)):
        return row._replace(status="not compared", what=apart)
    if after["status"] == "left out":
        return row._replace(status="not compared", what=after["what"])
    if after["status"] == "new weights":
        return row._replace(status="differs", what=after["what"])
    if item == "beams, with cache" and NO_REORDERING in after.get("what", ""):
        what = "the original does not reorder its state, so that beams go on with the state of others; now it raises"
        return row._replace(status="not compared", what=what)
    if after["status"] == "failed":
        load = new.classes.get(name, {}).get("load", {})
        if item != "load" and load.get("status") == "failed":
            return row._replace(status="failed", what="it does not load")
        return row._replace(status="failed", what=after["what"], where=after.get("where", ""))
    if item == "load":
        wrong = _other_weights(before, after)
        return row._replace(status="differs", what=wrong) if wrong else row
    tolerance = IMAGES if item == "processed" else TOLERANCE
    expected, given = old.of(name, item), new.of(name, item)
    if item.startswith("beams") and "scores" in expected and _tie(expected["scores"]):
        expected.pop("tokens")  # either row may be the best one
    wrong = difference(given, expected, tolerance)
    if not wrong and item == "loss and gradients":
        wrong = _trained_anew(given, expected)
    return row._replace(status="differs", what=wrong) if wrong else row


def _trained_anew(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    """A sentence on a parameter that the original keeps frozen and that gets a gradient now; "" if there is none."""
    found = [name for name, gradient in given.items() if name not in expected and (gradient.abs() > TOLERANCE).any()]
    return f"{found[0]} gets a gradient, and is frozen in the original" if found else ""


def properties_of(old: Recorded) -> list[str]:
    """Sentences on what the original does that `verify` reports of any code: padding counts, a cache changes numbers."""
    found = []
    for name, items in old.classes.items():
        found += [f"{one['what']} ({item} of {name})" for item, one in items.items() if one["status"] == PROPERTY]
        if wrong := _cache_apart(old, name):
            found.append(f"{wrong} (cached generation of {name})")
    return found


def _cache_apart(old: Recorded, name: str) -> str:
    """How greedy decoding of the original differs with its cache, or ""."""
    cached, plain = (old.of(name, f"greedy, {how} cache") for how in ("with", "without"))
    if not cached or not plain:
        return ""
    for step in range(cached["scores"].shape[1] if "scores" in cached else 0):
        seen, want = ({"scores": one["scores"][:, step]} for one in (cached, plain))
        if wrong := difference(seen, want, 1e-4):
            return f"generation with the cache differs from generation without it: at token {step + 1}, {wrong}"
        new = cached["scores"].shape[1] - step
        if not torch.equal(cached["tokens"][:, -new], plain["tokens"][:, -new]):
            return ""  # of two equal scores, either token may be taken
    return ""


def _beams_apart(old: Recorded, name: str) -> str:
    """Whether the original's beams are others without its cache, though greedy tokens are not, so that they are no measure.

    It never reordered the cache then. Where the cache changes greedy decoding too, it is compared as it is.
    """
    if _cache_apart(old, name):
        return ""
    cached, plain = (old.of(name, f"beams, {how} cache").get("scores") for how in ("with", "without"))
    if cached is None or plain is None or not difference({"scores": cached}, {"scores": plain}, 1e-3):
        return ""
    return "the original gives other beams with its cache than without it: it does not reorder the cache"


def _tie(scores: torch.Tensor) -> bool:
    """Whether two beams have the same score, as far as rounding tells."""
    ordered = scores.float().sort().values
    return bool((ordered.diff().abs() <= 1e-4 * ordered.abs().max().clamp(min=1)).any())


def _other_weights(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What differs between the loaded parameters, or the saved buffers that both have."""
    for kind in ("weights", "buffers"):
        for name, digest in before[kind].items():
            if name in after[kind] and after[kind][name] != digest:
                return f"{name} has other values after loading"
    missing = [n for n in before["weights"] if n not in after["weights"] and n not in before["second names"]]
    return f"the weight {missing[0]} is gone" if missing else ""
