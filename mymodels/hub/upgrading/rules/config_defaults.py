"""Attributes that every config had before transformers 5, and settings of generation that it takes out of configs."""

import ast
import re

import libcst as cst

from ...config_attributes import DEFAULTS_OF_4, GENERATION
from ...static.code_tree import Klass, calls, constant, is_self
from ..generating import own_config, parameters
from ..rule import Context, Rewriter, Rule, rewrites, statements

# what a config of transformers 4 has if nothing sets it; the last two by many classes of its own
DEFAULTS = {**DEFAULTS_OF_4, "use_cache": "True", "position_embedding_type": '"absolute"'}
_ASKED = "_get_generation_parameters"
_HELPER = '''
def keep_defaults(config, given, **defaults):
    """Sets what a config of transformers 4 has and a newer one may lack, to what was given or else to the default."""
    for name, value in defaults.items():
        if not hasattr(config, name):
            setattr(config, name, given.get(name, value))
'''
_CONFIG = re.compile(r"(^|\.|_)(config|cfg|configuration)$")


def _read(context: Context, klass: Klass) -> dict[str, None]:
    """The attributes of a config that the folder's code reads and that a config may lack."""
    found: dict[str, None] = {}
    ties = False
    own = {id(node) for member in context.code.lineage(klass) for node in ast.walk(member.node)}
    for file in context.code.files.values():
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in DEFAULTS:
                of = ast.unparse(node.value)
                if _CONFIG.search(of) or (of == "self" and id(node) in own):
                    found[node.attr] = None
            elif (isinstance(node, ast.Name) and node.id == "_tied_weights_keys") or (
                isinstance(node, ast.FunctionDef) and node.name == "get_output_embeddings"
            ):
                ties = True
    if ties and not _ties_by_itself(context):
        found["tie_word_embeddings"] = None
    found |= dict.fromkeys(_nested(context, klass))
    return dict.fromkeys(name for name in DEFAULTS if name in found)


def _ties_by_itself(context: Context) -> bool:
    """Whether the folder's own `tie_weights` decides, and never asks that of transformers, which reads the config."""
    own = [m for k in context.code.classes if context.code.is_model(k) and (m := k.method("tie_weights")) is not None]
    return bool(own) and not any("super()" in ast.unparse(m) or ".tie_weights(" in ast.unparse(m) for m in own)


def _nested(context: Context, klass: Klass) -> set[str]:
    """Settings of generation in a config inside the folder's config, from which a model inside the model generates."""
    auto_map = context.config.get("auto_map")
    main = str(auto_map.get("AutoConfig", "") if isinstance(auto_map, dict) else "").rpartition(".")[2]
    if klass.name == main:
        return set()
    inner = [value for value in context.config.values() if isinstance(value, dict) and "model_type" in value]
    own = constant(found[1]) if (found := context.code.value(klass, "model_type")) is not None else None
    return {
        name for value in inner if value["model_type"] == own for name in value if name in GENERATION & set(DEFAULTS)
    }


def _always_set(context: Context, klass: Klass) -> set[str]:
    """What a config sets itself: in its constructors, as a class attribute or property."""
    found: set[str] = set()
    for member in context.code.lineage(klass):
        for node in member.node.body:
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                found.add(node.name)
            elif isinstance(node, ast.Assign):
                found |= {goal.id for goal in node.targets if isinstance(goal, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                found.add(node.target.id)
        init = member.method("__init__")
        for step in init.body if init is not None else ():
            for goal in step.targets if isinstance(step, ast.Assign) else ():
                for one in getattr(goal, "elts", [goal]):
                    if isinstance(one, ast.Attribute) and is_self(one):
                        found.add(one.attr)
        for call in calls(init) if init is not None else ():  # a method of its own that sets what it is given
            if is_self(call.func) and context.code.method(klass, call.func.attr) is not None:  # type: ignore[attr-defined]
                found |= {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    return found


class _Defaults(Rewriter):
    """Puts one call below each config's call of the base class."""

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        scope = self.context.scope(original_node)
        klass = self.context.klass(scope[0]) if len(scope) == 1 and original_node.name.value == "__init__" else None
        init = klass.method("__init__") if klass is not None else None
        if klass is None or init is None or not own_config(self.context.code, klass):
            return updated_node
        body = updated_node.body
        if not isinstance(body, cst.IndentedBlock) or any("keep_defaults(" in ast.unparse(step) for step in init.body):
            return updated_node
        missing = [name for name in _read(self.context, klass) if name not in _always_set(self.context, klass)]
        at = next((i for i, step in enumerate(init.body) if _calls_base(step)), None)
        if not missing or at is None or len(init.body) != len(body.body):
            return updated_node
        given = init.args.kwarg.arg if init.args.kwarg is not None else "{}"
        named = parameters(init)
        values = ", ".join(f"{name}={name if name in named else DEFAULTS[name]}" for name in missing)
        self.context.define("keep_defaults", _HELPER)
        self.context.note(original_node, f"{klass.name} has {', '.join(missing)} under every release")
        line = statements(f"keep_defaults(self, {given}, {values})\n")
        return updated_node.with_changes(
            body=body.with_changes(body=[*body.body[: at + 1], *line, *body.body[at + 1 :]])
        )

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        klass = self.context.klass(original_node.name.value)
        body = updated_node.body
        if klass is None or not own_config(self.context.code, klass) or self.context.scope(original_node):
            return updated_node
        if id(klass.node) in self.context.code.parents or not isinstance(body, cst.IndentedBlock):
            return updated_node
        missing = [name for name in _read(self.context, klass) if name not in _always_set(self.context, klass)]
        added = ""
        if missing and self.context.code.method(klass, "__init__") is None:
            values = ", ".join(f"{name}={DEFAULTS[name]}" for name in missing)
            self.context.define("keep_defaults", _HELPER)
            self.context.note(original_node, f"{klass.name} has {', '.join(missing)} under every release")
            added = f"def __init__(self, **kwargs):\n    super().__init__(**kwargs)\n    keep_defaults(self, kwargs, {values})\n"
        if GENERATION & set(missing) and self.context.code.method(klass, _ASKED) is None:
            self.context.note(original_node, f"{klass.name} may hold settings of generation")
            added += f"def {_ASKED}(self):\n    return {{}}  # the code reads settings of generation from here\n"
        if not added:
            return updated_node
        made = [step.with_changes(leading_lines=[cst.EmptyLine(indent=False)]) for step in statements(added)]
        kept = [step for step in body.body if not _is_pass(step)]
        return updated_node.with_changes(body=body.with_changes(body=[*kept, *made]))


def _calls_base(step: ast.stmt) -> bool:
    """`super().__init__(…)`, `super(ToyConfig, self).__init__(…)` or `PretrainedConfig.__init__(self, …)`."""
    call = step.value if isinstance(step, ast.Expr) else None
    func = call.func if isinstance(call, ast.Call) else None
    return isinstance(func, ast.Attribute) and func.attr == "__init__"


def _is_pass(step: cst.CSTNode) -> bool:
    return isinstance(step, cst.SimpleStatementLine) and len(step.body) == 1 and isinstance(step.body[0], cst.Pass)


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    if str(context.config.get("transformers_version", "")).startswith("5."):
        return tree  # it was saved under a release that has no such defaults, and ran there
    return rewrites(_Defaults, ("Config",))(tree, context)


RULE = Rule(
    name="config attributes",
    reason="a config has no default for them any more, ties are off if none is set, and settings of generation are dropped",
    releases="5.0 and newer",
    before="""
        from transformers import PretrainedConfig


        class ToyConfig(PretrainedConfig):
            model_type = "toy"

            def __init__(self, hidden_size=8, forced_eos_token_id=2, **kwargs):
                self.hidden_size = hidden_size
                super().__init__(forced_eos_token_id=forced_eos_token_id, **kwargs)


        def pads(config):
            return config.pad_token_id, config.forced_eos_token_id, config.use_cache
    """,
    after="""
        from transformers import PretrainedConfig

        # --- transformers releases: what differs between them, and what newer ones no longer have ---
        # [keep_defaults]
        def keep_defaults(config, given, **defaults):
            \"\"\"Sets what a config of transformers 4 has and a newer one may lack, to what was given or else to the default.\"\"\"
            for name, value in defaults.items():
                if not hasattr(config, name):
                    setattr(config, name, given.get(name, value))
        # --- end of transformers releases ---


        class ToyConfig(PretrainedConfig):
            model_type = "toy"

            def __init__(self, hidden_size=8, forced_eos_token_id=2, **kwargs):
                self.hidden_size = hidden_size
                super().__init__(forced_eos_token_id=forced_eos_token_id, **kwargs)
                keep_defaults(self, kwargs, forced_eos_token_id=forced_eos_token_id, pad_token_id=None, use_cache=True)

            def _get_generation_parameters(self):
                return {}  # the code reads settings of generation from here


        def pads(config):
            return config.pad_token_id, config.forced_eos_token_id, config.use_cache
    """,
    apply=_apply,
    words=("Config",),
)
