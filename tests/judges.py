"""What this machine can do for a judge, asked of the kernel and not of the judge itself."""

import subprocess
import sys

_UNSHARE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
spaces = 0x6C020000 | (0 if os.geteuid() == 0 else 0x10000000)
raise SystemExit(libc.unshare(spaces) != 0)
"""
_LANDLOCK = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
raise SystemExit(libc.syscall(444, None, 0, 1) < 1)
"""


def tier_is_possible(tier: str) -> bool:
    """Namespaces, or Landlock, as such; a judge that then has no such tier is broken."""
    program = {"namespaces": _UNSHARE, "landlock": _LANDLOCK}[tier]
    return subprocess.run([sys.executable, "-c", program]).returncode == 0
