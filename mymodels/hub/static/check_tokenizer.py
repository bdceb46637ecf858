"""Checks of the tokenizer: its class, its files, and its maximum length."""

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from .api_availability import Span, level_for
from .check_config import all_code, in_library
from .code_tree import references
from .repo_snapshot import Finding, Folder, brief
from .settings import POSITIONS, position_rows, setting, stretches_positions
from .vocabulary import MAX_TOKENIZER_BYTES, tokenizer_file

# names of vocabulary files of transformers' tokenizers
_VOCABULARY = re.compile(
    r"(tokenizer\.json|vocab\.(json|txt|bpe)|.*\.(model|spm|tiktoken|tik)|spiece\.\w+|tekken\.json|"
    r"vocab_file.*|dict\.txt|bpe\.codes|.*vocab.*|merges\.txt|source\.spm|char.*\.(txt|json))$"
)
# these read bytes, or build their vocabulary from the config
_NO_VOCABULARY = re.compile(r"(ByT5|Canine|Perceiver|Byte|Char|Myt5)\w*Tokenizer")


def tokenizer(folder: Folder) -> Iterator[Finding]:
    """The tokenizer's class can be found, and its vocabulary exists."""
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
    yield from _options(folder, value)
    if not own:
        yield from _kind_of_model(folder, name)


def _known(name: Any) -> bool:
    return isinstance(name, str) and any(map(in_library, (name, f"{name}Fast", name.removesuffix("Fast"))))


def _options(folder: Folder, value: dict[str, Any]) -> Iterator[Finding]:
    """Options of `tokenizer_config.json` that the tokenizer rejects, or that name missing files."""
    for key in ("padding_side", "truncation_side"):
        side = value.get(key)
        if side is not None and side not in ("left", "right"):
            what = f"{key} is {brief(side)}, but must be left or right"
            yield Finding("failed", what, f"tokenizer_config.json: {key}", "write left or right")
    inputs = value.get("model_input_names")
    if inputs is not None and not (isinstance(inputs, list) and {"input_ids", "input_values"} & {*map(str, inputs)}):
        what = f"model_input_names is {brief(inputs)}, without input_ids, which every tokenizer returns first"
        yield Finding("failed", what, "tokenizer_config.json: model_input_names", 'begin the list with "input_ids"')
    for key, name in value.items():
        plain = key.endswith("_file") and isinstance(name, str) and not re.search(r"[/\\:]", name)
        if plain and name and name not in folder.files:
            status = "warning" if key == "special_tokens_map_file" else "failed"
            what = f"{key} names {brief(name)}, which is not in the folder"
            yield Finding(status, what, f"tokenizer_config.json: {key}", "add the file, or remove the key")


# these releases build the tokenizer by its class, and ignore what tokenizer.json describes
_REBUILT = Span((5, 0), (5, 99))


def _kind_of_model(folder: Folder, name: Any) -> Iterator[Finding]:
    """The class fits the kind of model in `tokenizer.json`: BPE, WordPiece or Unigram."""
    import transformers

    file = tokenizer_file(folder)
    model = file.get("model") if isinstance(file, dict) else None
    kind = model.get("type") if isinstance(model, dict) else None
    klass = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    wanted = getattr(getattr(klass, "model", None), "__name__", None)
    if isinstance(kind, str) and isinstance(wanted, str) and kind != wanted:
        what = f"tokenizer_class is {name}, which is for {wanted}, but tokenizer.json has a {brief(kind)} model"
        remedy = "name the class that the tokenizer was made with, or PreTrainedTokenizerFast"
        yield Finding(level_for(_REBUILT, folder.releases), what, "tokenizer_config.json: tokenizer_class", remedy)


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
    elif not own and not needs_none and all(n == "merges.txt" for n in folder.files if _VOCABULARY.fullmatch(n)):
        what = "the tokenizer has merges.txt, but not the vocabulary, vocab.json, that belongs to it"
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


def tokenizer_json(folder: Folder) -> Iterator[Finding]:
    """`tokenizer.json` is valid JSON, and describes a tokenizer that can be built."""
    path = folder.files.get("tokenizer.json")
    if path is None or path.stat().st_size > MAX_TOKENIZER_BYTES:
        return
    data = path.read_bytes()
    if data.startswith((b"version https://git-lfs", b"\xef\xbb\xbf")):
        return  # reported by `json files`
    where, remedy = "tokenizer.json", "save the tokenizer again"
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        what = f"tokenizer.json cannot be read: it is not valid JSON ({str(error)[:100]})"
        yield Finding("failed", what, where, remedy)
        return
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_buffer(data)
    except Exception as error:  # the Rust reader raises plain Exceptions
        reason = re.sub(r" at line \d+ column \d+$", "", str(error).strip())
        what = f"tokenizer.json cannot be loaded: {reason[:150]}"
        yield Finding("failed", what, where, remedy)
        return
    model = value["model"]
    unknown, tokens = model.get("unk_token"), model.get("vocab")
    added = {token.get("content") for token in value.get("added_tokens") or ()}
    word = model.get("type") in ("WordLevel", "WordPiece") or "continuing_subword_prefix" in model
    if word and unknown and isinstance(tokens, dict) and unknown not in tokens and unknown not in added:
        what = f"the vocabulary does not have the token for unknown words, {brief(unknown)}: these words raise"
        yield Finding("failed", what, f"{where}: model.unk_token", "name a token of the vocabulary")


SHORTEST = 16  # tokens; fewer are useless


def lengths(folder: Folder) -> Iterator[Finding]:
    """The tokenizer's maximum length fits the model's positions."""
    longest = folder.values.get("tokenizer_config.json", {}).get("model_max_length")
    where = "tokenizer_config.json: model_max_length"
    if isinstance(longest, (str, bool, list, dict)):
        yield Finding("failed", f"model_max_length is {brief(longest)}, no number", where, "write it as a number")
        return
    if longest is None or longest > 1e12:
        return  # not given, or transformers' "very large number" for that
    if longest <= 0:
        yield Finding("failed", f"model_max_length is {longest}, so every text is cut to nothing", where, "correct it")
        return
    limit = setting(folder, *POSITIONS)
    rows = position_rows(folder)
    remedy = "set model_max_length of the tokenizer to the number of positions, and save it again"
    if longest < SHORTEST and not (isinstance(limit, int) and limit <= longest):
        what = f"model_max_length is {longest:.0f}: every text is cut to so few tokens"
        yield Finding("failed", what, where, remedy)
    elif isinstance(limit, int) and longest * 16 < limit:
        what = f"model_max_length is {longest:.0f}, although the model has {limit} positions: texts are cut early"
        yield Finding("warning", what, where, remedy)
    known = [n for n in (limit, rows) if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    if not known or longest <= min(known):
        return
    what = f"model_max_length is {longest:.0f}, but the model has {min(known)} positions"
    if rows is not None:
        yield Finding("failed", f"{what}: longer texts raise or are wrong", where, remedy)
    elif not stretches_positions(folder):
        yield Finding("warning", f"{what} (max_position_embeddings)", where, remedy)


CHECKS = {"tokenizer": tokenizer, "tokenizer.json": tokenizer_json, "lengths": lengths}
