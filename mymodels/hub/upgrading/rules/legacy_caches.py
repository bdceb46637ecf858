"""`from_legacy_cache` and `to_legacy_cache`: tuples of keys and values from and to a `Cache`."""

import libcst as cst

from ..generating import guarded_lines, own_names
from ..rule import Context, Rewriter, Rule, name_of, rewrites, source_of

_FROM = '''
def cache_from_tuples(past_key_values=None, *unused):
    """A `DynamicCache` of keys and values for each layer."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    for layer_idx, (keys, values) in enumerate(past_key_values if past_key_values is not None else ()):
        cache.update(keys, values, layer_idx)
    return cache
'''
_FROM_PAIRS = '''
def cache_from_four(past_key_values=None):
    """An `EncoderDecoderCache` of own and crossed keys and values for each layer."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for layer_idx, layer in enumerate(past_key_values if past_key_values is not None else ()):
        cache.self_attention_cache.update(*layer[:2], layer_idx)
        if len(layer) > 2:
            cache.cross_attention_cache.update(*layer[2:4], layer_idx)
            cache.is_updated[layer_idx] = True
    return cache
'''
_TO = '''
def cache_to_tuples(cache):
    """Keys and values for each layer; of an encoder-decoder the own ones, then the crossed ones."""
    if hasattr(cache, "self_attention_cache"):
        own, crossed = cache_to_tuples(cache.self_attention_cache), cache_to_tuples(cache.cross_attention_cache)
        return tuple(layer + crossed[i] if i < len(crossed) else layer for i, layer in enumerate(own))
    return tuple((layer.keys, layer.values) for layer in cache.layers if layer.keys is not None)
'''


class _Legacy(Rewriter):
    def __init__(self, context: Context):
        super().__init__(context)
        self.own = own_names(context)
        self.guarded = guarded_lines(context)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        func = updated_node.func
        if not isinstance(func, cst.Attribute) or func.attr.value in self.own:
            return updated_node
        if self.context.line(original_node) in self.guarded:
            return updated_node
        if func.attr.value == "from_legacy_cache":
            of = name_of(func.value).rpartition(".")[2]
            if of in ("DynamicCache", "Cache", "DynamicLayer"):
                return self.replaced(original_node, updated_node, "cache_from_tuples", _FROM)
            if of == "EncoderDecoderCache":
                return self.replaced(original_node, updated_node, "cache_from_four", _FROM_PAIRS)
            self.context.refuse(
                original_node, f"{source_of(func)} is gone, and there is no cache of that kind from tuples"
            )
        elif func.attr.value == "to_legacy_cache" and not updated_node.args:
            self.context.define("cache_to_tuples", _TO)
            self.context.note(original_node, f"{source_of(original_node)} is made of the cache's layers")
            return cst.Call(cst.Name("cache_to_tuples"), [cst.Arg(func.value)])
        return updated_node

    def replaced(self, original: cst.Call, updated: cst.Call, name: str, source: str) -> cst.Call:
        self.context.define(name, source)
        self.context.note(original, f"{source_of(original)} is made by Cache.update")
        return updated.with_changes(func=cst.Name(name))


RULE = Rule(
    name="legacy caches",
    reason="transformers 5 has no from_legacy_cache and to_legacy_cache",
    releases="5.0 and newer",
    before="""
        from transformers.cache_utils import Cache, DynamicCache


        def forward(past_key_values):
            legacy = not isinstance(past_key_values, Cache)
            if legacy:
                past_key_values = DynamicCache.from_legacy_cache(past_key_values)
            return past_key_values.to_legacy_cache() if legacy else past_key_values
    """,
    after="""
        from transformers.cache_utils import Cache, DynamicCache

        # --- transformers releases: what differs between them, and what newer ones no longer have ---
        # [cache_from_tuples]
        def cache_from_tuples(past_key_values=None, *unused):
            \"\"\"A `DynamicCache` of keys and values for each layer.\"\"\"
            from transformers.cache_utils import DynamicCache

            cache = DynamicCache()
            for layer_idx, (keys, values) in enumerate(past_key_values if past_key_values is not None else ()):
                cache.update(keys, values, layer_idx)
            return cache


        # [cache_to_tuples]
        def cache_to_tuples(cache):
            \"\"\"Keys and values for each layer; of an encoder-decoder the own ones, then the crossed ones.\"\"\"
            if hasattr(cache, "self_attention_cache"):
                own, crossed = cache_to_tuples(cache.self_attention_cache), cache_to_tuples(cache.cross_attention_cache)
                return tuple(layer + crossed[i] if i < len(crossed) else layer for i, layer in enumerate(own))
            return tuple((layer.keys, layer.values) for layer in cache.layers if layer.keys is not None)
        # --- end of transformers releases ---


        def forward(past_key_values):
            legacy = not isinstance(past_key_values, Cache)
            if legacy:
                past_key_values = cache_from_tuples(past_key_values)
            return cache_to_tuples(past_key_values) if legacy else past_key_values
    """,
    apply=rewrites(_Legacy, ("legacy_cache",)),
    order=30,
    words=("legacy_cache",),
)
