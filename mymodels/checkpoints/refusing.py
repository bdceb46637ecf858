"""What transformers says of a folder that it cannot load, in one sentence."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import SafetensorError


@contextlib.contextmanager
def refusing(source: Any) -> Iterator[None]:
    """Around `from_pretrained`: errors of other kinds than `OSError` become a `ValueError` of one line.

    Raises:
        ValueError: the weights are broken, a package is missing, or the folder is none that transformers knows.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{source} has broken weights ({error}): `mymodels check {source}` says which") from error
    except ImportError as error:  # of a quantiser, or of code that the folder brings
        raise ValueError(f"{source} needs a package that is not here: {first_line(error)}") from error
    except ValueError as error:
        raise (code_of_its_own(source) if asks_for_trust(error) else ValueError(first_line(error))) from error


def asks_for_trust(error: Exception) -> bool:
    return "trust_remote_code" in str(error)


def code_of_its_own(source: Any) -> ValueError:
    return ValueError(
        f"{source} brings code of its own, which would be run: read it, then pass --trust-remote-code "
        "(trust_remote_code=True)"
    )


def refuse_mismatched(info: Mapping[str, Any], source: Any) -> None:
    """Raises:
    ValueError: by the loading info of `from_pretrained(…, ignore_mismatched_sizes=True)`, a tensor has another shape.
    """
    if not info["mismatched_keys"]:
        return
    first, *others = sorted(info["mismatched_keys"])
    name, *shapes = [first] if isinstance(first, str) else first  # 4.x: the name alone
    said = " is saved as {}, but by config.json it is {}".format(*map(list, shapes)) if shapes else " has another shape"
    more = f" (and {len(others)} more)" if others else ""
    raise ValueError(f"{source}: {name}{said}{more}: config.json or the weights are another model's")


def first_line(error: Exception) -> str:
    """The first line of an exception's text that says something, or its name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
