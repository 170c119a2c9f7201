"""Judging programs that nobody trusts: the face that the trainer sees.

A policy that can fool the judge fools the whole method, so no program runs in this process, nor in
one that knows what is wanted: see `sandbox_server`, which this starts, and `sandbox_zygote`. It
stops reward hacking and accidents and makes attacks on the kernel harder; it is no virtual machine.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import site
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Iterable
from typing import Any

from pgrpo_jax import config, sandbox_wire, types

_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from pgrpo_jax import sandbox_server; "
    "sandbox_server.main(sys.argv[2:])"
)
CLOSE_S = 10.0

Future = concurrent.futures.Future[types.Result]


@dataclasses.dataclass(frozen=True)
class Counters:
    """What a judge has done so far: processes of programs that ran, and slots built again."""

    runs: int = 0
    slot_rebuilds: int = 0


class Judge:
    """Runs programs against tests in jailed processes; see `types.Tests` for the kinds of tests.

    One that has a judge must close it or use it as a context manager; should this process be
    killed, the judge ends itself and all that it started. A broken judge answers "infra".
    """

    def __init__(self, cfg: config.JudgeConfig):
        """RuntimeError if this machine offers no way to hold a program."""
        self._cfg = cfg
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._room = threading.BoundedSemaphore(cfg.queue)
        self._futures: dict[int, tuple[Future, int]] = {}
        self._number = 0
        self.counters = Counters()
        self.workers = cfg.workers or default_workers()
        self._socket, theirs = socket.socketpair()
        settings = {
            "workers": self.workers,
            "tier": cfg.tier,
            "allow_unsafe": cfg.allow_unsafe,
            "packages": _packages(),
            "path": sys.path,
        }
        with theirs:
            self._process = _spawn(theirs.fileno(), json.dumps(settings))
        said = self._greeting()
        self.refused: dict[str, str] = said.get("refused", {"the judge": "it ended at once"})
        if "tier" not in said:
            self.close()
            raise RuntimeError(
                "the judge has no way to hold programs on this machine, so it will run none: "
                + "; ".join(f"{tier}: {why}" for tier, why in self.refused.items())
            )
        self.tier: str = said["tier"]
        self.said: str = said["said"]  # the tier and what it is made of
        if self.tier == "unsafe":
            _warn(said["breaches"])
        self._reader = threading.Thread(target=self._read, name="judge", daemon=True)
        self._reader.start()

    def submit(
        self,
        program: str,
        tests: types.Tests,
        timeout_s: float | None = None,
        memory_mb: int | None = None,
    ) -> Future:
        """Queues a program, under limits of its own if they are given; waits while the queue is
        full. The future is never cancelled and never raises: failures are "infra"."""
        future = self._queue(program, tests, timeout_s, memory_mb)[1]
        return future

    async def judge(self, program: str, tests: types.Tests) -> types.Result:
        """The same for a coroutine. If it is cancelled, so is a program that has not begun."""
        import asyncio  # which most who judge do without, and takes longer than all the rest

        loop = asyncio.get_running_loop()
        number, future = await loop.run_in_executor(None, self._queue, program, tests)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._give_up(number, "nobody waited for it")
            raise

    def batch(
        self, pairs: Iterable[tuple[str, types.Tests]], timeout_s: float | None = None
    ) -> list[types.Result]:
        """The results of (program, tests) pairs, in their order. After `timeout_s` seconds those
        that are not there yet are "infra", and the others are as good as ever."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        queued = [self._queue(*pair) for pair in pairs]
        for number, future in queued:
            left = None if until is None else max(until - time.monotonic(), 0)
            try:
                future.result(left)
            except TimeoutError:
                self._give_up(number, f"not judged within the {timeout_s:g} s of its batch")
        return [future.result() for _, future in queued]

    def close(self) -> None:
        """Ends the judge and everything that it started. Results still awaited become "infra"."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # its end is the order to leave
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._fail_all("the judge was closed")
        self._socket.close()

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the server

    def _greeting(self) -> dict[str, Any]:
        answer = sandbox_wire.receive_frame(self._socket)
        return sandbox_wire.loads(answer[sandbox_wire.ANSWER.size :]) if answer else {}

    def _queue(
        self,
        program: str,
        tests: types.Tests,
        timeout_s: float | None = None,
        memory_mb: int | None = None,
    ) -> tuple[int, Future]:
        body = self._body(program, tests, {"timeout_s": timeout_s, "memory_mb": memory_mb})
        future: Future = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        self._room.acquire()
        with self._lock:
            self._number += 1
            number = self._number
            self._futures[number] = future, len(tests)
        try:
            self._send(sandbox_wire.REQUEST.pack(number) + body)
        except OSError as error:
            self._give_up(number, f"the judge is gone: {error}")
        return number, future

    def _send(self, message: bytes) -> None:
        with self._sending:  # not the lock of the thread that reads: its answers must not wait
            sandbox_wire.send_frame(self._socket, message)

    def _read(self) -> None:
        """Runs in a thread of its own: resolves futures as answers come."""
        size = sandbox_wire.ANSWER.size
        with contextlib.suppress(OSError):
            while (answer := sandbox_wire.receive_frame(self._socket)) is not None:
                number, *counts = sandbox_wire.ANSWER.unpack_from(answer)
                self.counters = Counters(*counts)
                self._resolve(number, types.Result(**sandbox_wire.loads(answer[size:])))
        self._fail_all("the judge's process ended")

    def _resolve(self, number: int, result: types.Result) -> None:
        with self._lock:
            future, _ = self._futures.pop(number, (None, 0))
        if future is not None:
            self._room.release()
            future.set_result(result)

    def _give_up(self, number: int, why: str) -> None:
        """What is not judged yet is "infra", and if the judge has not begun with it, never is."""
        with self._lock:
            _, total = self._futures.get(number, (None, 0))
        self._resolve(number, types.Result("infra", 0, total, failure=why))
        with contextlib.suppress(OSError):
            self._send(sandbox_wire.REQUEST.pack(number))

    def _fail_all(self, why: str) -> None:
        with self._lock:
            waiting = {number: total for number, (_, total) in self._futures.items()}
        for number, total in waiting.items():
            self._resolve(number, types.Result("infra", 0, total, failure=why))

    def _body(self, program: str, tests: types.Tests, own: dict[str, Any]) -> bytes:
        cfg = self._cfg
        limits = {
            "timeout_s": cfg.timeout_s,
            "program_timeout_s": cfg.program_timeout_s,
            "memory_mb": cfg.memory_mb,
            "output_kb": cfg.output_kb,
            "accept_weak": cfg.accept_weak,
        }
        limits |= {name: value for name, value in own.items() if value is not None}
        limits["program_timeout_s"] = max(limits["program_timeout_s"], limits["timeout_s"])
        job: dict[str, Any] = {f.name: getattr(tests, f.name) for f in dataclasses.fields(tests)}
        job |= {"program": program, "limits": limits}
        try:
            body = sandbox_wire.dumps(job)
        except sandbox_wire.Unpackable as problem:
            raise ValueError(f"the tests hold {problem}; a judge takes plain values only") from None
        most = sandbox_wire.FRAME_LIMIT - sandbox_wire.REQUEST.size
        if len(body) > most:
            raise ValueError(f"a program and its tests are {len(body)} bytes; at most {most}")
        return body


def default_workers() -> int:
    """A quarter of the cores, and one at least, is JAX's."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores - max(1, cores // 4))


def _warn(breaches: list[str]) -> None:
    through = ", ".join(breaches) or "nothing that the embedded attacks try"
    warnings.warn(
        "UNSAFE JUDGE: no jail holds on this machine and `allow_unsafe` is set, so programs that "
        "nobody trusts run with little more than resource limits, and their verdicts can be "
        f"forged. Here a program can: {through}. Do not train on this.",
        stacklevel=3,
    )


def _spawn(descriptor: int, settings: str) -> subprocess.Popen[bytes]:
    """By vfork and exec: a fork of a process with JAX's threads may never return."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-I", "-S", "-B", "-c", _BOOT, root]
    command += [str(descriptor), str(os.getpid()), settings]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(descriptor,),
        start_new_session=True,
        env={"LC_ALL": "C.UTF-8", "PATH": os.environ.get("PATH", "")},
    )


def _packages() -> list[str]:
    """Where this interpreter's packages are: programs may read and import them.

    A system's own may lie apart from where it would install more, as Debian's do.
    """
    paths = sysconfig.get_paths()
    return sorted({paths["purelib"], paths["platlib"], *site.getsitepackages()})
