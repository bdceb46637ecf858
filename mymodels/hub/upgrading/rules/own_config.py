"""Code of one's own under a stock model type: a config class and a model type of its own."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import libcst as cst

from ...static.api_availability import model_types
from ...static.check_config import target
from ...static.check_model import live_code
from ...static.code_tree import Code, Klass, constant
from ...static.repo_snapshot import Folder
from ..rule import Context, Rewriter, Rule, rewrites, statements

_STOCK = re.compile(
    r"transformers\.(?:[\w.]+\.)?(?!Pre[Tt]rainedModel$)(\w+?)(PreTrainedModel|PretrainedModel|Model|For[A-Z]\w+)$"
)


class _Own(NamedTuple):
    """What a folder needs.

    Attributes:
        stock: the config class of transformers, such as `"LlamaConfig"`.
        name: the name of the config class to derive from it.
        model_type: its model type.
        models: the classes that get it as their `config_class`; all in one file.
    """

    stock: str
    name: str
    model_type: str
    models: list[Klass]


def _needed(folder: Folder, code: Code) -> _Own | None:
    """The config class that the folder's models lack, or None if they have one or it is not clear."""
    stock_type, known = folder.config.get("model_type"), model_types(folder.releases)
    autos = [str(auto) for auto in folder.auto_map if str(auto).startswith("AutoModel")]
    if "AutoConfig" in folder.auto_map or not autos or not isinstance(stock_type, str):
        return None
    served = [target(folder, code, auto) for auto in autos]
    if None in served or _needs_type_for_tokens(folder) or _needs_type_for_processor(folder):
        return None
    top = {id(one.node): one for klass in served if klass is not None for one in [_first_model(code, klass)]}
    models, stocks = list(top.values()), {_stock_config(code, klass) for klass in top.values()}
    stock = next(iter(stocks))
    if len(stocks) > 1 or not stock or len({one.file.name for one in models}) > 1 or "/" in models[0].file.name:
        return None
    main = next((one for one in served if one is not None and one.name in _architectures(folder)), served[0])
    assert main is not None
    own_type = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", main.name).lower()
    if (known and known.get(stock_type) != stock) or own_type in known or _builds_by_config(models[0]):
        return None
    return _Own(stock, f"{main.name}Config", own_type, models)


def _architectures(folder: Folder) -> list[Any]:
    names = folder.config.get("architectures")
    return names if isinstance(names, list) else []


def _needs_type_for_tokens(folder: Folder) -> bool:
    """Whether only the model type says which class the tokenizer is of."""
    named = folder.values.get("tokenizer_config.json")
    there = any(name.startswith("tokenizer") or name.startswith("vocab") for name in folder.files)
    return there and not (named and named.get("tokenizer_class"))


def _needs_type_for_processor(folder: Folder) -> bool:
    """Whether only the model type says which class an image or audio processor, or one of texts and images, is of."""
    settings = folder.values.get("preprocessor_config.json")
    if not settings:
        return False
    values = [folder.values.get(name) or {} for name in ("processor_config.json", "tokenizer_config.json")]
    texts = any(name.startswith(("tokenizer", "vocab")) for name in folder.files)
    if texts and not any("processor_class" in one for one in [settings, *values]):
        return True
    return not any(f"{kind}_type" in settings for kind in ("image_processor", "feature_extractor", "video_processor"))


def _first_model(code: Code, klass: Klass) -> Klass:
    """The first of a model's ancestors that is a model of the folder."""
    return [member for member in code.lineage(klass) if code.is_model(member)][-1] if code.is_model(klass) else klass


def _stock_config(code: Code, klass: Klass) -> str:
    """The config class of transformers that a model has by its base, or by name; "" if it has none, or one of its own."""
    if (found := code.value(klass, "config_class")) is not None:
        dotted = found[0].file.dotted(found[1])
        return dotted.rpartition(".")[2] if dotted.startswith("transformers.") else ""
    made = [match for root in sorted(code.roots(klass)) if (match := _STOCK.match(root))]
    return f"{made[0][1]}Config" if len(made) == 1 and made[0][1] else ""


def _builds_by_config(klass: Klass) -> bool:
    """Whether the file makes parts by Auto classes, which know the stock config and not the one derived from it."""
    return re.search(r"\bAuto\w+\.from_config\(", klass.file.text) is not None


class _Derive(Rewriter):
    """Defines the config class above the first model, and names it in the models."""

    def __init__(self, context: Context):
        super().__init__(context)
        needed = _needed(context.folder, context.code)
        here = needed is not None and needed.models[0].file.name == context.file.name
        self.own = needed if here and needed is not None and context.klass(needed.name) is None else None
        self.names = {klass.name for klass in self.own.models} if self.own else set()
        self.defined = False

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> Any:
        body = updated_node.body
        if self.own is None or original_node.name.value not in self.names or self.context.scope(original_node):
            return updated_node
        assert isinstance(body, cst.IndentedBlock)
        steps = [step for step in body.body if not _sets_config_class(step)]
        line = statements(f"config_class = {self.own.name}\n")
        gap = isinstance(steps[0], cst.FunctionDef) and not steps[0].leading_lines
        rest = [steps[0].with_changes(leading_lines=[cst.EmptyLine(indent=False)]), *steps[1:]] if gap else steps
        documented = isinstance(steps[0], cst.SimpleStatementLine) and isinstance(steps[0].body[0], cst.Expr)
        at = 1 if documented else 0
        changed = updated_node.with_changes(body=body.with_changes(body=[*rest[:at], *line, *rest[at:]]))
        self.context.note(original_node, f"{original_node.name.value} has the config class {self.own.name}")
        if self.defined:
            return changed
        self.defined = True
        text = f'class {self.own.name}({self.own.stock}):\n    model_type = "{self.own.model_type}"\n'
        made = statements(text)[0].with_changes(leading_lines=updated_node.leading_lines)
        blank = [cst.EmptyLine(indent=False)] * 2
        return cst.FlattenSentinel([made, changed.with_changes(leading_lines=blank)])


def _sets_config_class(step: Any) -> bool:
    if not isinstance(step, cst.SimpleStatementLine) or not isinstance(step.body[0], cst.Assign):
        return False
    goal = step.body[0].targets[0].target
    return isinstance(goal, cst.Name) and goal.value == "config_class"


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    needed = _needed(context.folder, context.code)
    changed = rewrites(_Derive)(tree, context) if needed is not None else tree
    if changed is tree or needed is None or needed.stock in context.file.names:
        return changed
    body = list(changed.body)
    imports = [
        number
        for number, step in enumerate(body)
        if isinstance(step, cst.SimpleStatementLine) and isinstance(step.body[0], (cst.Import, cst.ImportFrom))
    ]
    at = imports[-1] + 1 if imports else 0
    line = statements(f"from transformers import {needed.stock}\n")
    return changed.with_changes(body=[*body[:at], *line, *body[at:]])


def _configure(values: dict[str, Any], folder: Folder, report: Callable[[str], None]) -> dict[str, Any]:
    """Name the config class in auto_map once the models have it, and take over its model type."""
    code, known = live_code(folder), model_types(folder.releases)
    autos = [str(auto) for auto in folder.auto_map if str(auto).startswith("AutoModel")]
    if "AutoConfig" in folder.auto_map or (known and values.get("model_type") not in known):
        return values
    for klass in filter(None, (target(folder, code, auto) for auto in autos)):
        found = code.value(klass, "config_class")
        own = code.find(found[0].file, found[0].file.dotted(found[1])) if found is not None else None
        named = constant(own.value("model_type")) if own is not None else None
        if own is None or not isinstance(named, str) or named == values.get("model_type"):
            continue
        module = own.file.name.removesuffix(".py")
        values["auto_map"] = {"AutoConfig": f"{module}.{own.name}", **values["auto_map"]}
        report(f"auto_map names {own.name} as AutoConfig")
        report(
            f"model_type is {named}, that of {own.name}, and no longer {values.get('model_type')}: the folder loads with "
            "trust_remote_code only"
        )
        values["model_type"] = named
        if values.get("architectures") in [[root.rpartition(".")[2]] for root in code.roots(klass)]:
            report(f"architectures names {klass.name}, which is derived from {values['architectures'][0]}")
            values["architectures"] = [klass.name]
        break
    return values


_BEFORE = """
    from torch import nn
    from transformers import LlamaModel, LlamaPreTrainedModel
{line}

{config}    class ToyReward(LlamaPreTrainedModel):
{own}        def __init__(self, config):
            super().__init__(config)
            self.model = LlamaModel(config)
            self.score = nn.Linear(config.hidden_size, 1)
            self.post_init()
"""
_CONFIG = """    class ToyRewardConfig(LlamaConfig):
        model_type = "toy_reward"


"""

RULE = Rule(
    name="own config",
    reason="under a stock model type the library's own model loads where code is not trusted, and not this one",
    releases="every release",
    before=_BEFORE.format(line="", config="", own=""),
    after=_BEFORE.format(
        line="    from transformers import LlamaConfig\n",
        config=_CONFIG,
        own="        config_class = ToyRewardConfig\n\n",
    ),
    apply=_apply,
    configure=_configure,
    config={"model_type": "llama", "hidden_size": 8},
    config_after={"model_type": "toy_reward", "hidden_size": 8},
    order=65,
)
