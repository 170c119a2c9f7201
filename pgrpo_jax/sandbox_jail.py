"""What the kernel holds a judged program with: limits, system calls, paths, namespaces.

    limit()       resource limits of one program
    SystemCalls   seccomp filter: an allow list; what would make processes, sockets or reach other
                  processes answers EPERM and is told to the judge (seccomp(2), seccomp_unotify(2))
    landlock()    only the interpreter's files can be read, only scratch written (landlock(7))
    enter()       namespaces with their own root, processes and (no) network; must fork afterwards

Part of the sandbox: standard library only, called through ctypes, on x86-64 and aarch64.
"""

import ctypes
import fcntl
import os
import platform
import resource
import socket
import struct
import sys
import sysconfig

_libc = ctypes.CDLL(None, use_errno=True)
MEGABYTE = 1 << 20

# --- prctl


PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_NO_NEW_PRIVS = 38
# told once: each child would make an object for each argument
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


def prctl(option: int, value: int = 0, third: int = 0) -> None:
    """prctl(2), checked."""
    _checked("prctl", _libc.prctl(option, value, third, 0, 0))


def _checked(name: str, answer: int) -> int:
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return answer


def drop_capabilities() -> None:
    """For good: none now, none after an exec."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # past the last one, or none to drop from
    header = struct.pack("Ii", 0x20080522, 0)
    _checked("capset", _libc.capset(header, bytes(24)))


# --- what `os` and `fcntl` lack where the interpreter was built on an older C library than it runs
# on, as portable builds are

_PIDFD_OPEN = 434
_CLOSE_ON_EXEC, _ALLOW_SEALING = 1, 2  # of memfd_create(2)
_ADD_SEALS, _ALL_SEALS = 1033, 0b1111  # against seals, shrinking, growing and writing: fcntl(2)


def handle_of(pid: int) -> int:
    """A descriptor that becomes readable when the process ends (pidfd_open(2))."""
    return _checked("pidfd_open", _libc.syscall(_PIDFD_OPEN, pid, 0))


def memory_file() -> int:
    """A descriptor of an empty file in memory (memfd_create(2))."""
    flags = ctypes.c_uint(_CLOSE_ON_EXEC | _ALLOW_SEALING)
    return _checked("memfd_create", _libc.memfd_create(b"", flags))


def seal(descriptor: int) -> None:
    """Nobody can change the file in memory from now on."""
    fcntl.fcntl(descriptor, _ADD_SEALS, _ALL_SEALS)


# --- limits


MOST_OPEN = 128  # descriptors, from 0


def limit(cpu_s: int, memory_mb: int, file_mb: int) -> None:
    """Backstops inside the program's process; the judge's clock outside acts first.

    Address space is more than memory: the stacks of threads are reserved, not used, and a hundred
    threads are no attack. The judge watches the memory in use.
    """
    space = (memory_mb + 4096) * MEGABYTE
    for what, amount in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, space),
        (resource.RLIMIT_FSIZE, file_mb * MEGABYTE),
        (resource.RLIMIT_NOFILE, MOST_OPEN),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(what, (amount, amount))


# --- system calls

# fmt: off
_CALLS = {  # allowed: numbers on x86-64 and aarch64, None where it does not exist
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286),
    "pwritev2": (328, 287), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "msync": (26, 227), "mincore": (27, 232), "madvise": (28, 233), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132),
    "ioctl": (16, 29), "access": (21, None), "pipe": (22, None), "pipe2": (293, 59),
    "select": (23, None), "pselect6": (270, 72), "poll": (7, None), "ppoll": (271, 73),
    "sched_yield": (24, 124), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "getitimer": (36, 102),
    "setitimer": (38, 103), "alarm": (37, None), "pause": (34, None), "getpid": (39, 172),
    "getppid": (110, 173), "getpriority": (140, 141),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150),
    "getgroups": (115, 158), "getpgid": (121, 155), "getpgrp": (111, None), "getsid": (124, 156),
    "uname": (63, 160), "fcntl": (72, 25), "flock": (73, 32), "fsync": (74, 82),
    "fdatasync": (75, 83), "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47),
    "fadvise64": (221, 223), "readahead": (187, 213), "getdents": (78, None),
    "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "open": (2, None), "openat": (257, 56), "creat": (85, None), "stat": (4, None),
    "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43),
    "fstatfs": (138, 44), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None),
    "unlinkat": (263, 35), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "umask": (95, 166), "getrlimit": (97, 163), "setrlimit": (160, 164),
    "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "capget": (125, 90),
    "sched_getparam": (143, 121), "sched_getscheduler": (145, 120),
    "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126),
    "sched_getaffinity": (204, 123), "arch_prctl": (158, None), "futex": (202, 98),
    "set_tid_address": (218, 96), "set_robust_list": (273, 99), "get_robust_list": (274, 100),
    "rseq": (334, 293), "membarrier": (324, 283), "getcpu": (309, 168), "getrandom": (318, 278),
    "exit": (60, 93), "exit_group": (231, 94), "restart_syscall": (219, 128),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441),
    "eventfd": (284, None), "eventfd2": (290, 19), "timerfd_create": (283, 85),
    "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87), "timer_create": (222, 107),
    "timer_settime": (223, 110), "timer_gettime": (224, 108), "timer_delete": (226, 111),
    "timer_getoverrun": (225, 109), "copy_file_range": (326, 285), "sendfile": (40, 71),
    "close_range": (436, 436), "socketpair": (53, 199), "sendto": (44, 206), "recvfrom": (45, 207),
    "recvmsg": (47, 212), "shutdown": (48, 210), "getsockname": (51, 204),
    "getpeername": (52, 205), "getsockopt": (55, 209), "setsockopt": (54, 208),
    "wait4": (61, 260), "waitid": (247, 95),
}
_IGNORED = {  # answer 0 and do nothing: modes and times of scratch files are nobody's business
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "fchown": (93, 55), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88),
}
_UNSUPPORTED = {  # answer ENOTSUP, which copying a file expects of many file systems
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "getxattr": (191, 8),
    "lgetxattr": (192, 9), "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12),
    "flistxattr": (196, 13),
}
_REFUSED = {  # what programs try: names for reports; all that is in no table is refused as well
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "bind": (49, 200),
    "listen": (50, 201), "accept4": (288, 242), "sendmsg": (46, 211),
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "prctl": (157, 167),
    "prlimit64": (302, 261), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272), "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "setuid": (105, 146), "setgid": (106, 144),
    "setresuid": (117, 147), "setresgid": (119, 149), "setgroups": (116, 159), "capset": (126, 91),
    "chown": (92, None), "lchown": (94, None), "fchownat": (260, 54),
    "mknod": (133, None), "mknodat": (259, 33), "memfd_create": (319, 279), "shmget": (29, 194),
    "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "mlock": (149, 228), "mlockall": (151, 230), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_setup": (206, 0),
    "keyctl": (250, 219), "add_key": (248, 217), "seccomp": (317, 277),
    "landlock_create_ruleset": (444, 444), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "setpriority": (141, 140), "setpgid": (109, 154),
    "setsid": (112, 157), "personality": (135, 92), "inotify_init1": (294, 26),
    "fanotify_init": (300, 262), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "openat2": (437, 437), "syslog": (103, 116), "sethostname": (170, 161), "reboot": (169, 142),
    "init_module": (175, 105), "finit_module": (313, 273), "splice": (275, 76), "tee": (276, 77),
    "vmsplice": (278, 75), "memfd_secret": (447, 447), "adjtimex": (159, 171),
}
# fmt: on
_SECCOMP, _CLONE3 = (317, 277), (435, 435)
_CLONE, _PRCTL, _PRLIMIT = (_REFUSED[name] for name in ("clone", "prctl", "prlimit64"))
_SENDMSG = _REFUSED["sendmsg"]
_SIGNALS = tuple(_REFUSED[name] for name in ("kill", "tkill", "tgkill"))
_AUDIT = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_ALLOW, _ERRNO, _KILL, _ASK = 0x7FFF0000, 0x00050000, 0x80000000, 0x7FC00000
_EPERM, _ENOSYS, _ENOTSUP = 1, 38, 95
_SET_FILTER, _NEW_LISTENER = 1, 1 << 3
_ASKED, _ANSWER = struct.Struct("QIIiIQ6Q"), struct.Struct("QqiI")  # seccomp_notif and _resp
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # ioctls of a listener
_CLONE_THREAD = 0x00010000
_HARMLESS_PRCTL = (3, 15, 16, 0x53564D41)  # get dumpable, set and get name, name a mapping
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06


class SystemCalls:
    """The filter, built once; `install` puts it on the calling process for good.

    `told`: what is refused is first told to who holds the listener, see `refuse_next`. Not every
    container lets a process have one; then it is refused all the same, and nobody knows.
    """

    def __init__(self, told: bool):
        machine = platform.machine()
        if machine not in _AUDIT:
            raise OSError(
                f"no table of system calls for {machine}; there is one for {list(_AUDIT)}"
            )
        self._audit, self._column = _AUDIT[machine]
        self._told = told
        code = b"".join(self._assemble())
        self._own_pids = [i + 4 for i in range(0, len(code), 8) if code[i : i + 8] == _OWN_PID]
        self._buffer = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(self._buffer))
        self._program = ctypes.create_string_buffer(program, len(program))
        number, flags = _SECCOMP[self._column], _NEW_LISTENER
        self._call = ctypes.c_long(number), _SET_FILTER, ctypes.c_ulong(flags), self._program

    def install(self) -> int:
        """Needs no_new_privs. Signals go to the own process only: its number is compiled in.

        Returns the descriptor of the listener if there is to be one, else -1.
        """
        pid = os.getpid()
        for place in self._own_pids:
            struct.pack_into("I", self._buffer, place, pid)
        if not self._told:
            prctl(PR_SET_SECCOMP, 2, ctypes.addressof(self._program))
            return -1
        return _checked("seccomp", _libc.syscall(*self._call))

    def _assemble(self) -> list[bytes]:
        """A search tree over the numbers: the kernel runs the whole filter once for each of
        them."""
        allow, refuse = _give(_ALLOW), _give(_ASK if self._told else _ERRNO | _EPERM)
        actions = {numbers[self._column]: [allow] for numbers in _CALLS.values()}
        actions |= {numbers[self._column]: [_give(_ERRNO)] for numbers in _IGNORED.values()}
        unsupported = [_give(_ERRNO | _ENOTSUP)]
        actions |= {numbers[self._column]: unsupported for numbers in _UNSUPPORTED.values()}
        actions[_CLONE3[self._column]] = [_give(_ERRNO | _ENOSYS)]  # C libraries then use clone
        thread = _jump(_ANY_BIT, _CLONE_THREAD, 0, 1)
        actions[_CLONE[self._column]] = [_load(16), thread, allow, refuse]
        for numbers in _SIGNALS:
            actions[numbers[self._column]] = [_load(16), _OWN_PID, refuse, allow]
        # Descriptors on their way count for the user, not for the process: a program with many of
        # them would keep all others from starting. Only the zygote's own socket may carry them; its
        # number is one that no program can have.
        greeting = _jump(_EQUAL, MOST_OPEN, 0, 1)
        actions[_SENDMSG[self._column]] = [_load(16), greeting, allow, refuse]
        actions[_PRLIMIT[self._column]] = [_load(16), _jump(_EQUAL, 0, 0, 1), allow, refuse]
        options = [b for o in _HARMLESS_PRCTL for b in (_jump(_EQUAL, o, 0, 1), allow)]
        actions[_PRCTL[self._column]] = [_load(16), *options, refuse]
        known = {number: then for number, then in actions.items() if number is not None}
        starts = sorted({0, *known, *(number + 1 for number in known)})
        pieces: list[tuple[int, list[bytes]]] = []
        for number in starts:  # neighbours of equal action become one
            action = known.get(number, [refuse])
            if not pieces or pieces[-1][1] != action:
                pieces.append((number, action))
        head = [_load(4), _jump(_EQUAL, self._audit, 1, 0), _give(_KILL), _load(0)]
        return [*head, *_tree(pieces)]


def refuse_next(listener: int) -> str:
    """Refuses the call that waits at a listener with EPERM, and returns its name ("" if the caller
    died). Only when the listener is readable: without a call it would wait."""
    asked = bytearray(_ASKED.size)
    try:
        fcntl.ioctl(listener, _RECEIVE, asked)
        call, _, _, number, *_ = _ASKED.unpack(asked)
        fcntl.ioctl(listener, _SEND, bytearray(_ANSWER.pack(call, 0, -_EPERM, 0)))
    except OSError:
        return ""
    column = _AUDIT[platform.machine()][1]
    names = (name for name, numbers in _REFUSED.items() if numbers[column] == number)
    return next(names, f"call {number}")


def _tree(pieces: list[tuple[int, list[bytes]]]) -> list[bytes]:
    """Code that does the action of the last piece that begins at or below the loaded number."""
    if len(pieces) == 1:
        return pieces[0][1]
    middle = len(pieces) // 2
    below, above = _tree(pieces[:middle]), _tree(pieces[middle:])
    return [_jump(_AT_LEAST, pieces[middle][0], len(below), 0), *below, *above]


_OWN_PID = struct.pack("HBBI", _EQUAL, 1, 0, 0xFFFFFFFF)


def _load(offset: int) -> bytes:
    return struct.pack("HBBI", _LOAD, 0, 0, offset)


def _jump(test: int, value: int, yes: int, no: int) -> bytes:
    return struct.pack("HBBI", test, yes, no, value)


def _give(answer: int) -> bytes:
    return struct.pack("HBBI", _RETURN, 0, 0, answer)


# --- paths


def readable_paths(packages: list[str]) -> list[str]:
    """What an interpreter needs to import its library and `packages`: no more can be read."""
    known = sysconfig.get_paths()
    paths = [known["stdlib"], known["platstdlib"], *packages]
    paths += [os.path.join(sys.base_prefix, "lib"), os.path.join(sys.base_prefix, sys.platlibdir)]
    paths += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"]
    paths += ["/usr/share/zoneinfo"]
    kept: list[str] = []
    for path in sorted(set(paths)):
        if os.path.exists(path) and not any(path.startswith(k.rstrip("/") + "/") for k in kept):
            kept.append(path)
    return kept


SCRATCH = "/tmp"  # of a jail with a root of its own


def inside(path: str) -> str:
    """Where a readable path is found under a root of its own, whose /tmp is the scratch folder."""
    return f"/outer{path}" if path.startswith(f"{SCRATCH}/") else path


DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_RULESET_CREATE, _RULE_ADD, _RESTRICT = 444, 445, 446
_FS_READ = 0b1101  # execute, read a file, read a folder
_FS_READ_FILE, _FS_WRITE_FILE, _FS_REFER, _FS_TRUNCATE, _FS_IOCTL = 4, 2, 1 << 13, 1 << 14, 1 << 15
_FS_ALL = ((1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1)  # by version


def landlock(readable: list[str], scratch: str) -> int:
    """Restricts the calling process for good. Returns the kernel's version of Landlock, OSError
    without."""
    version = _checked("landlock", _libc.syscall(_RULESET_CREATE, None, 0, 1))
    handled = _FS_ALL[min(version, 5) - 1]
    network, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attribute = struct.pack("QQQ", handled, network, scoped)[
        : 8 * (1 + (version >= 4) + (version >= 6))
    ]
    size = ctypes.c_size_t(len(attribute))
    ruleset = _checked("landlock", _libc.syscall(_RULESET_CREATE, attribute, size, 0))
    files = _FS_READ_FILE | _FS_WRITE_FILE | (_FS_TRUNCATE | _FS_IOCTL) & handled
    rules = [(path, _FS_READ) for path in readable] + [(path, files) for path in DEVICES]
    # sockets, devices and pipes in the scratch folder are for nobody
    rules.append((scratch, handled & ~0b111001000001))
    for path, access in rules:
        folder = os.path.isdir(path)
        _add_rule(ruleset, path, access & handled if folder else access & files & handled)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    _checked("landlock", _libc.syscall(_RESTRICT, ruleset, 0))
    os.close(ruleset)
    return version


def _add_rule(ruleset: int, path: str, access: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", access, descriptor)
        _checked(f"landlock {path}", _libc.syscall(_RULE_ADD, ruleset, 1, rule, 0))
    finally:
        os.close(descriptor)


# --- namespaces

_NEW_MOUNT, _NEW_UTS, _NEW_IPC, _NEW_USER = 0x20000, 0x4000000, 0x8000000, 0x10000000
_NEW_PID, _NEW_NET, _NEW_CGROUP = 0x20000000, 0x40000000, 0x2000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT = 1, 2, 4, 8, 32
_NOATIME, _NODIRATIME, _BIND, _RECURSIVE, _PRIVATE, _RELATIME = (
    1024,
    2048,
    4096,
    16384,
    1 << 18,
    1 << 21,
)
_DETACH = 2
NOBODY = 65534
_SPACES = _NEW_MOUNT | _NEW_UTS | _NEW_IPC | _NEW_PID | _NEW_NET | _NEW_CGROUP


def enter() -> bool:
    """Leaves all namespaces of the caller. True if a user namespace was needed, False as real root.

    The next child is process 1 of the new ones; only that child may call `build_root`.
    """
    if os.geteuid() == 0 and _libc.unshare(_SPACES) == 0:
        return False
    user, group = os.geteuid(), os.getegid()
    _checked("unshare", _libc.unshare(_SPACES | _NEW_USER))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def build_root(readable: list[str], scratch_mb: int) -> None:
    """Gives the calling process a root of its own: the interpreter read-only, an empty /tmp, few
    devices."""
    root = "/tmp"
    sources = [(path, os.open(path, os.O_PATH)) for path in (*readable, *DEVICES)]
    _mount("", "/", "", _RECURSIVE | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=4m,nr_inodes=4096,mode=755")
    for path, descriptor in sources:
        _bind(descriptor, path, root)
        os.close(descriptor)
    for name, target in (("stdin", "0"), ("stdout", "1"), ("stderr", "2"), ("fd", "")):
        os.symlink(f"/proc/self/fd/{target}".rstrip("/"), f"{root}/dev/{name}")
    os.symlink(SCRATCH, f"{root}/dev/shm")  # where semaphores of threads are made
    for folder in ("/proc", SCRATCH, "/old"):
        os.mkdir(root + folder)
    _mount_proc(f"{root}/proc")
    limits = f"size={scratch_mb}m,nr_inodes=2048,mode=777"
    _mount("tmpfs", root + SCRATCH, "tmpfs", _NOSUID | _NODEV | _NOEXEC, limits)
    os.chdir(root)
    _checked("pivot_root", _libc.syscall(_PIVOT[platform.machine()], b".", b"old"))
    os.chdir("/")
    _checked("umount2", _libc.umount2(b"/old", _DETACH))
    os.rmdir("/old")
    _mount("", "/", "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    socket.sethostname("sandbox")


_PIVOT = {"x86_64": 155, "aarch64": 41}


def become_nobody() -> None:
    """For a real root: what is judged runs as nobody."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _mount_proc(target: str) -> None:
    """Only the own process is to be seen in it. Containers that mask /proc refuse: then there is
    none."""
    for options in ("hidepid=2,subset=pid", "hidepid=2"):
        try:
            return _mount("proc", target, "proc", _NOSUID | _NODEV | _NOEXEC, options)
        except OSError:
            continue


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    texts = [text.encode() or None for text in (source, target, kind)]
    answer = _libc.mount(*texts, ctypes.c_ulong(flags), options.encode() or None)
    _checked(f"mount {kind or source} on {target}", answer)


def _bind(descriptor: int, path: str, root: str) -> None:
    """The path behind a descriptor at its place under `root`."""
    place, source = root + inside(path), f"/proc/self/fd/{descriptor}"
    real = os.readlink(source)
    if os.path.isdir(source):
        os.makedirs(place, mode=0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), mode=0o755, exist_ok=True)
        os.close(os.open(place, os.O_CREAT | os.O_RDONLY, 0o644))
    _mount(source, place, "", _BIND | _RECURSIVE)
    if real.startswith("/dev/"):
        return
    kept = os.statvfs(place).f_flag
    locked = (
        (2, _NOSUID),
        (4, _NODEV),
        (8, _NOEXEC),
        (1024, _NOATIME),
        (2048, _NODIRATIME),
        (4096, _RELATIME),
    )
    flags = sum(flag for bit, flag in locked if kept & bit)
    _mount("", place, "", _REMOUNT | _BIND | _RDONLY | flags | _NOSUID)
