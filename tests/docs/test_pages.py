"""What README and docs/ show: read here, run in `test_snippets_run.py` (slow)."""

import ast
import importlib
import importlib.util
import re
import shlex

import pytest
from docs.pages import PAGES, ROOT, blocks_of, shell_commands

import mymodels
from mymodels.cli.command import make_parser

TEXTS = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
ENGLISH, CHINESE = (ROOT / name for name in ("README.md", "README.zh-CN.md"))


def test_every_block_names_its_language() -> None:
    assert [block.place for block in BLOCKS if block.language not in ("python", "bash", "text")] == []


def test_every_block_is_seen() -> None:
    """An indented one would be missed by `blocks_of`, and so by the tests that run them."""
    for page in PAGES:
        fences = re.findall(r"^\s*(?:```|~~~)", page.read_text(), re.M)
        assert len(fences) == 2 * len(blocks_of(page)), page


def _inline(page) -> list[str]:
    """What stands between single backticks in the prose."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_prose_names_is_there(page) -> None:
    """Files of this repository, targets of make, verbs, and options of the command line."""
    _, verbs = make_parser()
    options = {option for verb in verbs.values() for option in verb._option_string_actions} | {"--help", "--version"}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    tests = {path.name for path in (ROOT / "tests").rglob("*.py")}
    wrong = []
    for code in _inline(page):
        first, *others = code.split()
        names = re.findall(r"^(?:tests|benchmarks|mymodels|docs|notebooks|hub_repo)/[\w./-]*", first)
        wrong += [name for name in names if not (ROOT / name).exists()]
        wrong += [first] if re.fullmatch(r"test_\w+\.py", first) and first not in tests else []
        if first == "make":
            wrong += [target for target in shlex.split(code)[1:] if "=" not in target and target not in targets]
        elif first == "mymodels" and others and others[0] != "VERB":
            wrong += [] if others[0] in [*verbs, "--version"] else [code]
        if re.match(r"--\w", first) or first == "mymodels":
            given = [word.partition("=")[0] for word in code.split() if re.match(r"--\w", word)]
            wrong += [option for option in given if option not in options | OTHERS_OPTIONS]
    assert wrong == []


OTHERS_OPTIONS = {"--enforce-eager", "--trust-remote-code"}  # vLLM's and transformers'


def test_every_public_name_is_in_the_reference() -> None:
    listed = set(re.findall(r"^::: (\S+)$", (ROOT / "docs/reference/python.md").read_text(), re.M))
    missing = [name for name in mymodels.__all__ if not any(entry.endswith(f".{name}") for entry in listed)]
    for package in ("adopting", "checkpoints", "export", "hub", "predicting", "testing", "warmstart"):
        names = importlib.import_module(f"mymodels.{package}").__all__
        missing += [f"{package}.{name}" for name in names if not any(e.endswith(f".{name}") for e in listed)]
    assert missing == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash"], ids=lambda block: block.place)
def test_every_command_is_one_that_the_parser_takes(block) -> None:
    _, verbs = make_parser()
    for command in shell_commands(block.code):
        words = shlex.split(re.split(r"[<>|]", command.rpartition("| ")[2])[0])
        if words[:1] != ["mymodels"] or "VERB" in words:
            continue
        verbs[words[1]].parse_args(words[2:])  # raises SystemExit for an option that is not there


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda block: block.place)
def test_every_import_from_mymodels_is_there(block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and node.module == "mymodels":
            names = [alias.name for alias in node.names if alias.name not in mymodels.__all__]
            assert [name for name in names if importlib.util.find_spec(f"mymodels.{name}") is None] == []


def _targets(page) -> set[str]:
    return {
        link.partition("#")[0]
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not link.startswith(("http", "#"))
    }


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page) -> None:
    made = {"figures", "cli.md"}  # by docs/hooks.py
    missing = [
        target for target in _targets(page) if not made & set(target.split("/")) and not (page.parent / target).exists()
    ]
    assert missing == []


def _figures(text: str) -> list[str]:
    """Every number in prose and tables, in order of size: two languages may order a sentence differently."""
    prose = re.sub(r"^```.*?^```$|^#.*$|<!--.*?-->|`[^`]*`|\([^)\s]*\)", "", text, flags=re.M | re.S)
    return sorted(re.findall(r"\d+(?:\.\d+)?", prose))


def test_the_chinese_readme_is_in_step() -> None:
    english, chinese = ENGLISH.read_text(), CHINESE.read_text()
    levels = [re.findall(r"^(#+) ", text, re.M) for text in (english, chinese)]
    assert levels[0] == levels[1]
    codes = [[(b.language, b.code, b.reason) for b in blocks_of(page)] for page in (ENGLISH, CHINESE)]
    assert codes[0] == codes[1]
    assert _targets(ENGLISH) - {"README.zh-CN.md"} == _targets(CHINESE) - {"README.md"}
    assert _figures(english) == _figures(chinese)
    assert set(re.findall(r"`[^`\n]+`", english)) == set(re.findall(r"`[^`\n]+`", chinese))


def test_the_readme_is_short() -> None:
    assert len(ENGLISH.read_text().splitlines()) <= 150
