"""Reading the TPU compiler's schedule, by hand on small ones and on a dump of a real kernel."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kernel_cases_paged, kernels, tpu_static, xla_ops
from benchmarks.tpu_static import Kernel, Node

UNITS = {"MXU": 4, "VALU": 4, "VLOAD": 3, "VLOAD:FILL": 3}


def bundles(count, **code):
    """`count` bundles, empty but for `code` given by number (`at3="..."`)."""
    return [f" {i:#x}   : {{ {code.get(f'at{i}', '')} }}" for i in range(count)]


def test_bundles_are_read_with_the_lines_that_go_on():
    text = "head\n     0   :  { a }\n 0x1 LB: > { b ;;\n   c }\n 0x2   : >> { d }"
    assert [b.split()[-2] for b in tpu_static.read_bundles(text)] == ["a", "c", "d"]


def test_a_missing_bundle_is_an_error():
    with pytest.raises(ValueError, match="bundle 1 of a dump calls itself 0x2"):
        tpu_static.read_bundles(" 0x0   : { a }\n 0x2   : { b }")


def test_usage_has_a_row_a_bundle():
    text = "== CAPACITY:\nMXU, VALU\n    4     4\n== UTILIZATION:\n0 2\n4 1\n"
    count, rows = tpu_static.read_usage(text)
    assert count == {"MXU": 4, "VALU": 4}
    assert rows == [{"MXU": 0, "VALU": 2}, {"MXU": 4, "VALU": 1}]


def test_branches_back_are_loops_and_branches_forward_skip():
    code = bundles(
        40,
        at4="sbr.rel (%p1) target bundleno = 30",  # skips from behind its delay slots: 9 to 30
        at12="%s1 = sadd.s32 2, %s1",
        at20="%p2 = scmp.lt.s32.totalorder %s1, 8 ;; sbr.rel (%p2) target bundleno = 10",
    )
    root = tpu_static.read_tree(code)
    (region,) = root.children
    (loop,) = region.children
    assert (region.kind, region.start, region.end) == ("if", 9, 30)
    assert (loop.kind, loop.start, loop.end, loop.trips) == ("loop", 10, 25, 4)  # 8 / 2
    assert len(root.own()) == 40 - 21
    assert len(region.own()) == 21 - 15


def test_a_bound_that_is_no_constant_gives_no_trips():
    root = tpu_static.read_tree(
        bundles(20, at9="%p = scmp.lt.s32 %s1, %s2 ;; sbr.rel (%p) target bundleno = 3")
    )
    assert root.children[0].trips is None


def test_a_pass_counts_each_region_as_often_as_it_is_said_to_run():
    root = Node("root", 0, 100, children=[Node("loop", 10, 90)])
    root.children[0].children = [Node("if", 20, 40), Node("loop", 50, 60, trips=3)]
    usage = [dict.fromkeys(UNITS, 0) | {"MXU": 4 * (20 <= i < 30)} for i in range(100)]
    kernel = Kernel("k", bundles(100), UNITS, usage, 0, root)
    loop = kernel.main_loop()
    assert (loop.start, loop.end) == (10, 90)
    # 80 - 20 - 10 always, the region with matrix work once, the loop of 10 three times.
    assert kernel.step() == 50 + 20 + 30
    assert kernel.passed(loop, lambda node: 0) == 50
    assert kernel.hot().start == 20
    assert kernel.unit_floors(range(100)) == {"MXU": 10, "VALU": 0, "VLOAD": 0}


def test_vmem_reaches_from_the_lowest_to_the_highest_address():
    text = """
    #allocation2 [shape = 'u8[8192]{0}', space=vmem, size = 0x2000, offset = 0x1000, tag = 'a']
    #allocation3 [shape = 'u8[256]{0}', space=smem, size = 0x100, offset = 0x9000, tag = 'b']
    #allocation4 [shape = 'u8[4096]{0}', space=vmem, size = 0x1000, offset = 0x4000, tag = 'c']
    """
    assert tpu_static.read_vmem_bytes(text) == 0x5000 - 0x1000


def test_core_bytes_per_cycle_are_the_cores_share():
    # 2.765e12 / 2 cores / 1.75e9 cycles
    assert tpu_static.CHIPS["v5p"].core_bytes_per_cycle == pytest.approx(790)


def test_a_block_of_keys_pays_for_its_copies_and_its_products():
    """A loop of 100: one that copies 8 pages in 20, one of a page in 5, a slot's end of 30."""
    chunk, single, end = Node("loop", 10, 30), Node("loop", 30, 35), Node("if", 50, 80)
    root = Node("root", 0, 120, children=[Node("loop", 0, 100, children=[chunk, single, end])])
    copy = kernel_cases_paged.PAGE_COPY
    code = bundles(120, at31=copy, **{f"at{i}": copy for i in range(10, 18)})
    usage = [dict.fromkeys(UNITS, 0) | {"MXU": 4 * (i >= 85) * (i < 95)} for i in range(120)]
    kernel = Kernel("k", code, UNITS, usage, 0, root)
    always = 100 - 20 - 5 - 30
    assert kernel_cases_paged.block_cycles([kernel], pages=16) == always + 2 * 20
    assert kernel_cases_paged.block_cycles([kernel], pages=19) == always + 2 * 20 + 3 * 5


def test_a_splash_call_visits_the_causal_blocks_and_begins_and_ends_a_row_of_them_once():
    """A step of 180: 20 only begin a row and 10 only end it. Of two regions with matrix work, 40
    with the mask and 30 without, a visit takes one, the longer: 80 + 40 a visit, 30 a row."""
    masked, plain = Node("if", 50, 90), Node("if", 100, 130)
    begin, end = Node("if", 20, 40), Node("if", 140, 150)
    steps = Node("loop", 10, 190, children=[begin, masked, plain, end])
    usage = [
        dict.fromkeys(UNITS, 0) | {"MXU": 4 * (60 <= i < 80 or 110 <= i < 120)} for i in range(200)
    ]
    root = Node("root", 0, 200, children=[steps])
    kernel = Kernel("k", bundles(200), UNITS, usage, 0, root)
    # 2 rows x 28 heads over 2 cores; 4096 / 1024 = 4 rows of blocks, 1 + 2 + 3 + 4 of them causal.
    assert kernels._splash_cycles([kernel], "forward", cores=2) == 28 * (10 * 120 + 4 * 30)


def test_the_least_bytes_are_each_array_once():
    norm = next(o for o in xla_ops.operations() if o.name == "RMSNorm")
    assert norm.least_bytes == 2 * (2 * 4096 * 3584 * 2) + 3584 * 2


def test_what_goes_beyond_the_least_is_what_is_left():
    """2 GB at 1 TB/s would be 2 ms; XLA moves 2.5 GB, 0.5 ms more: a fifth of its 2.5 ms."""
    chip = tpu_static.Chip("chip", "", 1e9, 1, 1e12)
    two_gigabytes = jax.ShapeDtypeStruct((10**9,), jnp.int8)
    operation = xla_ops.Operation("copy", lambda x: x, (two_gigabytes,))
    assert xla_ops.row(chip, operation, 2.5e9).endswith("| 2.000 | 20% |")


def test_a_kernel_of_the_compiler_is_read():
    """Five steps of o += a @ b, all 128 x 128, bfloat16 in and float32 out, compiled for v5p."""
    (kernel,) = tpu_static.read(pathlib.Path(__file__).parent / "data" / "tpu_dump")
    assert kernel.name == "tiny.1"
    hot = kernel.hot()
    # 128 rows of a through b, one a cycle in each of four matrix units.
    assert kernel.matrix_cycles(range(hot.start, hot.end)) == 128 / 4
    # a and b twice, one block computed and one on its way; o once.
    assert kernel.vmem_bytes == (2 * 2 * 2 + 4) * 128 * 128
    # Zeros are written before the first step only: a region without matrix work, left out.
    everything = kernel.passed(kernel.main_loop(), lambda node: 1)
    assert 32 < kernel.step() < everything < len(kernel.bundles)
