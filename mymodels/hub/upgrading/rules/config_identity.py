"""`isinstance(config, …)` with the folder's own config class."""

import ast

import libcst as cst

from ..generating import own_config
from ..rule import Context, Rewriter, Rule, name_of, rewrites

_HELPER = '''
def is_config_of(config, config_class):
    """Whether a config is of a class, also if its file was loaded a second time under another name."""
    return any(kind.__name__ == config_class.__name__ for kind in type(config).__mro__)
'''


class _ByName(Rewriter):
    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        if name_of(updated_node.func) != "isinstance" or len(updated_node.args) != 2:
            return updated_node
        name = name_of(updated_node.args[1].value)
        klass = self.context.klass(name) if name else None
        if klass is None or klass.file.name == self.context.file.name or not own_config(self.context.code, klass):
            return updated_node
        self.context.define("is_config_of", _HELPER)
        self.context.note(original_node, f"{name} is known by its name, also if its file was loaded twice")
        return updated_node.with_changes(func=cst.Name("is_config_of"))


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    own = {alias for alias, full in context.file.names.items() if full.startswith(".") and full.endswith("Config")}
    asked = any(isinstance(n, ast.Name) and n.id == "isinstance" for n in ast.walk(context.file.tree))
    return rewrites(_ByName, ("isinstance",))(tree, context) if own and asked else tree


RULE = Rule(
    name="config class",
    reason="the file of a config is loaded once for itself and once for the model, so that its class is there twice",
    releases="newest 5.x",
    apply=_apply,
    words=("isinstance",),
)
