"""Names that transformers moved or dropped: taken from where they are, defined in the file, or no longer imported."""

import re
from collections.abc import Sequence

import libcst as cst

from ...static.api_availability import Span, lacking
from ...static.check_imports import other_imports
from ...static.symbols import GONE
from ..definitions import MISSING_BETWEEN, MODULES, MOVED, PASSED_ON, definition, is_documentation
from ..mask_definitions import MASKS
from ..rule import Context, Rewriter, Rule, name_of, rewrites, statements

_FROM_IMPORT = re.compile(r"^[ \t]*from [^\n]*import (?:\([^)]*\)|[^\n]*)", re.MULTILINE)


class _Imports(Rewriter):
    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.BaseStatement | cst.FlattenSentinel | cst.RemovalSentinel:
        node = original_node.body[0]
        if len(original_node.body) != 1 or not isinstance(node, cst.ImportFrom) or node.relative:
            return updated_node
        module = name_of(node.module)
        if isinstance(node.names, cst.ImportStar) or _in_try(self.context, node):
            return updated_node
        if module.split(".")[0] != "transformers" and not self._is_undeclared(original_node, node.names):
            return updated_node
        kept, more = [], []
        for alias in node.names:
            name = name_of(alias.name)
            local = alias.asname.name.value if alias.asname else name  # type: ignore[union-attr]
            if module.split(".")[0] == "transformers" and not _is_gone(self.context, module, name):
                kept.append(alias)
            elif not _is_used(self.context, local):
                self.context.note(original_node, f"{name} of {module} is no longer imported: nothing uses it")
            elif (module, name) in MOVED:
                home, now = MOVED[module, name]
                self.context.note(original_node, f"{name} is imported from {home}")
                more.append(f"from {home} import {now}" + (f" as {local}" if local != now else ""))
            elif module.startswith("transformers.models.") and name in PASSED_ON:
                self.context.note(original_node, f"{name} is imported from {PASSED_ON[name]}")
                more.append(f"from {PASSED_ON[name]} import {name}" + (f" as {local}" if local != name else ""))
            elif module in MODULES:
                self.context.note(original_node, f"{name} is imported from {MODULES[module]}")
                more.append(f"from {MODULES[module]} import {name}" + (f" as {local}" if local != name else ""))
            elif (source := definition(name)) is not None:
                self.context.note(original_node, f"{name}, which {module} no longer has, is defined in the file")
                self.context.define(name, source)
                more += [f"{local} = {name}"] if local != name else []
            else:
                kept.append(alias)
                self.context.refuse(original_node, f"{name} of {module} is gone, and no replacement for it is known")
        if len(kept) == len(node.names):
            return updated_node
        added = [step for text in more for step in statements(text + "\n")]
        if not kept:
            if not added:
                return cst.RemoveFromParent()
            first = added[0].with_changes(leading_lines=updated_node.leading_lines)
            return cst.FlattenSentinel([first, *added[1:]])
        last = kept[-1].with_changes(comma=node.names[-1].comma)
        changed = node.with_changes(names=[*kept[:-1], last])
        return cst.FlattenSentinel([updated_node.with_changes(body=[changed]), *added])

    def _is_undeclared(self, line: cst.CSTNode, names: Sequence[cst.ImportAlias]) -> bool:
        """Whether an import needs a package that nothing declares, for names that transformers once had."""
        if any(definition(name_of(alias.name)) is None for alias in names):
            return False
        where = f"{self.context.file.name}:{self.context.line(line)}"
        return any(finding.where == where for finding in other_imports(self.context.folder))


def _in_try(context: Context, node: cst.CSTNode) -> bool:
    current: cst.CSTNode | None = node
    while current is not None:
        if isinstance(current, cst.Try):
            return True
        current = context.parent(current)
    return False


def _is_gone(context: Context, module: str, name: str) -> bool:
    failing, _ = lacking(module, name, context.folder.releases)
    known = GONE.get((module, name)) or GONE.get((module, ""))
    first, last = context.releases
    if (module, name) in MISSING_BETWEEN or (module, name) in MOVED or module in MODULES or is_documentation(name):
        return True
    if name in MASKS and module.startswith("transformers.models."):
        return True  # none of the supported releases has them there
    return bool(failing) or (known is not None and Span(*known).first <= last and first <= Span(*known).last)


def _is_used(context: Context, local: str) -> bool:
    """Whether a name stands anywhere in the file, texts included, besides its imports; or siblings import it."""
    body = _FROM_IMPORT.sub("", context.file.text)
    module = context.file.name.rpartition("/")[2].removesuffix(".py")
    passed_on = any(f".{module}.{local}" in file.names.values() for file in context.folder.code.values())
    return passed_on or re.search(rf"\b{re.escape(local)}\b", body) is not None


RULE = Rule(
    name="imports",
    reason="transformers moved or dropped names, so that the file's import fails",
    releases="the release that dropped the name, and newer",
    before="""
        import torch
        from transformers.pytorch_utils import find_pruneable_heads_and_indices, prune_linear_layer
        from transformers.utils import (
            is_torch_fx_available,
            logging,  # kept
        )

        logger = logging.get_logger(__name__)
        if is_torch_fx_available():
            logger.debug("torch.fx")
    """,
    after="""
        import torch
        from transformers.pytorch_utils import prune_linear_layer
        from transformers.utils import (
            logging,  # kept
        )

        # --- transformers releases: what differs between them, and what newer ones no longer have ---
        # [is_torch_fx_available]
        def is_torch_fx_available(*arguments):
            return True  # every torch that the supported releases of transformers run on
        # --- end of transformers releases ---

        logger = logging.get_logger(__name__)
        if is_torch_fx_available():
            logger.debug("torch.fx")
    """,
    apply=rewrites(_Imports, ("import ",)),
    order=10,
)
