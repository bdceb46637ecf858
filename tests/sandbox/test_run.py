"""`sandbox.run`: what a script in the box can do, with each combination of layers that this kernel has."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from mymodels import sandbox
from mymodels.sandbox import results

LAYERS = {"all": sandbox.available(), "no namespaces": sandbox.available()._replace(namespaces=False)}

pytestmark = pytest.mark.skipif(not sandbox.available().confined, reason=str(sandbox.available()))


@pytest.fixture(params=LAYERS)
def isolation(request: pytest.FixtureRequest) -> sandbox.Isolation:
    if request.param == "all" and not sandbox.available().namespaces:
        pytest.skip(sandbox.available().why)
    return LAYERS[request.param]


def attempt(code: str, scratch: Path, isolation: sandbox.Isolation, **how) -> sandbox.Finished:
    return sandbox.run(["-c", code], scratch=scratch, isolation=isolation, **how)


def test_reads_and_writes(tmp_path: Path, isolation: sandbox.Isolation) -> None:
    scratch, given, secret = tmp_path / "scratch", tmp_path / "given", tmp_path / "secret"
    scratch.mkdir(), given.mkdir(), secret.write_text("token")
    (given / "data").write_text("open")
    code = f"""
import json, os
def attempt(call):
    try:
        return call()
    except OSError as error:
        return type(error).__name__
print(json.dumps({{
    "given": attempt(lambda: open({str(given / "data")!r}).read()),
    "changed": attempt(lambda: open({str(given / "data")!r}, "w").write("x")),
    "secret": attempt(lambda: open({str(secret)!r}).read()),
    "scratch": attempt(lambda: open("made", "w").write("x")),
    "beside": attempt(lambda: open({str(tmp_path / "beside")!r}, "w").write("x")),
    "home": os.environ["HOME"], "here": os.getcwd(), "token": os.environ.get("HF_TOKEN"),
    "exec": attempt(lambda: os.execv("/bin/sh", ["sh"])),
}}))
"""
    os.environ["HF_TOKEN"] = "hf_secret"
    try:
        done = attempt(code, scratch, isolation, readable=[given])
    finally:
        del os.environ["HF_TOKEN"]
    found = json.loads(done.stdout or done.stderr)
    assert found["given"] == "open" and found["scratch"] == 1
    assert found["secret"] in ("PermissionError", "FileNotFoundError") and found["token"] is None
    assert {found["changed"], found["beside"]} <= {"PermissionError", "OSError"}
    assert found["exec"] == "PermissionError"
    assert found["home"] == found["here"] == str(scratch)
    assert (given / "data").read_text() == "open" and not (tmp_path / "beside").exists()
    assert (scratch / "made").read_text() == "x"


def test_how_it_ends(tmp_path: Path, isolation: sandbox.Isolation) -> None:
    for code, returncode in (("raise SystemExit(7)", 7), ("import os; os.abort()", -6), ("1 / 0", 1)):
        done = attempt(code, tmp_path, isolation)
        assert (done.returncode, done.why) == (returncode, "")


def test_limits(tmp_path: Path, isolation: sandbox.Isolation) -> None:
    bombs = {
        "it did not end within 0.5 s": "while True: pass",
        "processes|temporarily unavailable": "import os, time\nwhile True:\n if not os.fork(): time.sleep(60)",
        "scratch folder": "for i in range(10**6):\n open(str(i), 'wb').write(bytes(10**6))",
        "to its scratch folder": "for i in range(30_000): open(str(i), 'wb').close()",  # may end before the box looks
        "cannot be looked into": "import os, time\nfor i in range(40):\n os.mkdir('d' * 200); os.chdir('d' * 200)\n"
        "time.sleep(20)",
        "memory": "import os, mmap\nmaps = []\nwhile True:\n f = os.memfd_create('m'); os.write(f, bytes(10**7))",
    }
    for why, code in bombs.items():
        scratch = tmp_path / str(len(why))
        scratch.mkdir()
        limits = {"seconds": 0.5 if "0.5" in why else 30, "memory": 3 * 10**8, "scratch_size": 10**8, "processes": 50}
        done = attempt(code, scratch, isolation, **limits)
        assert done.returncode != 0 and re.search(why, done.why + done.stderr.decode()), (why, done)
        assert sum(file.stat().st_size for file in scratch.iterdir()) < 10**9
        results.delete(scratch)
        assert not scratch.exists()


def test_leaves_no_process_behind(tmp_path: Path, isolation: sandbox.Isolation) -> None:
    code = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                with open("alive", "a") as file: file.write("x")
                time.sleep(0.02)
        os._exit(0)
time.sleep(0.2)
"""
    assert attempt(code, tmp_path, isolation).returncode == 0
    size = (tmp_path / "alive").stat().st_size
    assert size > 0
    time.sleep(0.2)
    assert (tmp_path / "alive").stat().st_size == size


def test_forks_and_threads(tmp_path: Path, isolation: sandbox.Isolation) -> None:
    code = """
import multiprocessing as mp, multiprocessing.pool, threading, time
context = mp.get_context("fork")
def add(queue, lock, semaphore, event, count):
    event.wait()
    with semaphore, lock, lock:
        count.value += 1
    queue.put(b"x" * 100_000)
def main():
    queue, lock, event = context.Queue(), context.RLock(), context.Event()
    semaphore, count = context.BoundedSemaphore(2), context.Value("i", 0)
    assert not context.Semaphore(0).acquire(timeout=0.05) and not context.Semaphore(0).acquire(False)
    try:
        semaphore.release()
        raise SystemExit("released too often")
    except ValueError:
        pass
    workers = [context.Process(target=add, args=(queue, lock, semaphore, event, count)) for _ in range(3)]
    for worker in workers:
        worker.start()
    event.set()
    assert sum(len(queue.get()) for _ in workers) == 300_000
    for worker in workers:
        worker.join(5)
    assert count.value == 3 and [worker.exitcode for worker in workers] == [0, 0, 0]
    barrier = context.Barrier(2)
    other = context.Process(target=barrier.wait)
    other.start()
    barrier.wait(5)
    with context.Pool(2) as pool:
        assert pool.map(abs, range(-5, 0)) == [5, 4, 3, 2, 1]
    with multiprocessing.pool.ThreadPool(4) as pool:
        assert pool.map(abs, [-1]) == [1]
    worker = context.Process(target=time.sleep, args=(60,))
    worker.start()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == -15
main()
print("done")
"""
    done = attempt(code, tmp_path, isolation)
    assert done.stdout == b"done\n", done
