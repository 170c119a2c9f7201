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
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterable
from typing import Any

from pgrpo_jax import config, sandbox_wire, types

_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from pgrpo_jax import sandbox_server; "
    "sandbox_server.main(sys.argv[2:])"
)
CLOSE_S = 10.0


class Judge:
    """Runs programs against tests in jailed processes; see `types.Tests` for the kinds of tests.

    One that has a judge must close it or use it as a context manager; should this process be
    killed, the judge ends itself and all that it started. A broken judge answers "infra".
    """

    def __init__(self, cfg: config.JudgeConfig):
        """RuntimeError if this machine offers no way to hold a program."""
        self._cfg = cfg
        self._lock = threading.Lock()
        self._futures: dict[int, tuple[concurrent.futures.Future[types.Result], int]] = {}
        self._number = 0
        self._socket, theirs = socket.socketpair()
        settings = {"workers": cfg.workers, "tier": cfg.tier, "packages": _packages()}
        with theirs:
            self._process = _spawn(theirs.fileno(), json.dumps(settings))
        said = self._greeting()
        if "tier" not in said:
            self.close()
            reason = said.get("refused", "its process ended at once")
            raise RuntimeError(
                "the judge has no way to hold programs on this machine, so it will run none: "
                f"{reason}"
            )
        self.tier: str = said["tier"]
        self._reader = threading.Thread(target=self._read, name="judge", daemon=True)
        self._reader.start()

    def submit(self, program: str, tests: types.Tests) -> concurrent.futures.Future[types.Result]:
        """Queues a program. The future is never cancelled and never raises: failures are
        "infra"."""
        future: concurrent.futures.Future[types.Result] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        body = self._body(program, tests)
        with self._lock:
            self._number += 1
            number = self._number
            self._futures[number] = future, len(tests)
            try:
                sandbox_wire.send_frame(self._socket, sandbox_wire.REQUEST.pack(number) + body)
            except OSError as error:
                del self._futures[number]
                future.set_result(
                    types.Result("infra", 0, len(tests), failure=f"the judge is gone: {error}")
                )
        return future

    def batch(self, pairs: Iterable[tuple[str, types.Tests]]) -> list[types.Result]:
        """The results of (program, tests) pairs, in their order."""
        return [future.result() for future in [self.submit(*pair) for pair in pairs]]

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

    def _greeting(self) -> dict[str, Any]:
        answer = sandbox_wire.receive_frame(self._socket)
        return sandbox_wire.loads(answer[sandbox_wire.REQUEST.size :]) if answer else {}

    def _read(self) -> None:
        """Runs in a thread of its own: resolves futures as answers come."""
        size = sandbox_wire.REQUEST.size
        with contextlib.suppress(OSError):
            while (answer := sandbox_wire.receive_frame(self._socket)) is not None:
                (number,) = sandbox_wire.REQUEST.unpack_from(answer)
                with self._lock:
                    future, _ = self._futures.pop(number)
                future.set_result(types.Result(**sandbox_wire.loads(answer[size:])))
        self._fail_all("the judge's process ended")

    def _fail_all(self, why: str) -> None:
        with self._lock:
            futures, self._futures = self._futures, {}
        for future, total in futures.values():
            future.set_result(types.Result("infra", 0, total, failure=why))

    def _body(self, program: str, tests: types.Tests) -> bytes:
        cfg = self._cfg
        job: dict[str, Any] = {f.name: getattr(tests, f.name) for f in dataclasses.fields(tests)}
        job |= {"program": program, "limits": (cfg.timeout_s, cfg.memory_mb, cfg.output_kb)}
        try:
            return sandbox_wire.dumps(job)
        except sandbox_wire.Unpackable as problem:
            raise ValueError(f"the tests hold {problem}; a judge takes plain values only") from None


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
    """Where this interpreter's packages are: programs may read and import them."""
    paths = sysconfig.get_paths()
    return sorted({paths["purelib"], paths["platlib"]})
