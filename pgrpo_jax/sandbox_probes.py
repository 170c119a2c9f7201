"""Small attacks that the judge makes on its own jail before it trusts it.

Each is a piece of a program. A tier counts only if all of them are held off on this machine, tried
through the same path as any program. A probe gets through if it ends without an exception; one that
gets through does no harm.

Part of the sandbox: standard library only.
"""

import os

FOLDERS = ("/dev/shm", "/var/tmp", "/tmp", "/run/lock", "/")
PROBES = {
    "read a file outside": "open(outside).read(1)",
    "list folders outside": "os.listdir(os.path.dirname(outside))",
    "write a file outside": "create(outside + '.probe')",
    "change the interpreter's library": "open(os.__file__, 'a')",
    "start a process": "os.fork() or os._exit(0)",
    "start a process by vfork": "import subprocess; subprocess.Popen(['/bin/true'])",
    "run another program": "refused(lambda: os.execv('/nonexistent', ['x']))",
    "open a TCP socket": "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "open a UDP socket": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "open a unix socket": "socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
    "signal the parent": "os.kill(os.getppid(), 0)",
    "signal everybody": "os.kill(-1, 0)",
    "trace the parent": "call('ptrace', 16, os.getppid(), 0, 0)",
    "read the memory of the parent": "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "read the environment of the parent": "open(f'/proc/{os.getppid()}/environ', 'rb').read(1)",
    "look into the parent's descriptors": "os.listdir(f'/proc/{os.getppid()}/fd')",
    "enter new namespaces": "call('unshare', 0x10000000)",
    "mount": "call('mount', b'none', b'/nonexistent', b'tmpfs', 0, None)",
    "change root": "os.chroot('/')",
    "become root": "os.setuid(0); open('/etc/shadow')",
    "use io_uring": "call('syscall', 425, 1, ctypes.create_string_buffer(120))",
    "keep memory after its end": "call('shmget', 0, 4096, 0o1600)",
    "hide memory in a descriptor": "call('memfd_create', b'x', 0)",
    "survive the death of its parent": "call('prctl', 1, 0, 0, 0, 0)",
    "change another process's limits": "import resource; "
    "resource.prlimit(os.getppid(), resource.RLIMIT_CORE)",
    "hold descriptors that are not its own": "os.fstat(3)",
}

_HEAD = """
import ctypes, errno, os, socket
outside, trace = input(), input()
libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1 and ctypes.get_errno() in (errno.EPERM, errno.EACCES):
        raise OSError(ctypes.get_errno(), name)

def refused(action):
    try:
        action()
    except PermissionError:
        raise
    except OSError:
        pass

def leave(folder):
    try:
        with open(os.path.join(folder, trace), 'w'):
            pass
    except OSError:
        pass

def create(path):
    with open(path, 'w'):
        os.unlink(path)
"""


def program(names: list[str] | None = None) -> str:
    """A script that prints the names of the probes that get through, and a last line."""
    parts = [_HEAD]
    for name in names or PROBES:
        body = f"try:\n    {PROBES[name]}\n    print({name!r})\nexcept Exception:\n    pass\n"
        parts.append(body)
    leave = f"for folder in {FOLDERS!r}:\n    leave(folder)\n"
    return "".join([*parts, leave, "print('done')\n"])


def stdin(outside: str, trace: str) -> bytes:
    """What the script wants to read: a file that it must not reach, and a name for a file that it
    leaves in FOLDERS. A jail may have folders of these names; the machine's must not have it."""
    return f"{outside}\n{trace}\n".encode()


def left_behind(trace: str) -> list[str]:
    """FOLDERS of this machine in which the script could leave its file, which is deleted."""
    paths = [os.path.join(folder, trace) for folder in FOLDERS]
    found = [path for path in paths if os.path.exists(path)]
    for path in found:
        os.unlink(path)
    return [f"write to {os.path.dirname(path)}" for path in found]
