"""What `allocator` asks of malloc, seen from outside: in processes of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

HUGE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")

# No NumPy: its large arrays ask for huge pages themselves.
MEASURE = """
import resource
from pgrpo_jax import allocator

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def kb(file, name):
    lines = open("/proc/self/" + file).read().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])

{limit}
allocator.keep_freed_memory(huge_pages={huge_pages})
b"x" * 100_000_000
before = faults()
b"x" * 100_000_000
kept = b"x" * 100_000_000
print(faults() - before, kb("smaps_rollup", "AnonHugePages"), kb("status", "VmSize"))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")


def measured(limit: str = "", huge_pages: bool = True) -> tuple[int, int, int]:
    """Page faults of getting 100 MB twice that were freed before; kB in huge pages and of addresses
    taken."""
    code = MEASURE.format(limit=limit, huge_pages=huge_pages)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    again, huge_kb, addresses_kb = map(int, done.stdout.split())
    return again, huge_kb, addresses_kb


def test_freed_memory_is_not_paid_for_again():
    again, _, _ = measured(huge_pages=False)
    assert again < 25_000  # 100 MB are 24,414 pages, and only the second 100 MB are new


@pytest.mark.skipif(
    not HUGE.exists() or "[never]" in HUGE.read_text(), reason="this kernel gives none"
)
def test_large_arrays_lie_in_huge_pages():
    _, huge_kb, _ = measured()
    assert huge_kb > 80_000


def test_a_limit_of_addresses_is_not_spent_on_the_reserve():
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = 3 * machine // 4
    limit = f"resource.setrlimit(resource.RLIMIT_AS, ({allowed}, {allowed}))"
    assert measured(limit)[2] < machine / 2 / 1024 < measured()[2]
