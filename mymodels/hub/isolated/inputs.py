"""Inputs for a model, generated from its config: text longer than its window, images, audio, time series."""

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .comparing import run_model
from .load_repo import accepts, text_config
from .signals import PICTURES, SOUNDS, is_size, series_shapes, shapes, wave
from .stages import innermost, sentence

LENGTH, NEW_TOKENS = 11, 8
LONGEST = 2560  # tokens
WORK = 2e11  # the most multiply-adds of one forward in a check
_LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length", "max_sequence_length")
_WINDOW = re.compile(r"window|attention_chunk_size|local_(attention|span|context)")


class NoSuitableInputs(Exception):
    """No inputs for the model could be generated from its config."""


class WrongInputs(Exception):
    """The caller's inputs are not the arguments of `forward`."""


class FailedOnInputs(Exception):
    """`forward` cannot compute with the caller's inputs."""


# ---- text


def ordinary_token_ids(model: Any) -> list[int]:
    """Token ids that are not special, or all if that leaves too few."""
    config, size = text_config(model.config), vocabulary_size(model)
    if not size:
        raise NoSuitableInputs("the config has no vocab_size, so no token ids can be generated")
    special: set[Any] = {pad_id(model)}  # what `generate` takes for padding, whether the config names it or not
    for name in dir(config):
        if name.endswith("_token_id"):
            value = getattr(config, name, None)
            special.update(value if isinstance(value, (list, tuple)) else [value])
    usable = [token for token in range(min(size, 50_000)) if token not in special]
    return usable if len(usable) > 1 else list(range(size))


def vocabulary_size(model: Any) -> int:
    """The number of tokens, 0 if neither config nor embeddings tell: the model may read numbers under `input_ids`."""
    for size in (
        getattr(text_config(model.config), "vocab_size", None),
        getattr(_embeddings(model), "num_embeddings", None),
    ):
        if isinstance(size, int) and size >= 2:
            return size
    return 0


def _embeddings(model: Any) -> Any:
    """The input embeddings, also of a model inside the model to which nothing leads; None if there are none."""
    for part in model.modules():  # the model itself is the first
        try:
            if (found := part.get_input_embeddings()) is not None:
                return found
        except (AttributeError, NotImplementedError, TypeError):
            continue
    return None


def make_token_ids(model: Any, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """The same pseudo-random token ids on every machine."""
    ids, state, values = ordinary_token_ids(model), seed + 1, []
    for _ in range(rows * length):
        state = state * 6364136223846793005 + 1442695040888963407 & (2**64 - 1)
        values.append(ids[(state >> 33) % len(ids)])
    return torch.tensor(values).reshape(rows, length)


def takes_numbers(inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether `input_ids` are numbers, as the series that a forecasting model takes, and not token ids."""
    return "input_ids" in inputs and inputs["input_ids"].is_floating_point()


def has_tokens(inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether the inputs hold token ids."""
    return "input_ids" in inputs and not takes_numbers(inputs)


def make_rows(model: Any, like: Mapping[str, torch.Tensor], rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """`input_ids` of another length: token ids, or numbers if those of `like` are numbers."""
    if not takes_numbers(like):
        return make_token_ids(model, rows, length, seed)
    return wave((rows, length, *like["input_ids"].shape[2:])).roll(seed, 1)


def max_positions(model: Any) -> int:
    """The config's maximum number of positions, 0 if it names none.

    A position table with a padding index, as RoBERTa's, counts from the entry after that index.
    """
    config = text_config(model.config)
    value = next((v for v in (getattr(config, name, None) for name in _LIMITS) if isinstance(v, int) and v > 0), 0)
    for module in model.modules():
        table = isinstance(module, torch.nn.Embedding) and module.num_embeddings == value
        if table and module.padding_idx is not None and module is not _embeddings(model):
            return value - module.padding_idx - 1
    return value


def attention_window(model: Any) -> int:
    """The largest attention window in use by the config, 0 if there is none."""
    config = text_config(model.config)
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", True) is False:
        return 0
    if isinstance(kinds, (list, tuple)) and kinds and all(kind == "full_attention" for kind in kinds):
        return 0
    found = [0]
    for name, value in config.to_dict().items():
        if _WINDOW.search(name) and not name.startswith(("max_window", "use_")):
            for size in value if isinstance(value, (list, tuple)) else [value]:
                found += [size] if isinstance(size, int) and not isinstance(size, bool) else []
    return max(found)


def affordable_length(model: Any) -> int:
    """The most tokens for one forward, so that a check of a large model fits into time and memory."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return max(LENGTH, min(LONGEST, int(WORK / max(size, 1))))


def prompt_length(model: Any) -> int:
    """An input length beyond the attention window that leaves positions for padding and generated tokens."""
    most, wanted = max_positions(model) or 1_000_000, LENGTH
    if attention_window(model):
        wanted = min(attention_window(model) + LENGTH, affordable_length(model))
    return max(2, min(wanted, most - NEW_TOKENS - 3))


def pad_id(model: Any) -> int:
    value = getattr(text_config(model.config), "pad_token_id", None)
    return value if isinstance(value, int) and value >= 0 else 0


def generates(model: Any) -> bool:
    return bool(getattr(model, "can_generate", bool)())


def has_encoder_and_decoder(model: Any) -> bool:
    """Whether the model is an encoder-decoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def one_row_only(model: Any) -> bool:
    """Whether the model takes one row at a time: a classifier that finds a row's end by a pad token, but has none."""
    return "Classif" in type(model).__name__ and getattr(text_config(model.config), "pad_token_id", None) is None


def padding_side(model: Any) -> str:
    return "left" if generates(model) and not has_encoder_and_decoder(model) else "right"


def pad(model: Any, ids: torch.Tensor, side: str, padding: list[int]) -> dict[str, torch.Tensor]:
    """The rows of `ids` with their first (or last) `padding` tokens replaced by padding."""
    ids, mask = ids.clone(), full_mask(ids)
    for row, count in enumerate(padding):
        cut = slice(0, count) if side == "left" else slice(ids.shape[1] - count, None)
        ids[row, cut], mask[row, cut] = pad_id(model), 0
    return {"input_ids": ids, "attention_mask": mask}


def full_mask(rows: torch.Tensor) -> torch.Tensor:
    """An attention mask of ones, for token ids, numbers or embeddings."""
    return torch.ones(rows.shape[:2], dtype=torch.long)


def with_required(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Text with what `forward` cannot be called without, where it is missing: all tokens seen, of one kind, in order."""
    given, ids = dict(inputs), inputs.get("input_ids", inputs.get("inputs_embeds"))
    if ids is None:
        return given
    rows, length = ids.shape[:2]
    for name in required(model):
        if name not in given and name == "attention_mask":
            given[name] = full_mask(ids)
        elif name not in given and name == "token_type_ids":
            given[name] = torch.zeros((rows, length), dtype=torch.long)
        elif name not in given and name == "position_ids":
            given[name] = torch.arange(length).repeat(rows, 1)
    return given


_TEXT = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


def non_text_inputs(inputs: Mapping[str, torch.Tensor], rows: int = 1) -> dict[str, torch.Tensor]:
    """The inputs other than text, such as images or decoder tokens: their first row, repeated `rows` times."""
    return {n: x[:1].repeat(rows, *[1] * (x.dim() - 1)) for n, x in inputs.items() if n not in _TEXT}


def last_positions(model: Any) -> dict[str, torch.Tensor]:
    """Inputs that reach the config's last position: a row of that length, or a few tokens with the last position ids.

    Empty if the config names no maximum, or if the row would be too long and `forward` takes no `position_ids`.
    """
    most = max_positions(model)
    if not most or getattr(model, "main_input_name", "input_ids") != "input_ids" or not accepts(model, "input_ids"):
        return {}
    if not vocabulary_size(model):
        return {}
    inputs = {}
    if most <= affordable_length(model):
        inputs["input_ids"] = make_token_ids(model, 1, most, seed=11)
    elif accepts(model, "position_ids") and not has_encoder_and_decoder(model):
        inputs["input_ids"] = make_token_ids(model, 1, NEW_TOKENS, seed=11)
        inputs["position_ids"] = torch.arange(most - NEW_TOKENS, most)[None]
    else:
        return {}
    if accepts(model, "attention_mask"):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if has_encoder_and_decoder(model):
        inputs["decoder_input_ids"] = make_token_ids(model, 1, 5, seed=7)
    return with_required(model, inputs)


# ---- inputs of any modality


def make_inputs(model: Any, processed: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """A batch of two rows; of text the second row is padded, on the left for decoders, else on the right.

    Args:
        processed: the output of the folder's processor for an image or audio.

    Raises:
        NoSuitableInputs: `forward` accepts none of the inputs that were tried.
        Exception: the error of `forward`, if it is the same for all inputs that were tried.
    """
    raised: list[Exception] = []
    for inputs, sure in _candidates(model, dict(processed or {})):
        if sure:
            return inputs
        try:
            run_model(model, inputs)
            return inputs
        except Exception as error:
            raised.append(error)
    takes = getattr(model, "main_input_name", "input_ids")
    if len(raised) > 1 and len({_error_key(error) for error in raised}) == 1:
        raise raised[0]  # the error does not depend on the inputs
    why = f"; of {len(raised)} that were tried, the first raises {sentence(raised[0])}" if raised else ""
    raise NoSuitableInputs(f"no inputs could be generated for a model that takes {takes}{why}")


_NOT_CAUSED_BY_INPUTS = (AttributeError, NameError, ImportError, NotImplementedError)


def _error_key(error: Exception) -> tuple[str, str]:
    """Where an error was raised, and its text; only its type where the text may contain the input."""
    return (innermost(error), type(error).__name__ if isinstance(error, _NOT_CAUSED_BY_INPUTS) else sentence(error))


def _candidates(model: Any, processed: dict[str, torch.Tensor]) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
    """Inputs to try, and whether the config determines them, so that an error of `forward` on them is a fault."""
    main = getattr(model, "main_input_name", "input_ids")
    other = [name for name in (*PICTURES, *SOUNDS) if accepts(model, name)]
    known = {name: value for name, value in processed.items() if accepts(model, name)}
    if known and main in known:
        yield known, False  # the check "processor" reports it if these do not fit
    if main == "input_ids" and accepts(model, main) and not vocabulary_size(model):
        for shape in series_shapes(model, prompt_length(model)):
            yield with_mask(model, wave(shape)), False
    if main == "input_ids" and (accepts(model, main) or not required(model)):
        text = _text_inputs(model)
        if not other and set(required(model)) <= set(text):
            yield text, True
        yield text, False
        for name in other:
            for shape in shapes(model, name):
                yield {**text, name: wave(shape), **known}, False
    elif main in (*PICTURES, *SOUNDS):
        exact = isinstance(getattr(model.config, "image_size", None), int) and main in PICTURES
        for shape in shapes(model, main):
            yield _with_decoder(model, {main: wave(shape)}), exact and not has_encoder_and_decoder(model)
    else:
        yield from ((inputs, False) for inputs in _guessed_inputs(model, main))


def required(model: Any) -> list[str]:
    """The arguments without which `forward` cannot be called."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _text_inputs(model: Any) -> dict[str, torch.Tensor]:
    length = prompt_length(model)
    inputs = {"input_ids": make_token_ids(model, 1 if one_row_only(model) else 2, length)}
    if accepts(model, "attention_mask") and not one_row_only(model):
        inputs = pad(model, inputs["input_ids"], padding_side(model), [0, min(4, length - 1)])
    if has_encoder_and_decoder(model):
        inputs["decoder_input_ids"] = make_token_ids(
            model, inputs["input_ids"].shape[0], max(1, min(length, LENGTH) // 2), 7
        )
    return with_required(model, inputs)


def with_mask(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows without padding, with a mask if `forward` takes one."""
    mask = {"attention_mask": full_mask(ids)} if accepts(model, "attention_mask") else {}
    return with_required(model, {"input_ids": ids, **mask})


def _with_decoder(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if has_encoder_and_decoder(model) and accepts(model, "decoder_input_ids"):
        inputs["decoder_input_ids"] = make_token_ids(model, 2, 5, seed=7)
    return inputs


def _guessed_inputs(model: Any, main: str) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of several shapes, floats and token ids, for a `forward` with argument names that are not standard."""
    names = [name for name in dict.fromkeys([*required(model), main]) if accepts(model, name)]
    if not names:
        return
    sizes = model.config.to_dict()
    width = [
        sizes[n] for n in ("num_input_channels", "input_size", "input_dim", "hidden_size") if is_size(sizes.get(n))
    ]
    length = [sizes[n] for n in ("context_length", "seq_len", "max_position_embeddings") if is_size(sizes.get(n))]
    for steps in (*length[:1], LENGTH):
        for shape in (*((2, steps, channels) for channels in width[:2]), (2, steps), (2, steps, 1)):
            yield {name: wave(shape) for name in names}
    try:
        ids = make_token_ids(model, 2, prompt_length(model))
    except NoSuitableInputs:
        ids = torch.arange(2 * LENGTH).reshape(2, LENGTH) % 16
    yield dict.fromkeys(names, ids)


# ---- the caller's inputs


def accepted_inputs(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs that this class's `forward` takes; a folder's other classes may take fewer than its main class."""
    return (
        {name: tensor for name, tensor in inputs.items() if accepts(model, name)} if _is_strict(model) else {**inputs}
    )


def _is_strict(model: Any) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters)


def check_caller_inputs(model: Any, inputs: Mapping[str, torch.Tensor]) -> None:
    """Check that `forward` can be called with the caller's inputs.

    Raises:
        WrongInputs: an argument is unknown or missing.
        FailedOnInputs: `forward` fails on these values.
    """
    takes = list(inspect.signature(model.forward).parameters)
    unknown = [name for name in inputs if _is_strict(model) and name not in takes]
    if unknown:
        raise WrongInputs(
            f"the given inputs have {unknown[0]!r}, which forward of {type(model).__name__} does not take: it takes "
            f"{', '.join(takes)}"
        )
    if missing := [name for name in required(model) if name not in inputs]:
        raise WrongInputs(f"forward of {type(model).__name__} needs {missing[0]!r}, which the given inputs do not have")
    try:
        run_model(model, inputs)
    except Exception as error:
        shapes_given = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        raise FailedOnInputs(f"forward fails on the given inputs ({shapes_given}): {sentence(error)}") from error


# ---- inputs shared by all stages


def keep_inputs(job: dict[str, Any], inputs: Mapping[str, torch.Tensor]) -> None:
    """Store the inputs of the class of `architectures` for the stages after it."""
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, _kept_inputs_path(job))


def kept_inputs(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The inputs that `keep_inputs` stored, or an empty dict."""
    return read_tensors(_kept_inputs_path(job)) if _kept_inputs_path(job).is_file() else {}


def _kept_inputs_path(job: dict[str, Any]) -> Path:
    return Path(job["scratch"], "inputs.safetensors")


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is not a mapping
