"""One fault: an edit of a healthy folder, and what the static checks must say of it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

Edit = Callable[[Path], None]
MODELING, LAYERS, CONFIGURATION = "modeling_tinymany.py", "layers_tinymany.py", "configuration_tinymany.py"
INIT_NORMAL = "nn.init.normal_(module.weight, std=0.02)"
TOKENIZER = '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": []}'
Q_PROJ = "        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)\n"


class Fault(NamedTuple):
    """One edit and its one finding: the check, a part of `where`, a part of `what`."""

    name: str
    edit: Edit
    check: str
    where: str
    what: str
    status: str = "failed"
    base: str = "multi_file"
    releases: tuple[str, ...] | None = None
    also: tuple[str, ...] = ()  # other checks that rightly speak up


def replace(file: str, old: str, new: str, folder: Path | None = None) -> Any:
    """Replace a text that must be there."""
    if folder is None:
        return partial(replace, file, old, new)
    text = (folder / file).read_text()
    assert old in text, f"{file} has no {old!r}"
    (folder / file).write_text(text.replace(old, new))
    return None


def write(file: str, content: str | bytes) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def append(file: str, text: str) -> Edit:
    return lambda folder: write(file, (folder / file).read_text() + text)(folder)


def prepend(file: str, text: str) -> Edit:
    return lambda folder: write(file, text + (folder / file).read_text())(folder)


def config(file: str = "config.json", /, **changes: Any) -> Edit:
    """Set keys of a JSON file; None takes a key out."""

    def edit(folder: Path) -> None:
        path = folder / file
        value = json.loads(path.read_text()) if path.exists() else {}
        value |= changes
        path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))

    return edit


def auto_map(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        value = json.loads((folder / "config.json").read_text())["auto_map"] | changes
        config(auto_map={k: v for k, v in value.items() if v is not None})(folder)

    return edit


def both(*edits: Edit) -> Edit:
    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


def unchanged(folder: Path) -> None:
    """The healthy folder itself."""


def remove(file: str) -> Edit:
    return lambda folder: (folder / file).unlink()


def rename(old: str, new: str) -> Edit:
    return lambda folder: (folder / old).rename(folder / new)


def init_weights(new: str) -> Edit:
    return replace(MODELING, INIT_NORMAL, new)


def attention_init(line: str) -> Edit:
    return replace(LAYERS, Q_PROJ, f"{Q_PROJ}        {line}\n")


def module(text: str) -> Edit:
    """A line at the top of the modeling file."""
    return replace(MODELING, "MASK_ARGUMENTS =", f"{text}\n\nMASK_ARGUMENTS =")


def in_forward(line: str) -> Edit:
    start = "        if inputs_embeds is None:\n            inputs_embeds = self.embed_tokens(input_ids)\n"
    return replace(MODELING, start, f"        {line}\n{start}")
