"""The one marked block of a file that differs between transformers releases."""

import re

BEGIN = "# --- transformers releases: what differs between them, and what newer ones no longer have ---"
END = "# --- end of transformers releases ---"
_BLOCK = re.compile(rf"\n*^{re.escape(BEGIN)}\n(.*?)^{re.escape(END)}\n+", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"^# \[(\w+)\]\n", re.MULTILINE)


def take_out(text: str) -> tuple[str, dict[str, str]]:
    """A file's text without its block, and the block's entries by name."""
    found = _BLOCK.search(text)
    if found is None:
        return text, {}
    parts = _ENTRY.split(found[1])
    entries = {name: source.strip("\n") for name, source in zip(parts[1::2], parts[2::2])}
    before, after = text[: found.start()], text[found.end() :]
    gap = "\n\n\n" if re.match(r"class |def |@", after) else "\n\n"
    return (before + gap + after if before else after), entries


def put_in(text: str, entries: dict[str, str]) -> str:
    """A file's text with a block of these entries below its first imports."""
    if not entries:
        return text
    body = "\n\n\n".join(f"# [{name}]\n{source}" for name, source in sorted(entries.items()))
    lines = text.splitlines(keepends=True)
    at = _end_of_imports(text)
    before, after = "".join(lines[:at]).rstrip("\n"), "".join(lines[at:]).lstrip("\n")
    gap = "\n\n\n" if re.match(r"class |def |@", after) else "\n\n"
    return f"{before}\n\n{BEGIN}\n{body}\n{END}{gap}{after}" if before else f"{BEGIN}\n{body}\n{END}{gap}{after}"


def _end_of_imports(text: str) -> int:
    """The number of lines up to the first statement that is neither an import nor the file's docstring."""
    import ast

    end = 0
    tree = ast.parse(text)
    for index, node in enumerate(tree.body):
        docstring = index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not docstring and not isinstance(node, (ast.Import, ast.ImportFrom)):
            break
        end = node.end_lineno or node.lineno
    return end
