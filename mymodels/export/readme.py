"""The README of an exported folder: its content, the comparison, and code that runs it without mymodels."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PretrainedConfig

RUNS_WITH = {
    "onnx": "ONNX Runtime",
    "pt2": "`torch.export.load`",
    "aoti": "`torch._inductor.aoti_load_package`, on a processor like the one it was compiled on",
    "torchscript": "`torch.jit.load` (legacy: PyTorch advises `torch.export` instead)",
}
_OPEN = {
    "onnx": ["import onnxruntime"],
    "pt2": ["import torch"],
    "aoti": ["import torch"],
    "torchscript": ["import torch"],
}
_LOAD = {
    "onnx": 'session = onnxruntime.InferenceSession("{file}")',
    "pt2": 'graph = torch.export.load("{file}").module()',
    "aoti": 'graph = torch._inductor.aoti_load_package("{file}")',
    "torchscript": 'graph = torch.jit.load("{file}")',
}
_RUN = {"onnx": 'session.run(["{name}"], feed)[0]'}
_RUN_TORCH = 'graph(**{{name: torch.from_numpy(value) for name, value in feed.items()}})["{name}"].detach().numpy()'

_GENERATE = """\
past = {{
    entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.{dtype})
    for entry in session.get_inputs()
    if entry.name.startswith("past")
}}
names = [output.name for output in session.get_outputs()]
tokens = ids
for _ in range(20):
    feed = {{{step}, **past}}
    results = dict(zip(names, session.run(names, feed)))
    past = {{name.replace("present", "past_key_values"): results[name] for name in names[1:]}}
    tokens = results["logits"][:, -1:].argmax(-1)
    ids = np.concatenate((ids, tokens), axis=1)
    if tokens[0, 0] in {ends}:
        break"""

_GENERATE_BY_TORCH = """\
torch.set_grad_enabled(False)
past = [torch.zeros(1, heads, 0, width, dtype=torch.{dtype}) for heads, width in {past}]
tokens = ids
for _ in range(20):
    feed = {{{step}}}
    results = graph(**{{name: torch.from_numpy(value) for name, value in feed.items()}}, past_key_values=past)
    past = [value for name, value in results.items() if name.startswith("present")]
    tokens = results["logits"][:, -1:].argmax(-1).numpy()
    ids = np.concatenate((ids, tokens), axis=1)
    if tokens[0, 0] in {ends}:
        break"""

_GENERATE_WITHOUT_CACHE = """\
for _ in range(20):
    feed = {{{feed}}}
    logits = {run}
    ids = np.concatenate((ids, logits[:, -1:].argmax(-1)), axis=1)
    if ids[0, -1] in {ends}:
        break"""


_TEXT_TO_TEXT = """\
decoder_ids = np.array([[{start}]])
for _ in range(20):
    feed = {{{feed}, "decoder_input_ids": decoder_ids}}
    logits = {run}
    decoder_ids = np.concatenate((decoder_ids, logits[:, -1:].argmax(-1)), axis=1)
    if decoder_ids[0, -1] in {ends}:
        break"""

# input of a graph with a cache → expression for its value in a step
_STEP = {
    "input_ids": "tokens",
    "attention_mask": "np.ones_like(ids)",
    "token_type_ids": "np.zeros_like(tokens)",
    "position_ids": "np.arange(ids.shape[1] - tokens.shape[1], ids.shape[1])[None]",
}
# likewise without a cache
_FEED = {
    "input_ids": "ids",
    "attention_mask": "np.ones_like(ids)",
    "token_type_ids": "np.zeros_like(ids)",
    "position_ids": "np.arange(ids.shape[1])[None]",
}


def snippet(
    kind: str,
    task: str,
    file: str,
    config: PretrainedConfig,
    *,
    inputs: list[str],
    outputs: list[str],
    dtype: str,
    tokenizer: bool,
    examples: Mapping[str, torch.Tensor] | None = None,
    past: Sequence[tuple[int, int]] = (),
) -> str:
    """Python code that runs `file` in the current folder with its runtime, numpy and tokenizers only.

    Args:
        kind, task: as for `export_model`.
        file: name of the graph's file.
        inputs, outputs: names of the graph's inputs and outputs.
        dtype: numpy's name of the cache's dtype.
        examples: inputs that are no texts, of which the code makes zeros of the same shape and dtype.
        past: heads and width of each of the cache's keys and values, if there is a cache.
        tokenizer: whether there is a `tokenizer.json`; otherwise the code uses token ids instead of a text.
    """
    lines = ["import numpy as np", *_OPEN[kind]]
    if examples is not None:
        lines += ["", _LOAD[kind].format(file=file), "feed = {  # any number of rows"]
        for name, value in examples.items():
            kept = "float32" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
            lines.append(f'    "{name}": np.zeros({tuple(value.shape)}, np.{kept}),')
        lines.append("}")
        lines += [f"{_variable(name)} = {_RUN.get(kind, _RUN_TORCH).format(name=name)}" for name in outputs]
        return "\n".join([*lines, f"print({', '.join(map(_variable, outputs))})"])
    if tokenizer:
        lines += ["from tokenizers import Tokenizer", "", 'tokenizer = Tokenizer.from_file("tokenizer.json")']
    else:
        lines += [""]
    lines.append(_LOAD[kind].format(file=file))
    fed = ", ".join(f'"{name}": {_FEED[name]}' for name in inputs if name in _FEED)
    if task in ("text-generation", "text2text-generation"):
        end = getattr(config, "eos_token_id", None)
        ends = end if isinstance(end, list) else [end]
        code = (
            'ids = np.array([tokenizer.encode("Once upon a time").ids])' if tokenizer else "ids = np.array([[5, 6, 7]])"
        )
        run = _RUN.get(kind, _RUN_TORCH).format(name="logits")
        body = _GENERATE_WITHOUT_CACHE
        if past:
            body = _GENERATE if kind == "onnx" else _GENERATE_BY_TORCH
        ids = "ids"
        if task == "text2text-generation":
            body, ids = _TEXT_TO_TEXT, "decoder_ids"
        start = getattr(config, "decoder_start_token_id", None) or 0
        how = {
            "dtype": dtype,
            "ends": [end for end in ends if end is not None],
            "run": run,
            "feed": fed,
            "start": start,
            "step": ", ".join(f'"{name}": {_STEP[name]}' for name in inputs if name in _STEP),
            "past": _repeated(past),
        }
        lines += [code, body.format(**how)]
        lines.append(f"print(tokenizer.decode({ids}[0].tolist()))" if tokenizer else f"print({ids})")
        return "\n".join(lines)
    segments, masked = "token_type_ids" in inputs, "attention_mask" in inputs
    if tokenizer:
        padding = getattr(config, "pad_token_id", None) or 0
        lines += [
            f"tokenizer.enable_padding(pad_id={padding}, pad_token=tokenizer.id_to_token({padding}))",
            'rows = tokenizer.encode_batch(["The cat sat on the mat.", "It was late."])',
            "feed = {",
            '    "input_ids": np.array([row.ids for row in rows]),',
            *(['    "attention_mask": np.array([row.attention_mask for row in rows]),'] if masked else []),
            *(['    "token_type_ids": np.array([row.type_ids for row in rows]),'] if segments else []),
            "}",
        ]
    else:
        lines.append("ids = np.array([[5, 6, 7], [8, 9, 10]])")
        lines.append(f"feed = {{{fed}}}")
    for name in outputs:
        lines.append(f"{name} = {_RUN.get(kind, _RUN_TORCH).format(name=name)}")
    labels = [str(label) for _, label in sorted((config.id2label or {}).items())]
    if task == "text-classification" and len(labels) > 1:
        lines.append(f"labels = {json.dumps(labels, ensure_ascii=False)}")
        lines.append("print([labels[i] for i in logits.argmax(-1)])")
    else:
        lines.append(f"print({', '.join(outputs)})")
    return "\n".join(lines)


def _repeated(past: Sequence[tuple[int, int]]) -> str:
    """Code of a list of pairs; short if all are equal."""
    return f"[{past[0]}] * {len(past)}" if len(set(past)) == 1 else str(list(past))


def _variable(name: str) -> str:
    """A name for an output, which may be a number."""
    return name if name.isidentifier() else f"output_{name}"


def write_readme(folder: Path, title: str, kind: str, task: str, compared: str, code: str) -> None:
    """`README.md` of an exported folder."""
    Path(folder, "README.md").write_text(
        f"# {title}\n\nExported for {task}; runs with {RUNS_WITH[kind]}. {compared}\n\n"
        f"Started in this folder:\n\n```python\n{code}\n```\n",
        encoding="utf-8",
    )
