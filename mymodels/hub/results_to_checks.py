"""Turn the events of a clean process, crashes and timeouts included, into checks with remedies."""

from pathlib import Path

from ..checkpoints.errors import CheckpointError
from ..messages import one_line
from .checks import STATUSES, Check
from .clean_process import LONGEST, CleanRun, failure_reason
from .explain_errors import explain
from .stage_plan import rest_of_stage

# every check of a clean process, in the order of the report → the remedy for a failure
DYNAMIC = {
    "clean process": "run the folder's code by hand to see more: python -I, without mymodels",
    "load": "make from_pretrained(folder, trust_remote_code=True) work with nothing but the folder's files",
    "auto_map": "let each entry of auto_map name a class for its Auto class",
    "weights": "save the model again",
    "buffers": "compute them in forward",
    "tied": "declare the tie",
    "side effects": "leave settings, seeds, the environment and other packages' classes as they are; see the lines read above",
    "tokenizer": "save the tokenizer that belongs to this model again",
    "forward": "make forward work in eval mode, the same each time: functional dropout needs training=self.training",
    "golden": "find out what changed since it was recorded; if the outputs are right now, record again: --record",
    "generation": "find out what changed since it was recorded; if the tokens are right now, record again: --record",
    "processor": "save the processor of this model again: its outputs must have the names and sizes that forward takes",
    "tokenizer output": "let forward accept the tokenizer's output, or set model_input_names in tokenizer_config.json",
    "pipeline": "make pipeline(task, model=folder, trust_remote_code=True) work with nothing but the folder's files",
    "save": "leave save_pretrained to transformers, and import each code file by `from .name import …` at the top",
    "reload": "leave save_pretrained and from_pretrained to transformers",
    "batch": "compute each row independently: no mean, norm, sort or squeeze over the batch, no state between calls",
    "padding": "build the attention mask with transformers.masking_utils, and pass it to every layer",
    "cached generation": "update the cache in every layer, and take positions and mask from its length",
    "generation config": "correct generation_config.json, or the methods of generate that the class overrides",
    "beams": "use a cache of transformers (DynamicCache), or reorder your own by beam_idx in _reorder_cache",
    "static cache": "pass cache_position to Cache.update where there is one, and build the mask with transformers.masking_utils",
    "inputs_embeds": "compute everything after the embedding from inputs_embeds, whether passed or looked up",
    "last position": "make position tables as long as the config's maximum, or lower max_position_embeddings",
    "eager = sdpa": "call the config's function of ALL_ATTENTION_FUNCTIONS, with the same mask and scaling",
    "meta": "read no tensor values in __init__ and _init_weights",
    "device map": "use a submodule's weights by calling it, not by reading its attributes; read no values in _init_weights",
    "no split": "name the class of a block in _no_split_modules, as type(module).__name__ gives it",
    "training loss": "compute it from the logits: for a causal language model labels[:, 1:] against logits[:, :-1], once",
    "backward": "keep .detach(), .data and no_grad out of forward",
    "gradient checkpointing": "derive blocks from GradientCheckpointingLayer, and recompute what was computed",
    "optimizer step": "check the sign of the loss, and what forward detaches",
    "resize": "define get/set_input_embeddings and get/set_output_embeddings, and declare the tie",
    "pickle": "define classes and functions at the top level of a module; store no lambdas or handles in model and config",
    "forked worker": "start no threads and open no files when the model is created",
    "spawned worker": "define classes at the top level of a module, so that another process can import them",
    "parallel load": "write no files at import",
    "network": "remove code that opens connections: a model must load from its folder alone",
    "file writes": "remove code that writes outside of the temporary folder",
}
# if one of these fails, failures of dependent checks are consequences and are skipped
_ROOTS = ("load", "weights", "buffers", "tied", "forward")
_INDEPENDENT = {
    *_ROOTS,
    "clean process",
    "auto_map",
    "side effects",
    "tokenizer",
    "processor",
    "no split",
    "save",
    "network",
    "file writes",
}
_CHECK_OF_STAGE = {  # the check to report for a stage that ended before its first check
    "outputs": "load",
    "side effects": "side effects",
    "other classes": "load",
    "reload": "reload",
    "placement": "meta",
    "training": "training loss",
    "workers": "pickle",
    "parallel load": "parallel load",
}


def checks_of_run(run: CleanRun, folder: Path, main: str) -> list[Check]:
    """The checks of one clean process, in the order of `DYNAMIC`.

    Args:
        run: the result of `clean_process`.
        folder: the folder, with whose files the weights are compared.
        main: the class of `architectures`.
    """
    try:
        checks = _outcomes(run, folder) + _weights(run, folder, main)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # the folder's own code can write events too
        what = f"its report is invalid ({type(error).__name__}: {one_line(error, 100)})"
        remedy = "do not trust this folder's code: it tampered with the report"
        return [Check("clean process", "failed", what, "", remedy)]
    if run.failure:
        checks.append(_failed("clean process", failure_reason(run), ""))
    elif not checks:
        checks.append(_failed("clean process", "it reported nothing", ""))
    order = list(DYNAMIC)
    checks = [c._replace(what=explain(c.what, folder)) if c.status == "failed" else c for c in checks]
    checks = [
        check._replace(what=one_line(check.what, LONGEST), where=one_line(check.where, LONGEST)) for check in checks
    ]
    return sorted(_skip_consequences(checks), key=lambda check: order.index(check.name))


def _failed(name: str, what: str, where: str) -> Check:
    return Check(name, "failed", what, where, DYNAMIC[name])


def _outcomes(run: CleanRun, folder: Path) -> list[Check]:
    checks: list[Check] = []
    begun: tuple[str, str] | None = None
    attempts = set()
    ends: list[tuple[str, dict]] = []  # (running check, event of the end) of processes that crashed or hung
    for event in run.events:
        if "begin" in event:
            begun = event["begin"], event["where"]
        elif "check" in event:
            if event["check"] not in DYNAMIC or event["status"] not in STATUSES:
                raise ValueError(f"{event['check']} is {event['status']}")
            remedy = DYNAMIC[event["check"]] if event["status"] == "failed" else ""
            checks.append(Check(event["check"], event["status"], event["what"], event["where"], remedy))
            begun = None
        elif "attempt" in event and (event["attempt"], event["where"]) not in attempts:
            attempts.add((event["attempt"], event["where"]))
            checks.append(_failed(event["attempt"], event["what"], event["where"]))
        elif "ended" in event and (begun or event["ended"] in _CHECK_OF_STAGE):
            name, where = begun or (_CHECK_OF_STAGE[event["ended"]], "")
            cause = next((check for check, end in ends if _ended_alike(end, event)), None)
            if cause:
                what = f"could not be checked: its process ended for the same reason as that of {cause!r}"
                checks.append(Check(name, "skipped", what, where))
            else:
                last = f": {event['last']}" if event["last"] else ""
                checks.append(_failed(name, f"the process {event['how']}{last}", event["where"] or where))
                ends.append((name, event))
            known = {(check.name, check.where) for check in checks} | {(check.name, "") for check in checks}
            for other, place in rest_of_stage(event["ended"], name, where, folder):
                if (other, place) not in known:
                    what = f"not run, because the process of its stage ended at {name!r}"
                    checks.append(Check(other, "skipped", what, place))
            begun = None
        elif "not_run" in event and event["not_run"] in _CHECK_OF_STAGE:
            cause = next((check.name for check in checks if check.status == "failed"), "load")
            if _CHECK_OF_STAGE[event["not_run"]] != cause:
                checks.append(Check(_CHECK_OF_STAGE[event["not_run"]], "skipped", f"not run because {cause!r} failed"))
    return checks


def _ended_alike(one: dict, other: dict) -> bool:
    """Whether two processes ended for the same reason: a crash at the same line, or another end in the same file."""
    places = [
        event["where"] if "crashed" in event["how"] else event["where"].partition(":")[0] for event in (one, other)
    ]
    return one["how"] == other["how"] and (places[0] == places[1])


def _weights(run: CleanRun, folder: Path, main: str) -> list[Check]:
    loaded = [event for event in run.events if "loaded" in event]
    if not loaded:
        return []
    from ..checkpoints import open_checkpoint  # imports torch
    from .weights import Files, compare_weights

    try:
        files = Files(open_checkpoint(folder))
        return [check for event in loaded for check in compare_weights(event, files, event["loaded"] == main)]
    except CheckpointError as error:
        return [Check("weights", "failed", str(error), "", "see `mymodels check`")]


def _skip_consequences(checks: list[Check]) -> list[Check]:
    """Replace failures that follow from a failure of one of `_ROOTS` by skipped checks."""
    failed = {check.name for check in checks if check.status == "failed"}
    root = next((name for name in _ROOTS if name in failed), None)
    if root is None:
        return checks
    dependent = set(DYNAMIC) - _INDEPENDENT | ({"forward"} - {root})
    return [
        check._replace(status="skipped", what=f"not checked while {root!r} fails", remedy="")
        if check.status == "failed" and check.name in dependent
        else check
        for check in checks
    ]
