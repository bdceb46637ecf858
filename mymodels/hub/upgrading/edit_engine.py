"""Apply the rules to a folder's files in memory: nothing of the folder is run or written."""

import ast
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import libcst as cst

from ..static.api_availability import FIRST, LAST, Minor
from ..static.check_model import live_code
from ..static.code_tree import Code
from ..static.repo_snapshot import CodeFile, Folder, parse_text
from .releases_block import put_in, take_out
from .rule import Context, Edit, Places, Rule

_NAMED = (ast.FunctionDef, ast.ClassDef)
MAX_ROUNDS = 3  # a rule may bring up what another one repairs


class EditError(ValueError):
    """A rule made something that is no Python: a fault of the rule, never of the folder."""


@dataclass
class Edited:
    """A folder's code and config after the rules.

    Attributes:
        texts: the code files that differ from the folder's, by name.
        config: `config.json`, if it differs.
        edits: what was done, and what could not be repaired, with lines of the original files.
    """

    texts: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    edits: list[Edit] = field(default_factory=list)

    @property
    def refused(self) -> list[Edit]:
        """The places that break and that no rule could repair."""
        return [edit for edit in self.edits if edit.refused]

    @property
    def rules(self) -> list[str]:
        """The names of the rules that changed something, in order."""
        return list(dict.fromkeys(edit.rule for edit in self.edits if not edit.refused))

    @property
    def changes(self) -> bool:
        """Whether anything differs from the original."""
        return bool(self.texts) or self.config is not None


def apply_rules(folder: Folder, rules: Iterable[Rule], *, releases: tuple[Minor, Minor] = (FIRST, LAST)) -> Edited:
    """The folder's code and config after these rules, until they change nothing more.

    Args:
        folder: as `static.repo_snapshot.read_folder` gives it. It is not changed.
        rules: in the order of application.
        releases: first and last transformers release that the result is for.
    """
    rules = list(rules)
    original = {name: file.text for name, file in folder.code.items()}
    work = replace(folder, code=dict(folder.code), values=dict(folder.values), memo=dict(folder.memo))
    _clear_memo(work)
    blocks: dict[str, dict[str, str]] = {}
    for name, text in original.items():
        bare, blocks[name] = take_out(text)
        _set_text(work, name, bare)
    edits: list[Edit] = []
    trees: dict[str, tuple[str, cst.Module, Places]] = {}
    for _ in range(MAX_ROUNDS):
        changed = False
        for rule in rules:
            changed = _configure(work, rule, edits) or changed
            changed = _edit_files(work, rule, releases, blocks, original, edits, trees) or changed
        if not changed:
            break
    texts = {name: put_in(file.text, blocks[name]) for name, file in work.code.items()}
    config = work.config if work.config != folder.config else None
    return Edited({n: t for n, t in texts.items() if t != original[n]}, config, list(dict.fromkeys(edits)))


def _set_text(folder: Folder, name: str, text: str) -> None:
    parsed = parse_text(name, text)
    if isinstance(parsed, str):
        raise EditError(f"{name}: {parsed}")
    folder.code[name] = parsed
    _clear_memo(folder)


def _clear_memo(folder: Folder) -> None:
    """Clear what was derived from code and config; the weights' headers do not change."""
    headers = folder.memo.get("headers")
    folder.memo.clear()
    if headers is not None:
        folder.memo["headers"] = headers


def _configure(work: Folder, rule: Rule, edits: list[Edit]) -> bool:
    if rule.configure is None or "config.json" not in work.values:
        return False
    before = json.loads(json.dumps(work.config))
    changes: list[str] = []
    after = rule.configure(json.loads(json.dumps(before)), work, changes.append)
    edits += [Edit(rule.name, "config.json", 0, what) for what in changes]
    if after == before and list(after) == list(before):
        return False
    work.values["config.json"] = after
    _clear_memo(work)
    return True


def _edit_files(
    work: Folder,
    rule: Rule,
    releases: tuple[Minor, Minor],
    blocks: dict[str, dict[str, str]],
    original: dict[str, str],
    edits: list[Edit],
    trees: dict[str, tuple[str, cst.Module, Places]],
) -> bool:
    changed = False
    for name in sorted(work.code) if rule.apply is not None else ():
        file = work.code[name]
        if rule.words and not any(word in file.text for word in rule.words):
            continue
        if name not in trees or trees[name][0] != file.text:
            parsed = cst.parse_module(file.text)
            trees[name] = (file.text, parsed, Places(parsed))
        _, tree, places = trees[name]
        code = live_code(work)
        if name not in code.files:
            code = Code(work)
        context = Context(rule.name, file, work, code, work.config, tree, releases, places)
        assert rule.apply is not None
        made = rule.apply(tree, context)
        text = file.text if made is tree else made.code
        for taken in _taken(file, context.definitions):
            context.refuse(1, f"the repair defines {taken}, and the file uses that name for something else")
        if text != file.text or context.definitions.keys() - blocks[name].keys():
            if not context.edits:
                raise EditError(f"the rule {rule.name!r} changed {name} without a report")
            changed = True
        edits += _in_original(context.edits, file.text, original[name])
        if text != file.text:
            _set_text(work, name, text)
        blocks[name] |= {key: source for key, source in context.definitions.items() if key not in blocks[name]}
    return changed


def _taken(file: CodeFile, definitions: dict[str, str]) -> list[str]:
    """The names that the block's new entries define and the file binds too, to something else than an import."""
    made = {node.name for source in definitions.values() for node in ast.parse(source).body if isinstance(node, _NAMED)}
    if not made:
        return []
    bound = {node.id for node in ast.walk(file.tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.name for node in ast.walk(file.tree) if isinstance(node, _NAMED)}
    bound |= {node.arg for node in ast.walk(file.tree) if isinstance(node, ast.arg)}
    methods = {
        m.name for k in ast.walk(file.tree) if isinstance(k, ast.ClassDef) for m in k.body if isinstance(m, _NAMED)
    }
    return sorted(made & (bound - methods))


def _in_original(edits: list[Edit], now: str, original: str) -> list[Edit]:
    """The edits with the lines of the original file."""
    if not edits or now == original:
        return edits
    lines: dict[int, int] = {}
    last = 1
    matcher = SequenceMatcher(None, now.splitlines(), original.splitlines(), autojunk=False)
    for _, start, end, first, stop in matcher.get_opcodes():
        for line in range(start, end):
            last = min(first + line - start, max(stop - 1, first)) + 1
            lines[line + 1] = last
    return [edit._replace(line=lines.get(edit.line, last)) for edit in edits]


def apply_to_source(rule: Rule, source: str, *, config: dict[str, Any] | None = None) -> Edited:
    """What one rule makes of the text of a single modeling file, as for the rules' own examples.

    Args:
        source: text of `modeling_example.py`.
        config: values of `config.json`; `auto_map` is filled in if it has none.
    """
    folder = Folder(Path("example"))
    name = "modeling_example.py"
    _set_text(folder, name, source)
    folder.files[name] = Path("example", name)
    classes = [node.name for node in folder.code[name].tree.body if isinstance(node, ast.ClassDef)]
    auto_map = {"AutoModel": f"modeling_example.{classes[-1]}"} if classes else {}
    folder.values["config.json"] = {"auto_map": auto_map, **(config or {})}
    folder.memo["headers"] = {}
    return apply_rules(folder, [rule])
