"""Checks of the tokenizer's files: its class and vocabulary, special ids, lengths, and the chat template."""

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from ...checkpoints import CheckpointError, open_checkpoint
from ...checkpoints.opening import weight_files
from .check_config import all_code, library_names
from .code_tree import references
from .repo_snapshot import Finding, Folder, brief
from .settings import POSITIONS, setting, text_config

MAX_TOKENIZER_BYTES = 100_000_000
# Files that hold a vocabulary, by the names that transformers' tokenizers give them
_VOCABULARY = re.compile(
    r"(tokenizer\.json|vocab\.(json|txt|bpe)|.*\.(model|spm|tiktoken|tik)|spiece\.\w+|tekken\.json|"
    r"vocab_file.*|dict\.txt|bpe\.codes|.*vocab.*|merges\.txt|source\.spm|char.*\.(txt|json))$"
)
# These read bytes, or make their vocabulary from the config
_NO_VOCABULARY = re.compile(r"(ByT5|Canine|Perceiver|Byte|Char|Myt5)\w*Tokenizer")


def tokenizer(folder: Folder) -> Iterator[Finding]:
    """The tokenizer's class can be found, and its vocabulary is there."""
    value = folder.values.get("tokenizer_config.json", {})
    name = value.get("tokenizer_class")
    where = "tokenizer_config.json: tokenizer_class"
    own = isinstance(value.get("auto_map"), dict) and "AutoTokenizer" in value["auto_map"]
    if name == "TokenizersBackend" and not own:
        what = "tokenizer_class is TokenizersBackend, which transformers 4 does not know"
        yield Finding("warning", what, where, "write PreTrainedTokenizerFast, which every release knows")
    elif name is not None and not own and not _known(name):
        what = f"transformers has no tokenizer class {brief(name)}, and auto_map has no AutoTokenizer"
        yield Finding("failed", what, where, "add AutoTokenizer to auto_map in tokenizer_config.json")
    yield from _vocabulary_files(folder, value, own)


def _known(name: Any) -> bool:
    return isinstance(name, str) and (name in library_names() or f"{name}Fast" in library_names())


def _vocabulary_files(folder: Folder, value: dict[str, Any], own: bool) -> Iterator[Finding]:
    if not value:
        return
    what = "tokenizer_config.json is there, but no vocabulary: neither tokenizer.json nor what it is made from"
    remedy = "save the tokenizer again with save_pretrained, and copy all the files that it writes"
    needs_none = _NO_VOCABULARY.match(str(value.get("tokenizer_class")))
    missing = [f for f in _declared_files(folder, value) if f not in folder.files]
    if own and missing and "tokenizer.json" not in folder.files:
        what = f"the tokenizer reads {', '.join(missing)}, which is not in the folder"
        yield Finding("failed", what, "tokenizer_config.json", remedy)
    elif not (own or needs_none or any(_VOCABULARY.fullmatch(name) for name in folder.files)):
        yield Finding("failed", what, "tokenizer_config.json", remedy)


def _declared_files(folder: Folder, value: dict[str, Any]) -> list[str]:
    """The files that the folder's own tokenizer class names in `vocab_files_names`."""
    code = all_code(folder)
    for _, auto, reference in references(folder):
        module, _, name = reference.rpartition(".")
        file = code.files.get(f"{module}.py")
        klass = code.find(file, name) if auto == "AutoTokenizer" and file is not None else None
        found = code.value(klass, "vocab_files_names") if klass is not None else None
        if found is not None:
            node = found[1]
            if isinstance(node, ast.Name):  # VOCAB_FILES_NAMES at the top of the file
                node = next(
                    (
                        step.value
                        for step in found[0].file.tree.body
                        if isinstance(step, ast.Assign) and ast.unparse(step.targets[0]) == node.id
                    ),
                    node,
                )
            try:
                names = ast.literal_eval(node)
            except (ValueError, TypeError, RecursionError, MemoryError):
                return []
            required = _required_arguments(code, klass)
            return (
                [f for k, f in names.items() if k in required and isinstance(f, str)] if isinstance(names, dict) else []
            )
    return []


def _required_arguments(code: Any, klass: Any) -> set[str]:
    """The arguments of a class's `__init__` that have no default."""
    found = code.method(klass, "__init__")
    if found is None:
        return set()
    arguments = found[1].args
    return {a.arg for a in arguments.args[: len(arguments.args) - len(arguments.defaults)]}


def vocabulary(folder: Folder) -> dict[str, int]:
    """Token → id of `tokenizer.json`, added tokens too; empty if there is none that can be read."""
    if "vocabulary" not in folder.memo:
        folder.memo["vocabulary"] = _read_vocabulary(folder)
    return folder.memo["vocabulary"]


def _read_vocabulary(folder: Folder) -> dict[str, int]:
    path = folder.files.get("tokenizer.json")
    if path is None or path.stat().st_size > MAX_TOKENIZER_BYTES:
        return {}
    try:
        value = json.loads(path.read_bytes())
        vocab = value["model"].get("vocab", {})
        found = (
            {str(token): number for token, number in vocab.items()}
            if isinstance(vocab, dict)
            else {str(pair[0]): number for number, pair in enumerate(vocab)}
        )
        found |= {str(token["content"]): token["id"] for token in value.get("added_tokens") or []}
        return {token: number for token, number in found.items() if isinstance(number, int)}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OSError):
        return {}


def tokenizer_json(folder: Folder) -> Iterator[Finding]:
    """`tokenizer.json` is valid JSON."""
    path = folder.files.get("tokenizer.json")
    if path is None or path.stat().st_size > MAX_TOKENIZER_BYTES:
        return
    data = path.read_bytes()
    if data.startswith((b"version https://git-lfs", b"\xef\xbb\xbf")):
        return  # named by `json files`
    try:
        json.loads(data)
    except (ValueError, RecursionError) as error:
        what = f"tokenizer.json cannot be read: it is not valid JSON ({str(error)[:100]})"
        yield Finding("failed", what, "tokenizer.json", "save the tokenizer again")


def token_ids(folder: Folder) -> Iterator[Finding]:
    """The special ids of config and generation config are in the vocabulary, which the embeddings have rows for."""
    size = setting(folder, "vocab_size")
    size = size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None
    used = vocabulary(folder)
    if size is not None and used and max(used.values()) >= size:
        token = max(used, key=lambda t: used[t])
        what = f"tokenizer.json has the token {brief(token)} with id {used[token]}, but vocab_size is {size}"
        remedy = "save the tokenizer that belongs to this model again, or call resize_token_embeddings"
        yield Finding("failed", what, "tokenizer.json", remedy)
    config_is_text = text_config(folder) is folder.config
    tables = [("config.json", text_config(folder) if not config_is_text else folder.config)]
    tables.append(("generation_config.json", folder.values.get("generation_config.json", {})))
    for name, values in tables:
        for key, value in values.items():
            if not re.fullmatch(r"\w*_token_ids?|\w*suppress_tokens", key) or not re.search(_OF_TEXT, key):
                continue
            ids = value if isinstance(value, list) else [value]
            for number in ids:
                where = f"{name}: {key}"
                if number is None:
                    continue
                if not isinstance(number, int) or isinstance(number, bool):
                    if not isinstance(number, list):
                        what = f"{key} is {brief(value)}, not a token id"
                        yield Finding("failed", what, where, "write the id as a number")
                elif size is not None and number >= size:
                    what = f"{key} is {number}, outside of the vocabulary of {size} tokens (0 to {size - 1})"
                    yield Finding("failed", what, where, "write the id that the tokenizer has for this token")
                elif number < -1 or (number == -1 and key != "pad_token_id" and "suppress" not in key):
                    what = f"{key} is {number}, which is no token id"
                    yield Finding("failed", what, where, "write the id that the tokenizer has for this token, or null")


_OF_TEXT = r"^(pad|eos|bos|unk|sep|cls|mask|decoder_start|forced_\w+|begin_suppress|suppress)(_|$)|suppress_tokens$"
_POSITION_TABLE = re.compile(
    r"(^|\.)(\w*position\w*embed\w*|\w*embed\w*position\w*|wpe|pos_emb\w*|position_embedding)\.weight$"
)


def lengths(folder: Folder) -> Iterator[Finding]:
    """The tokenizer does not promise more positions than the model has."""
    longest = folder.values.get("tokenizer_config.json", {}).get("model_max_length")
    if not isinstance(longest, (int, float)) or isinstance(longest, bool) or longest > 1e12:
        return  # not given, or transformers' "very large number" for that
    where = "tokenizer_config.json: model_max_length"
    if longest <= 0:
        yield Finding("failed", f"model_max_length is {longest}, so every text is cut to nothing", where, "correct it")
        return
    limit = setting(folder, *POSITIONS)
    rows = _position_rows(folder)
    remedy = "set model_max_length of the tokenizer to the number of positions, and save it again"
    known = [n for n in (limit, rows) if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    if not known or longest <= min(known):
        return
    what = f"model_max_length is {longest:.0f}, but the model has {min(known)} positions"
    if rows is not None:
        yield Finding("failed", f"{what}: longer texts raise or are wrong", where, remedy)
    elif not any(_scaled(text_config(folder).get(key)) for key in ("rope_scaling", "rope_parameters")):
        yield Finding("warning", f"{what} (max_position_embeddings)", where, remedy)


def _scaled(rope: Any) -> bool:
    """Whether rotary positions are stretched beyond what the model was trained on."""
    return isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) not in (None, "default")


def _position_rows(folder: Folder) -> int | None:
    """The rows of a learned table of positions, if the checkpoint has one for texts."""
    if folder.odd or not weight_files(folder.path):
        return None
    try:
        info = open_checkpoint(folder.path).info
    except (CheckpointError, OSError):
        return None  # named by `weights`
    rows = [
        tensor.shape[0]
        for name, tensor in info.items()
        if _POSITION_TABLE.search(name)
        and len(tensor.shape) == 2
        and tensor.shape[0] > 1
        and not re.search(r"vision|visual|image|patch|encoder_pos|rel|bias", name)
    ]
    return min(rows) if rows else None


_UNSAFE_TEMPLATE = re.compile(r"__(class|subclasses|globals|mro|builtins|import|init|getattribute)__|\|\s*attr\s*\(")


def _templates(folder: Folder) -> Iterator[tuple[str, str]]:
    for name, value in folder.values.items():
        template = value.get("chat_template")
        for entry in template if isinstance(template, list) else [template]:
            text = entry.get("template") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                yield f"{name}: chat_template", text
    for name, path in folder.files.items():
        if name.endswith(".jinja"):
            with path.open("rb") as file:
                yield name, file.read(1_000_000).decode("utf-8", errors="replace")


def templates(folder: Folder) -> Iterator[Finding]:
    """Chat templates are programs: they must parse, read the messages, and reach for nothing else."""
    for where, text in _templates(folder):
        if found := _UNSAFE_TEMPLATE.search(text):
            what = f"the chat template uses {found[0]}, the way out of its sandbox"
            yield Finding("failed", what, where, "do not render it")
        yield from _parsed(where, text)


def _parsed(where: str, text: str) -> Iterator[Finding]:
    import jinja2
    from jinja2 import meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    text = re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", "", text)  # transformers' own tag
    try:
        tree = environment.parse(text)
        environment.compile(tree)  # to Python code, which is not run: names of filters are looked up here
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        at = f" (line {line})" if line else ""
        what = f"the chat template does not parse: {str(error)[:150]}{at}"
        yield Finding("failed", what, where, "mend it, and try tokenizer.apply_chat_template")
        return
    except (RecursionError, MemoryError):
        yield Finding("failed", "the chat template is nested too deeply", where, "do not render it")
        return
    if "messages" not in meta.find_undeclared_variables(tree):
        what = "the chat template does not read `messages`, so it gives the same text for every conversation"
        yield Finding("failed", what, where, "loop over messages, and try tokenizer.apply_chat_template")


CHECKS = {
    "tokenizer": tokenizer,
    "tokenizer.json": tokenizer_json,
    "token ids": token_ids,
    "lengths": lengths,
    "chat template": templates,
}
