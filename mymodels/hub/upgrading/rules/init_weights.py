"""`_init_weights` that writes past the loader's guard: loaded weights would be overwritten."""

from collections.abc import Sequence

import libcst as cst
import libcst.matchers as m

from ...static.initial_value import IN_PLACE, KEYWORDS
from ..rule import Context, Rewriter, Rule, expression, rewrites, source_of, statements

_FLAG = "_is_hf_initialized"
_DATA = m.Attribute(attr=m.Name("data"))


class _Guarded(Rewriter):
    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.BaseStatement:
        scope = self.context.scope(original_node)
        if len(scope) != 2 or scope[1] != "_init_weights" or not self.context.is_model(scope[0]):
            return updated_node
        if len(original_node.body) != 1 or self._is_guarded(original_node):
            return updated_node
        step = updated_node.body[0]
        if isinstance(step, cst.Expr) and isinstance(step.value, cst.Call):
            changed = self._init_call(step.value)
            if changed is not None:
                self.context.note(original_node, f"{source_of(changed)} goes through the guard of loaded weights")
                return updated_node.with_changes(body=[step.with_changes(value=changed)])
        tensor = _written(step) or self._looped(original_node, step)
        if tensor is None:
            return updated_node
        self.context.note(original_node, f"{tensor} is written only if it was not loaded")
        inner = updated_node.with_changes(leading_lines=[])
        guard = statements(f'if not getattr({tensor}, "{_FLAG}", False):\n    pass\n')[0]
        assert isinstance(guard, cst.If)
        return guard.with_changes(leading_lines=updated_node.leading_lines, body=cst.IndentedBlock([inner]))

    def _looped(self, line: cst.SimpleStatementLine, step: cst.BaseSmallStatement) -> str | None:
        """The variable of a loop over parameters that a statement writes in place (`p /= 2`), or None."""
        target: cst.CSTNode | None = None
        if isinstance(step, cst.AugAssign):
            target = step.target
        elif isinstance(step, cst.Expr) and m.matches(step.value, m.Call(func=m.Attribute(value=m.Name()))):
            func = step.value.func  # type: ignore[attr-defined]
            target = func.value if func.attr.value.endswith("_") and func.attr.value != "requires_grad_" else None
        current = self.context.parent(line)
        while isinstance(target, cst.Name) and current is not None and not isinstance(current, cst.FunctionDef):
            loop = isinstance(current, cst.For) and "parameters(" in source_of(current.iter)
            names = m.findall(current.target, m.Name()) if loop else []  # type: ignore[attr-defined]
            if any(name.value == target.value for name in names):  # type: ignore[attr-defined]
                return target.value
            current = self.context.parent(current)
        return None

    def _is_guarded(self, node: cst.CSTNode) -> bool:
        current = self.context.parent(node)
        while current is not None and not isinstance(current, cst.FunctionDef):
            if isinstance(current, cst.If) and _FLAG in source_of(current.test):
                return True
            current = self.context.parent(current)
        return False

    def _init_call(self, call: cst.Call) -> cst.Call | None:
        """The call as one of `nn.init` on the parameter itself, or None if it is none, or has no such form."""
        if not isinstance(call.func, cst.Attribute):
            return None
        method, on = call.func.attr.value, call.func.value
        if m.matches(on, _DATA) and method in IN_PLACE:
            assert isinstance(on, cst.Attribute)
            name = f"{init_module(self.context)}.{IN_PLACE[method]}"
            tensor = cst.Arg(on.value)
            return (
                cst.Call(expression(name), [tensor, *call.args])
                if not call.args
                else cst.Call(
                    expression(name),
                    [
                        tensor.with_changes(comma=cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))),
                        *_renamed(method, call.args),
                    ],
                )
            )
        first = call.args[0].value if call.args else None
        if (
            first is not None
            and m.matches(first, _DATA)
            and self.context.dotted(call.func).startswith(("torch.nn.init.", "nn.init."))
        ):
            assert isinstance(first, cst.Attribute)
            return call.with_changes(args=[call.args[0].with_changes(value=first.value), *call.args[1:]])
        return None


def _renamed(method: str, arguments: Sequence[cst.Arg]) -> list[cst.Arg]:
    """Keywords of a tensor's method as those of `nn.init`: `from` and `to` of `uniform_` are `a` and `b`."""
    names = KEYWORDS.get(method, {})
    return [
        one.with_changes(keyword=cst.Name(names[one.keyword.value]))
        if one.keyword is not None and one.keyword.value in names
        else one
        for one in arguments
    ]


def init_module(context: Context) -> str:
    """How the file names `torch.nn.init`."""
    names = context.file.names
    for local, full in names.items():
        if full == "torch.nn":
            return f"{local}.init"
    return next((local for local, full in names.items() if full == "torch.nn.init"), "torch.nn.init")


def _written(step: cst.BaseSmallStatement) -> str | None:
    """The parameter that a statement writes past the guard, as source, or None."""
    if isinstance(step, cst.Expr) and isinstance(step.value, cst.Call) and isinstance(step.value.func, cst.Attribute):
        call = step.value.func
        if call.attr.value.endswith("_") and not call.attr.value.endswith("__") and call.attr.value != "requires_grad_":
            return _parameter(call.value)
        first = step.value.args[0].value if step.value.args else None
        if isinstance(first, cst.Subscript) and ".init." in source_of(call):
            return _parameter(first, needs_data=False)
    if isinstance(step, cst.Assign) and len(step.targets) == 1:
        return _parameter(step.targets[0].target)
    if isinstance(step, cst.AugAssign):
        return _parameter(step.target)
    return None


def _parameter(node: cst.BaseExpression, *, needs_data: bool = True) -> str | None:
    """`module.weight` of `module.weight.data[0]`, `module.weight.data` or `module.weight[0]`."""
    seen = False
    while True:
        if isinstance(node, cst.Subscript):
            node, seen = node.value, True
        elif m.matches(node, _DATA):
            assert isinstance(node, cst.Attribute)
            node, seen = node.value, True
        else:
            break
    is_tensor = isinstance(node, cst.Attribute) and (
        node.attr.value in ("weight", "bias") or node.attr.value.endswith(("weight", "bias", "_embed", "_token"))
    )
    return (
        source_of(node)
        if isinstance(node, (cst.Attribute, cst.Name)) and (seen or (is_tensor and needs_data))
        else None
    )


RULE = Rule(
    name="init weights",
    reason="_init_weights writes past the guard that keeps loaded weights, so transformers 5 overwrites them without a word",
    releases="5.0 to 5.2; newer ones for modules with a buffer that is in no file",
    before="""
        from torch import nn
        from transformers import PreTrainedModel


        class ToyPreTrainedModel(PreTrainedModel):
            def _init_weights(self, module):
                std = self.config.initializer_range
                if isinstance(module, nn.Linear):
                    module.weight.data.normal_(mean=0.0, std=std)
                    if module.bias is not None:
                        module.bias.data.zero_()  # no bias at first
                elif isinstance(module, nn.Embedding):
                    nn.init.normal_(module.weight.data, std=std)
                    if module.padding_idx is not None:
                        module.weight.data[module.padding_idx].zero_()
                elif isinstance(module, nn.LayerNorm):
                    module.weight.data.fill_(1.0)
                for name, p in module.named_parameters():
                    if name == "c_proj.weight":
                        p /= 2
    """,
    after="""
        from torch import nn
        from transformers import PreTrainedModel


        class ToyPreTrainedModel(PreTrainedModel):
            def _init_weights(self, module):
                std = self.config.initializer_range
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, mean=0.0, std=std)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)  # no bias at first
                elif isinstance(module, nn.Embedding):
                    nn.init.normal_(module.weight, std=std)
                    if module.padding_idx is not None:
                        if not getattr(module.weight, "_is_hf_initialized", False):
                            module.weight.data[module.padding_idx].zero_()
                elif isinstance(module, nn.LayerNorm):
                    nn.init.constant_(module.weight, 1.0)
                for name, p in module.named_parameters():
                    if name == "c_proj.weight":
                        if not getattr(p, "_is_hf_initialized", False):
                            p /= 2
    """,
    apply=rewrites(_Guarded, ("_init_weights",)),
    words=("_init_weights",),
)
