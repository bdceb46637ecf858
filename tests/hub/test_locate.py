"""A checkpoint by the name of a Hub repo: fetched once, found again without the Hub; a sentence where there is none."""

import os
import sys

import pytest
from hub_server import Blob, Hub

CODE = """
import sys
from mymodels.checkpoints.locating import locate
def asked(path, **given):
    try:
        print(sorted(file.name for file in locate(path, **given).iterdir()))
    except FileNotFoundError as error:
        print(error)
"""
WEIGHTS = ["config.json", "model.safetensors", "pytorch_model.bin"]


@pytest.fixture
def ask(hub: Hub, client):
    """What a new process prints for a call `asked(…)`: each shares the cache of those before."""
    hub.create("me/both", private=False).commit(
        "refs/heads/main", {name: Blob.regular(name.encode()) for name in WEIGHTS}, "files"
    )
    hub.create("me/pickled", private=False).commit(
        "refs/heads/main", {name: Blob.regular(name.encode()) for name in (WEIGHTS[0], WEIGHTS[2])}, "files"
    )

    others = (*WEIGHTS[::2], "golden.safetensors", "lora/adapter_model.safetensors")
    hub.create("me/golden", private=False).commit(
        "refs/heads/main", {name: Blob.regular(name.encode()) for name in others}, "files"
    )

    def run(call: str) -> str:
        return client(f"{CODE}\nasked({call})", path=os.pathsep.join(sys.path)).communicate()[0]

    return run


def away(hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()


@pytest.mark.parametrize(
    ("call", "files"),
    [
        ("'me/both'", WEIGHTS[:2]),
        ("'me/both', everything=True", WEIGHTS),
        ("'me/pickled'", [WEIGHTS[0], WEIGHTS[2]]),
        ("'me/golden'", ["config.json", "golden.safetensors", "lora", "pytorch_model.bin"]),
    ],
)
def test_fetched_once_is_found_without_the_hub(hub, ask, call: str, files: list[str]) -> None:
    before = ask(call)
    assert before == f"{files}\n"
    away(hub)
    assert ask(call) == before  # no retries either, which print lines


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("'me/none'", "the Hub has no such repo, or it is private: check the name, or log in with `hf auth login`"),
        ("'me/both', revision='v9'", "the Hub's repo has no revision v9"),
    ],
)
def test_missing_on_the_hub(ask, call: str, reason: str) -> None:
    path = call.split("'")[1]
    assert ask(call) == f"there is no file or folder {path}, and {reason}\n"


def test_gated(hub, ask) -> None:
    hub.fail("GET /api/models/me/both", 403, 10, "Access to model me/both is restricted", X_Error_Code="GatedRepo")
    assert ask("'me/both'") == (
        "there is no file or folder me/both, and the Hub's repo is gated: ask for access on its page, and log in with "
        "`hf auth login`\n"
    )


def test_never_fetched_and_no_hub(hub, ask) -> None:
    away(hub)
    start, end = ask("'me/both'").split("(")
    assert start == "there is no file or folder me/both, and the Hub did not answer "
    assert end.endswith("Connection refused), nor is it in the cache\n")


def test_partly_fetched(hub, ask) -> None:
    ask("'me/both'")
    away(hub)
    assert "is incomplete: 1 file(s) are missing (pytorch_model.bin)" in ask("'me/both', everything=True")
