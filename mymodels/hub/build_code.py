"""`build --code`: the model classes in files that the user names, and their Auto classes."""

import ast
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ..checkpoints import CheckpointError
from ..checkpoints.opening import shard_problem
from ..released import CONFIGS
from .auto_class_names import auto_class_of, known_auto_classes
from .code_files import auto_map_of_files, collect_code, config_class_of, forward_arguments, is_a

Classes = Mapping[str, tuple[str, ast.ClassDef]]


class NamedCode(NamedTuple):
    """Code files by name, `auto_map`, the class of the weights, and the `model_type` of its config class."""

    files: dict[str, str]
    auto_map: dict[str, str]
    architecture: str
    model_type: str | None


def check_parts(source: Path, where: Path) -> None:
    """Refuse a source that is only a part of a model, saying what is missing."""
    if not source.is_dir() and (problem := shard_problem(source)):
        raise CheckpointError(f"{problem}, and config.json")
    if not (where / "config.json").is_file():
        what = f"{source} has" if source.is_dir() else f"{source} is a file of weights alone, and {where} has"
        raise CheckpointError(
            f"{what} no config.json, without which the model cannot be loaded: write it beside the weights with "
            f"model.config.save_pretrained({str(where)!r})"
        )


def code_in_folder(where: Path, config: Mapping[str, Any], *, asked: bool) -> list[Path]:
    """The code files in a folder without an `auto_map` that define the class of its weights.

    Args:
        asked: whether the user passed `auto_classes`, so that code is required.

    Raises:
        CheckpointError: neither transformers nor the folder's code defines the model.
    """
    auto_map = config.get("auto_map") or {}
    if asked:
        if found := files_with_models(where):
            return found
        raise CheckpointError(f"{where} has no .py file that defines a model: name it by --code (code=)")
    if (any(str(name).startswith("AutoModel") for name in auto_map)) or config.get("model_type") in CONFIGS:
        return []
    files = files_with_models(where)
    architectures = [str(name) for name in config.get("architectures") or []]
    known = config.get("model_type") in CONFIG_MAPPING_NAMES or bool(auto_map)
    if not files and not known:
        raise CheckpointError(
            f"{where}/config.json has the model_type {config.get('model_type')!r}, which transformers does not know, and "
            "no .py file there defines it: name the file with the model's classes by --code (code=)"
        )
    if not architectures:
        return [] if known else files
    defining = [file for file in files if set(architectures) & classes_of({file.name: file.read_text("utf-8")}).keys()]
    if not defining and not any(hasattr(transformers, name) for name in architectures):
        raise CheckpointError(
            f"{where} was saved from the class {architectures[0]}, which neither transformers nor a .py file there "
            "defines: name the file that does by --code (code=)"
        )
    return defining


def files_with_models(where: Path) -> list[Path]:
    """The `.py` files of a folder that define a class derived from `PreTrainedModel`."""
    found = []
    for path in sorted(where.glob("*.py")):
        try:
            classes = classes_of({path.name: path.read_text(encoding="utf-8")})
        except (SyntaxError, ValueError, RecursionError):
            continue  # it could not be imported either
        if any(is_a(name, "PreTrainedModel", classes) for name in classes):
            found.append(path)
    return found


def classes_of(texts: Mapping[str, str]) -> dict[str, tuple[str, ast.ClassDef]]:
    """Class name → (file, definition) of the top-level classes in code files."""
    return {
        node.name: (file, node)
        for file, text in texts.items()
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef)
    }


def check_code_arguments(code: Sequence[Path], auto_classes: Mapping[str, str]) -> None:
    """Raise a `CheckpointError` for a code file that does not exist, or an Auto class that transformers does not have."""
    for path in code:
        if not path.is_file() or path.suffix != ".py":
            what = "is not a .py file" if path.exists() else "does not exist"
            raise CheckpointError(f"{path} {what}: name the file with the model's class by --code (code=)")
    known = ["AutoConfig", *known_auto_classes()]
    for auto_class in auto_classes:
        if auto_class not in known:
            raise CheckpointError(
                f"transformers {transformers.__version__} has no {auto_class}: {_suggest(auto_class, known)}"
            )


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, 3) or known[:6]
    return f"choose one such as {', '.join(near)}" if near else "there is none to choose from"


def named_code(
    code: Sequence[Path], config: Mapping[str, Any], auto_classes: Mapping[str, str], *, within: Path | None = None
) -> NamedCode:
    """The code files for a flat folder, and the `auto_map` of their classes; none of the code is executed.

    Args:
        code: files with the model's classes; files that they import from their own package are included.
        config: the content of `config.json`.
        auto_classes: Auto class → class, for classes whose suffix does not determine the Auto class.
        within: see `collect_code`.

    Raises:
        CheckpointError: a class does not exist or is not a model, or the model's Auto class cannot be determined.
    """
    files = collect_code(code, within=within)
    classes = classes_of(files)
    names = ", ".join(path.name for path in code)
    for auto_class, name in auto_classes.items():
        _check_class(auto_class, name, classes, names)
    models = [
        name for name in classes if is_a(name, "PreTrainedModel", classes) and not name.endswith("PreTrainedModel")
    ]
    if not models:
        raise CheckpointError(
            f"{names} defines no class derived from PreTrainedModel: `mymodels adopt` wraps a plain nn.Module in one"
        )
    architectures = [str(name) for name in config.get("architectures") or []]
    chosen = [name for name in auto_classes.values() if name in models]
    wanted = [*chosen, *(name for name in architectures if name in models)]
    config_class = auto_classes.get("AutoConfig") or _config_class(config, wanted or models, classes)
    found = auto_map_of_files(files, [*(wanted or models), config_class], config_class=config_class)
    given = {auto: f"{Path(classes[name][0]).stem}.{name}" for auto, name in auto_classes.items()}
    auto_map = {**found, **given}
    if config_class in classes:
        auto_map["AutoConfig"] = f"{Path(classes[config_class][0]).stem}.{config_class}"
    else:
        auto_map.pop("AutoConfig", None)  # transformers' own class
    heads = {auto: target.rpartition(".")[2] for auto, target in auto_map.items() if auto != "AutoConfig"}
    main = next((name for name in wanted if name in heads.values()), "")
    if not main and (unserved := [name for name in wanted if not auto_class_of(name)]):
        raise _no_auto_class(unserved[0], classes)
    if not main:
        candidates = [name for auto, name in heads.items() if auto != "AutoModel"] or list(heads.values())
        if not candidates:
            raise _no_auto_class(models[0], classes)
        if len(set(candidates)) > 1:
            raise CheckpointError(
                f"{names} defines {', '.join(sorted(set(candidates)))}, and config.json does not name the class of the "
                'weights: set "architectures" there, or pass --auto-class AutoModelFor…=CLASS (auto_classes=)'
            )
        main = candidates[0]
    model_type = _model_type(classes[config_class][1]) if config_class in classes else None
    return NamedCode(files, dict(sorted(auto_map.items())), main, model_type)


def _check_class(auto_class: str, name: str, classes: Classes, names: str) -> None:
    if name not in classes:
        raise CheckpointError(f"{names} defines no class {name}: {_suggest(name, classes)}")
    base = "Config" if auto_class == "AutoConfig" else "PreTrainedModel"
    if not is_a(name, base, classes):
        place = f"{classes[name][0]}:{classes[name][1].lineno}"
        remedy = (
            "derive it from PretrainedConfig"
            if auto_class == "AutoConfig"
            else "`mymodels adopt` wraps a plain nn.Module in one"
        )
        raise CheckpointError(f"{place}: {name} does not derive from {base}, which {auto_class} needs: {remedy}")


def _config_class(config: Mapping[str, Any], models: Sequence[str], classes: Classes) -> str:
    """The name of the config class: the models' `config_class`, else the one with this `model_type`, else the only one."""
    for name in models:
        if found := config_class_of(name, classes):
            return found
    configs = [name for name in classes if is_a(name, "Config", classes)]
    of_type = [name for name in configs if _model_type(classes[name][1]) == config.get("model_type")]
    if len(of_type or configs) == 1:
        return (of_type or configs)[0]
    if len(configs) > 1:
        raise CheckpointError(
            f"the code defines {', '.join(sorted(configs))}, but the model has no config_class: set it, or pass "
            "--auto-class AutoConfig=CLASS"
        )
    return ""


def _model_type(node: ast.ClassDef) -> str | None:
    for statement in node.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Constant):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == "model_type" for target in targets):
                return str(statement.value.value)
    return None


def _no_auto_class(name: str, classes: Classes) -> CheckpointError:
    file, node = classes[name]
    takes = [argument for argument in forward_arguments(name, classes) if argument != "labels"]
    return CheckpointError(
        f"{file}:{node.lineno}: the Auto class of {name} cannot be determined from its name (forward takes "
        f"{', '.join(takes[:4]) or 'unknown arguments'}): pass --auto-class AutoModelFor…={name}, or "
        f"--auto-class AutoModel={name} for a model without a head (auto_classes=)"
    )
