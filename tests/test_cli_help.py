"""The command line before any verb runs: quick help, its examples, wrong input, interruption, closed pipes."""

import importlib
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_python

import mymodels
from mymodels import cli
from mymodels.cli.command import make_parser, parse

ROOT = Path(__file__).parents[1]
VERBS = sorted(make_parser()[1])
SLOW = {"adopt", "demo", "finetune", "verify", "upgrade", "export"}  # each runs models for longer than a few seconds
SCRIPT = "import sys, mymodels_command as start; sys.exit(start.main())"  # what the installed script does
STARTS = {"script": ["-c", SCRIPT], "module": ["-m", "mymodels"]}


def run(how: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *STARTS[how], *arguments], capture_output=True, text=True, **options)


def help_of(verb: str) -> str:
    return make_parser()[1][verb].format_help()


def example_in(text: str) -> str:
    return re.search(r"^example:\n  (.*)$", text, re.MULTILINE)[1]


def example_of(verb: str) -> str:
    return example_in(help_of(verb))


def test_the_installed_script_starts_what_is_tested_here() -> None:
    declared = re.search(r'^mymodels = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert declared == "mymodels_command:main"


WATCH = """
import sys, runpy
sys.argv = ["mymodels", *{arguments!r}]
try:
    {start}
except SystemExit:
    pass
print(sorted({{name.partition(".")[0] for name in sys.modules}} & {{"torch", "transformers", "numpy", "rich"}}))
"""


def test_help_and_version_import_nothing_heavy() -> None:
    """Each in the way of the installed script; `-X importtime` tells of `python -m`, which ends the process."""
    for arguments in (["--help"], ["--version"], [], *([verb, "--help"] for verb in VERBS)):
        code = WATCH.format(arguments=arguments, start=SCRIPT)
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert told.stdout.splitlines()[-1] == "[]", (arguments, told.stdout)
    for arguments in (["mymodels", "--version"], ["mymodels", "inspect", "--help"], ["mymodels.cli", "--help"]):
        told = subprocess.run([sys.executable, "-X", "importtime", "-m", *arguments], capture_output=True, text=True)
        imported = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines()}
        assert told.returncode == 0 and "mymodels.cli.warm_start" in imported
        assert not imported & {"torch", "transformers", "numpy", "rich"}, arguments


@pytest.mark.parametrize("how", STARTS)
def test_help_takes_little_processor_time(how: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(how, "finetune", "--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # some 0.06 s; with torch 3


PYTHON = ["/usr/bin/python3", "-X", "dev"]


@pytest.mark.parametrize(
    ("started", "argv", "command"),
    [
        ([*PYTHON, "-m", "mymodels", "inspect", "x"], ["-m", "inspect", "x"], True),
        ([*PYTHON, "-m", "mymodels"], ["-m"], True),
        ([*PYTHON, "-m", "mymodels.cli", "-h"], ["-m", "-h"], True),
        ([*PYTHON, "-m", "mymodels.training.example"], ["-m"], False),
        ([*PYTHON, "-m", "pytest", "-m", "mymodels"], ["-m", "-m", "mymodels"], False),
        ([*PYTHON, "-m", "other", "mymodels"], ["-m", "mymodels"], False),
        ([*PYTHON, "mymodels", "-m", "mymodels"], ["mymodels", "-m", "mymodels"], False),
        ([*PYTHON, "-c", "import mymodels", "-m", "mymodels"], ["-c", "-m", "mymodels"], False),
        (PYTHON, [""], False),
        ([*PYTHON, "-c", "from multiprocessing …", "--fork"], ["/usr/bin/mymodels", "inspect", "x"], False),
        ([], [], False),  # Python inside another program
        ([], ["-m"], False),
    ],
)
def test_what_is_taken_for_the_command_line(
    started: list[str], argv: list[str], command: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", started)
    monkeypatch.setattr(sys, "argv", argv)
    assert mymodels._is_command_line() == command


LOOK = "import transformers; print('mygpt2' in transformers.CONFIG_MAPPING, flush=True)"


def test_the_models_are_registered_before_a_verb_runs_and_in_worker_processes(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(
        f"import multiprocessing, sys\ndef look():\n    import mymodels\n    {LOOK}\n"
        "def run(arguments):\n"
        f"    {LOOK}\n    worker = multiprocessing.get_context('spawn').Process(target=look)\n"
        "    worker.start()\n    worker.join()\n    return worker.exitcode\n"
        "if __name__ == '__main__':\n"
        "    import mymodels_command\n    mymodels_command.started = True\n    import mymodels.cli.lock as lock\n"
        "    assert 'transformers' not in sys.modules\n    lock.run = run\n"
        "    sys.exit(mymodels_command.main())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "command.py", "lock", "x"]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout == "True\nTrue\n", told


def test_no_verb_prints_the_help_and_fails() -> None:
    for how in STARTS:
        told = run(how)
        assert told.returncode == 2 and told.stdout == ""
        assert set(VERBS) <= set(re.findall(r"^    ([\w-]+)", told.stderr, re.MULTILINE))
    assert run("module", "--version").stdout == f"mymodels {mymodels.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_a_help_starts_with_a_sentence_and_ends_with_an_example_and_the_exit_codes(verb: str) -> None:
    usage, sentence, *_ = help_of(verb).split("\n\n")
    assert usage.startswith(f"usage: mymodels {verb}") and re.fullmatch(r"[A-Z].*\.", sentence, re.S), sentence
    *_, example, codes = help_of(verb).rstrip().split("\n\n")
    assert example.startswith("example:\n") and example.count("\n") == 1
    numbers = re.findall(r"^  (\d+) +\S", codes.removeprefix("exit codes:\n"), re.MULTILINE)
    assert {"0", "1", "2", "130"} <= set(numbers) and numbers == sorted(numbers, key=int)
    arguments = parse(shlex.split(example_of(verb).rpartition("| ")[2])[1:])
    assert arguments.verb == verb


def test_a_help_fits_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the example, which is one line to copy. No word is broken."""
    parser, verbs = make_parser()
    for shown in (parser, *verbs.values()):
        monkeypatch.setenv("COLUMNS", "1000")
        wide = set(shown.format_help().split())
        monkeypatch.setenv("COLUMNS", "80")
        text = shown.format_help()
        assert set(text.split()) <= wide
        assert [line for line in text.splitlines() if len(line) > 80 and line.strip() != example_in(text)] == []


MY_MODEL = """
from torch import nn


class MyNet(nn.Module):
    def __init__(self, hidden, layers, vocab=50):
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(layers)])
        self.head = nn.Linear(hidden, vocab)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x)
"""


@pytest.mark.parametrize(
    "verb",
    [
        pytest.param(verb, marks=pytest.mark.slow if verb in SLOW else ())
        for verb in VERBS
        if verb not in ("push", "demo")
    ],
)
def test_the_example_runs(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`push` needs a Hub: tests/hub/test_commands.py runs its example; `make demo` runs that of `demo`, in CI too."""
    shutil.copytree(ROOT / "hub_repo", tmp_path / "hub_repo")
    monkeypatch.chdir(tmp_path)
    command = shlex.split(example_of(verb))
    if command[0] == "echo":
        Path("lines.jsonl").write_text(command[1] + "\n")
        command = [*command[3:], "--input", "lines.jsonl"]
    if verb == "adopt":
        Path("my_model.py").write_text(MY_MODEL)
        monkeypatch.syspath_prepend(tmp_path)
        torch.save(importlib.import_module("my_model").MyNet(256, 4).state_dict(), "net.pt")
        command.append("--quick")
    if verb == "upgrade":
        shutil.copytree("hub_repo/mygpt2", "old-model")  # nothing to change: tests/upgrading/ has the others
    assert command[0] == "mymodels"
    assert cli.main(command[1:]) == 0


WRONG = {
    "inspct": "there is no verb 'inspct', did you mean 'inspect'?",
    "xyz --help": "there is no verb 'xyz' (",
    "--nothing": "unexpected '--nothing'",
    "inspect": "arguments are required: PATH|REPO_ID",
    "inspect a b": "unexpected 'b'",
    "inspect a --dfif b": "did you mean --diff?",
    "convert a b --format zip": "invalid choice: 'zip'",
    "finetune --model a --data b --out c --lora-r x": "--lora-r: invalid int value: 'x'",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_gives_one_sentence(line: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(line.split())
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == ""
    assert told.err.startswith("mymodels") and told.err.count("\n") == 1 and WRONG[line] in told.err


MISSING = [
    "inspect nope",
    "inspect hub_repo/mygpt2 --diff nope.bin",
    "convert nope out",
    "check nope",
    "warm-start nope --to mygpt2",
    "warm-start hub_repo/mygpt2 --to mygpt2 --config nope.json",
    "build nope --out out",
    "build hub_repo/mygpt2 --out out --card nope.md",
    "finetune --model nope --data sample_text --out out",
    "finetune --model hub_repo/mybert --data nope.csv --out out",
    "predict nope --input hub_repo/mybert/config.json",
    "predict hub_repo/mybert --input nope.jsonl",
    "verify nope",
    "push nope me/x",
    "lock nope",
    "export nope --to pt2 --out out",
    "export hub_repo/mygpt2 --to onnx --int8 --texts nope.txt --out out",
]


@pytest.mark.parametrize("line", MISSING)
def test_a_missing_file_gives_one_sentence(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "hub_repo").symlink_to(ROOT / "hub_repo")
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"mymodels {line.split()[0]}: ") and told.count("\n") == 1 and "nope" in told, told
    assert [path.name for path in tmp_path.iterdir()] == ["hub_repo"]


LEAVE = """
import os, sys, mymodels.cli
for arguments in (["inspect", "hub_repo/mygpt2"], ["inspect", "hub_repo/mygpt2", "--json"], ["check", "hub_repo/mygpt2"]):
    read, write = os.pipe()
    os.close(read)
    child = os.fork()
    if not child:
        os.dup2(write, 1)
        sys.stdout = open(1, "w", closefd=False)
        sys.exit(mymodels.cli.main(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_reader_that_leaves_early_ends_the_command_without_a_traceback() -> None:
    """Tables by rich, JSON by `print`, one line."""
    told = warm_python.run([sys.executable, "-c", LEAVE], cwd=ROOT)
    assert told.stdout.split() == ["141"] * 3 and told.stderr == "", told


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("mymodels.hub.lock.write_lock", fail)
    assert cli.main(["lock", "x"]) == 1
    assert capfd.readouterr().err == "mymodels lock: [Errno 32] Broken pipe\n"


def test_ctrl_c_exits_130(tmp_path: Path) -> None:
    """While a verb waits for its input, and while torch is imported."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # the background jobs of a script, and so their children, start with SIGINT ignored
    heard = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {SCRIPT}"
    command = [sys.executable, "-c", heard, "predict", str(ROOT / "hub_repo/mybert"), "--input", str(pipe)]
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        process = warm_python.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT)
    with pipe.open("w"):  # once somebody reads
        os.kill(process.pid, signal.SIGINT)
        code = process.wait(100)
    told = (tmp_path / "err").read_text()
    assert code == 130 and "Traceback" not in told and not (tmp_path / "out").read_text(), told
    interrupt = (
        "import sys\nclass Interrupt:\n    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\nsys.argv = ['mymodels', 'lock', 'x']\n"
        "import mymodels_command\nsys.exit(mymodels_command.main())"
    )
    told = subprocess.run([sys.executable, "-c", interrupt], capture_output=True, text=True)
    assert told.returncode == 130 and told.stderr == "", told
