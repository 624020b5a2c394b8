"""Give a command that goes on where it stopped again and again, and kill it at random moments.

For example ``python tools/interrupt.py --kills 10 --longest 60 -- python tools/reproduce.py
--profile tiny --out runs/killed``; then compare with a run that was left alone:
``diff -r --exclude=environments.jsonl runs/tiny runs/killed``.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

_PATIENCE = 15.0  # seconds for the children of a killed command to end by themselves


def interrupt(
    command: Sequence[str], *, kills: int, longest: float, seed: int = 0, whole: bool = False
) -> int:
    """Run a command to its end, killing it on the way.

    Each time the kill (SIGKILL) takes the process alone, whose children must then end by
    themselves, or its whole process group, as a machine that goes down does.

    Args:
        command: The program and its arguments.
        kills: How often, at most: a command that ends before its moment has come was not killed.
        longest: Seconds; each moment is drawn evenly from 0 to this.
        seed: Of the moments.
        whole: Always take the whole group: Ray's own agents outlive the one that started them.

    Returns:
        How many kills found it running.

    Raises:
        ValueError: No kills, or no time.
        RuntimeError: The command ended with an error of its own, or children outlived it.
    """
    if kills < 1 or not longest > 0:
        raise ValueError(f"expected kills >= 1 and longest > 0, got {kills} and {longest}")
    draw = random.Random(seed)
    for done in range(kills + 1):
        process = subprocess.Popen(command, start_new_session=True)
        try:
            code = process.wait(draw.uniform(0, longest) if done < kills else None)
        except subprocess.TimeoutExpired:
            end = os.killpg if whole else draw.choice((os.kill, os.killpg))
            end(process.pid, signal.SIGKILL)
            process.wait()
            _must_be_empty(process.pid)
            print(f"kill {done + 1}: {end.__name__}", file=sys.stderr, flush=True)
            continue
        finally:
            _end_group(process.pid)
        if code:
            raise RuntimeError(f"the command ended with {code} after {done} kills")
        return done
    raise AssertionError("unreachable: the last turn has no time limit")


def _must_be_empty(group: int) -> None:
    deadline = time.monotonic() + _PATIENCE
    while _runs(group):
        if time.monotonic() > deadline:
            raise RuntimeError(f"children outlive the command by more than {_PATIENCE:.0f} s")
        time.sleep(0.05)


def _runs(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _end_group(group: int) -> None:
    if _runs(group):
        os.killpg(group, signal.SIGKILL)


def _main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="interrupt", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--longest", type=float, default=60.0, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", action="store_true", help="always kill the whole group")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    given = parser.parse_args(argv)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("expected a command after --")
    try:
        done = interrupt(
            command,
            kills=given.kills,
            longest=given.longest,
            seed=given.seed,
            whole=given.whole,
        )
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"killed {done} times, then ended by itself")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
