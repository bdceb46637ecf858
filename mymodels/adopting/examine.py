"""`python -m mymodels.adopting.examine JOB`: run the author's code in a separate process, and write what a folder is built from.

None of the author's code runs in the process that called `adopt`, so it can neither change that process nor depend on
its imports.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from ..checkpoints import CheckpointError
from ..hub.code_files import collect_code
from .author_file import AuthorFile, check_author_file, check_post_init, find_class, read_author_file
from .build_module import (
    build,
    check_shared,
    check_twice,
    import_class,
    load,
    make_config,
    match_keys,
    open_weights,
    recorded_arguments,
)
from .constructor import Constructor, read_constructor
from .describing import KINDS, probe
from .probing import PER_ROW, Probe
from .write_configuration import Names, aliases, write_configuration
from .write_modeling import Wrapped, pretty, wrapped, write_modeling

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
SOURCE, INPUTS, OUTPUTS, RESULT = "source", "inputs.safetensors", "outputs.safetensors", "result.json"


def examine(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Build the author's module, probe it, and write a folder `source`, inputs, and the module's outputs to `out`.

    Args:
        job: `file`, `class`, `config` (name → value), `weights` (a path or None), `auto_class`, `section`, `allow_pickle`.

    Returns:
        the findings: `model`, `auto_class`, `derived`, `missing`, `changed` (sentences); `call` and `logits`, as in `Probe`.

    Raises:
        CheckpointError: the class cannot be adopted; one sentence.
    """
    file = read_author_file(Path(job["file"]))
    name = find_class(file, job["class"])
    check_author_file(file)
    check_post_init(file, name)
    cls = import_class(file.path, name)
    checkpoint = open_weights(job["weights"], job["section"], job["allow_pickle"]) if job["weights"] else None
    constructor = read_constructor(cls, file, job["config"], recorded_arguments(checkpoint))
    torch.manual_seed(0)
    module = build(cls, constructor, file.path)
    ties = check_shared(module)
    second = build(cls, constructor, file.path)
    check_twice(module, second, f"{file.path}: {name}")
    on_cpu = _needs_values(cls, constructor, file, module)
    module.eval()
    dtype = torch.float32
    if checkpoint is not None:
        keys = match_keys(module, checkpoint, ties, name)
        dtypes = load(module, checkpoint, keys)
        dtype = dtypes.pop() if len(dtypes) == 1 else dtype
    fields = {field.argument: field.value for field in constructor.fields}
    if constructor.config_class is not None:
        fields = {**make_config(constructor).to_dict(), **fields}
    found = probe(module, second, file, f"{file.path}: {name}", fields, job["auto_class"])
    ties = _towards_embeddings(ties, found.embeddings)
    about = wrapped(module, ties, on_cpu)
    names, changed = _names(name, file, found, constructor)
    depth = max((len(part) for part in module.modules() if isinstance(part, nn.ModuleList)), default=0)
    renamed = {} if constructor.config_class else aliases(constructor, found, depth, _width(module, found))
    tied = bool(set(ties) & {f"{found.head}.weight"}) if found.head else False
    config = _config(constructor, found, names, renamed, tied, dtype, job.get("tokens") or {})
    for key in [
        n for n, v in config.items() if n.endswith("_token_id") and isinstance(v, int) and v >= (found.vocab or v + 1)
    ]:
        changed.append(f"{key} is None, because {config[key]} is outside of the vocabulary of {found.vocab} tokens")
        config[key] = None
    source = out / SOURCE
    source.mkdir()
    texts = collect_code([file.path])
    for other, text in texts.items():
        (source / other).write_text(text, encoding="utf-8")
    if texts[file.path.name] != file.text:
        changed.append(f"{file.path.name}: its imports of other files in the folder are rewritten as relative imports")
    (source / f"configuration_{names.model_type}.py").write_text(
        write_configuration(constructor, found, names, name, file, renamed, tied), encoding="utf-8"
    )
    (source / f"modeling_{names.model_type}.py").write_text(
        pretty(write_modeling(constructor, found, names, name, file, renamed, about)), encoding="utf-8"
    )
    (source / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    if found.generates:
        ends = {key: value for key, value in config.items() if key in TOKENS and value is not None}
        (source / "generation_config.json").write_text(json.dumps({"use_cache": False, **ends}), encoding="utf-8")
    save_file(_weights(module, about), source / "model.safetensors", metadata={"format": "pt"})
    save_file({n: t.contiguous() for n, t in found.inputs.items()}, out / INPUTS)
    save_file(found.outputs, out / OUTPUTS)
    return {
        "model": names.model,
        "model_type": names.model_type,
        "auto_class": KINDS[found.kind][1],
        "derived": _derived(found, constructor, about, renamed, job["weights"]),
        "missing": _missing(module, found, constructor, about),
        "changed": changed,
        "takes": sorted(_takes(found)),
        "call": found.call.arguments,
        "logits": found.logits,
    }


def _takes(found: Probe) -> set[str]:
    """The outputs of a tokenizer that the wrapper's forward takes."""
    roles = [
        role for roles in found.call.arguments.values() for role in (roles if isinstance(roles, list) else [roles])
    ]
    return {"input_ids", "attention_mask"} | ({"token_type_ids"} & set(roles))


def _needs_values(cls: Any, constructor: Constructor, file: AuthorFile, module: nn.Module) -> bool:
    """Whether the constructor reads values of tensors, or stores tensors that are neither parameters nor buffers."""
    if any(isinstance(value, torch.Tensor) for part in module.modules() for value in _attributes(part)):
        return True
    try:
        with torch.device("meta"):
            build(cls, constructor, file.path)
    except CheckpointError:
        return True
    return False


def _attributes(part: nn.Module) -> list[Any]:
    values = [value for name, value in vars(part).items() if name not in ("_parameters", "_buffers", "_modules")]
    return [inner for value in values for inner in (value if isinstance(value, (list, tuple)) else [value])]


def _towards_embeddings(ties: dict[str, str], embeddings: str) -> dict[str, str]:
    """The ties, turned so that the embeddings' name is the one stored."""
    weight = f"{embeddings}.weight"
    group = {tied for tied, target in ties.items() if target == ties.get(weight)} | {ties.get(weight, "")}
    if weight not in ties:
        return ties
    return {
        **{tied: target for tied, target in ties.items() if tied not in group},
        **dict.fromkeys(group - {weight}, weight),
    }


def _names(name: str, file: AuthorFile, found: Probe, constructor: Constructor) -> tuple[Names, list[str]]:
    """Names for model type and classes that are unused in transformers and in the author's file."""
    changed = []
    ending = KINDS[found.kind][0]
    stem = (
        re.sub(
            r"(Model|Module|Net|ForCausalLM|LMHeadModel|ForSequenceClassification|ForTokenClassification|ForMaskedLM)$",
            "",
            name,
        )
        or name
    )
    stem = re.sub(r"For(?=[A-Z])", "", stem)
    taken = set(file.classes)
    tries = [stem, f"{stem}Hub", *(f"{stem}Hub{number}" for number in range(2, 9))]
    own_type = str(getattr(constructor.config_class, "model_type", "") or "")
    for candidate in tries:
        model_type = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", candidate).lower()
        files = {f"configuration_{model_type}", f"modeling_{model_type}"}
        classes = {f"{candidate}Config", f"{candidate}{ending}"}
        if model_type in CONFIG_MAPPING or classes & taken or file.path.stem in files or _is_own(file, files):
            continue
        if own_type:
            changed.append(f"model_type is {model_type!r}, because {own_type!r} is a family of transformers' own")
        elif candidate != stem:
            changed.append(
                f"model_type is {model_type!r} and the classes are {' and '.join(sorted(classes))}: the plain names are taken"
            )
        return Names(candidate, model_type, f"{candidate}Config", f"{candidate}{ending}"), changed
    raise CheckpointError(f"{file.path}: no free name was found for {name}: rename the class")


def _width(module: nn.Module, found: Probe) -> int | None:
    return module.get_submodule(found.embeddings).embedding_dim if found.embeddings else None  # type: ignore[return-value]


def _is_own(file: AuthorFile, stems: set[str]) -> bool:
    return any((file.path.parent / f"{stem}.py").is_file() for stem in stems)


def _config(
    constructor: Constructor,
    found: Probe,
    names: Names,
    renamed: dict[str, str],
    tied: bool,
    dtype: torch.dtype,
    tokens: dict[str, int],
) -> dict[str, Any]:
    if constructor.config_class is not None:
        base: PretrainedConfig = make_config(constructor)
        values = {
            n: v
            for n, v in base.to_diff_dict().items()
            if n not in ("transformers_version", "_name_or_path", "torch_dtype")
        }
    else:
        values = {field.name: field.value for field in constructor.fields if field.name != renamed.get("num_labels")}
        values["tie_word_embeddings"] = tied
        if found.kind == "seq2seq":
            values["is_encoder_decoder"] = True
            values.setdefault("decoder_start_token_id", _start(constructor, found, tokens))
    if found.kind in ("tokens", *PER_ROW):
        labels = [f"LABEL_{number}" for number in range(found.width)]
        values["id2label"] = {str(number): label for number, label in enumerate(labels)}
        values["label2id"] = {label: number for number, label in enumerate(labels)}
    if found.pad is not None and values.get("pad_token_id") is None:
        values["pad_token_id"] = found.pad
    for key, token in tokens.items():
        if found.vocab is not None and values.get(key) is None:
            values[key] = token
    return {
        **values,
        "model_type": names.model_type,
        "architectures": [names.model],
        "auto_map": {
            "AutoConfig": f"configuration_{names.model_type}.{names.config}",
            KINDS[found.kind][1]: f"modeling_{names.model_type}.{names.model}",
        },
        "dtype": str(dtype).removeprefix("torch."),
    }


def _start(constructor: Constructor, found: Probe, tokens: dict[str, int]) -> int:
    """The token that a target starts with: an argument's, the tokenizer's, or the padding's, as T5 has it."""
    pattern = r"(decoder_start|tgt_(sos|bos|start)|sos|bos)(_(token|idx|index|id))*"
    named = [f.value for f in constructor.fields if re.fullmatch(pattern, f.argument) and type(f.value) is int]
    given = [tokens[key] for key in ("bos_token_id", "pad_token_id") if key in tokens]
    return next(iter([*named, *given, *([found.pad] if found.pad is not None else [])]), 0)


def _weights(module: nn.Module, about: Wrapped) -> dict[str, torch.Tensor]:
    """The module's tensors under the wrapper's names, without duplicates of tied ones, and its non-persistent buffers."""
    tensors = {name: tensor for name, tensor in module.state_dict().items() if name not in about.ties}
    if about.tables:
        for path, part in module.named_modules():
            if not type(part).__module__.startswith("transformers."):
                names = sorted(part._non_persistent_buffers_set)
                tensors |= {f"{path}.{n}".lstrip("."): part._buffers[n] for n in names if part._buffers[n] is not None}
    return {f"net.{name}": tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _derived(
    found: Probe, constructor: Constructor, about: Wrapped, renamed: dict[str, str], weights: str | None
) -> list[str]:
    what = [f"inputs: {', '.join(f'{n} ← {r}' for n, r in found.call.arguments.items())}"]
    what.append(
        f"outputs: forward(…){found.logits}, {list(next(iter(found.outputs.values())).shape)} for {list(next(iter(found.inputs.values())).shape)}"
    )
    if found.limit:
        what.append(f"longest input: {found.limit} tokens")
    if found.embeddings:
        what.append(f"embeddings: {found.embeddings}" + (f", head: {found.head}" if found.head else ""))
    if about.ties:
        what.append("tied: " + ", ".join(f"{tied} = {target}" for tied, target in about.ties.items()))
    if found.padding == "mask":
        what.append("padding: masked by the module's own mask")
    if found.padding == "moved":
        what.append("padding: moved behind the tokens, which do not attend to later positions")
    if found.padding == "ids":
        what.append(f"padding: by the module itself, which leaves out the id {found.pad}")
    if found.encoder:
        what.append(f"encoder: {found.encoder}, which generate runs once")
    if found.loss.kind != "none":
        what.append(f"loss: {found.loss.note}")
    if about.no_split:
        what.append(f"blocks that stay on one device: {', '.join(about.no_split)}")
    if others := [f"{name} = {field}" for name, field in sorted(renamed.items()) if name != field]:
        what.append(f"names: {', '.join(others)}")
    if not weights:
        what.append("weights: none were given, so they are the author's initial weights with seed 0")
    return what


def _missing(module: nn.Module, found: Probe, constructor: Constructor, about: Wrapped) -> list[str]:
    what = []
    if found.kind == "causal":
        what.append("cache: forward takes none, so generate runs all tokens again at each step")
    if found.kind == "seq2seq" and not found.generates:
        what.append("generation: an output depends on later tokens of the target, so the decoder needs a causal mask")
    elif found.kind == "seq2seq":
        what.append("cache: forward takes none, so generate runs all tokens of the target again at each step")
        if not found.encoder:
            what.append(
                "encoder: no module's output is all that the decoder gets, so each step runs the source again too"
            )
    if found.call.main == "input_ids" and found.padding == "none":
        what.append("padding: forward takes no mask for it, so rows of different length must be run separately")
    if found.loss.kind == "none":
        what.append(f"training: {found.loss.note}, so there are no labels")
    elif found.loss.kind == "own" and found.loss.ignored is None and found.kind not in PER_ROW:
        what.append("ignored labels: the module's own loss ignores none, so -100 is refused")
    if found.unused:
        what.append(f"outputs that are not returned: {', '.join(f'forward(…){path}' for path in found.unused)}")
    if "supports_gradient_checkpointing" not in about.flags:
        what.append(
            "gradient checkpointing: the blocks are not transformers.modeling_layers.GradientCheckpointingLayer"
        )
    if found.call.main == "input_ids":
        if not found.embeddings:
            what.append("resizing the vocabulary: no nn.Embedding takes the token ids")
        elif not found.resizes:
            what.append("resizing the vocabulary: source and target have tables of their own")
        elif found.kind in ("causal", "masked") and not found.head:
            what.append("resizing the vocabulary: no nn.Linear computes the logits, so the head would not be resized")
        what.append(
            "inputs_embeds, position_ids, attentions and hidden states: the wrapper neither takes nor returns them"
        )
    if found.kind == "audio":
        what.append("pipelines: there is no feature extractor, so sounds have to be tensors already")
    if found.kind == "image":
        what.append("pipelines: there is no image processor, so images must be passed as tensors")
    if any(isinstance(part, nn.MultiheadAttention) for part in module.modules()):
        what.append(
            "offloading to disk: nn.MultiheadAttention reads weights of its submodules without the hooks of a device map"
        )
    if found.left:
        what.append(f"arguments of forward that keep their defaults: {', '.join(found.left)}")
    if constructor.left:
        what.append(
            f"arguments of the constructor that keep their defaults, which config.json cannot hold: {', '.join(constructor.left)}"
        )
    return what


def main(argv: list[str]) -> int:
    out = Path(argv[0])
    try:
        result = examine(json.loads((out / "job.json").read_text(encoding="utf-8")), out)
    except (CheckpointError, OSError) as error:
        result = {"error": str(error)}
    (out / RESULT).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
