"""One slot: a jail made once, and in it a single-threaded process that forks a child for every run.

The zygote handles numbers and descriptors only. Programs, inputs, tests and outputs pass it by as
descriptors that it never reads, so that no run can find another run's data in its own copy of this
memory. It runs no foreign code; its children do, after they have given up everything else.

Packets on the control socket (descriptor 3, SOCK_SEQPACKET), to the zygote:

    RUN  number role cpu_s memory_mb file_mb, and: stdin stdout stderr job [channel [verdicts]]
    KILL number

and from it: READY text or BROKEN text once; HELLO number, sent by the child itself, so that the
kernel tells the server its process id, with the listener of its refused system calls; ENDED number
status cpu_s peak_kb. The end of the stream ends the slot.

Part of the sandbox: standard library only.
"""

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import locale
import os
import posix
import random
import select
import signal
import socket
import struct
import sys

from pgrpo_jax import sandbox_jail, sandbox_run, sandbox_tests, sandbox_wire

THREAD_STACK_MB = 16

# Loaded before the first fork, so that programs need not. More of them would slow each fork down.
_MODULES = """
array bisect cmath collections contextlib copy dataclasses datetime decimal enum fractions functools
heapq io itertools json math numbers operator os queue random re statistics string struct sys
textwrap threading time traceback types typing
""".split()  # noqa: SIM905


def main(arguments: list[str]) -> None:
    """`arguments` is one JSON object: tier, scratch, scratch_mb, readable, packages, preload."""
    settings = json.loads(arguments[0])
    os.setsid()  # here, since posix_spawn cannot do it everywhere
    control = socket.socket(fileno=sandbox_wire.CONTROL)
    try:
        said = _prepare(settings)
        calls = _system_calls(settings["tier"])
    except (OSError, ImportError) as error:
        control.send(bytes([sandbox_wire.BROKEN]) + str(error).encode())
        return
    control.send(bytes([sandbox_wire.READY]) + said.encode())
    # where no program can have a descriptor, see `SystemCalls`
    os.dup2(sandbox_wire.CONTROL, sandbox_jail.MOST_OPEN, inheritable=False)
    control.close()
    control = socket.socket(fileno=sandbox_jail.MOST_OPEN)
    alone = settings["tier"] == "namespaces"
    _Slot(control, settings["scratch"], calls, alone).serve()


def _prepare(settings: dict) -> str:
    """Enters the jail, loads what programs import, and says what holds."""
    tier, scratch, packages = settings["tier"], settings["scratch"], settings["packages"]
    paths = [path for path in sys.path if path not in settings["hidden"]] + packages
    user_namespace = sandbox_jail.enter() if tier == "namespaces" else True
    if tier == "namespaces":
        paths = [sandbox_jail.inside(path) for path in paths]
        _stay_outside_while_it_lives()
        sandbox_jail.build_root(settings["readable"], settings["scratch_mb"])
        if not user_namespace:
            sandbox_jail.become_nobody()
    sandbox_jail.prctl(sandbox_jail.PR_SET_PDEATHSIG, signal.SIGKILL)
    _set_thread_stack()
    _name_a_locale_that_is_here()
    sys.path[:] = paths
    for name in _MODULES + settings["preload"]:
        importlib.import_module(name)
    _seed()
    if tier == "landlock":  # with namespaces /dev/shm is the scratch folder
        importlib.import_module("pgrpo_jax.sandbox_semaphore").install()
    os.register_at_fork = posix.register_at_fork  # see sandbox_slot
    _hide_the_sandbox()
    sandbox_run.install_builtins()
    _make_streams()
    os.chdir(scratch)
    said = tier
    if tier == "landlock":
        said = f"landlock {sandbox_jail.landlock(settings['readable'], scratch)}"
    sandbox_jail.prctl(sandbox_jail.PR_SET_NO_NEW_PRIVS, 1)
    sandbox_jail.drop_capabilities()
    sandbox_jail.prctl(sandbox_jail.PR_SET_DUMPABLE, 0)
    gc.collect()
    gc.freeze()
    return said


def _seed() -> None:
    """What a program draws is the same in every run, as its hashes are."""
    random.seed(0)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(0)


def _hide_the_sandbox() -> None:
    """A program imports what any interpreter has. Done here: every page that a child writes to
    costs it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "pgrpo_jax"]:
        del sys.modules[name]


def _make_streams() -> None:
    """sys.stdin and the like for the children, on descriptors of the kind that they will have, once
    they have been used as children do."""
    kept = [os.dup(descriptor) for descriptor in range(3)]
    out, out_end = os.pipe()
    given = sandbox_jail.memory_file()
    for descriptor, like in enumerate((given, out_end, out_end)):
        os.dup2(like, descriptor)
    sandbox_run.rehearse()
    os.ftruncate(given, 0)
    sandbox_run.open_streams()
    for descriptor, before in enumerate(kept):
        os.dup2(before, descriptor)
        os.close(before)
    for descriptor in (given, out, out_end):
        os.close(descriptor)


def _stay_outside_while_it_lives() -> None:
    """Only a child is in the new process namespace: its process 1. The parent waits for its end.

    A parent that is killed takes the child along from its first moment: a slow start would else go
    on with nobody to tell. `_prepare` asks again, since a change of user forgets it.
    """
    ready, told = os.pipe()
    child = os.fork()
    if child:
        os.close(sandbox_wire.CONTROL)
        os.close(told)
        os.waitpid(child, 0)
        os._exit(0)
    os.close(ready)
    sandbox_jail.prctl(sandbox_jail.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        os.write(told, b"\0")
    except BrokenPipeError:  # the parent was killed before
        os._exit(1)
    os.close(told)


def _set_thread_stack() -> None:
    """The server gives slots a large stack for recursion; threads would each reserve as much."""
    libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    if hasattr(libc, "pthread_setattr_default_np"):
        libc.pthread_attr_init(attributes)
        libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(THREAD_STACK_MB << 20))
        libc.pthread_setattr_default_np(attributes)


def _name_a_locale_that_is_here() -> None:
    """Some old or bare systems have no C.UTF-8; programs that ask for the environment's locale
    would all end there. Text is UTF-8 in any: the interpreter is told so apart."""
    try:
        locale.setlocale(locale.LC_CTYPE, "")  # as the interpreter did at its start
    except locale.Error:
        os.environ["LC_ALL"] = "C"


class _Slot:
    """`alone`: this is process 1 of a namespace, and may kill whatever is left in it."""

    def __init__(
        self,
        control: socket.socket,
        scratch: str,
        calls: sandbox_jail.SystemCalls | None,
        alone: bool,
    ):
        self._control = control
        self._scratch = scratch
        self._alone = alone
        self._calls = calls
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._runs: dict[
            int, tuple[int, int]
        ] = {}  # descriptor of a process: its id, number of the run

    def serve(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._control.fileno():
                    self._bury(descriptor)
                elif not self._obey():
                    return self._stop()

    def _obey(self) -> bool:
        packet, descriptors, _ = sandbox_wire.receive_descriptors(
            self._control, sandbox_wire.ORDER.size, 6
        )
        if not packet:
            return False
        order, number, *rest = sandbox_wire.ORDER.unpack(packet)
        if order == sandbox_wire.RUN:
            self._start(number, rest, descriptors)
        else:
            for pid, running in self._runs.values():
                if running == number:
                    os.kill(pid, signal.SIGKILL)
        return True

    def _start(self, number: int, rest: list[int], descriptors: list[int]) -> None:
        try:
            pid = os.fork()
        except OSError:
            pid = -1
        if pid == 0:
            self._child(number, rest, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        if pid < 0:
            return self._report(number, -1, 0.0, 0)
        handle = sandbox_jail.handle_of(pid)
        self._runs[handle] = pid, number
        self._poll.register(handle, select.POLLIN)

    def _child(self, number: int, rest: list[int], descriptors: list[int]) -> None:
        """Never returns. The hello is its last word to the judge: a run without one is no fault of
        the program."""
        role, cpu_s, memory_mb, file_mb = rest
        try:
            sandbox_jail.prctl(sandbox_jail.PR_SET_PDEATHSIG, signal.SIGKILL)
            os.setsid()
            sandbox_jail.limit(cpu_s, memory_mb, file_mb)
            # /dev/stdin is a link into the own folder of /proc; the tests' process stays closed
            sandbox_jail.prctl(sandbox_jail.PR_SET_DUMPABLE, int(role != sandbox_wire.TESTS))
            listener = self._calls.install() if self._calls else -1
            self._greet(number, listener)
            _place(descriptors)
            if role == sandbox_wire.TESTS:
                sandbox_tests.run()
            sandbox_run.run(role)
        finally:
            os._exit(1)

    def _greet(self, number: int, listener: int) -> None:
        hello = bytes([sandbox_wire.HELLO]) + struct.pack("!I", number)
        if listener < 0:
            self._control.send(hello)
        else:
            rights = struct.pack("i", listener)
            self._control.sendmsg([hello], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            os.close(listener)

    def _bury(self, descriptor: int) -> None:
        pid, number = self._runs.pop(descriptor)
        self._poll.unregister(descriptor)
        os.close(descriptor)
        _, status, usage = os.wait4(pid, 0)
        if not self._runs:
            self._clean()
        self._report(
            number,
            os.waitstatus_to_exitcode(status),
            usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss,
        )

    def _report(self, number: int, status: int, cpu_s: float, peak_kb: int) -> None:
        self._control.send(
            sandbox_wire.REPORT.pack(sandbox_wire.ENDED, number, status, cpu_s, peak_kb)
        )

    def _clean(self) -> None:
        """No process and no file of a run outlives it."""
        if self._alone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.waitpid(-1, 0)
        _empty(self._scratch)

    def _stop(self) -> None:
        for pid, _ in self._runs.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        _empty(self._scratch)


def _system_calls(tier: str) -> sandbox_jail.SystemCalls | None:
    try:
        return sandbox_jail.SystemCalls(told=_listener_is_allowed())
    except OSError:
        if tier != "unsafe":
            raise
    return None


def _listener_is_allowed() -> bool:
    """Tried in a child: a filter is for good, and some containers have a listener of their own."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(int(sandbox_jail.SystemCalls(told=True).install() < 0))
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _place(descriptors: list[int]) -> None:
    """Descriptors to 0, 1, 2 (stdin, stdout, stderr), job, channel, verdicts; all others closed.

    First out of the way, since they may lie on each other's places.
    """
    high = [fcntl.fcntl(d, fcntl.F_DUPFD_CLOEXEC, 32) for d in descriptors]
    for place, descriptor in enumerate(high):
        os.dup2(descriptor, place)
    os.closerange(len(descriptors), 1024)


def _empty(folder: str) -> None:
    """Deletes all in a folder, but follows no link, and gets through whatever modes and depths a
    program left."""
    with os.scandir(folder) as entries:
        found = list(entries)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            os.chmod(entry.path, 0o700)
            _empty(entry.path)
            os.rmdir(entry.path)
        else:
            os.unlink(entry.path)
