"""The tokens of a folder's tokenizer and their ids, from its JSON files."""

import json
from typing import Any, NamedTuple

from .repo_snapshot import Folder

MAX_TOKENIZER_BYTES = 100_000_000
ROLES = ("pad_token", "eos_token", "bos_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Tokens(NamedTuple):
    """Tokens and ids in the tokenizer's files.

    Attributes:
        ids: token → id over all files; the first file with a token counts.
        files: the same for each file.
        complete: whether these are all tokens of the tokenizer, as `tokenizer.json` has them.
    """

    ids: dict[str, int]
    files: dict[str, dict[str, int]]
    complete: bool

    def file_of(self, token: str) -> str:
        """The first file that has a token."""
        return next(file for file, ids in self.files.items() if token in ids)


def vocabulary(folder: Folder) -> Tokens:
    """The tokens of `tokenizer.json` or `vocab.json` with the added ones; no ids if neither can be read."""
    if "vocabulary" not in folder.memo:
        folder.memo["vocabulary"] = _read(folder)
    return folder.memo["vocabulary"]


def _read(folder: Folder) -> Tokens:
    value = tokenizer_file(folder)
    main = _of_tokenizer_json(value) if isinstance(value, dict) else {}
    files = {"tokenizer.json": main}
    if not main:
        files = {"vocab.json": _integers(_json(folder, "vocab.json"))}
    if not any(files.values()):
        return Tokens({}, {}, False)
    files["added_tokens.json"] = _integers(folder.values.get("added_tokens.json", {}))
    decoder = folder.values.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    added: dict[str, int] = {}
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str) and str(number).isdigit():
            added[text] = int(number)
    files["tokenizer_config.json"] = added
    ids: dict[str, int] = {}
    for found in files.values():
        ids = found | ids
    return Tokens(ids, files, bool(main))


def tokenizer_file(folder: Folder) -> Any:
    """The content of `tokenizer.json`; None if it is missing or unreadable, which the check `tokenizer.json` reports."""
    if "tokenizer.json" not in folder.memo:
        folder.memo["tokenizer.json"] = _json(folder, "tokenizer.json")
    return folder.memo["tokenizer.json"]


def _json(folder: Folder, name: str) -> Any:
    path = folder.files.get(name)
    if path is None or path.stat().st_size > MAX_TOKENIZER_BYTES:
        return None
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):
        return None


def _of_tokenizer_json(value: dict[str, Any]) -> dict[str, int]:
    try:
        vocab = value["model"].get("vocab", {})
        found: dict[str, Any] = {}
        if isinstance(vocab, dict):
            found = {str(token): number for token, number in vocab.items()}
        else:
            for number, pair in enumerate(vocab):
                found.setdefault(str(pair[0]), number)
        found |= {str(token["content"]): token["id"] for token in value.get("added_tokens") or []}
        return _integers(found)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return {}


def _integers(value: Any) -> dict[str, int]:
    table = value if isinstance(value, dict) else {}
    return {k: v for k, v in table.items() if isinstance(v, int) and not isinstance(v, bool)}


def special_tokens(folder: Folder) -> dict[str, dict[str, str]]:
    """Role → the token that each file names for it: `{"eos_token": {"tokenizer_config.json": "</s>"}}`."""
    found: dict[str, dict[str, str]] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for role in ROLES:
            entry = folder.values.get(file, {}).get(role)
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str) and text:
                found.setdefault(role, {})[file] = text
    return found
