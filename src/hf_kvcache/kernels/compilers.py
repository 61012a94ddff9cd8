"""Compilers and other tools run in a process group of their own, so that ending one ends what it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

INTERRUPT_SECONDS = 5


def run(command: list[str], timeout: float | None = None, **options) -> subprocess.CompletedProcess:
    """`subprocess.run` with output captured as text; whatever ends it early ends the children of the command, too.

    A compiler driver starts the compiler proper as a child, which would go on for minutes after its parent is gone.

    Args:
        command: program and arguments.
        timeout: seconds, or None.
        options: further arguments of `subprocess.Popen`.

    Raises:
        OSError: the program cannot be started.
        subprocess.TimeoutExpired: it took longer than `timeout`.
    """
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, process_group=0, **pipes, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        end(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end(process: subprocess.Popen) -> None:
    """Interrupt a process that leads a group of its own (`process_group=0`); kill what is left of the group, and wait.

    One that has started compilers by `run` ends their groups when it is interrupted, and could not when it is killed.
    """
    try:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(INTERRUPT_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        # all of them had ended
        pass
    # what they wrote is of no use any more
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    process.wait()
