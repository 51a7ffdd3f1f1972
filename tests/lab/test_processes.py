"""Runs in processes of their own: several at once, and killed at any moment."""

from __future__ import annotations

import itertools
import os
import pty
import random
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lab.conftest import write_cells
from maskloss.lab.models.learners import CompactLearner
from maskloss.lab.models.weights import read_tensors
from maskloss.lab.runfolder import read_facts, steps_of

SOURCES = Path(__file__).parents[2] / "src"
OPTIONS = {
    "--batch-size": 4,
    "--num-points": 32,
    "--evaluations": 1,
    "--size": 32,
    "--workers": 0,
    "--threads": 1,
    "--device": "cpu",
}


TERMINAL = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "from maskloss.lab.cli import main; sys.exit(main(sys.argv[1:]))"
)


def environment() -> dict[str, str]:
    # What starts no thread pools that fight over the cores, and no warnings of libraries as errors.
    return os.environ | {"PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def arguments(**more: object) -> list[str]:
    options = OPTIONS | {f"--{name.replace('_', '-')}": value for name, value in more.items()}
    return ["train", *(str(part) for pair in options.items() for part in pair)]


def command(words: list[str], *launcher: str) -> subprocess.Popen[str]:
    start = [*launcher, "-m", "maskloss", *words] if launcher else [sys.executable, "-m", "maskloss", *words]
    return subprocess.Popen(
        start, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finished(process: subprocess.Popen[str], seconds: float = 240) -> str:
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_are_one(tmp_path, accumulate):
    """Two processes, each with half of every batch, reach the weights of one process with the whole batch."""
    cells = write_cells(tmp_path / "cells", 12, 48, 4)
    # A small rate: where a gradient is all but zero AdamW makes a whole step of its rounding.
    shared = {"data": cells, "steps": 20, "batch_size": 8, "lr": 1e-5, "norm": "group"}
    finished(command(arguments(out=tmp_path / "one", **shared)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = arguments(out=tmp_path / "two", accumulate=accumulate, **shared)
    printed = finished(command(both, *torchrun))
    assert printed.count("AP50") >= 1 and "2 processes" in printed
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    before = CompactLearner(read_facts(tmp_path / "one").config, 1, 3).network.state_dict()
    moved = apart = 0.0
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        moved += float((tensor - before[name]).abs().sum())
        apart += float((tensor - two[name]).abs().sum())
    assert apart < 2e-3 * moved, (apart, moved)


@pytest.mark.slow
def test_processes_that_read_different_clocks_write_one_folder(tmp_path):
    cells = write_cells(tmp_path / "cells", 6, 32, 3)
    script = tmp_path / "command.py"
    script.write_text(
        "import datetime, os, sys\n"
        "from maskloss.lab.cli import main\n"
        "from maskloss.lab.loop import claim\n"
        "class Clock:\n"
        "    def now():\n"
        "        return datetime.datetime.now() + datetime.timedelta(hours=int(os.environ['RANK']))\n"
        "claim.datetime = Clock\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = arguments(data=cells, steps=4, checkpoint_every=2)
    process = subprocess.Popen(
        [*torchrun, str(script), *words],
        cwd=tmp_path,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    finished(process)
    [run] = (tmp_path / "runs").iterdir()
    assert (run / "report.html").is_file() and steps_of(run) == [2, 4]


def port() -> int:
    """A port below those that a system hands out: nobody else is given it before it is used."""
    for number in range(20000 + os.getpid() % 10000, 32000):
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", number))
            return number
    raise AssertionError("no port is free")


def ranks(folder: Path, words: list[str], patience: int) -> list[subprocess.Popen[str]]:
    """Start two processes of a run without a launcher, which would end one after the other."""
    script = folder / "command.py"
    script.write_text(
        "import sys\n"
        "from maskloss.lab.cli import main\n"
        "from maskloss.lab.loop import run\n"
        f"run.PATIENCE = {patience}\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, str(script), *words],
            env=environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "patience", "told"),
    [
        (signal.SIGKILL, 240, "another one has ended"),
        # Both must have begun within that time, too.
        (signal.SIGSTOP, 40, "one has not answered for 40 seconds"),
    ],
)
def test_a_lost_rank_ends_a_run_with_one_sentence(tmp_path, number, patience, told):
    cells, run = write_cells(tmp_path / "cells", 6, 32, 3), tmp_path / "run"
    first, second = ranks(tmp_path, arguments(data=cells, out=run, steps=100000, checkpoint_every=2), patience)
    try:
        deadline = time.monotonic() + 240
        while not steps_of(run):
            assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
            time.sleep(0.05)
        second.send_signal(number)
        printed, _ = first.communicate(timeout=240)
    finally:
        first.kill()
        second.kill()
        second.communicate()
    assert first.returncode == 2 and "Traceback" not in printed, printed
    assert f"{told} (go on with: maskloss train --resume {run})" in " ".join(printed.split()), printed


@pytest.mark.slow
def test_a_killed_run_is_resumed_right_away(tmp_path):
    """Its workers are still there."""
    cells, run = write_cells(tmp_path / "cells", 6, 32, 3), tmp_path / "run"
    script = tmp_path / "command.py"
    script.write_text(
        "import os, signal, sys\n"
        "from maskloss.lab.cli import main\n"
        "from maskloss.lab.loop import checkpoint\n"
        "write = checkpoint.write\n"
        "def once(*given, **options):\n"
        "    write(*given, **options)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.write = once\n"
        "main(sys.argv[1:])\n"
    )
    words = arguments(data=cells, out=run, steps=20, checkpoint_every=2, workers=2)
    killed = subprocess.run([sys.executable, str(script), *words], env=environment(), check=False)
    assert killed.returncode == -signal.SIGKILL and steps_of(run) == [2]
    finished(command(["train", "--resume", str(run)]))
    assert steps_of(run)[-1] == 20


@pytest.mark.slow
def test_a_terminal_that_closes_leaves_a_checkpoint(tmp_path):
    cells, run = write_cells(tmp_path / "cells", 6, 32, 3), tmp_path / "run"
    words = arguments(data=cells, out=run, steps=100000, workers=1)
    ours, theirs = pty.openpty()
    # A session of its own with the terminal in control of it, as a window has it.
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, *words], env=environment(), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or "total" not in (run / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        if select.select([ours], [], [], 0.2)[0]:
            os.read(ours, 1 << 16)
    os.close(ours)
    assert process.wait(120) == 128 + signal.SIGHUP and len(steps_of(run)) == 1


def kill(process: subprocess.Popen[str], run: Path, inside_a_checkpoint: bool, moments: random.Random) -> None:
    """Kill a run when it has come further: at a random moment, or as soon as it is writing a checkpoint."""
    begun = (steps_of(run) or [0])[-1]
    deadline = time.monotonic() + 120
    while (steps_of(run) or [0])[-1] <= begun:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    if inside_a_checkpoint:
        while not list((run / "checkpoints").glob(".*")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
    else:
        time.sleep(moments.uniform(0, 0.3))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_run_survives_being_killed_at_any_moment(tmp_path):
    """Ten times: at random, or while a checkpoint is being written, of which there is one after every step."""
    cells = write_cells(tmp_path / "cells", 6, 32, 3)
    shared = {"data": cells, "steps": 200, "checkpoint_every": 1, "evaluations": 40}
    finished(command(arguments(out=tmp_path / "whole", **shared)))
    run, moments, left_behind = tmp_path / "run", random.Random(4), 0
    words = arguments(out=run, **shared)
    for number in itertools.count():
        if number >= 10 and left_behind:
            break
        kill(command(words), run, number % 2 == 0, moments)
        left_behind += bool(list((run / "checkpoints").glob(".*")))
        words = ["train", "--resume", str(run)]
    assert steps_of(run)[-1] < 200
    finished(command(words))
    assert steps_of(run) == steps_of(tmp_path / "whole")
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_an_interrupted_command_says_how_to_go_on(tmp_path):
    cells = write_cells(tmp_path / "cells", 6, 32, 3)
    run = tmp_path / "run"
    process = command(arguments(out=run, data=cells, steps=100000, workers=2))
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("total"):
            break
        time.sleep(0.2)
    # As a terminal does it: to the workers too.
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in printed
    assert f"go on with: maskloss train --resume {run}" in printed.replace("\n", " ").replace("  ", " ")
    assert len(steps_of(run)) == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path):
    """Ten times the images, hardly more memory: images are read as they are needed, annotations are kept packed."""
    peaks = {}
    for count in (500, 5000):
        folder = _photographs(tmp_path / str(count), count)
        words = arguments(data=folder, out=tmp_path / f"run{count}", steps=40, batch_size=8, workers=1)
        script = (
            "import resource, sys; from maskloss.lab.cli import main; status = main(sys.argv[1:]);"
            "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script, *words], env=environment(), text=True, stdout=subprocess.PIPE
        )
        printed, _ = process.communicate(timeout=400)
        assert process.returncode == 0, printed
        peaks[count] = int(printed.rsplit("peak ", 1)[1].split()[0])
    assert peaks[5000] < 1.1 * peaks[500], peaks


def _photographs(root: Path, count: int) -> Path:
    """Write many COCO images, all of them links to a few files, with ten polygons each."""
    import json

    import numpy as np
    from PIL import Image

    (root / "images").mkdir(parents=True)
    # Beside the folder: a name that two images have would be asked about.
    originals = root.with_name(f"{root.name} originals")
    originals.mkdir()
    random_numbers = np.random.default_rng(0)
    for number in range(8):
        pixels = random_numbers.integers(0, 255, (96, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(originals / f"{number}.jpg")
    images, annotations = [], []
    for number in range(count):
        os.link(originals / f"{number % 8}.jpg", root / "images" / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 96, "width": 128})
        for _ in range(10):
            x, y = (float(value) for value in random_numbers.integers(0, 80, 2))
            polygon = [x, y, x + 12.5, y + 1, x + 11, y + 14.25, x + 1, y + 13]
            annotations.append(
                {"id": len(annotations), "image_id": number, "category_id": 1, "segmentation": [polygon], "iscrowd": 0}
            )
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "instances.json").write_text(json.dumps(content))
    held_out = {**content, "images": images[:4], "annotations": annotations[:40]}
    (root / "instances_val.json").write_text(json.dumps(held_out))
    return root
