"""The text of `configuration_NAME.py`: the constructor's arguments as a config class."""

import ast
import math
import re
from typing import Any, NamedTuple

from .author_file import AuthorFile
from .constructor import Constructor, Field
from .probing import PER_ROW, Probe

# transformers' name of a size → names that authors use
SYNONYMS = {
    "vocab_size": r"(n_?)?vocab(_?size)?|n_?tokens?|num_tokens|num_embeddings|src_vocab(_size)?|source_vocab(_size)?",
    "hidden_size": r"hidden(_size|_dim)?|d_?model|n_?embd|dim|embed(ding)?_(dim|size)|emb(_dim|_size)?|width|model_dim",
    "num_hidden_layers": r"(n_?|num_)?layers?|depth|n_?blocks?|num_blocks",
    "num_attention_heads": r"(n_?|num_)?heads?|num_attention_heads",
    "max_position_embeddings": r"(model_)?max_?(len|length|seq\w*|pos\w*|tokens|context\w*)|context\w*|block_size|n_ctx|n_positions|seq_?len\w*|ctx\w*|window",
    "num_labels": r"(n_?|num_)?(classes|labels|tags|class)|n_?cls|output_classes",
    "image_size": r"(image|img|input)_?(size|res|resolution)",
    "num_channels": r"(in_|num_|n_)?(channels|chans)|in_ch",
}


class Names(NamedTuple):
    """The names in the written files.

    Attributes:
        stem: prefix of the classes, `GPT` for `GPTConfig` and `GPTForCausalLM`.
        model_type: model type of the config; file names end in it.
        config: name of the config class.
        model: name of the wrapper.
    """

    stem: str
    model_type: str
    config: str
    model: str


def aliases(constructor: Constructor, probe: Probe, depth: int, width: int | None) -> dict[str, str]:
    """transformers' name of a size → the field with this size, by name and by the module's structure."""
    sizes = {
        "vocab_size": probe.vocab,
        "num_hidden_layers": depth,
        "max_position_embeddings": probe.limit,
        "hidden_size": width,
    }
    if probe.kind in ("tokens", *PER_ROW):
        sizes["num_labels"] = probe.width
    sizes |= {"num_attention_heads": None} if probe.vocab else {"image_size": None, "num_channels": None}
    found = {}
    for name, size in sizes.items():
        if not size and name not in ("num_attention_heads", "image_size", "num_channels"):
            continue
        fields = [
            f for f in constructor.fields if re.fullmatch(SYNONYMS[name], f.argument) and f.value == (size or f.value)
        ]
        fields = [f for f in fields if isinstance(f.value, int) and not isinstance(f.value, bool)]
        exact = [f for f in fields if f.argument == name]
        if len(exact or fields) == 1:
            found[name] = (exact or fields)[0].name
    return found


def write_configuration(
    constructor: Constructor,
    probe: Probe,
    names: Names,
    cls: str,
    file: AuthorFile,
    renamed: dict[str, str],
    tied: bool,
) -> str:
    """The file's text.

    Args:
        renamed: from `aliases`; `num_labels` replaces the field's name instead of being an alias.
    """
    base = constructor.config_class
    fields = [f for f in constructor.fields if f.name != renamed.get("num_labels")]
    attribute_map = {name: field for name, field in renamed.items() if name not in ("num_labels", field)}
    has_labels = "num_labels" in renamed
    comments = _comments(file)
    lines = [
        f'"""Configuration of {names.model}."""',
        "",
        "from typing import Any",
        "",
        f"from transformers import {base.__name__ if base else 'PretrainedConfig'}",
        "",
        "",
        f"class {names.config}({base.__name__ if base else 'PretrainedConfig'}):",
        f'    """What `{cls}` in {file.path.name} is built from.',
        "",
        "    The defaults are the author's, or what this model was made with.",
        "",
    ]
    if fields or has_labels:
        lines.append("    Args:")
        for field in fields:
            what = comments.get(field.argument) or f"`{field.argument}` of `{cls}`"
            other = next((name for name, target in attribute_map.items() if target == field.name), "")
            lines.append(f"        {field.name}: {what}{f'; also read as `{other}`' if other else ''}.")
        if has_labels:
            label = next(f for f in constructor.fields if f.name == renamed["num_labels"])
            lines.append(f"        num_labels: number of classes, `{label.argument}` of `{cls}`.")
    else:
        lines.append(f"    `{cls}` takes no arguments of its own.")
    lines += ['    """', "", f'    model_type = "{names.model_type}"']
    if attribute_map and base is None:
        lines.append("    attribute_map = {")
        lines += [f'        "{name}": "{field}",' for name, field in sorted(attribute_map.items())]
        lines.append("    }")
    lines += ["", "    def __init__(", "        self,"]
    lines += [f"        {field.name}: {_type(field)} = {_literal(field.default)}," for field in fields]
    sets_tie = base is None and "tie_word_embeddings" not in [f.name for f in fields]
    if sets_tie:
        lines.append(f"        tie_word_embeddings: bool = {tied},")
    if has_labels and base is None:
        label = next(f for f in constructor.fields if f.name == renamed["num_labels"])
        lines.append(f"        num_labels: int = {_literal(label.value)},")
    lines += ["        **kwargs: Any,", "    ):"]
    own = [f for f in fields if f.name not in ("tie_word_embeddings", "num_labels")]
    lines += [f"        self.{field.name} = {field.name}" for field in own]
    passed = ["tie_word_embeddings=tie_word_embeddings"] if base is None else []
    if has_labels and base is None:
        passed.append("num_labels=num_labels")
    lines.append(f"        super().__init__({', '.join([*passed, '**kwargs'])})")
    return "\n".join(lines) + "\n"


def _comments(file: AuthorFile) -> dict[str, str]:
    """The author's comments on the lines of fields or arguments."""
    lines = file.text.splitlines()
    found = {}
    for node in ast.walk(file.tree):
        names = []
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [(node.target.id, node.end_lineno)]
        elif isinstance(node, ast.arguments):
            names = [(a.arg, a.end_lineno) for a in (*node.args, *node.kwonlyargs)]
        for name, line in names:
            text = lines[(line or 1) - 1]
            heading = re.fullmatch(rf"\s*{name}\s*[:=][^#]*#\s*(.+?)\.?\s*", text)
            if heading and '"""' not in heading[1] and "\\" not in heading[1]:
                found[name] = heading[1]
    return found


def _type(field: Field) -> str:
    kinds = {type(value) for value in (field.value, field.default) if value is not None}
    name = {bool: "bool", int: "int", float: "float", str: "str", list: "list[Any]", dict: "dict[str, Any]"}
    if kinds == {int, float}:
        kinds = {float}
    if len(kinds) != 1:
        return "Any"
    optional = " | None" if field.value is None or field.default is None else ""
    return name[kinds.pop()] + optional


def _literal(value: Any) -> str:
    if isinstance(value, str):
        quoted = repr(value)
        return '"' + quoted[1:-1] + '"' if quoted[0] == "'" and '"' not in quoted else quoted
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)
