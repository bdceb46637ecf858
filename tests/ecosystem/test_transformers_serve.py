"""`transformers serve` on hub_repo/mygpt2, asked over HTTP by OpenAI's client.

The server looks a model's class up among transformers' own names, so it takes no custom code by itself (5.23), whatever
`--trust-remote-code` says; `import mymodels` in its process puts ours there.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
FOLDER = str(ROOT / "hub_repo" / "mygpt2")
START = "from transformers.cli.transformers import main; main()"
pytestmark = pytest.mark.ecosystem


def start(first: str, port: int) -> subprocess.Popen:
    options = ["serve", FOLDER, "--trust-remote-code", "--device", "cpu", "--port", str(port)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", first + START, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    server = start("import mymodels; ", number)
    try:
        for _ in range(120):
            assert server.poll() is None, server.stdout.read()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{number}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield number
    finally:
        server.terminate()
        server.communicate(timeout=30)


@torch.no_grad()
def expected(prompt: str, count: int) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=count)[0, ids.shape[1] :])


@pytest.mark.parametrize("stream", [False, True])
def test_completions_are_the_model_s(port: int, stream: bool) -> None:
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    answer = client.completions.create(
        model=FOLDER, prompt="It was a dark", max_tokens=12, temperature=0, stream=stream
    )
    text = "".join(chunk.choices[0].text for chunk in answer if chunk.choices) if stream else answer.choices[0].text
    assert text == expected("It was a dark", 12)


def test_without_mymodels_the_server_takes_no_custom_code() -> None:
    server = start("import sys; sys.modules['mymodels'] = None; ", 1)
    said, _ = server.communicate(timeout=120)
    assert server.returncode and "module transformers has no attribute MyGPT2ForCausalLM" in said
