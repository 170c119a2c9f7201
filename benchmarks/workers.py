"""Engines that are compared, each in a process of its own, by the interpreter that has it.

A worker is a script that reads jobs from its input, one JSON line each, and answers each with one
JSON line. Only one works at a time; the others wait for their line and take no processor. Standard
library only: peers' environments hold no more of what is here.
"""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO


class Worker:
    """One engine's process."""

    def __init__(self, command: Sequence[str]):
        self._command = command
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer; what else it prints is passed over."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{' '.join(self._command)} ended without an answer to {job}")

    def close(self) -> None:
        """Lets the process end: its input is at an end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, and an answer's figures: seconds, CPU seconds and peak memory."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    done = work()
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
    return done, {"seconds": seconds, "cpu_s": cpu_s, "peak_mb": resident_mb()}


def resident_mb() -> float:
    """The most memory that this process has held, in MB. Not getrusage's: that one counts what the
    process that started this one held as well."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["VmHWM"].split()[0]) / 1024


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]], jobs: TextIO, out: TextIO) -> None:
    """A worker's loop."""
    for line in jobs:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)
