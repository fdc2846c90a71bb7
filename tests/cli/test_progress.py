"""How long work shows on stderr: on a terminal, a narrow one, a dumb one, in a log, and not at all."""

from __future__ import annotations

import os
import pty
import re
import select
import struct
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from patchkit.cli.progress import Display, LogDisplay, TerminalDisplay, shown
from patchkit.cli.stages import clock, pace

ROOT = Path(__file__).resolve().parents[2]
#: Two stages, the second left before its end, with failures and a message.
DRIVE = """
import time
from patchkit.cli.progress import shown
with shown(quiet=QUIET) as display:
    display.batch(16, 40)
    display("checking", 30, 30)
    display.message("batches are halved")
    for done in (100, 200, 300, 400):
        display.batch(12, 40)
        time.sleep(0.4)
        if done == 200:
            display.failed(2)
        display("patching", done, 1000)
"""
CODES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(width: int = 160) -> tuple[Console, StringIO]:
    out = StringIO()
    return Console(file=out, width=width, force_terminal=False), out


def piped(quiet: bool = False, **environment: str) -> tuple[bytes, bytes]:
    """What the stages print on stdout and stderr that are pipes."""
    process = subprocess.run(
        [sys.executable, "-c", DRIVE.replace("QUIET", str(quiet))],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        timeout=120,
        check=True,
    )
    return process.stdout, process.stderr


def on_terminal(columns: int, **environment: str) -> bytes:
    """Everything that the stages print on a terminal."""
    import fcntl
    import termios

    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    without = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVE.replace("QUIET", "False")],
        cwd=ROOT,
        env={**without, "TERM": "xterm-256color", **environment},
        stdin=child,
        stdout=child,
        stderr=child,
    )
    os.close(child)
    printed = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if not select.select([parent], [], [], 1.0)[0]:
            continue
        try:
            printed += os.read(parent, 65536)
        except OSError:
            # The child has ended, and with it the terminal.
            break
    os.close(parent)
    assert process.wait(timeout=60) == 0, printed.decode()
    return printed


def lines_of(printed: bytes) -> list[str]:
    """The lines that were drawn, each time that they were drawn, without control codes."""
    return [line for line in re.split(r"[\r\n]+", CODES.sub(b"", printed).decode()) if line.strip()]


def test_a_log_has_whole_lines_and_no_control_characters() -> None:
    stdout, stderr = piped()
    assert stdout == b""
    first, message, left = stderr.decode().splitlines()
    assert b"\r" not in stderr and b"\x1b" not in stderr and stderr.isascii()
    assert first == "done: checking (30 in 0:00)" and message == "batches are halved"
    assert re.fullmatch(r"patching: 400 of 1,000, [0-9.]+/s, 0:0[0-9] left, 2 failed", left)


def test_colours_that_are_forced_make_no_live_display_in_a_log() -> None:
    _, stderr = piped(FORCE_COLOR="1", TERM="xterm-256color")
    assert b"\r" not in stderr and len(stderr.splitlines()) == 3


def test_quiet_prints_nothing() -> None:
    assert piped(quiet=True) == (b"", b"")


def test_a_terminal_shows_pace_batch_and_failures() -> None:
    printed = on_terminal(120)
    drawn = lines_of(printed)
    live = [line for line in drawn if line.startswith("patching") and "/1,000" in line]
    assert live, drawn
    assert re.search(
        r"400/1,000 +[0-9.]+/s +0:0[0-9] left +elapsed 0:0[0-9] +batch 12 x 40 +2 failed", live[-1]
    )
    assert "failed" not in live[0], "failures show only where there are some"
    assert "done: checking (30 in 0:00)" in [line.strip() for line in drawn]
    assert drawn[-1].startswith("patching: 400 of 1,000"), "where it was left stays on the screen"
    assert b"\x1b[1;31m2 failed" in printed
    assert printed.count(b"\x1b[?25l") == printed.count(b"\x1b[?25h"), "the cursor is given back"


def test_without_colours_all_words_are_there() -> None:
    printed = on_terminal(120, NO_COLOR="1")
    assert b"31m" not in printed
    assert any("batch 12 x 40" in line and "2 failed" in line for line in lines_of(printed))


@pytest.mark.parametrize("columns", [40, 24])
def test_a_narrow_terminal_keeps_each_stage_on_one_line(columns: int) -> None:
    live = [line for line in lines_of(on_terminal(columns)) if "/1,000" in line]
    assert live and max(map(len, live)) < columns
    assert all(line.startswith("p") for line in live)
    assert "400/1,000" in live[-1] and "2 failed" in live[-1]
    assert columns < 40 or "/s" in live[-1]


def test_a_dumb_terminal_gets_the_lines_of_a_log() -> None:
    printed = on_terminal(80, TERM="dumb")
    assert b"\x1b" not in printed and printed.count(b"\r") == printed.count(b"\r\n") == 3


@pytest.mark.parametrize(("term", "kind"), [("dumb", LogDisplay), ("xterm", TerminalDisplay)])
def test_a_dumb_terminal_hears_of_long_stages_as_a_log_does(
    term: str, kind: type[Display], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with shown() as display:
        assert type(display) is kind


def test_a_long_stage_in_a_log_says_where_it_is_every_half_minute() -> None:
    console, out = plain()
    now = Clock()
    display = LogDisplay(console, now)
    for second in range(0, 100, 2):
        now.now = second
        display.batch(1, 7)
        now.now = second + 2
        display("patching", second // 2 + 1, 100)
    said = out.getvalue().splitlines()
    assert said == [
        "patching: 15 of 100, 30/min, 2:50 left",
        "patching: 30 of 100, 30/min, 2:20 left",
        "patching: 45 of 100, 30/min, 1:50 left",
    ]


def test_what_an_earlier_run_finished_does_not_count_as_pace() -> None:
    now = Clock()
    console, out = plain()
    display = LogDisplay(console, now)
    now.now = 1.0
    display("patching", 900, 1000)
    for done in (910, 920):
        display.batch(10, 5)
        now.now += 5.0
        display("patching", done, 1000)
    (stage,) = display._stages.values()
    assert stage.rate() == pytest.approx(2.0)
    assert stage.remaining(now.now) == pytest.approx(40.0)
    now.now += 10.0
    assert stage.remaining(now.now) == pytest.approx(30.0), "the batch in hand has taken ten of them"
    display("patching", 1000, 1000)
    assert out.getvalue() == "done: patching (1,000 in 0:21)\n"


def test_failures_are_counted_over_stages() -> None:
    console, out = plain()
    display = LogDisplay(console, Clock())
    display.failed(1)
    display.failed(3)
    display("patching", 5, 8)
    display("patching", 5, 5)
    display.failed(2)
    display("verification", 4, 4)
    assert out.getvalue().splitlines() == [
        "done: patching (5 in 0:00, 3 failed)",
        "done: verification (4 in 0:00, 5 failed)",
    ]


def test_a_stage_that_begins_again_is_another_one() -> None:
    console, out = plain()
    now = Clock()
    display = LogDisplay(console, now)
    display("circuits", 8, 10)
    now.now = 100.0
    display("circuits", 2, 10)
    assert len(display._stages) == 1 and next(iter(display._stages.values())).rate() is None
    display("circuits", 10, 10)
    assert out.getvalue().splitlines()[-1].startswith("done: circuits (10 in")


@pytest.mark.parametrize("width", range(20, 130, 7))
def test_a_live_line_fits_whatever_it_says(width: int) -> None:
    out = StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    now = Clock()
    display = TerminalDisplay(console, now)
    display.batch(128, 2048)
    now.now = 40.0
    display.failed(17)
    display("effects on the logits (s2-flip)", 12_345, 1_234_567)
    console.print(display.render())
    (line,) = out.getvalue().splitlines()
    assert len(line.rstrip()) < width
    assert "12,345/1,234,567" in line or width < 32


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (None, ""),
        (1234.4, "1,234/s"),
        (12.34, "12.3/s"),
        (0.5, "30/min"),
        (0.01, "36/h"),
        (1 / 36000, "0.1/h"),
    ],
)
def test_paces_are_said_in_easy_numbers(rate: float | None, text: str) -> None:
    assert pace(rate) == text


def test_clocks() -> None:
    assert [clock(each) for each in (0, 59.9, 61, 3600, 90061)] == [
        "0:00",
        "0:59",
        "1:01",
        "1:00:00",
        "25:01:01",
    ]
