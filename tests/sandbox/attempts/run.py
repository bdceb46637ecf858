"""Make attempts, one after another, and print what came of each as a line of JSON.

    python -I run.py TARGET name …          each in a child of its own; TARGET: the fields of a `Target` as JSON
    python -I run.py TARGET --alone name
It runs in the box, or without it for the control.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import attempts
from attempts import Attempt, Impossible, Left, Printed, Remains, Target

LONGEST = 10  # seconds for one attempt
PROCESSOR = 20  # seconds of a processor: a loop that the control run leaves behind ends too


def say(**what) -> None:
    os.write(1, (json.dumps(what) + "\n").encode())


def make(attempt: Attempt, target: Target) -> None:
    """One attempt, in this process, and what came of it."""
    say(name=attempt.name, outcome="began")
    try:
        reached = attempt.run(target)
    except Impossible as reason:
        return say(name=attempt.name, outcome="impossible", detail=str(reason))
    except (OSError, MemoryError) as error:
        return say(name=attempt.name, outcome="stopped", detail=f"{type(error).__name__}: {error}"[:200])
    except BaseException as error:
        return say(name=attempt.name, outcome="mistake", detail=f"{type(error).__name__}: {error}"[:200])
    evidence = {"left": reached.path} if isinstance(reached, Left) else {}
    evidence |= {"remains": reached.process} if isinstance(reached, Remains) else {}
    evidence |= {"printed": reached.size} if isinstance(reached, Printed) else {}
    say(name=attempt.name, outcome="succeeded" if reached else "stopped", detail=repr(reached)[:200], **evidence)


def make_in_child(attempt: Attempt, target: Target) -> None:
    sys.stdout.flush()
    try:
        child = os.fork()
    except OSError:
        return make(attempt, target)
    if not child:
        try:
            signal.alarm(LONGEST)
            make(attempt, target)
        finally:
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        say(name=attempt.name, outcome="stopped", detail=f"ended with {status}")


def main(fields: str, *names: str) -> None:
    target = Target(**json.loads(fields))
    with contextlib.suppress(OSError, ValueError):  # the box lets nothing set a limit, and has its own
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    known = attempts.load()
    alone = names[0] == "--alone"
    order = list(known)
    for name in names[1:] if alone else names:
        own = target._replace(name=name, marker=f"{target.marker}{order.index(name):03d}")
        (make if alone else make_in_child)(known[name], own)


if __name__ == "__main__":
    main(*sys.argv[1:])
