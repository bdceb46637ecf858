"""The supported transformers releases, and their installation side by side with a shared torch."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.atomic_write import replace_folder

# minor: its last release, and compatible releases of huggingface_hub and tokenizers
RELEASES = {
    "4.56": ("4.56.2", "0.36.2", "0.22.2"),
    "4.57": ("4.57.6", "0.36.2", "0.22.2"),
    "5.0": ("5.0.0", "1.31.0", "0.22.2"),
    "5.1": ("5.1.0", "1.31.0", "0.22.2"),
    "5.2": ("5.2.0", "1.31.0", "0.22.2"),
    "5.3": ("5.3.0", "1.31.0", "0.22.2"),
    "5.4": ("5.4.0", "1.31.0", "0.22.2"),
    "5.5": ("5.5.4", "1.31.0", "0.22.2"),
    "5.6": ("5.6.2", "1.31.0", "0.22.2"),
    "5.7": ("5.7.0", "1.31.0", "0.22.2"),
    "5.8": ("5.8.1", "1.31.0", "0.22.2"),
    "5.9": ("5.9.0", "1.31.0", "0.22.2"),
    "5.10": ("5.10.4", "1.31.0", "0.22.2"),
    "5.11": ("5.11.0", "1.31.0", "0.22.2"),
    "5.12": ("5.12.1", "1.31.0", "0.22.2"),
    "5.13": ("5.13.1", "1.31.0", "0.22.2"),
    "5.14": ("5.14.1", "1.31.0", "0.22.2"),
    "5.15": ("5.15.1", "1.31.0", "0.22.2"),
    "5.16": ("5.16.1", "1.31.0", "0.23.3"),
    "5.17": ("5.17.0", "1.31.0", "0.23.3"),
    "5.18": ("5.18.0", "2.4.0", "0.23.3"),
    "5.19": ("5.19.0", "2.4.0", "0.23.3"),
    "5.20": ("5.20.2", "2.4.0", "0.23.3"),
    "5.21": ("5.21.1", "2.4.0", "0.23.3"),
    "5.22": ("5.22.2", "2.4.0", "0.23.3"),
    "5.23": ("5.23.0", "2.4.0", "0.23.3"),
}

# releases before the supported ones, which old custom code was written for; they run with today's torch and NumPy
OLD_RELEASES = {
    "4.28": ("4.28.1", "0.36.2", "0.13.3"),
    "4.30": ("4.30.2", "0.36.2", "0.13.3"),
    "4.31": ("4.31.0", "0.36.2", "0.13.3"),
    "4.32": ("4.32.1", "0.36.2", "0.13.3"),
    "4.33": ("4.33.3", "0.36.2", "0.13.3"),
    "4.34": ("4.34.1", "0.36.2", "0.14.1"),
    "4.35": ("4.35.2", "0.36.2", "0.15.2"),
    "4.36": ("4.36.2", "0.36.2", "0.15.2"),
    "4.37": ("4.37.2", "0.36.2", "0.15.2"),
    "4.38": ("4.38.2", "0.36.2", "0.15.2"),
    "4.39": ("4.39.3", "0.36.2", "0.15.2"),
    "4.40": ("4.40.2", "0.36.2", "0.19.1"),
    "4.41": ("4.41.2", "0.36.2", "0.19.1"),
    "4.42": ("4.42.4", "0.36.2", "0.19.1"),
    "4.43": ("4.43.4", "0.36.2", "0.19.1"),
    "4.44": ("4.44.2", "0.36.2", "0.19.1"),
    "4.45": ("4.45.2", "0.36.2", "0.20.3"),
    "4.46": ("4.46.3", "0.36.2", "0.20.3"),
    "4.47": ("4.47.1", "0.36.2", "0.21.4"),
    "4.48": ("4.48.3", "0.36.2", "0.21.4"),
    "4.49": ("4.49.0", "0.36.2", "0.21.4"),
    "4.50": ("4.50.3", "0.36.2", "0.21.4"),
    "4.51": ("4.51.3", "0.36.2", "0.21.4"),
    "4.52": ("4.52.4", "0.36.2", "0.21.4"),
    "4.53": ("4.53.3", "0.36.2", "0.21.4"),
    "4.54": ("4.54.1", "0.36.2", "0.21.4"),
    "4.55": ("4.55.4", "0.36.2", "0.21.4"),
}


class PinnedRelease(NamedTuple):
    """A transformers release and compatible releases of its dependencies."""

    transformers: str
    huggingface_hub: str
    tokenizers: str


def resolve(wanted: str | Iterable[str]) -> list[PinnedRelease]:
    """The exact releases for a specification such as `"4.57,5.0"`, `"latest"` or `"all"`, oldest first.

    Args:
        wanted: minors, for which the last release is used, exact releases of a supported minor, `"latest"` for the
            newest supported one, `"all"` for the last release of every supported minor; a list, or separated by commas.

    Raises:
        ValueError: a release is not supported; the message lists those that are.

    Examples:
        >>> [release.transformers for release in resolve("4.57,5.0")]
        ['4.57.6', '5.0.0']
    """
    names = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    found: dict[str, PinnedRelease] = {}
    for name in (name.strip() for name in names):
        if name == "all":
            found.update({row[0]: PinnedRelease(*row) for row in RELEASES.values()})
            continue
        minor = list(RELEASES)[-1] if name == "latest" else ".".join(name.split(".")[:2])
        if minor not in RELEASES or not re.fullmatch(r"latest|\d+\.\d+(\.\d+)?", name):
            supported = f"{next(iter(RELEASES))} to {list(RELEASES)[-1]}"
            raise ValueError(
                f"{name!r} is not a supported transformers release: name one from {supported}, latest, or all"
            )
        last, *companions = RELEASES[minor]
        exact = name if name.count(".") == 2 else last
        found[exact] = PinnedRelease(exact, *companions)
    return sorted(found.values(), key=lambda release: tuple(map(int, release.transformers.split("."))))


def nearest(version: str) -> PinnedRelease:
    """The release of a version's minor, old or supported, or else the nearest one that is known.

    Examples:
        >>> nearest("4.36.0.dev0").transformers
        '4.36.2'
        >>> nearest("4.29").transformers
        '4.30.2'
    """
    known = {tuple(map(int, minor.split("."))): PinnedRelease(*row) for minor, row in (OLD_RELEASES | RELEASES).items()}
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"{version!r} is no transformers version: write it like 4.36")
    wanted = (int(found[1]), int(found[2]))
    same = [minor for minor in known if minor >= wanted]
    return known[min(same) if same else max(known)]


def default_cache_dir() -> Path:
    """The folder of installed releases: `transformers` in `$MYMODELS_CACHE` or `~/.cache/mymodels`."""
    home = os.environ.get("MYMODELS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mymodels")
    return Path(home).expanduser() / "transformers"


def install(release: PinnedRelease, cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder of a release, installed on first use by pip without dependencies, so that torch is shared.

    Args:
        cache_dir: holds one folder per release; default `default_cache_dir()`.

    Returns:
        The folder to put in front of `sys.path`.

    Raises:
        RuntimeError: pip failed; the message ends with pip's last line.
    """
    target = Path(cache_dir or default_cache_dir()).absolute() / release.transformers  # the process has another cwd
    if (target / "transformers" / "__init__.py").is_file():
        return target
    packages = [f"{name}=={version}" for name, version in release._asdict().items()]
    if release.huggingface_hub.startswith(
        "0."
    ):  # it depends on requests, which newer releases of huggingface_hub do not
        packages += ["requests", "urllib3", "certifi", "charset-normalizer", "idna"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    with replace_folder(target) as folder:
        pip = subprocess.run([*command, "--target", str(folder), *packages], capture_output=True, text=True)
        if pip.returncode:
            printed = [line for line in pip.stderr.splitlines() if line.strip()] or [f"exit code {pip.returncode}"]
            raise RuntimeError(f"pip cannot install transformers {release.transformers}: {printed[-1].strip()}")
    return target
