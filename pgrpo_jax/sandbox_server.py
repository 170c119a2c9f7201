"""The judge: a small process of its own that keeps slots, queues programs and answers with results.

It is started once by exec and speaks with its trainer over one socket, see `sandbox_wire`. Wanted
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
import signal
import socket
import sys
import time
import traceback
from typing import Any

from pgrpo_jax import sandbox_jail, sandbox_pool, sandbox_slot, sandbox_wire, sandbox_work

CACHE_SIZE = 1 << 13  # results; a group repeats its programs within a step
STACK_MB = 512
TRIES = 2


def main(arguments: list[str]) -> None:
    """`arguments`: descriptor of the socket, the trainer's process id, JSON of the pool's settings
    and of `path`, where checkers are imported from."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, whose end is ours
    descriptor, trainer, settings = int(arguments[0]), int(arguments[1]), json.loads(arguments[2])
    sys.path += settings["path"]
    stack, hard = STACK_MB << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(
        resource.RLIMIT_STACK,  # its room is fixed when a process starts: the slots inherit this
        (stack if hard == resource.RLIM_INFINITY else min(stack, hard), hard),
    )
    server = _Server(socket.socket(fileno=descriptor), settings)
    try:
        server.watch_trainer()
        if os.getppid() == trainer and server.start():
            server.run()
    except _TrainerGone:
        pass
    finally:
        server.close()


class _TrainerGone(Exception):
    """Nobody waits for results any more: all that goes on here, a slot's start too, ends."""


class _Job:
    """One program that waits or runs, and the numbers of the requests that wait for it."""

    def __init__(self, order: int, key: bytes, content: dict[str, Any]):
        self.order, self.key, self.content = order, key, content
        self.numbers: list[int] = []
        self.tries = 0


class _Server:
    def __init__(self, trainer: socket.socket, settings: dict[str, Any]):
        self._trainer = trainer
        self._workers = settings["workers"]
        self._loop = sandbox_slot.Loop()
        self._pool = sandbox_pool.Pool(self._loop, settings)
        self._frames = sandbox_wire.Frames(sandbox_wire.FRAME_LIMIT)
        self._waiting: dict[str, collections.deque[_Job]] = {
            flavour: collections.deque() for flavour in (sandbox_pool.PLAIN, sandbox_pool.NUMPY)
        }
        self._jobs: dict[bytes, _Job] = {}  # waiting or running
        self._asked: dict[int, _Job] = {}
        self._done: collections.OrderedDict[bytes, bytes] = collections.OrderedDict()
        self._running: dict[sandbox_slot.Slot, _Job] = {}
        self._accepted = self._runs = 0

    def watch_trainer(self) -> None:
        self._trainer.setblocking(False)
        self._loop.watch(self._trainer.fileno(), self._hear)
        with contextlib.suppress(OSError):  # a child of the trainer may hold our socket open
            self._loop.watch(sandbox_jail.handle_of(os.getppid()), self._leave)

    def start(self) -> bool:
        """Tells the trainer the tier, or why there is none; then False."""
        said = self._pool.start()
        self._send(0, sandbox_wire.dumps(said))
        return "tier" in said

    def run(self) -> None:
        while True:
            self._hand_out()
            self._loop.turn(self._pool.next_look() - time.monotonic())
            for slot in self._pool.look():
                job = self._running.pop(slot, None)
                if job is not None:
                    self._failed(job, f"a slot broke: {slot.said}")

    def _leave(self) -> None:
        raise _TrainerGone

    def close(self) -> None:
        self._pool.close()

    # --- jobs

    def _hand_out(self) -> None:
        """The oldest job of those whose kind of slot is idle, until all workers have one. Some are
        judged at once, an empty program for example: then the slot takes the next."""
        while len(self._running) < self._workers:
            queues = [(f, queue) for f, queue in self._waiting.items() if queue]
            idle = [(queue[0].order, queue, self._pool.idle(f)) for f, queue in queues]
            ready = [(order, queue, slot) for order, queue, slot in idle if slot is not None]
            if not ready:
                break
            _, queue, slot = min(ready, key=lambda entry: entry[0])
            job = queue.popleft()
            self._running[slot] = job
            slot.work = self._serve(slot, job)
            slot.resume()

    def _serve(self, slot: sandbox_slot.Slot, job: _Job) -> sandbox_slot.Work:
        try:
            result = yield from sandbox_work.judge(slot, job.content)
        except Exception as error:  # whatever goes wrong in the judge is no verdict
            if not isinstance(error, sandbox_slot.InfraError):
                slot.broken = True
                traceback.print_exc()
            del self._running[slot]
            return self._failed(job, f"{type(error).__name__}: {error}")
        del self._running[slot]
        self._runs += result.pop("runs")
        self._finish(job, result, keep=True)

    def _queue(self, job: _Job) -> collections.deque[_Job]:
        content = job.content
        return self._waiting[
            self._pool.flavour(content["program"], content["setup"], *content["code"])
        ]

    def _failed(self, job: _Job, why: str) -> None:
        job.tries += 1
        if job.tries < TRIES:
            self._queue(job).appendleft(job)
        else:
            total = sandbox_work.total(job.content)
            result = {"verdict": "infra", "passed": 0, "total": total, "failure": why}
            self._finish(job, result, keep=False)

    def _finish(self, job: _Job, result: dict[str, Any], keep: bool) -> None:
        del self._jobs[job.key]
        body = sandbox_wire.dumps(result | {"tier": self._pool.tier})
        if keep:
            self._done[job.key] = body
            if len(self._done) > CACHE_SIZE:
                self._done.popitem(last=False)
        for number in job.numbers:
            del self._asked[number]
            self._send(number, body)

    # --- the trainer

    def _hear(self) -> None:
        try:
            data = self._trainer.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            self._leave()
        for message in self._frames.feed(data):
            (number,) = sandbox_wire.REQUEST.unpack_from(message)
            body = message[sandbox_wire.REQUEST.size :]
            if body:
                self._accept(number, body)
            else:
                self._forget(number)

    def _accept(self, number: int, body: bytes) -> None:
        key = hashlib.blake2b(body, digest_size=16).digest()
        if key in self._done:
            self._done.move_to_end(key)
            return self._send(number, self._done[key])
        if key not in self._jobs:
            self._accepted += 1
            job = self._jobs[key] = _Job(self._accepted, key, sandbox_wire.loads(body))
            self._queue(job).append(job)
        self._asked[number] = self._jobs[key]
        self._jobs[key].numbers.append(number)

    def _forget(self, number: int) -> None:
        """Nobody waits for this one any more: if it has not begun it never will."""
        job = self._asked.pop(number, None)
        if job is None:
            return
        job.numbers.remove(number)
        queue = self._queue(job)
        if not job.numbers and job in queue:
            queue.remove(job)
            del self._jobs[job.key]

    def _send(self, number: int, body: bytes) -> None:
        head = sandbox_wire.ANSWER.pack(number, self._runs, self._pool.rebuilds)
        try:
            self._trainer.setblocking(True)
            sandbox_wire.send_frame(self._trainer, head + body)
            self._trainer.setblocking(False)
        except OSError:
            self._leave()
