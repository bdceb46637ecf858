"""Statements put into the `_init_weights` of a folder's models, where they run for every module."""

import libcst as cst

from .rule import Rewriter, statements


class IntoInitWeights(Rewriter):
    """Adds statements to each `_init_weights`; a model that leaves it to transformers gets one that calls its own."""

    def added(self, owner: str, node: cst.CSTNode, model: str, module: str) -> list[str]:
        """The statements for the `_init_weights` of one class of this file; each is reported here.

        Args:
            owner: the class.
            node: the method, or the class that has none yet.
            model: how the method calls the model: its first argument.
            module: how it calls the module: its second argument.
        """
        raise NotImplementedError

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        scope = self.context.scope(original_node)
        if len(scope) != 1 or original_node.name.value != "_init_weights" or not self.context.is_model(scope[0]):
            return updated_node
        parameters = [parameter.name.value for parameter in original_node.params.params]
        return self._put_in(scope[0], original_node, updated_node, parameters)

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        name, code = original_node.name.value, self.context.code
        klass = self.context.klass(name)
        if klass is None or not code.is_model(klass) or self.context.scope(original_node):
            return updated_node
        if code.method(klass, "_init_weights") or any(code.is_model(base) for base in code.lineage(klass)[1:]):
            return updated_node
        method = statements("\ndef _init_weights(self, module):\n    super()._init_weights(module)\n")[0]
        assert isinstance(method, cst.FunctionDef) and isinstance(updated_node.body, cst.IndentedBlock)
        filled = self._put_in(name, original_node, method, ["self", "module"])
        if filled is method:
            return updated_node
        filled = filled.with_changes(leading_lines=[cst.EmptyLine(indent=False)])
        return updated_node.with_changes(body=updated_node.body.with_changes(body=[*updated_node.body.body, filled]))

    def _put_in(
        self, owner: str, original: cst.CSTNode, updated: cst.FunctionDef, parameters: list[str]
    ) -> cst.FunctionDef:
        if len(parameters) < 2 or not isinstance(updated.body, cst.IndentedBlock):
            return updated
        added = [step for text in self.added(owner, original, *parameters[:2]) for step in statements(text)]
        if not added:
            return updated
        docstring = 1 if updated.get_docstring() is not None else 0
        body = [*updated.body.body[:docstring], *added, *updated.body.body[docstring:]]
        return updated.with_changes(body=updated.body.with_changes(body=body))
