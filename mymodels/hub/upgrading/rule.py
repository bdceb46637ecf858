"""What a rule is, and what it may ask while it edits a file."""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import Any, NamedTuple

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider

from ..static.api_availability import Minor
from ..static.code_tree import Code, Klass
from ..static.repo_snapshot import CodeFile, Folder


class Edit(NamedTuple):
    """One change that a rule made, or, if `refused`, a place that it knows to break but cannot repair.

    Attributes:
        rule: the rule's name.
        file: file name; `config.json` for a setting.
        line: line in the original file, 0 for a setting.
        what: what was changed; what is wrong, for a place that was refused.
        refused: whether the place was left as it was.
    """

    rule: str
    file: str
    line: int
    what: str
    refused: bool = False


class Places:
    """Where the nodes of a tree are: worked out when first asked, once for all rules that see the same tree."""

    def __init__(self, tree: cst.Module):
        self._wrapper = MetadataWrapper(tree, unsafe_skip_copy=True)

    @cached_property
    def positions(self) -> Mapping[cst.CSTNode, Any]:
        return self._wrapper.resolve(PositionProvider)

    @cached_property
    def parents(self) -> Mapping[cst.CSTNode, cst.CSTNode]:
        found: dict[cst.CSTNode, cst.CSTNode] = {}
        waiting: list[cst.CSTNode] = [self._wrapper.module]
        while waiting:
            node = waiting.pop()
            for name in _fields(type(node)):
                value = getattr(node, name)
                for child in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(child, cst.CSTNode):
                        found[child] = node
                        waiting.append(child)
        return found


@cache
def _fields(kind: type) -> tuple[str, ...]:
    """The fields of a kind of node that hold code: not whitespace, commas and brackets."""
    left_out = re.compile(
        r"whitespace|leading_lines|lines_after|header|footer|comma|semicolon|[lr](par|bracket|brace)$"
    )
    return tuple(field.name for field in fields(kind) if not left_out.search(field.name))  # type: ignore[arg-type]


@dataclass
class Context:
    """A file that is edited, the folder it is in, and the report of the edits.

    Attributes:
        rule: name of the rule that is applied.
        file: name of the file, with its syntax tree of `ast` and the meaning of imported names.
        folder: the folder as the static checks see it, edits so far included.
        code: the classes of all files of the folder, edits so far included.
        config: `config.json`.
        tree: the tree that the rule is given; positions are those of its nodes.
        releases: first and last transformers release that the result is for.
        places: lines and parents of the nodes of `tree`.
        edits: what was done, with lines of `tree`.
        definitions: entries for the file's block of release branches: name → source.
    """

    rule: str
    file: CodeFile
    folder: Folder
    code: Code
    config: dict[str, Any]
    tree: cst.Module
    releases: tuple[Minor, Minor]
    places: "Places"
    edits: list[Edit] = field(default_factory=list)
    definitions: dict[str, str] = field(default_factory=dict)

    def line(self, node: cst.CSTNode) -> int:
        """The line of a node of `tree`; 0 for a node that a rule made."""
        position = self.places.positions.get(node)
        return position.start.line if position is not None else 0

    def parent(self, node: cst.CSTNode) -> cst.CSTNode | None:
        """The node that a node of `tree` is in."""
        return self.places.parents.get(node)

    def scope(self, node: cst.CSTNode) -> list[str]:
        """The names of the classes and functions around a node of `tree`, outermost first."""
        names: list[str] = []
        current = self.parent(node)
        while current is not None:
            if isinstance(current, (cst.ClassDef, cst.FunctionDef)):
                names.insert(0, current.name.value)
            current = self.parent(current)
        return names

    def dotted(self, node: cst.CSTNode | None) -> str:
        """The full name of a name or attribute (`nn.init.zeros_` → `torch.nn.init.zeros_`), or "" for anything else."""
        written = name_of(node)
        first, dot, rest = written.partition(".")
        return self.file.names.get(first, first) + dot + rest

    def klass(self, name: str) -> Klass | None:
        """A class that this file defines or imports from a sibling."""
        return self.code.find(self.file, name)

    def is_model(self, name: str) -> bool:
        """Whether a class of this file is a `PreTrainedModel`."""
        found = self.klass(name)
        return found is not None and self.code.is_model(found)

    def note(self, node: cst.CSTNode | int, what: str) -> None:
        """Report an edit. Every edit is reported, at a node of `tree` or a line of it."""
        line = node if isinstance(node, int) else self.line(node)
        self.edits.append(Edit(self.rule, self.file.name, line, what))

    def refuse(self, node: cst.CSTNode | int, what: str) -> None:
        """Report a place that breaks under newer releases and that the rule cannot repair: nothing is written then."""
        line = node if isinstance(node, int) else self.line(node)
        self.edits.append(Edit(self.rule, self.file.name, line, what, refused=True))

    def define(self, name: str, source: str) -> None:
        """Define a function or import a name in the file's one block of release branches, above its first use.

        Args:
            name: what the block then defines; the entry is written once.
            source: Python source that is complete by itself: it imports what it uses.
        """
        self.definitions.setdefault(name, source.strip("\n"))


Apply = Callable[[cst.Module, Context], cst.Module]
Report = Callable[[str], None]  # called with a phrase on what was changed
Configure = Callable[[dict[str, Any], Folder, Report], dict[str, Any]]


@dataclass(frozen=True)
class Rule:
    """One repair of old custom code.

    Attributes:
        name: short and stable, such as `"tied weights"`.
        reason: one sentence on what breaks, and how it shows.
        releases: the releases that break the old form, such as `"5.0 and newer"`.
        before: source of a file with the old form.
        after: the same file after the rule; both are the rule's test.
        apply: edits one file's tree, and reports each edit by `context.note`. Applied to its own result it changes
            nothing.
        configure: edits `config.json`: takes its values, the folder and a function that reports an edit; returns the
            new values.
        config: `config.json` of the example.
        config_after: the example's `config.json` after the rule, for a rule with `configure`.
        words: the rule is tried on files that contain one of these texts; default: on every file. It saves time only.
        order: rules are applied in this order, then by name. Imports are 10, caches 30, masks 40, others 50.
        option: the option that the rule needs, such as `"attention_interface"`; "" for a rule that always applies.
    """

    name: str
    reason: str
    releases: str
    before: str = ""
    after: str = ""
    apply: Apply | None = None
    configure: Configure | None = None
    config: dict[str, Any] = field(default_factory=dict)
    config_after: dict[str, Any] | None = None
    words: tuple[str, ...] = ()
    order: int = 50
    option: str = ""


class Rewriter(cst.CSTTransformer):
    """A transformer with the context at hand: `leave_…` methods report at their `original_node`."""

    def __init__(self, context: Context):
        super().__init__()
        self.context = context


def rewrites(transformer: Callable[[Context], Rewriter], words: tuple[str, ...] = ()) -> Apply:
    """`apply` of a rule that is one pass of a transformer.

    Args:
        words: only top-level statements (classes, functions, imports) that contain one of these texts are visited.
    """

    def apply(tree: cst.Module, context: Context) -> cst.Module:
        if not words:
            changed = tree.visit(transformer(context))
            return changed if context.edits else tree
        made = transformer(context)
        body: list[Any] = []
        for step, text in _top_level(tree, context.file):
            new = step.visit(made) if any(word in text for word in words) else step
            body += list(new) if isinstance(new, cst.FlattenSentinel) else [new] if isinstance(new, cst.CSTNode) else []
        return tree.with_changes(body=body) if context.edits else tree

    return apply


def _top_level(tree: cst.Module, file: CodeFile) -> Iterator[tuple[cst.CSTNode, str]]:
    """The top-level statements with their text, without the comments above them."""
    lines, at = file.text.splitlines(keepends=True), 0
    for step in tree.body:
        count = len(step.body) if isinstance(step, cst.SimpleStatementLine) else 1
        nodes = file.tree.body[at : at + count]
        at += count
        first = min((n.lineno for node in nodes for n in [node, *getattr(node, "decorator_list", [])]), default=1)
        last = max((node.end_lineno or node.lineno for node in nodes), default=0)
        yield step, "".join(lines[first - 1 : last])


def name_of(node: cst.CSTNode | None) -> str:
    """A name or attribute as it is written (`self.config.pad_token_id`), or "" for anything else."""
    parts: list[str] = []
    while isinstance(node, cst.Attribute):
        parts.append(node.attr.value)
        node = node.value
    if not isinstance(node, cst.Name):
        return ""
    return ".".join([node.value, *reversed(parts)])


def source_of(node: cst.CSTNode) -> str:
    """The source text of a node."""
    return name_of(node) or cst.Module(body=[]).code_for_node(node)


def expression(text: str) -> cst.BaseExpression:
    """The tree of an expression."""
    return cst.parse_expression(text)


def statements(text: str) -> list[cst.BaseStatement]:
    """The trees of some statements."""
    return [*cst.parse_module(text).body]  # type: ignore[list-item]


def literal(node: cst.CSTNode | None) -> Any:
    """The value of a literal, or None."""
    if node is None:
        return None
    try:
        return ast.literal_eval(source_of(node))
    except (ValueError, SyntaxError):
        return None
