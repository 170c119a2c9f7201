"""The server's side of slots and runs: starting them, feeding them, reading them, timing them,
ending them.

Everything a run may use up is watched from here, outside the jail: CPU seconds by the clock of the
process, memory in use, seconds on the wall, bytes printed. Part of the sandbox: standard library
only.
"""

import contextlib
import json
import math
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

from pgrpo_jax import sandbox_jail, sandbox_wire

# Modules that reseed and relock after every fork would cost each run half a millisecond. A child of
# the zygote has nothing to reseed (see there) and, as its parent has one thread, nothing to relock.
_BOOT = (
    "import os, sys; os.register_at_fork = lambda **_: None; "
    " sys.path.append(sys.argv[1]); from pgrpo_jax import sandbox_zygote; "
    "sandbox_zygote.main(sys.argv[2:])"
)
# -I would ignore PYTHONHASHSEED: the same by parts, over an environment that holds nothing else.
_PYTHON = ("-S", "-s", "-P", "-B", "-c", _BOOT)
_ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "HOME": "/tmp",
    "PATH": "/nonexistent",
    "LD_BIND_NOW": "1",  # or each child would look functions up anew
    "PYTHONHASHSEED": "0",
    "PYTHONINTMAXSTRDIGITS": "0",
    "PYTHONUTF8": "1",
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
FIRST_LOOK_S, LOOK_S, LEAVE_S = 0.05, 0.025, 0.02
LONGEST_TURN_S = 3600.0
START_S, KILL_S = 60.0, 10.0  # a slot that takes longer is broken
PIPE_READ = 1 << 16
SCRATCH_MB, MOST_FILES = 64, 2048  # in the scratch folder
MOST_THREADS = 64  # that are looked at
MOST_DENIALS = 64  # refused system calls that are answered one by one
WALL_FACTOR, WALL_MORE_S = 20, 10.0  # seconds on the wall for one of CPU, and for everything
CORES = os.cpu_count() or 1


class Loop:
    """epoll with a handler a descriptor."""

    def __init__(self):
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}

    def watch(self, descriptor: int, handler: Callable[[], None]) -> None:
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, select.EPOLLIN)

    def forget(self, descriptor: int) -> None:
        del self._handlers[descriptor]
        self._epoll.unregister(descriptor)

    def turn(self, timeout_s: float) -> None:
        for descriptor, _ in self._epoll.poll(min(max(timeout_s, 0), LONGEST_TURN_S)):
            if descriptor in self._handlers:  # an earlier handler of this turn may have closed it
                self._handlers[descriptor]()


class Limits:
    """Of one run. `cpu_s` is for a part of it: a test; the clock is set back by
    `Run.begin_part`. `whole_s` is for all parts together."""

    def __init__(
        self,
        cpu_s: float,
        memory_mb: int,
        output_kb: int,
        scratch_mb: int,
        whole_s: float = 0.0,
    ):
        self.cpu_s = cpu_s
        self.whole_s = max(cpu_s, whole_s)
        self.memory_mb = memory_mb
        self.output = output_kb * 1024
        self.scratch_mb = scratch_mb
        self.total_cpu_s = math.ceil(self.whole_s) + 2
        self.idle_s = 2 * cpu_s + 1  # waiting for nothing, such as sleeping
        self.wall_s = WALL_FACTOR * cpu_s + WALL_MORE_S  # whatever the load of the machine is


class Run:
    """One process in a slot: from the order to its report and the end of its pipes.

    `stopped` says why the judge ended it: "timeout", "memory", "output", "over", "busy" (the
    machine, with other things) or "".
    """

    def __init__(self, slot: "Slot", number: int, limits: Limits):
        self.slot, self.number, self.limits = slot, number, limits
        self.output, self.errors = bytearray(), bytearray()
        self.pid = 0
        self.status: int | None = None
        self.cpu_s = self.peak_mb = 0.0
        self.stopped = ""
        self.started = self.part_started = time.monotonic()
        self.look_at = self.started + START_S
        self.part_cpu_s = self.part_waited_s = 0.0
        self.channel: Channel | None = None  # on which it tells the end of its parts
        self.companion: Run | None = None  # the other process of a pair
        self.denied: set[str] = set()  # names of system calls that were refused
        self._leaving = False
        self._denials = 0
        self._listener = -1
        self._pipes: dict[int, bytearray] = {}

    @property
    def over(self) -> bool:
        return self.status is not None and not self._pipes

    def began(self, pid: int, listeners: list[int]) -> None:
        self.pid = pid
        for self._listener in listeners:
            self.slot.loop.watch(self._listener, self._refuse)
        self.started = self.part_started = time.monotonic()
        self.look_at = self.started + min(FIRST_LOOK_S, self.limits.cpu_s / CORES)

    def _refuse(self) -> None:
        """A system call waits for its refusal, or the process has ended. One that insists is not
        listened to any longer: the kernel then refuses in the judge's place."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        if any(event & select.POLLIN for _, event in poll.poll(0)):
            self.denied |= {sandbox_jail.refuse_next(self._listener)} - {""}
            self._denials += 1
        else:
            self._denials = MOST_DENIALS
        if self._denials >= MOST_DENIALS:
            self._stop_listening()

    def _stop_listening(self) -> None:
        if self._listener >= 0:
            self.slot.loop.forget(self._listener)
            os.close(self._listener)
            self._listener = -1

    def begin_part(self) -> None:
        """The next test: CPU and wall seconds count from here."""
        self.part_started = now = time.monotonic()
        if now - self.started > self.limits.idle_s:  # before that nobody asks
            self.part_waited_s = self._waited_for_a_core()
        self.part_cpu_s = self.cpu_clock()

    def cpu_clock(self) -> float:
        """CPU seconds so far, of a living process by its clock (clock_getcpuclockid(3))."""
        if self.status is None and self.pid:
            with contextlib.suppress(OSError):
                self.cpu_s = time.clock_gettime((~self.pid << 3) | 2)
        return self.cpu_s

    def part_s(self) -> float:
        """CPU seconds of the part so far."""
        return self.cpu_clock() - self.part_cpu_s

    def waited_s(self) -> float:
        """Seconds of the part in which its threads could have run but the machine was busy."""
        return max(self._waited_for_a_core() - self.part_waited_s, 0.0)

    def look(self, now: float) -> None:
        """Has it used up something? Called when `look_at` has come, and when a part has ended."""
        if self.status is not None or now < self.look_at:
            return
        if self.stopped or not self.pid:
            self.slot.broken = True  # did not start, or did not die when it was killed
            return
        if self._leaving:
            return self.stop("over")
        left = min(self.limits.cpu_s - self.part_s(), self.limits.whole_s - self.cpu_s)
        wall = now - self.part_started
        if left <= 0:
            if self.cpu_s < self.limits.whole_s and self.channel and self.channel.unread():
                self.look_at = now + 0.002  # it may be at a later part: listen first
                return None
            return self.stop("timeout")
        if wall > self.limits.idle_s:
            waited = self.waited_s()
            if self.companion is not None:  # one of them waits while the other works
                waited += self.companion.waited_s() + self.companion.part_s()
            if wall - waited > self.limits.idle_s:
                return self.stop("timeout")
            if wall > self.limits.wall_s:
                return self.stop("busy")
        if self._memory_mb() > self.limits.memory_mb:
            return self.stop("memory")
        if self.slot.scratch_is_full(self.limits.scratch_mb):
            return self.stop("output")
        self.look_at = now + max(0.002, min(LOOK_S, left / CORES))

    def leave(self) -> None:
        """It has said all that was asked of it and should end by itself, at once."""
        self._leaving = True
        self.look_at = time.monotonic() + LEAVE_S

    def stop(self, why: str) -> None:
        if self.status is None and not self.stopped:
            self.stopped = why
            self.look_at = time.monotonic() + KILL_S
            self.slot.send(sandbox_wire.ORDER.pack(sandbox_wire.KILL, self.number, 0, 0, 0, 0))

    def _waited_for_a_core(self) -> float:
        waited_ns = 0
        with contextlib.suppress(OSError, ValueError, IndexError):
            for thread in os.listdir(f"/proc/{self.pid}/task")[:MOST_THREADS]:
                with open(f"/proc/{self.pid}/task/{thread}/schedstat") as file:
                    waited_ns += int(file.read().split()[1])
        return waited_ns * 1e-9

    def _memory_mb(self) -> float:
        with (
            contextlib.suppress(OSError, ValueError, IndexError),
            open(f"/proc/{self.pid}/statm") as file,
        ):
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / (1 << 20)
        return 0.0

    def read(self, pipe: int, into: bytearray) -> None:
        """Takes what comes out of a pipe; more than the limit ends the run and is not kept."""
        self._pipes[pipe] = into
        self.slot.loop.watch(pipe, lambda: self._read(pipe))

    def _read(self, pipe: int) -> None:
        data, into = os.read(pipe, PIPE_READ), self._pipes[pipe]
        if not data:
            self._close(pipe)
            self.slot.resume()
        elif len(into) + len(data) <= self.limits.output:
            into.extend(data)
        else:
            self.stop("output")

    def _close(self, pipe: int) -> None:
        self.slot.loop.forget(pipe)
        os.close(pipe)
        del self._pipes[pipe]

    def abandon(self) -> None:
        """The slot is being closed: the run never reports."""
        for pipe in list(self._pipes):
            self._close(pipe)
        self._retire()

    def ended(self, status: int, cpu_s: float, peak_kb: int) -> None:
        self._retire()
        self.status, self.cpu_s, self.peak_mb = status, cpu_s, peak_kb / 1024

    def _retire(self) -> None:
        self._stop_listening()
        self.companion = None  # or the two keep each other's outputs, until they are collected


Work = Generator[None, None, Any]


class InfraError(Exception):
    """The judge failed, not the program."""


class Slot:
    """One jail with its zygote. `work` is a generator, resumed whenever something happened here."""

    def __init__(self, loop: Loop, settings: dict[str, Any], package_root: str):
        self.loop = loop
        self.said = ""  # what the zygote said of its jail, or of why it has none
        self.ready = self.broken = False
        self.work: Work | None = None
        self.runs: dict[int, Run] = {}
        self._numbers = 0
        self._scratch = settings["scratch"] if settings["tier"] == "landlock" else ""
        self._ready_until = time.monotonic() + START_S
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._pid = os.posix_spawn(
            sys.executable,
            [sys.executable, *_PYTHON, package_root, json.dumps(settings)],
            _ENVIRONMENT,
            file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), sandbox_wire.CONTROL)],
        )
        theirs.close()
        loop.watch(self._control.fileno(), self._hear)

    def start(
        self, role: int, job: int, limits: Limits, stdin: bytes = b"", more: tuple[int, ...] = ()
    ) -> Run:
        """Orders a run. `job` is a sealed file that the run reads, `more` its channel and verdict
        pipe.

        The caller keeps `job` and gives `more` away.
        """
        self._numbers += 1
        run = self.runs[self._numbers] = Run(self, self._numbers, limits)
        out, out_end = os.pipe2(os.O_CLOEXEC)
        err, err_end = os.pipe2(os.O_CLOEXEC)
        for end in (out_end, err_end):
            os.fchmod(end, 0o622)  # so that whoever runs there can open /dev/stdout
        given = (sealed_file(stdin), out_end, err_end)
        file_mb = limits.scratch_mb
        order = (sandbox_wire.RUN, run.number, role, limits.total_cpu_s, limits.memory_mb, file_mb)
        self.send(sandbox_wire.ORDER.pack(*order), [*given, job, *more])
        for descriptor in (*given, *more):
            os.close(descriptor)
        run.read(out, run.output)
        run.read(err, run.errors)
        return run

    def send(self, packet: bytes, descriptors: list[int] | None = None) -> None:
        rights = struct.pack(f"{len(descriptors)}i", *descriptors) if descriptors else b""
        try:
            self._control.sendmsg(
                [packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
            )
        except OSError:
            self.broken = True

    def _hear(self) -> None:
        try:
            packet, listeners, pid = sandbox_wire.receive_descriptors(self._control, 4096, 1)
        except ConnectionError:
            packet, listeners, pid = b"", [], 0
        if not packet:
            self.broken = True
        elif packet[0] == sandbox_wire.HELLO:
            self.runs[struct.unpack("!I", packet[1:])[0]].began(pid, listeners)
        elif packet[0] == sandbox_wire.ENDED:
            _, number, status, cpu_s, peak_kb = sandbox_wire.REPORT.unpack(packet)
            self.runs.pop(number).ended(status, cpu_s, peak_kb)
            self.resume()
        else:
            self.said, self.ready = packet[1:].decode(), packet[0] == sandbox_wire.READY
            self.broken = not self.ready

    def resume(self) -> None:
        """Lets the work go on; it returns when it has nothing more to wait for."""
        if self.work is None:
            return
        try:
            next(self.work)
        except StopIteration:
            self.work = None

    def look(self, now: float) -> None:
        for run in list(self.runs.values()):
            run.look(now)
        if not self.ready and now > self._ready_until:
            self.said, self.broken = f"a slot did not start within {START_S:.0f} s", True

    def next_look(self) -> float:
        looks = [run.look_at for run in self.runs.values()]
        return min(looks if self.ready else [*looks, self._ready_until], default=math.inf)

    def scratch_is_full(self, limit_mb: int) -> bool:
        """Looked at only where no file system of its own sets the limit."""
        blocks = files = 0
        for folder, folders, names in os.walk(self._scratch) if self._scratch else ():
            files += len(names) + len(folders)
            if files > MOST_FILES:
                return True
            with contextlib.suppress(OSError):
                blocks += sum(os.lstat(os.path.join(folder, name)).st_blocks for name in names)
        return blocks * 512 > limit_mb << 20

    def close(self) -> None:
        """Kills whatever is left of it. The work is not resumed any more."""
        if self.work is not None:
            self.work.close()
            self.work = None
        for run in self.runs.values():
            run.abandon()
        self.runs.clear()
        self.loop.forget(self._control.fileno())
        self._control.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


class Channel:
    """The server's end of a stream of messages out of a run. `ended` when no more can come."""

    def __init__(self, slot: Slot, limit: int):
        self._slot = slot
        self._frames = sandbox_wire.Frames(limit)
        self._socket, theirs = socket.socketpair()
        self.given = theirs.detach()
        self.messages: list[bytes] = []
        self.ended = False
        slot.loop.watch(self._socket.fileno(), self._hear)

    def _hear(self) -> None:
        try:
            data = self._socket.recv(PIPE_READ)
            self.messages += self._frames.feed(data)
        except (ConnectionError, sandbox_wire.Malformed):
            data = b""
        if not data:
            self.close()
        self._slot.resume()

    def go_on(self, parts: int = 1) -> None:
        """Lets the run begin with so many more parts."""
        with contextlib.suppress(OSError):
            self._socket.send(b"\0" * parts, socket.MSG_DONTWAIT)

    def unread(self) -> bool:
        """Has the run said anything that was not looked at yet?"""
        if self.messages or self.ended or self._frames.begun():
            return bool(self.messages or not self.ended)
        with contextlib.suppress(OSError):
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        return False

    def close(self) -> None:
        if not self.ended:
            self.ended = True
            self._slot.loop.forget(self._socket.fileno())
            self._socket.close()


def sealed_file(data: bytes) -> int:
    """A descriptor of a file in memory that nobody can change."""
    descriptor = sandbox_jail.memory_file()
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    sandbox_jail.seal(descriptor)
    return descriptor
