"""What reaches a terminal: safe text, errors of one line, a bar that erases nothing, and lines where there is none."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile
from PIL import Image
from rich.console import Console

from maskloss.lab import terminal
from maskloss.lab.cli import main
from maskloss.lab.terminal import Display, did_you_mean, display, printable

EVIL = "\x1b[31mr\x1b]0;own\x07\ne\u202ed"
SHOWN = r"\x1b[31mr\x1b]0;own\x07\ne\u202ed"
# A run as short as can be, whose report is not drawn.
RUN = """
import sys
from maskloss.lab.cli import main
from maskloss.lab.results import report
report.write = lambda folder, _: [folder / "report.html"]
sys.exit(main(sys.argv[1:]))
"""
SHORT = [*("--steps", "2"), *("--batch-size", "2"), *("--held-out", "4"), *("--evaluations", "1")]
SHORT += [*("--num-points", "32"), *("--device", "cpu")]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain – 箱 é.png", "plain – 箱 é.png"),
        (EVIL, SHOWN),
        ("a\r\tb\x9bc\x7f", r"a\r\tb\x9bc\x7f"),
        (os.fsdecode(b"caf\xe9.png"), r"caf\xe9.png"),
        ("\ud834", r"\ud834"),
    ],
)
def test_text_is_shown_and_not_obeyed(text, shown):
    assert printable(text) == shown
    shown.encode()


def screen(command: list[str], **environment: str) -> tuple[int, list[str]]:
    """Run a command in a terminal; return its exit status and the lines that are left on the screen."""
    master, slave = pty.openpty()
    started = subprocess.Popen(
        [sys.executable, "-c", RUN, *command],
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", **environment},
    )
    os.close(slave)
    received = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        received += part
    os.close(master)
    return started.wait(), emulate(received.decode())


def emulate(text: str) -> list[str]:
    """Do what a terminal does with lines, carriage returns, and the sequences that rich uses."""
    lines, row, column = [""], 0, 0
    for sequence, character in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z])|(.)", text, re.DOTALL):
        if character == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif character == "\r":
            column = 0
        elif character:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
        elif sequence.endswith("A"):
            row = max(0, row - int(sequence[2:-1] or 1))
        elif sequence.endswith("K"):
            lines[row] = "" if sequence == "\x1b[2K" else lines[row][:column]
    return [line.rstrip() for line in lines if line.strip()]


def test_in_a_terminal_nothing_is_erased_and_no_bar_is_left(tmp_path):
    status, lines = screen(["train", *SHORT, "--out", str(tmp_path / "run")])
    assert status == 0, lines
    text = "\n".join(lines)
    for name in ("scenes", "model", "run"):
        assert re.search(rf"^ *{name}  \w", text, re.MULTILINE), text
    assert re.search(r"^AP50 ", text, re.MULTILINE)
    assert "━" not in text and "Training" not in text


def test_in_a_terminal_an_error_is_the_only_line(tmp_path):
    status, lines = screen(["train", "--data", str(tmp_path / "nowhere")])
    assert status == 2
    assert lines[0].startswith("error: ") and "━" not in "".join(lines)


def test_without_a_terminal_there_is_a_line_from_time_to_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with display(Console(file=out), "Reading") as shown:
        shown.note("Training")
        for step in range(101):
            now[0] += 20.0 if step == 1 else 2.0  # which compiles kernels, and says nothing of what is left
            shown.advance(step, 100, "mask 0.5")
    lines = out.getvalue().splitlines()
    assert lines[:3] == ["Reading", "Training", "5 of 100  mask 0.5  3 min left"]
    assert len(lines) == 2 + 220 // 30


def test_what_cannot_be_counted_shows_no_count():
    with display(Console(file=io.StringIO(), force_terminal=True), "Reading") as shown:
        shown.advance(3, 40)
        shown.note("Drawing")
        [task] = shown._bar.tasks
        assert (task.completed, task.total, task.description) == (0, None, "Drawing")


def test_other_processes_are_silent():
    out = io.StringIO()
    with display(Console(file=out, quiet=True), "Reading") as shown:
        shown.note("Training")
        shown.print("a line")
    assert out.getvalue() == ""


def test_styles_are_kept_apart_from_text():
    """What looks like a style of rich is text."""
    out = io.StringIO()
    Display(Console(file=out), None).print("[bold]x[/bold] :smile: ", (EVIL, "dim"))
    assert out.getvalue() == f"[bold]x[/bold] :smile: {SHOWN}\n"


@pytest.mark.usefixtures("no_pictures")
def test_names_of_others_change_no_terminal(folder, tmp_path, capsys):
    """Names of classes, images and folders, through train, evaluate and predict, in what works and in errors."""
    folder.content["categories"][0]["name"] = f"disc{EVIL}"
    folder.save()
    data = folder.root.rename(tmp_path / EVIL.replace("/", ""))
    run, found = tmp_path / f"run{EVIL}", tmp_path / f"found{EVIL}"
    assert main(["train", *SHORT, "--data", str(data), "--workers", "0", "--out", str(run)]) == 0
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    Image.new("RGB", (40, 40)).save(tmp_path / f"image{EVIL}.png")
    (tmp_path / f"broken{EVIL}.png").write_text("no image")
    images = [str(tmp_path / f"{name}{EVIL}.png") for name in ("image", "broken")]
    assert main(["predict", str(run), *images, "--out", str(found), "--on-error", "skip", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    for text in (f"disc{SHOWN}", f"run{SHOWN}", f"image{SHOWN}.png: ", f"broken{SHOWN}.png", f"found{SHOWN}"):
        assert text in captured.out, text
    assert main(["evaluate", str(tmp_path / f"no{EVIL}")]) == 2
    errors = capsys.readouterr().err
    assert f"there is no folder {tmp_path}/no{SHOWN}" in errors and len(errors.splitlines()) == 1
    for printed in (captured.out, captured.err, errors):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "maskloss: error: there is no command trian, did you mean train?"),
        (["xyz"], "maskloss: error: there is no command xyz"),
        (
            ["train", "--bach-size", "3"],
            "maskloss train: error: there is no option --bach-size, did you mean --batch-size?",
        ),
        (
            ["evaluate", "run", "--divice=cpu"],
            "maskloss evaluate: error: there is no option --divice, did you mean --device?",
        ),
        (["evaluate", "run", "other"], "maskloss evaluate: error: one argument too many: other"),
        (["train", f"--{EVIL}"], f"maskloss train: error: there is no option --{SHOWN}"),
    ],
)
def test_typing_errors_get_the_usage_of_the_command(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and lines[-1] == message
    assert lines[0].startswith("usage: maskloss " + ("" if len(arguments) == 1 else arguments[0]))


def test_suggestions():
    assert did_you_mean("--epoch", ["--epochs", "--steps"]) == ", did you mean --epochs?"
    assert did_you_mean("--qqq", ["--epochs", "--steps"]) == ""


def test_a_command_is_imported_when_it_is_asked_for():
    """`maskloss --help` reads no training code, which would take a second more."""
    code = (
        "import sys, contextlib\nfrom maskloss.lab.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "print([name for name in sys.modules if name.startswith(('maskloss.lab.', 'rich', 'accelerate'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1].replace("'", '"')))
    assert loaded == {"maskloss.lab.terminal", "maskloss.lab.files", "maskloss.lab.cli"}


def test_log_lines_of_libraries_stay_away(tmp_path, caplog, capsys):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((20, 20), np.uint16))
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[:-100])
    np.save(tmp_path / "p.npy", np.zeros((1, 20, 20), np.float32))
    (tmp_path / "b.tif").write_bytes(content.replace(b"\x00\x01\x03\x00", b"\x00\x01\xff\x00"))
    for name in ("a.tif", "b.tif"):
        main(
            [
                "show",
                "--prediction",
                str(tmp_path / "p.npy"),
                "--target",
                str(tmp_path / name),
                "--out",
                str(tmp_path / "o.png"),
            ]
        )
    assert not [record for record in caplog.records if record.name.startswith(("tifffile", "matplotlib", "PIL"))]
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_too_little_memory_gets_the_hint_of_the_command():
    assert terminal.explain_error(MemoryError(), "take less") == "there is not enough memory (take less)"
    assert terminal.explain_error(RuntimeError("a bug"), "take less") is None
