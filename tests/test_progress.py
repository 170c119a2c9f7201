"""Progress speaks now and then where there is no terminal; Ctrl-C waits for the end of a step."""

import io
import os
import signal

import pytest
import rich.console

from pgrpo_jax import interrupt, progress


def plain_console() -> rich.console.Console:
    return rich.console.Console(file=io.StringIO(), force_terminal=False)


def test_without_a_terminal_a_line_comes_now_and_then_with_rate_and_remaining_time():
    now = [100.0]
    console = plain_console()
    with progress._lines(console, "sft", 100, 20, "step", 30.0, clock=lambda: now[0]) as advance:
        for _ in range(40):  # 2 s a step: lines at 30 s and 60 s
            now[0] += 2.0
            advance(loss=0.51234)
    # 15 done in 30 s are 2 s a step; 100 - 35 = 65 steps are 130 s. The 20 of before do not count.
    # Last line: 40 steps in 80 s, 100 - 60 = 40 steps are 80 s.
    assert console.file.getvalue().splitlines() == [
        "sft 35/100  2.0 s/step  2:10 left  loss 0.512",
        "sft 50/100  2.0 s/step  1:40 left  loss 0.512",
        "sft 60/100  2.0 s/step  1:20 left  loss 0.512",
    ]


def test_a_loop_that_is_done_says_so_once_and_has_no_remaining_time():
    console = plain_console()
    with progress.bar("pairs", 3, unit="pair", console=console) as advance:
        advance(3)
    (line,) = console.file.getvalue().splitlines()
    assert line.startswith("pairs 3/3  ") and line.endswith(" pairs/s") and "left" not in line


def test_a_terminal_shows_a_bar_with_its_figures():
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress.bar("grpo", 4, done=1, console=console) as advance:
        for _ in range(3):
            advance(reward=1.25)
    shown = console.file.getvalue()
    assert "grpo" in shown and "4/4" in shown and "reward 1.25" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_process_that_is_not_primary_shows_nothing(terminal):
    console = rich.console.Console(file=io.StringIO(), force_terminal=terminal)
    with progress.bar("grpo", 2, every_s=0.0, primary=False, console=console) as advance:
        advance(2)
    assert console.file.getvalue() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_flag_and_the_second_raises(number, capfd):
    before = signal.getsignal(number)
    steps = []
    with pytest.raises(KeyboardInterrupt), interrupt.delayed() as interrupted:
        for step in range(9):
            if step in (3, 6):
                os.kill(os.getpid(), number)
            steps.append((step, interrupted.requested))
    assert steps == [(0, False), (1, False), (2, False), (3, True), (4, True), (5, True)]
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.count("Stopping after this step") == 1
