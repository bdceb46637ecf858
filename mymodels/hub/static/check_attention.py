"""Checks of attention: it uses transformers' attention interface and receives all arguments that engines pass."""

import ast
import re
from collections.abc import Iterator

from .api_availability import Span, level_for
from .check_model import live_code, served
from .code_tree import Code, Klass, bridged, calls, constant
from .repo_snapshot import Finding, Folder
from .walking import walk

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_PROJECTIONS = {
    *("q_proj", "k_proj", "query", "q_lin", "to_q", "wq", "q", "qkv", "qkv_proj", "Wqkv", "c_attn", "in_proj"),
    *("query_key_value", "attn_qkv"),
}
_COMPUTES = {"softmax", "scaled_dot_product_attention", "flash_attn_func", "flash_attn_varlen_func"}
_TEXT_NEW = "ALL_ATTENTION_FUNCTIONS.get_interface("
_TEXT_OLD = "ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]"


def _words(node: ast.AST) -> set[str]:
    return {n.id for n in walk(node) if isinstance(n, ast.Name)} | {
        n.attr for n in walk(node) if isinstance(n, ast.Attribute)
    }


def _words_of_class(klass: ast.ClassDef) -> set[str]:
    """As `_words`, without decorators of methods: what they call is no attention of this class."""
    words: set[str] = set()
    for statement in klass.body:
        parts = [statement.args, *statement.body] if isinstance(statement, ast.FunctionDef) else [statement]
        words = words.union(*map(_words, parts))
    return words


def _gates(code: Code) -> set[str]:
    """The names of the interface, and of the folder's functions that call it."""
    gates = {_INTERFACE}
    functions = [n for f in code.files.values() for n in f.tree.body if isinstance(n, ast.FunctionDef)]
    for _ in range(3):
        gates |= {function.name for function in functions if _words(function) & gates}
    return gates


def _kwargs_passed(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a method takes `**kwargs` and passes them to at least one call."""
    if method.args.kwarg is None:
        return False
    name = method.args.kwarg.arg
    return any(
        keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == name
        for call in calls(method)
        for keyword in call.keywords
    )


def attention(folder: Folder) -> Iterator[Finding]:
    """Attention uses the interface, and `**kwargs` reach it from the model's `forward`."""
    code = live_code(folder)
    gates = _gates(code)
    declared = [klass for klass in code.classes if constant(klass.value("_supports_attention_backend")) is True]
    mentioned = {id(klass.node): _words_of_class(klass.node) for klass in code.classes}
    reaching: set[str] = set()
    past: list[Klass] = []
    for klass in code.classes:
        forward = klass.method("forward") if code.is_module(klass) else None
        if forward is None:
            continue
        words = set().union(*(mentioned[id(member.node)] for member in code.lineage(klass)))
        if words & gates:
            reaching.add(klass.name)
            if not _kwargs_passed(forward):
                what = f"{klass.name}.forward does not pass **kwargs on to the attention function"
                remedy = "take **kwargs and pass them: packed sequences and engines such as vLLM need them"
                yield Finding("warning", what, klass.file.at(forward), remedy)
            if "is_causal" not in words:
                what = f"{klass.name} does not set is_causal, so its attention is causal wherever there is no mask"
                yield Finding("warning", what, klass.file.at(forward), "set self.is_causal, and pass it if it is False")
        elif words & _PROJECTIONS and words & _COMPUTES:
            past.append(klass)
    for klass in past:
        # attention of another model may call the interface
        borrowed = any("AutoModel" in file.text for file in code.files.values())
        false_claim = declared and not reaching and not borrowed
        more = f", although {declared[0].name} declares _supports_attention_backend" if false_claim else ""
        what = f"{klass.name} computes attention itself, without transformers' attention interface{more}"
        remedy = "call ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)"
        yield Finding("failed" if false_claim else "warning", what, klass.where, remedy)
    yield from _holders(code, reaching)


def _holders(code: Code, reaching: set[str]) -> Iterator[Finding]:
    """Modules between the model and its attention that drop `**kwargs`."""
    seen = set(reaching)
    growing = set(reaching)
    while growing:
        made, growing = growing, set()
        for klass in code.classes:
            init, forward = klass.method("__init__"), klass.method("forward")
            if klass.name in seen or init is None or not code.is_module(klass):
                continue
            if not any(isinstance(call.func, ast.Name) and call.func.id in made for call in calls(init)):
                continue
            seen.add(klass.name)
            growing.add(klass.name)
            if forward is not None and not _kwargs_passed(forward):
                what = f"{klass.name}.forward drops **kwargs on the way to the attention function"
                remedy = "take **kwargs and pass them on to the module that holds the attention"
                yield Finding("warning", what, klass.file.at(forward), remedy)


def attention_switch(folder: Folder) -> Iterator[Finding]:
    """The text that `set_attn_implementation` searches for is in the file."""
    code = live_code(folder)
    gates = _gates(code)
    for file in {klass.file.name: klass.file for klass in served(folder, code)}.values():
        users = [k for k in code.classes if k.file is file and code.is_module(k) and _words(k.node) & gates]
        if not users or not re.search(r"^class \w*Attention\w*\(nn\.Module\)", file.text, re.MULTILINE):
            continue
        for text, span in ((_TEXT_NEW, Span((5, 3), (5, 99))), (_TEXT_OLD, Span(last=(5, 2)))):
            if text not in file.text:
                what = f"set_attn_implementation changes nothing {span}: it searches {file.name} for `{text}`"
                yield Finding("warning", what, file.at(users[0].node), "write this text, in code or in a comment")


def masks_and_caches(folder: Folder) -> Iterator[Finding]:
    """Arguments of masks and caches that differ by release."""
    code = live_code(folder)
    for file in code.files.values():
        optional = bridged(file)
        for call in calls(file.tree):
            if id(call) in optional:
                continue  # in a branch for some releases only
            dotted = file.dotted(call.func)
            keywords = {keyword.arg for keyword in call.keywords}
            if re.match(r"transformers\.masking_utils\.create_\w+", dotted) and None not in keywords:
                name = dotted.rpartition(".")[2]
                for keyword, span in (("inputs_embeds", Span(last=(5, 1))), ("input_embeds", Span((5, 6), (5, 99)))):
                    if keyword in keywords:
                        what = f"{name} has no argument {keyword} {span}"
                        status = level_for(span, folder.releases)
                        remedy = "inspect its signature at import, and pass the name that it has"
                        yield Finding(status, what, file.at(call), remedy)
                if "cache_position" not in keywords:
                    span = Span(last=(5, 3))
                    what = f"{name} needs cache_position {span}"
                    yield Finding(
                        level_for(span, folder.releases), what, file.at(call), "pass it if the signature has it"
                    )
            elif isinstance(call.func, ast.Attribute) and call.func.attr == "update" and len(call.args) == 3:
                is_cache = re.search(r"past_key_values?$|cache$", ast.unparse(call.func.value))
                if is_cache and not call.keywords:
                    span = Span((4, 57), (5, 2))
                    what = f"the cache is updated without cache_position, so static caches go wrong {span}"
                    remedy = 'add {"cache_position": cache_position} as the fourth argument'
                    yield Finding(level_for(span, folder.releases), what, file.at(call), remedy)
    for klass in served(folder, code):
        forward = klass.method("forward")
        if forward is not None and "cache_position" in {a.arg for a in forward.args.args}:
            what = f"{klass.name}.forward names cache_position, which makes transformers 5.4 and newer warn"
            yield Finding("warning", what, klass.file.at(forward), "take it out of **kwargs with pop")


CHECKS = {"attention": attention, "attention switch": attention_switch, "masks and caches": masks_and_caches}
