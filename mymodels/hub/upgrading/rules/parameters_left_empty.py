"""Parameters that the checkpoint lacks: `_init_weights` gives them what the constructor does."""

import libcst as cst

from ...static.check_parameters import LeftEmpty, parameters_left_empty
from ...static.code_tree import Code, Klass
from ...static.initial_value import init_call
from ...static.torch_norms import is_torch_norm
from ..into_init_weights import IntoInitWeights
from ..rule import Context, Rule, rewrites
from .init_weights import init_module


def _home(code: Code, model: Klass) -> Klass:
    """The class whose `_init_weights` runs for a model; if no class of the folder has one, the one that gets it."""
    found = code.method(model, "_init_weights")
    return found[0] if found is not None else [one for one in code.lineage(model) if code.is_model(one)][-1]


class _Edit(IntoInitWeights):
    def __init__(self, context: Context, found: list[LeftEmpty]):
        super().__init__(context)
        self.found = found

    def added(self, owner: str, node: cst.CSTNode, model: str, module: str) -> list[str]:
        own = self.context.klass(owner)
        calls: dict[str, list[str]] = {}
        for one in self.found:
            homes = {id(_home(self.context.code, klass).node) for klass in one.models}
            call = init_call(one.made, one.name, module, model)
            if own is None or id(own.node) not in homes or call is None:
                continue
            call = call.replace("nn.init", init_module(self.context), 1)
            guard = f'if getattr({module}, "{one.name}", None) is not None:\n        ' if one.may_be_missing else ""
            calls.setdefault(self._test(one.klass, module), []).append(f"    {guard}{call}\n")
            self.context.note(node, f"_init_weights gives {one.name} of {one.klass.name}, in no file, a value")
        return [f"if {test}:\n" + "".join(lines) for test, lines in calls.items()]

    def _test(self, klass: Klass, module: str) -> str:
        """A test for modules of a class, also where the file does not import it."""
        if is_torch_norm(klass):
            return f"isinstance({module}, {init_module(self.context).removesuffix('init')}{klass.name})"
        known = self.context.klass(klass.name)
        if known is not None and known.node is klass.node:
            return f"isinstance({module}, {klass.name})"
        code = self.context.code
        named = [one.name for one in code.classes if any(base.node is klass.node for base in code.lineage(one))]
        shown = ", ".join(f'"{name}"' for name in dict.fromkeys(named))
        return f"type({module}).__name__ in ({shown})" if len(named) > 1 else f"type({module}).__name__ == {shown}"


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    found = parameters_left_empty(context.folder, context.code)
    if not found:
        return tree
    homes = tuple(_home(context.code, model).name for one in found for model in one.models)
    return rewrites(lambda context: _Edit(context, found), homes)(tree, context)


RULE = Rule(
    name="parameters left empty",
    reason="a parameter that is in no file gets memory that nobody wrote, and no _init_weights gives it a value",
    releases="4.51 and newer",
    apply=_apply,
    words=("_init_weights", "PreTrainedModel", "Model"),
    order=61,
)
