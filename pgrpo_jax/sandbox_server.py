"""The judge: a small process of its own that keeps slots, queues programs and answers with results.

It is started once by exec and speaks with its trainer over one socket: a request is 8
bytes of number and a job by `sandbox_wire.dumps`, an answer the same number and a result. Wanted
values exist only here. It is a process and not a thread of the trainer because a jail must not
descend from a process with JAX's threads and gigabytes, because its loop must not wait for the
trainer's interpreter lock, and because what it holds dies with it: when the trainer goes, in
whatever way, the socket ends, and this process ends every slot and itself.

Part of the sandbox: standard library only.
"""

import collections
import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

from pgrpo_jax import sandbox_jail, sandbox_slot, sandbox_wire, sandbox_work

TIERS = ("namespaces", "landlock")
CACHE_SIZE = 1 << 16
STACK_MB = 512
TRIES = 2


def main(arguments: list[str]) -> None:
    """`arguments`: descriptor of the socket, the trainer's process id, JSON of workers, tier,
    packages."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, whose end is ours
    descriptor, trainer, settings = int(arguments[0]), int(arguments[1]), json.loads(arguments[2])
    stack, hard = STACK_MB << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(
        resource.RLIMIT_STACK,  # its room is fixed when a process starts: the slots inherit this
        (stack if hard == resource.RLIM_INFINITY else min(stack, hard), hard),
    )
    server = _Server(socket.socket(fileno=descriptor), settings)
    try:
        if os.getppid() == trainer and server.start():
            server.run()
    finally:
        server.close()


class _Job:
    """One program that waits or runs, and the numbers of the requests that wait for it."""

    def __init__(self, key: bytes, content: dict[str, Any]):
        self.key, self.content = key, content
        self.numbers: list[int] = []
        self.tries = 0


class _Server:
    def __init__(self, trainer: socket.socket, settings: dict[str, Any]):
        self._trainer = trainer
        self._settings = settings
        self._loop = sandbox_slot.Loop()
        self._frames = sandbox_wire.Frames(sandbox_wire.FRAME_LIMIT)
        self._waiting: collections.deque[_Job] = collections.deque()
        self._jobs: dict[bytes, _Job] = {}  # waiting or running
        self._done: collections.OrderedDict[bytes, bytes] = collections.OrderedDict()
        self._slots: list[sandbox_slot.Slot] = []
        self._running: dict[sandbox_slot.Slot, _Job] = {}
        self._tier = ""
        self._base = ""
        self._open = True

    # --- slots

    def start(self) -> bool:
        """Finds the strongest tier by building a slot of it. Tells the trainer; False if there is
        none."""
        tiers = TIERS if self._settings["tier"] == "auto" else (self._settings["tier"],)
        reasons = []
        for self._tier in tiers:
            slot = self._new_slot()
            self._wait_for(slot, lambda slot=slot: slot.ready)
            if slot.ready and not (breaches := self._probe(slot)):
                self._slots.append(slot)
                self._slots += [self._new_slot() for _ in range(self._settings["workers"] - 1)]
                self._tell(0, {"tier": self._tier, "said": slot.said})
                return True
            said = f"a program could {', '.join(breaches)}" if slot.ready else slot.said
            reasons.append(f"{self._tier}: {said or 'the slot died'}")
            slot.close()
        self._tell(0, {"refused": "; ".join(reasons)})
        return False

    def _wait_for(self, slot: sandbox_slot.Slot, what: Callable[[], bool]) -> None:
        while not (what() or slot.broken):
            self._loop.turn(slot.next_look() - time.monotonic())
            slot.look(time.monotonic())

    def _probe(self, slot: sandbox_slot.Slot) -> list[str]:
        """The embedded attacks that get through: there must be none."""
        breaches: list[str] = []

        def work() -> sandbox_slot.Work:
            breaches.extend((yield from sandbox_work.probe(slot, __file__, self._temporary())))

        slot.work = work()
        slot.resume()
        self._wait_for(slot, lambda: slot.work is None)
        return breaches if slot.work is None else ["break the slot"]

    def _new_slot(self) -> sandbox_slot.Slot:
        scratch = "/tmp"
        if self._tier == "landlock":
            scratch = os.path.join(self._folder(), str(time.monotonic_ns()))
            os.mkdir(scratch, 0o700)
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        packages = self._settings["packages"]
        settings = {
            "tier": self._tier,
            "scratch": scratch,
            "scratch_mb": sandbox_work.SCRATCH_MB,
            "readable": sandbox_jail.readable_paths(packages),
            "packages": packages,
            "hidden": [root],
            "preload": [],
        }
        return sandbox_slot.Slot(self._loop, settings, root)

    def _folder(self) -> str:
        if not self._base:
            self._base = os.path.join(
                self._temporary(), f"judge-{os.getpid()}-{os.urandom(6).hex()}"
            )
            os.mkdir(self._base, 0o700)
        return self._base

    def _temporary(self) -> str:
        places = ("/dev/shm", "/var/tmp", "/tmp")
        return next(place for place in places if os.access(place, os.W_OK | os.X_OK))

    def _rebuild(self, slot: sandbox_slot.Slot) -> None:
        self._slots.remove(slot)
        slot.close()
        job = self._running.pop(slot, None)
        if job is not None:
            self._failed(job, f"a slot broke: {slot.said}")
        self._slots.append(self._new_slot())

    # --- the loop

    def run(self) -> None:
        self._trainer.setblocking(False)
        self._loop.watch(self._trainer.fileno(), self._hear)
        with contextlib.suppress(OSError):  # a child of the trainer may hold our socket open
            self._loop.watch(os.pidfd_open(os.getppid()), self._stop)
        while self._open:
            self._hand_out()
            look = min(slot.next_look() for slot in self._slots)
            self._loop.turn(min(look - time.monotonic(), 3600))
            now = time.monotonic()
            for slot in list(self._slots):
                slot.look(now)
                if slot.broken:
                    self._rebuild(slot)

    def _stop(self) -> None:
        self._open = False

    def _hand_out(self) -> None:
        for slot in self._slots:
            # Some programs are judged at once, an empty one for example: then the slot takes the
            # next.
            while self._waiting and slot.ready and slot.work is None:
                job = self._waiting.popleft()
                self._running[slot] = job
                slot.work = self._serve(slot, job)
                slot.resume()

    def _serve(self, slot: sandbox_slot.Slot, job: _Job) -> sandbox_slot.Work:
        try:
            result = yield from sandbox_work.judge(slot, job.content)
        except Exception as error:  # whatever goes wrong in the judge is no verdict
            slot.broken = True
            traceback.print_exc()
            del self._running[slot]
            return self._failed(job, f"{type(error).__name__}: {error}")
        del self._running[slot]
        self._finish(job, result, keep=True)

    def _failed(self, job: _Job, why: str) -> None:
        job.tries += 1
        if job.tries < TRIES:
            self._waiting.appendleft(job)
        else:
            total = sandbox_work.total(job.content)
            self._finish(
                job, {"verdict": "infra", "passed": 0, "total": total, "failure": why}, False
            )

    def _finish(self, job: _Job, result: dict[str, Any], keep: bool) -> None:
        del self._jobs[job.key]
        body = sandbox_wire.dumps(result)
        if keep:
            self._done[job.key] = body
            if len(self._done) > CACHE_SIZE:
                self._done.popitem(last=False)
        for number in job.numbers:
            self._send(number, body)

    # --- the trainer

    def _hear(self) -> None:
        try:
            data = self._trainer.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            return self._stop()
        for message in self._frames.feed(data):
            (number,) = sandbox_wire.REQUEST.unpack_from(message)
            self._accept(number, message[sandbox_wire.REQUEST.size :])

    def _accept(self, number: int, body: bytes) -> None:
        key = hashlib.blake2b(body, digest_size=16).digest()
        if key in self._done:
            self._done.move_to_end(key)
            return self._send(number, self._done[key])
        if key not in self._jobs:
            self._jobs[key] = _Job(key, sandbox_wire.loads(body))
            self._waiting.append(self._jobs[key])
        self._jobs[key].numbers.append(number)

    def _tell(self, number: int, what: dict[str, Any]) -> None:
        self._send(number, sandbox_wire.dumps(what))

    def _send(self, number: int, body: bytes) -> None:
        try:
            self._trainer.setblocking(True)
            sandbox_wire.send_frame(self._trainer, sandbox_wire.REQUEST.pack(number) + body)
            self._trainer.setblocking(False)
        except OSError:
            self._stop()

    def close(self) -> None:
        for slot in self._slots:
            slot.close()
        if self._base:
            shutil.rmtree(self._base, ignore_errors=True)
