"""Methods and attributes that transformers' `Cache` no longer has."""

import libcst as cst

from ..generating import guarded_lines, own_names
from ..rule import Context, Rewriter, Rule, name_of, rewrites, source_of

_LENGTH_WORDS = ("get_usable_length", "seen_tokens", "get_max_length")
_CONTENT_WORDS = ("key_cache", "value_cache")
_LENGTH = '''
def length_of_cache(cache, layer_idx=0):
    """How many tokens a cache holds: of `Cache`, or of a tuple of keys and values for each layer."""
    return cache.get_seq_length(layer_idx) if hasattr(cache, "get_seq_length") else cache[layer_idx][0].shape[-2]
'''
_LIMIT = '''
def limit_of_cache(cache):
    """How many tokens a cache can hold; None for one that grows."""
    for name in ("get_max_cache_shape", "get_max_length"):
        if hasattr(cache, name):
            limit = getattr(cache, name)()
            return None if limit is None or limit < 0 else limit
    return None
'''
_LISTS = '''
def cache_{part}(cache):
    """The {part} of every layer that a cache holds."""
    if hasattr(cache, "layers"):
        return [layer.{part} for layer in cache.layers if layer.{part} is not None]
    return cache.{old}
'''


class _Lengths(Rewriter):
    def __init__(self, context: Context):
        super().__init__(context)
        self.own = own_names(context)
        self.guarded = guarded_lines(context)

    def skip(self, node: cst.CSTNode, name: str) -> bool:
        return name in self.own or self.context.line(node) in self.guarded

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        func = updated_node.func
        if not isinstance(func, cst.Attribute) or self.skip(original_node, func.attr.value):
            return updated_node
        cache = source_of(func.value)
        if func.attr.value == "get_usable_length" and updated_node.args:
            self.context.define("length_of_cache", _LENGTH)
            self.context.note(original_node, f"{cache}.get_usable_length is what the cache holds")
            layer = [arg for i, arg in enumerate(updated_node.args) if i == 1 or name_of(arg.keyword) == "layer_idx"]
            given = [cst.Arg(func.value), *(a.with_changes(comma=cst.MaybeSentinel.DEFAULT) for a in layer)]
            return cst.Call(cst.Name("length_of_cache"), given)
        if func.attr.value == "get_max_length" and not updated_node.args:
            self.context.define("limit_of_cache", _LIMIT)
            self.context.note(original_node, f"{cache}.get_max_length() is asked by either of its names")
            return cst.Call(cst.Name("limit_of_cache"), [cst.Arg(func.value)])
        return updated_node

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        attr = original_node.attr.value
        if attr not in ("seen_tokens", "_seen_tokens") or self.skip(original_node, attr):
            return updated_node
        if isinstance(self.context.parent(original_node), (cst.AssignTarget, cst.AugAssign)):
            return updated_node
        self.context.define("length_of_cache", _LENGTH)
        self.context.note(original_node, f"{source_of(original_node)} is what the cache holds")
        return cst.Call(cst.Name("length_of_cache"), [cst.Arg(updated_node.value)])


class _Contents(Rewriter):
    def __init__(self, context: Context):
        super().__init__(context)
        self.own = own_names(context)
        self.guarded = guarded_lines(context)

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        attr = original_node.attr.value
        if attr not in ("key_cache", "value_cache") or attr in self.own:
            return updated_node
        if self.context.line(original_node) in self.guarded:
            return updated_node
        parent = self.context.parent(original_node)
        grand = self.context.parent(parent) if parent is not None else None
        stored = isinstance(parent, cst.AssignTarget) or (
            isinstance(parent, cst.Subscript) and isinstance(grand, (cst.AssignTarget, cst.AugAssign))
        )
        if stored:
            self.context.refuse(original_node, f"it writes into {attr} of a cache, which has layers now")
            return updated_node
        part = "keys" if attr == "key_cache" else "values"
        self.context.define(f"cache_{part}", _LISTS.format(part=part, old=attr))
        self.context.note(original_node, f"{source_of(original_node)} is read from the cache's layers")
        return cst.Call(cst.Name(f"cache_{part}"), [cst.Arg(updated_node.value)])


LENGTHS = Rule(
    name="cache lengths",
    reason="Cache has lost get_usable_length, seen_tokens and, between releases, get_max_length",
    releases="4.56 and newer",
    before="""
        def past_of(past_key_values, length, layer_idx):
            held = past_key_values.get_usable_length(length, layer_idx)
            return held, past_key_values.seen_tokens, past_key_values.get_max_length()
    """,
    after="""
        # --- transformers releases: what differs between them, and what newer ones no longer have ---
        # [length_of_cache]
        def length_of_cache(cache, layer_idx=0):
            \"\"\"How many tokens a cache holds: of `Cache`, or of a tuple of keys and values for each layer.\"\"\"
            return cache.get_seq_length(layer_idx) if hasattr(cache, "get_seq_length") else cache[layer_idx][0].shape[-2]


        # [limit_of_cache]
        def limit_of_cache(cache):
            \"\"\"How many tokens a cache can hold; None for one that grows.\"\"\"
            for name in ("get_max_cache_shape", "get_max_length"):
                if hasattr(cache, name):
                    limit = getattr(cache, name)()
                    return None if limit is None or limit < 0 else limit
            return None
        # --- end of transformers releases ---


        def past_of(past_key_values, length, layer_idx):
            held = length_of_cache(past_key_values, layer_idx)
            return held, length_of_cache(past_key_values), limit_of_cache(past_key_values)
    """,
    apply=rewrites(_Lengths, _LENGTH_WORDS),
    order=30,
    words=_LENGTH_WORDS,
)
CONTENTS = Rule(
    name="cache contents",
    reason="Cache keeps its tensors in layers: the lists key_cache and value_cache are gone",
    releases="4.56 and newer",
    before="""
        def kept(past_key_values):
            return past_key_values.key_cache[0].shape[-2]
    """,
    after="""
        # --- transformers releases: what differs between them, and what newer ones no longer have ---
        # [cache_keys]
        def cache_keys(cache):
            \"\"\"The keys of every layer that a cache holds.\"\"\"
            if hasattr(cache, "layers"):
                return [layer.keys for layer in cache.layers if layer.keys is not None]
            return cache.key_cache
        # --- end of transformers releases ---


        def kept(past_key_values):
            return cache_keys(past_key_values)[0].shape[-2]
    """,
    apply=rewrites(_Contents, _CONTENT_WORDS),
    order=30,
    words=_CONTENT_WORDS,
)
RULES = [LENGTHS, CONTENTS]
