import io
import os
import pty
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tracking.console import (
    Console,
    format_bytes,
    format_count,
    format_fields,
    format_seconds,
)


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def screen():
    return io.StringIO()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def console(screen, clock):
    return Console(stream=screen, errors=screen, clock=clock)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (12_345_678, "12.3 M"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (99_950, "100 k"),
        (560_988_160, "561 M"),
        (11_200_000_000, "11.2 B"),
        (3 * 10**15, "3000 T"),
    ],
)
def test_counts_have_three_digits_and_a_unit(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1_610_612_736, "1.50 GiB"), (2**20 - 1, "1.00 MiB")],
)
def test_sizes_are_in_binary_units(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.25 s"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (65, "1 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7380, "2 h 03 min"),
        (86_400 * 4 + 3600 * 7, "4 d 07 h"),
    ],
)
def test_durations_are_in_the_unit_a_person_would_choose(seconds, text):
    assert format_seconds(seconds) == text


@settings(max_examples=500, deadline=None)
@given(count=st.integers(min_value=0, max_value=999 * 10**12))
def test_a_formatted_count_is_within_half_a_percent(count):
    number, _, unit = format_count(count).partition(" ")
    value = float(number) * 1000 ** ["", "k", "M", "B", "T"].index(unit)
    assert abs(value - count) <= 0.0051 * count
    assert float(number) < 1000


def test_fields_keep_their_order_and_floats_four_digits():
    assert format_fields({"step": 12, "loss": 3.14159, "run": "a"}) == "step=12 loss=3.142 run=a"


def test_a_stage_is_announced_and_timed(console, screen, clock):
    with console.stage(2, 5, "tokenizer"):
        clock.now = 65.0
        console.info("trained", vocab_size=65536)
    assert screen.getvalue().splitlines() == [
        "[2/5] tokenizer …",
        "trained vocab_size=65536",
        "[2/5] tokenizer done after 1 min 05 s",
    ]


def test_a_stage_that_fails_never_says_done(console, screen):
    with pytest.raises(RuntimeError), console.stage(1, 2, "base"):
        raise RuntimeError
    assert screen.getvalue().splitlines()[-1] == "[1/2] base stopped after 0.00 s"


def test_long_work_prints_a_line_every_thirty_seconds(console, screen, clock):
    with console.progress("base", total=1_000_000) as progress:
        for step in range(120):
            clock.now = float(step)
            progress.advance(1, loss=2.0)
    lines = screen.getvalue().splitlines()
    assert lines[0] == "base: 0 % 31/1000000 30.0 s loss=2"
    assert len(lines) == 4
    assert "120/1000000" in lines[-1]


def test_short_work_prints_a_line_at_each_tenth(console, screen, clock):
    with console.progress("tokenize", total=100) as progress:
        for _ in range(100):
            clock.now += 0.2
            progress.advance()
    assert [line.split()[1] for line in screen.getvalue().splitlines()] == [str(n) for n in range(10, 101, 10)]


def test_work_done_in_an_instant_prints_one_line(console, screen):
    with console.progress("tokenize", total=100) as progress:
        for _ in range(100):
            progress.advance()
    assert screen.getvalue() == "tokenize: 100 % 100/100 0.00 s\n"


def test_work_that_fails_says_how_far_it_came(console, screen):
    def fail_after_three():
        with console.progress("base", total=10) as progress:
            progress.advance(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_after_three()
    assert screen.getvalue() == "base: 30 % 3/10 0.00 s\n"


def test_a_disabled_console_prints_nothing(screen):
    console = Console(False, stream=screen, errors=screen)
    with console.stage(1, 1, "base"), console.progress("base", total=2) as progress:
        progress.advance(2)
        console.info("text", loss=1.0)
        console.warning("text")
    assert screen.getvalue() == ""


PROGRESS = """
    import time
    from nanochat.tracking.console import Console
    console = Console()
    with console.progress("base [x]", total=3) as progress:
        for step in range(3):
            progress.advance(loss=1.5)
            time.sleep(0.05)
        console.info("between [y]")
"""


def run_on_terminal(**environment):
    """Run PROGRESS with a real terminal as stdout; return the exit status and what the terminal got."""
    ours, theirs = pty.openpty()
    base = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRESS)], stdout=theirs, env={**base, **environment}
    )
    os.close(theirs)
    received = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        if not part:
            break
        received += part
    os.close(ours)
    return process.wait(), received.decode()


def test_a_terminal_shows_a_live_bar_and_text_as_it_is():
    status, text = run_on_terminal(TERM="xterm-256color", COLUMNS="120")
    assert status == 0
    assert "\x1b[" in text
    assert "3/3" in text
    assert "base [x]" in text
    assert "between [y]" in text
    assert "loss=1.5" in text


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm", "SLURM_JOB_ID": "7"}])
def test_under_slurm_and_on_dumb_terminals_progress_is_plain_lines(environment):
    status, text = run_on_terminal(**environment)
    assert status == 0
    assert "\x1b" not in text
    assert "base [x]: 100 % 3/3" in text


def run_script(script, **how):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.PIPE, text=True, **how)


def test_a_full_disk_under_the_log_does_not_end_a_run():
    script = """
        import sys
        from nanochat.tracking.console import Console
        console = Console()
        for step in range(3):
            console.info("step", step=step)
        print("trained", file=sys.stderr)
    """
    with Path("/dev/full").open("w") as full:
        done = run_script(script, stdout=full)
    assert (done.returncode, done.stderr) == (0, "trained\n")


def test_a_stream_that_cannot_write_a_character_gets_another():
    script = "from nanochat.tracking.console import Console; Console().info('8 \\N{MULTIPLICATION SIGN} H200')"
    done = run_script(script, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "8 ? H200\n")


def test_every_line_is_flushed_at_once():
    script = """
        import os
        from nanochat.tracking.console import Console
        Console().info("seen")
        os._exit(0)
    """
    assert run_script(script, stdout=subprocess.PIPE).stdout == "seen\n"


def test_warnings_go_to_stderr():
    script = "from nanochat.tracking.console import Console; Console().warning('low disk')"
    done = run_script(script, stdout=subprocess.PIPE)
    assert (done.stdout, done.stderr) == ("", "warning: low disk\n")
