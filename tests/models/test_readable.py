"""The modeling files hold the models and nothing else: measured, so that they stay so."""

import ast
import re
from pathlib import Path

import pytest

import mymodels

FOLDER = Path(mymodels.__file__).parent / "models"
MODELING = ["modeling_mygpt2.py", "modeling_mybert.py"]
STACKS = {"MyGPT2Model", "MyBertModel"}
FORBIDDEN = re.compile(r"packing|block|mode\b|engine|vllm|stage|readable|kernel", re.IGNORECASE)
LOOPS = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.comprehension)


def methods(name: str) -> list[tuple[str, ast.FunctionDef, str]]:
    """Class, function and its code without docstring and comments, of each method."""
    source = (FOLDER / name).read_text()
    found = []
    for node in ast.parse(source).body:
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(method, ast.FunctionDef):
                body = method.body[1:] if ast.get_docstring(method) else method.body
                lines = source.splitlines()[body[0].lineno - 1 : method.end_lineno]
                code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
                found.append((node.name, method, "\n".join(code)))
    return found


def branches(method: ast.FunctionDef) -> int:
    count = sum(isinstance(node, LOOPS) for node in ast.walk(method))
    return count + sum(len(node.values) - 1 for node in ast.walk(method) if isinstance(node, ast.BoolOp))


@pytest.mark.parametrize("name", MODELING)
def test_a_modeling_file_fits_its_limits(name: str) -> None:
    assert len((FOLDER / name).read_text().splitlines()) <= 380
    for owner, method, code in methods(name):
        lines = len(code.splitlines())
        where = f"{owner}.{method.name}: {lines} lines, {branches(method)} branches"
        if owner in STACKS:
            assert lines <= 50 and branches(method) <= 12, where
        elif method.name == "forward" and "For" not in owner:
            assert lines <= 25, where
            assert not FORBIDDEN.search(code), where


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("name", MODELING)
def test_the_modeling_file_imports_every_file_that_it_needs(name: str) -> None:
    """Releases up to 5.6 do not fetch what only a sibling imports."""

    def siblings(file: str) -> set[str]:
        tree = ast.parse((FOLDER / file).read_text())
        return {f"{node.module}.py" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}

    direct = siblings(name)
    assert {other for file in direct for other in siblings(file)} <= direct
