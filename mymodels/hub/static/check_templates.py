"""Checks of chat templates: they parse, use the messages, and access nothing else. No template is rendered."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .repo_snapshot import Finding, Folder

if TYPE_CHECKING:
    from jinja2 import Environment, nodes

_UNSAFE = re.compile(r"__(class|subclasses|globals|mro|builtins|import|init|getattribute)__|\|\s*attr\s*\(")
# what transformers passes to a template, besides Jinja's own functions
_GIVEN = {"raise_exception", "strftime_now"}
_DUMPS = {"tojson", "string", "pprint", "join", "items", "dictsort", "xmlattr", "urlencode"}  # of an entire message
_REMEDY = "correct it, and try tokenizer.apply_chat_template"


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
    """Chat templates parse, use the messages, and access nothing else."""
    for where, text in _templates(folder):
        if found := _UNSAFE.search(text):
            what = f"the chat template uses {found[0]}, which is used to escape Jinja's sandbox"
            yield Finding("failed", what, where, "do not render it")
        yield from _parsed(where, text)


def _parsed(where: str, text: str) -> Iterator[Finding]:
    import jinja2
    from jinja2 import meta, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    text = re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", "", text)  # transformers' own tag
    try:
        tree = environment.parse(text)
        environment.compile(tree)  # compiles to Python code, which is not run; unknown filters raise here
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        at = f" (line {line})" if line else ""
        what = f"the chat template does not parse: {str(error)[:150]}{at}"
        yield Finding("failed", what, where, _REMEDY)
        return
    except (RecursionError, MemoryError):
        yield Finding("failed", "the chat template is nested too deeply", where, "do not render it")
        return
    unknown = meta.find_undeclared_variables(tree)
    missing = list(_not_there(environment, tree, unknown))
    yield from (Finding("failed", what, where, _REMEDY) for what in missing)
    if missing:
        return
    if "messages" not in unknown:
        what = "the chat template does not read `messages`, so it gives the same text for every conversation"
        yield Finding("failed", what, where, _REMEDY)
        return
    words = {node.attr for node in tree.find_all(nodes.Getattr)}
    words |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    if not _prints_messages(tree):
        if "content" not in words:
            what = (
                "the chat template never reads the content of a message, so its text does not depend on what was said"
            )
            yield Finding("failed", what, where, _REMEDY)
        if "role" not in words:
            what = "the chat template does not read who speaks (role), so questions and answers look alike"
            yield Finding("warning", what, where, _REMEDY)
    if "add_generation_prompt" not in unknown and not re.search(r"\[/?INST\]", text):
        what = "the chat template ignores add_generation_prompt: the model is not asked to answer"
        yield Finding("warning", what, where, "end it with what begins an answer, {% if add_generation_prompt %}")


def _not_there(environment: "Environment", tree: "nodes.Template", unknown: set[str]) -> Iterator[str]:
    """What a template uses that neither Jinja nor transformers provides: rendering raises there."""
    from jinja2 import nodes

    for step in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        kind = type(step).__name__.lower().replace("fromimport", "import")
        yield f"the chat template has an {kind} of another file, which transformers does not provide (line {step.lineno})"
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in unknown - _GIVEN:
            yield f"the chat template calls {call.node.name}(), which is not defined (line {call.lineno})"
    for used in tree.find_all(nodes.Filter):
        if used.name not in environment.filters:
            yield f"the chat template uses the filter {used.name}, which does not exist (line {used.lineno})"
    for test in tree.find_all(nodes.Test):
        if test.name not in environment.tests:
            yield f"the chat template uses the test {test.name}, which does not exist (line {test.lineno})"


def _prints_messages(tree: "nodes.Template") -> bool:
    """Whether messages are printed as they are, by `{{ message }}` or `messages | tojson`."""
    from jinja2 import nodes

    if any(node.name in _DUMPS for node in tree.find_all(nodes.Filter)):
        return True
    if any(node.attr in ("items", "values") for node in tree.find_all(nodes.Getattr)):
        return True
    loops = {node.target.name for node in tree.find_all(nodes.For) if isinstance(node.target, nodes.Name)}
    printed = [part for node in tree.find_all(nodes.Output) for part in node.nodes]
    return any(isinstance(part, nodes.Name) and part.name in loops | {"messages"} for part in printed)


CHECKS = {"chat template": templates}
