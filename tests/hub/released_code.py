"""Earlier releases of our code, as the history of `hub_repo/` has them; run it to bring the table of digests up to date."""

import subprocess
from pathlib import Path

from mymodels.released import _TABLE, CONFIGS, _module, digest, reached

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> bytes | None:
    run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)
    return run.stdout if run.returncode == 0 else None


def commits() -> list[str]:
    """The commits that changed the code of the shipped folders, the newest first; none without git."""
    return (_run("log", "--format=%H", "--", "hub_repo/*/*.py") or b"").decode().split()


def at(commit: str, path: str) -> bytes | None:
    """A file as it was then."""
    return _run("show", f"{commit}:{path}")


def digests_at(commit: str) -> set[str]:
    """Of the code that each shipped folder had then: of its config's, and of all."""
    found = set()
    for name, config in CONFIGS.items():

        def read(file: str, folder: str = f"hub_repo/{name}") -> bytes | None:
            return at(commit, f"{folder}/{file}")

        for modules in ({_module(config.AUTO_MAP["AutoConfig"])}, set(map(_module, config.AUTO_MAP.values()))):
            files = reached(modules, read)
            if all(content is not None for content in files.values()):
                found.add(digest({file: content or b"" for file, content in files.items()}))
    return found


if __name__ == "__main__":
    known = set(_TABLE.read_text(encoding="ascii").split()) if _TABLE.is_file() else set()
    for commit in commits():
        known |= digests_at(commit)
    _TABLE.write_text("\n".join(sorted(known)) + "\n", encoding="ascii")
