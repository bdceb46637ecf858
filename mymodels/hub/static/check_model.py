"""Checks of the model classes: what transformers' loader expects of them, and silently breaks otherwise."""

import ast
import re
from collections.abc import Iterator

from .api_availability import Span, level_for
from .check_config import target
from .code_tree import Code, Klass, calls, depth, is_self, reachable
from .repo_snapshot import Finding, Folder
from .walking import walk

FROM_5 = Span((5, 0), (5, 99))


def live_code(folder: Folder) -> Code:
    """The classes of the files that transformers loads."""
    if "live code" not in folder.memo:
        folder.memo["live code"] = Code(folder, reachable(folder))
    return folder.memo["live code"]


def served(folder: Folder, code: Code) -> list[Klass]:
    """The models that must load on their own: those in `auto_map`, and those without a subclass in the code."""
    named = [target(folder, code, auto) for auto in folder.auto_map if str(auto).startswith("AutoModel")]
    found = {id(klass.node): klass for klass in [*named, *code.leaves()] if klass is not None and code.is_model(klass)}
    return list(found.values())


def post_init(folder: Folder) -> Iterator[Finding]:
    """Every model ends its `__init__` with `self.post_init()`."""
    code = live_code(folder)
    reported: set[int] = set()
    for klass in served(folder, code):
        found = code.method(klass, "__init__")
        if found is None or id(found[1]) in reported:
            continue
        owner, init = found
        reported.add(id(init))
        ends = [i for i, step in enumerate(init.body) if any(is_self(c.func, "post_init") for c in calls(step))]
        if not ends:
            inherited = any(
                any(is_self(c.func, "post_init") for c in calls(method))
                for member in code.lineage(owner)[1:]
                for method in [member.method("__init__")]
                if method is not None
            )
            borrowed = any(not root.endswith("PreTrainedModel") for root in code.roots(owner) if "Mixin" not in root)
            status = "warning" if inherited or borrowed else level_for(FROM_5, folder.releases)
            what = f"{owner.name}.__init__ does not call self.post_init(), so transformers 5 cannot load it"
            if status == "warning" and (inherited or borrowed):
                what = f"{owner.name}.__init__ adds modules after its parent's post_init(), which does not see them"
            yield Finding(status, what, owner.file.at(init), "end __init__ with self.post_init()")
        elif late := [step for step in init.body[ends[-1] + 1 :] if _sets_module(step)]:
            what = f"{owner.name}.__init__ adds modules after self.post_init(), which does not see them"
            yield Finding("warning", what, owner.file.at(late[0]), "make self.post_init() the last line")


def _ties_by_decorator(klass: Klass) -> bool:
    """Whether a decorator that the file itself defines gives the class a `tie_weights`, as `upgrade` writes it."""
    names = {klass.file.dotted(decorator) for decorator in klass.node.decorator_list}
    made = [node for node in klass.file.tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    return any(
        isinstance(goal, ast.Attribute) and goal.attr == "tie_weights"
        for function in made
        for node in walk(function)
        if isinstance(node, ast.Assign)
        for goal in node.targets
    )


_WEIGHTLESS = re.compile(r"Loss|Dropout|Identity|Softmax|Softplus|Sigmoid|Tanh|LU\b|Pool|Flatten|Config|Output")


def _sets_module(step: ast.stmt) -> bool:
    return (
        isinstance(step, ast.Assign)
        and isinstance(step.value, ast.Call)
        and any(is_self(goal) for goal in step.targets)
        and bool(re.search(r"(^|\.)[A-Z]\w*$", text := ast.unparse(step.value.func)))
        and not _WEIGHTLESS.search(text)
    )


def tied_weights(folder: Folder) -> Iterator[Finding]:
    """Ties are declared as transformers 5 requires, where the loader finds them."""
    code = live_code(folder)
    tied = folder.config.get("tie_word_embeddings", True)
    for klass in code.classes:
        if not code.is_model(klass):
            continue
        keys = klass.value("_tied_weights_keys")
        if isinstance(keys, (ast.List, ast.Tuple, ast.Set)):
            what = f"{klass.name}._tied_weights_keys is a {type(keys).__name__.lower()}, which crashes transformers 5"
            remedy = 'write a dict: {"lm_head.weight": "model.embed_tokens.weight"}'
            yield Finding(level_for(FROM_5, folder.releases), what, klass.file.at(keys), remedy)
        tie = klass.method("tie_weights")
        if tie is not None and tie.args.kwarg is None and "missing_keys" not in {a.arg for a in tie.args.args}:
            what = f"{klass.name}.tie_weights takes no missing_keys, which transformers 5 passes when it loads"
            yield Finding(level_for(FROM_5, folder.releases), what, klass.file.at(tie), "add **kwargs and pass them on")
        found = code.value(klass, "_tied_weights_keys")
        for node in walk(klass.node):
            if isinstance(node, ast.Assign) and _ties_by_hand(node) and found is None:
                what = f"{ast.unparse(node)} ties two weights that _tied_weights_keys does not name"
                remedy = "declare the tie in _tied_weights_keys: otherwise saving and loading lose it"
                yield Finding("failed", what, klass.file.at(node), remedy)
    for klass in served(folder, code):
        found = code.value(klass, "_tied_weights_keys")
        if found is None or not tied or not isinstance(found[1], ast.Dict) or not found[1].keys:
            continue
        heads = code.method(klass, "get_output_embeddings"), code.method(klass, "set_output_embeddings")
        if None in heads and "self.lm_head" not in ast.unparse(klass.node):
            what = f"{klass.name} ties its head, but has no get_output_embeddings and set_output_embeddings"
            yield Finding("warning", what, klass.where, "add both: resizing and tying use them")
        if code.method(klass, "tie_weights") is None and not _ties_by_decorator(klass):
            what = f"the tied head of {klass.name} stays uninitialised under transformers 5.3, because of a bug there"
            remedy = "override tie_weights for 5.3, or ask users to use another release"
            yield Finding(level_for(Span((5, 3), (5, 3)), folder.releases), what, klass.where, remedy)


def _ties_by_hand(node: ast.Assign) -> bool:
    goal, value = node.targets[0], node.value
    both = [goal, value]
    return all(isinstance(n, ast.Attribute) and n.attr == "weight" and depth(n) >= 3 for n in both) and all(
        ast.unparse(n).startswith("self.") for n in both
    )


_LOADERS = ("from_pretrained", "_load_pretrained_model", "load_state_dict", "_load_from_state_dict", "_from_config")


def custom_loading(folder: Folder) -> Iterator[Finding]:
    """Loading needs no custom `from_pretrained`, which engines such as vLLM skip."""
    code = live_code(folder)
    for klass in code.classes:
        for method in klass.methods():
            if method.name in _LOADERS and code.is_model(klass):
                what = f"{klass.name} overrides {method.name}, which engines such as vLLM do not call"
                yield Finding("warning", what, klass.file.at(method), "do it in __init__ or in the checkpoint")
    causal = target(folder, code, "AutoModelForCausalLM")
    if causal is not None and code.is_model(causal):
        mixed = any("GenerationMixin" in root or "For" in root for root in code.roots(causal))
        if not mixed and code.method(causal, "prepare_inputs_for_generation") is None:
            what = f"{causal.name} cannot generate: it does not derive from GenerationMixin"
            yield Finding("warning", what, causal.where, f"class {causal.name}(…PreTrainedModel, GenerationMixin)")
        own = [name for name in ("prepare_inputs_for_generation", "generate") if code.method(causal, name) is not None]
        if own and "GenerationMixin" not in " ".join(map(ast.unparse, causal.node.bases)):
            what = (
                f"{causal.name} has {own[0]}, but not GenerationMixin among its bases: transformers makes another class"
            )
            what += " of that name when it loads it, which cannot be pickled"
            yield Finding("warning", what, causal.where, f"class {causal.name}(…PreTrainedModel, GenerationMixin)")


CHECKS = {
    "post_init": post_init,
    "tied weights": tied_weights,
    "custom loading": custom_loading,
}
