"""One command for a GPU machine: it goes on after what fails, writes after each part, and can be resumed."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import KernelInterface

from maskloss import MaskLossError
from maskloss.lab.bench import kernels, verify, verify_page, worker
from maskloss.lab.bench.cases import PRESETS, Case
from maskloss.lab.bench.verify import Part, Plan, run
from maskloss.lab.commands import bench as bench_command

ROOT = Path(__file__).parents[2]
CPU = Plan.on("cpu")


def read_json(output: str, _: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output)
    return found


def part(name: str, code: str, limit: float = 60.0, **options: Any) -> Part:
    return Part(name, [sys.executable, "-c", code], limit, read_json, **options)


def use(monkeypatch: pytest.MonkeyPatch, *made: Part) -> None:
    monkeypatch.setattr(verify, "parts", lambda *_: list(made))


PASSES = "print('{\"passed\": true}')"


def test_it_goes_on_after_every_kind_of_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verify, "_GRACE", 0.2)
    use(
        monkeypatch,
        part("right", "import os; print(os.environ['ANSWER'])", environment={"ANSWER": '{"passed": true}'}),
        part("wrong", "print('{\"passed\": false}')"),
        part("crash", "import os; print('last words', flush=True); os.abort()"),
        part("status", PASSES + "; raise SystemExit(9)"),
        part("hangs", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)", 0.1),
        part("incomplete", 'print(\'{"passed": true, "complete": false}\')'),
        part("elsewhere", PASSES, missing="no such tool"),
    )
    written = []
    inner = verify._write
    monkeypatch.setattr(
        verify, "_write", lambda report, folder: written.append(len(report["parts"])) or inner(report, folder)
    )
    report = run(replace(CPU, patience=1.0), tmp_path, lambda _: None)
    found = {name: outcome["status"] for name, outcome in report["parts"].items()}
    assert found == {
        "right": "passed", "wrong": "failed", "crash": "failed", "status": "failed", "hangs": "stopped",
        "incomplete": "stopped", "elsewhere": "not run",
    }  # fmt: skip
    assert "last words" in report["parts"]["crash"]["last"]
    assert report["parts"]["status"]["why"] == "exit status 9"
    assert written == [1, 2, 3, 4, 5, 6, 7, 7]
    assert json.loads((tmp_path / verify.RESULTS).read_text()) == report
    page = (tmp_path / verify.PAGE).read_text()
    assert "A rehearsal without a GPU" in page
    assert "Parts: 1 passed, 3 failed, 2 stopped, 1 not run." in page
    assert "| elsewhere | not run |  | no such tool |" in page
    fine = [name for name, outcome in report["parts"].items() if verify.is_fine(outcome)]
    assert fine == ["right", "elsewhere"]


def test_a_second_run_does_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, part("first", PASSES), part("second", "print('{\"passed\": false}')"))
    run(CPU, tmp_path, lambda _: None)
    use(monkeypatch, part("first", "raise SystemExit(1)"), part("second", PASSES), part("third", PASSES))
    said: list[str] = []
    report = run(CPU, tmp_path, said.append)
    assert [outcome["status"] for outcome in report["parts"].values()] == ["passed"] * 3
    assert said[0] == "first: passed before"


def test_a_part_runs_where_it_belongs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    code = "import json, os; print(json.dumps({'passed': True, 'place': os.getcwd()}))"
    use(monkeypatch, part("there", code, place=tmp_path / "root"), part("here", code))
    found = run(CPU, tmp_path / "out", lambda _: None)["parts"]
    assert [Path(found[name]["result"]["place"]) for name in ("there", "here")] == [
        (tmp_path / "root").resolve(),
        Path.cwd(),
    ]


def test_results_of_other_sources_are_not_added_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "maskloss"
    (package / "ops").mkdir(parents=True)
    for name in ("__init__.py", "ops/kernel.py"):
        (package / name).write_text("")
    monkeypatch.setattr(verify.maskloss, "__file__", str(package / "__init__.py"))
    use(monkeypatch)
    (tmp_path / "out").mkdir()
    for _ in range(2):
        run(CPU, tmp_path / "out", lambda _: None)
    (package / "ops" / "kernel.py").write_text("edited = True")
    with pytest.raises(MaskLossError, match=r"is of another software(.|\n)*give another --out"):
        run(CPU, tmp_path / "out", lambda _: None)


def test_results_of_another_machine_are_not_added_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch)
    run(CPU, tmp_path, lambda _: None)
    report = json.loads((tmp_path / verify.RESULTS).read_text())
    report["machine"]["gpu"] = {"name": "another"}
    report["software"]["torch"] = "1.0"
    (tmp_path / verify.RESULTS).write_text(json.dumps(report))
    with pytest.raises(MaskLossError, match=r"is of another software, machine(.|\n)*give another --out"):
        run(CPU, tmp_path, lambda _: None)


def test_without_time_a_part_is_left_for_the_next_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, part("late", PASSES))
    report = run(replace(CPU, seconds=1.0), tmp_path, lambda _: None)
    assert report["parts"]["late"]["status"] == "not run"
    assert not verify.is_fine(report["parts"]["late"])


def test_the_parts_for_a_gpu_are_commands_that_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As far as a machine without one can tell: every command line is one that its program takes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(verify.shutil, "which", lambda _: "/usr/local/cuda/bin/compute-sanitizer")
    made = verify.parts(Plan.on("cuda"), tmp_path)
    assert sum(each.limit for each in made if not each.name.startswith(("preset", "model"))) <= verify.SECONDS
    parser = argparse.ArgumentParser()
    bench_command.add_arguments(parser)
    ran: list[str] = []
    monkeypatch.setattr(kernels, "bandwidth", lambda *_: ran.append("bandwidth"))
    monkeypatch.setattr(kernels, "Operations", lambda case, _: ran.append(case.name) or NoOperations())
    for name in ("races", "unwritten"):
        monkeypatch.setattr(kernels, name, lambda *_: [])
    for each in made:
        command = list(each.command)
        if "bench" in command:
            given = parser.parse_args(command[command.index("bench") + 1 :])
            ran += [*(given.preset or ()), *(given.model or ())]
            assert given.out == tmp_path / each.name.replace(" ", "-")
        elif "maskloss.lab.bench.kernels" in command:
            at = command.index("maskloss.lab.bench.kernels") + 1
            kernels.main(command[at:])
    assert {"coco", "crowded", "cityscapes", "rf-detr", "rf-detr-head", "mask2former", "eomt"} <= set(ran)
    assert [name for name in ("small", "tiny-head", "bandwidth") if name in ran] == ["small", "tiny-head", "bandwidth"]
    [tests] = [each for each in made if each.name == "tests"]
    assert tests.missing is None
    assert all((ROOT / each).exists() for each in tests.command if each.startswith("tests/"))
    [check] = [each for each in made if each.name == "compute-sanitizer racecheck"]
    assert check.command[1:5] == ["--tool", "racecheck", "--error-exitcode", "9"]


class NoOperations:
    def run(self, _: Any) -> dict[str, Any]:
        return {}


def test_what_pytest_says_is_counted() -> None:
    output = """
tests/gpu/test_device.py::test_one PASSED                   [ 33%]
[gw0] [ 66%] FAILED tests/gpu/test_device.py::test_two[packed-1]
tests/gpu/test_device.py::test_three SKIPPED (needs 6 GiB)  [100%]
FAILED tests/gpu/test_device.py::test_two[packed-1] - assert 1 == 0
"""
    found = verify._tested(output, ROOT)
    assert not found["passed"]
    assert found["wrong"] == ["tests/gpu/test_device.py::test_two[packed-1]"]
    assert (found["counts"]["passed"], found["counts"]["skipped"]) == (1, 1)
    assert not verify._tested("no tests ran", ROOT)["passed"]


def test_launches_and_copies_are_told_apart() -> None:
    names = ["loss_terms", "Memcpy HtoD (Pageable -> Device)", "scatter", "Memset (Device)", "Memcpy DtoH", "sort"]
    assert worker.count_launches(names) == {"kernels": 3, "to host": 1, "to device": 1}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("coco", 2 * 4 * 10 * 2 * 100 * 256 * 256),
        ("coco-head", 2 * 4 * (10 * 2 * 100 * 256 + 2 * 256 * 256 * 256)),
        ("rf-detr-head", 2 * 4 * 6 * (2600 * 256 + 256 * 108 * 108)),
    ],
)
def test_the_least_that_must_be_moved(name: str, expected: int) -> None:
    assert PRESETS[name].least_bytes(4) == expected


def test_the_page_shows_times_and_what_differs() -> None:
    step = {"median": 0.002, "low": 0.001, "high": 0.003}
    samples = [{"round": turn, "forward": 0.001, "backward": 0.001, "criterion": 0.00025} for turn in range(3)]
    slow = [{**sample, "backward": 0.009} for sample in samples]
    arm = {"summary": {"step": step}, "samples": samples, "memory": {"peak": 4e6, "extra": 1e6}}
    counted = {"counts": {"operations": 80, "transfers": 0}, "launches": {"kernels": 41, "to host": 0, "to device": 1}}
    case = {"name": "tiny", "sizes": PRESETS["tiny"].as_dict(), "arms": {"maskloss": {**arm, **counted}}}
    case["arms"]["transformers"] = {**arm, **counted, "samples": slow}
    model = {"name": "eomt", "arms": {"unpatched": {**arm, "samples": slow}, "patched": arm}}
    hunted = [
        {"kernel": "choose", "warps": 8, "repeats": 200, "equal": False, "difference": 0.5, "passed": False},
        {"kernel": "scatter", "warps": 1, "repeats": 200, "skipped": True},
    ]
    report = {
        "date": "2026-01-01",
        "machine": {"cpu": "A processor", "system": "Linux", "gpu": {"name": "A GPU", "cuda": "13.0", "driver": "600"}},
        "software": {"torch": "2.13"},
        "parts": {
            "races": {"status": "failed", "why": "exit status 0", "result": {"launches": hunted}},
            "bandwidth": {"status": "passed", "result": {"bytes_per_second": 4e9}},
            "preset tiny": {"status": "passed", "result": {"found": [case]}},
            "model eomt": {"status": "passed", "result": {"found": [model]}},
        },
    }
    page = verify_page.page(report)
    assert page.startswith("# Verification: A GPU (CUDA 13.0, driver 600)\n")
    assert "rehearsal" not in page
    least = Case.from_dict(PRESETS["tiny"].as_dict()).least_bytes(4)
    share = round(100 * least / 4e9 / 0.002)
    assert (
        f"| `tiny` | maskloss | 2.00 ms | 41 | 0 | 4.00 MB | 1.00 MB | {least / 1e3:.1f} kB | {share}% | 5.0 ×" in page
    )
    assert "| `eomt` | patched | 2.00 ms | 25% | 4.00 MB | 5.0 × |" in page
    assert "| choose | 8 | 200 | 5.0e-01 | **differs** | **failed** |" in page
    assert "| scatter | 1 | 200 |  | no time |  |" in page


def test_options_that_it_would_ignore_are_an_error(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    bench_command.add_arguments(parser)
    for typed, told in (
        (["--preset", "tiny", "--steps", "3"], "--preset, --steps"),
        (["--seed", "1", "--seconds", "5", "--dtype", "float16"], "--dtype, --seconds, --seed"),
    ):
        given = parser.parse_args(["--verify", *typed, "--out", str(tmp_path)])
        with pytest.raises(MaskLossError, match=rf"it was given {told}\n"):
            bench_command.main(given)


# ---------------------------------------------------------------------------------------------------------- the kernels


class Kernel(KernelInterface):  # type: ignore[misc]
    """What is launched like a kernel of Triton."""

    def __init__(self, body: Any) -> None:
        self.__name__, self.body = body.__name__, body

    def run(self, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        self.body(*arguments, **options)


class Fake:
    """Operations of one kernel, which is given the middle of some memory."""

    def __init__(self, body: Any) -> None:
        self.kernel, self.memory = Kernel(body), torch.arange(12.0)

    def run(self, _: Any) -> dict[str, Any]:
        self.kernel[(1,)](self.memory[3:9], num_warps=4)
        return {}


def adds(values: torch.Tensor, num_warps: int) -> None:
    values += 1


def races_(values: torch.Tensor, num_warps: int) -> None:
    values += torch.rand(6)


def races_beside(values: torch.Tensor, num_warps: int) -> None:
    torch.empty(0).set_(values.untyped_storage())[0] += torch.rand(())


def depends_on_warps(values: torch.Tensor, num_warps: int) -> None:
    values.fill_(num_warps)


@pytest.mark.parametrize(
    ("body", "equal", "passed"),
    [
        (adds, True, [True, True]),
        (races_, False, [False, False]),
        (races_beside, False, [False, False]),
        (depends_on_warps, True, [False, True]),
    ],
)
def test_launches_are_compared_bit_by_bit(body: Any, equal: bool, passed: list[bool]) -> None:
    operations = Fake(body)
    found = kernels.races(operations, None, 5, [1, 4], 60.0)  # type: ignore[arg-type]
    assert [each["warps"] for each in found] == [1, 4]
    assert [each["equal"] for each in found] == [equal] * 2
    assert [each["passed"] for each in found] == passed
    if body is adds:
        # What came after saw one launch.
        assert operations.memory.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 9, 10, 11]
    skipped = kernels.races(Fake(body), None, 5, [1], -1.0)  # type: ignore[arg-type]
    assert [each.get("skipped") for each in skipped] == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_memory_that_nobody_writes_shows() -> None:
    class Forgets:
        def run(self, ops: Any) -> dict[str, Any]:
            made = {
                "empty": torch.empty(2),
                "empty_like": torch.empty_like(torch.ones(2)),
                "new": torch.ones(2).new_empty(2),
            }
            for name, value in made.items():
                if name not in forgotten or ops is kernels.reference:
                    value.zero_()
            return {name: [value] for name, value in made.items()}

    for forgotten in ((), ("empty",), ("empty_like",), ("new",)):
        found = kernels.unwritten(Forgets(), None)  # type: ignore[arg-type]
        assert [each["operation"] for each in found if not each["passed"]] == list(forgotten)
    assert float(torch.empty(1).fill_(0)) == 0


@pytest.mark.long
def test_a_rehearsal_runs_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels under the interpreter, and a program in place of compute-sanitizer that runs what it is told to."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nshift 4\n"$@" && echo "========= ERROR SUMMARY: 0 errors"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    report = run(Plan.on("cpu"), tmp_path / "out", lambda _: None)
    assert {name: part["status"] for name, part in report["parts"].items()} == dict.fromkeys(
        ("unwritten", "races", "tests", "compute-sanitizer memcheck", "compute-sanitizer racecheck", "bandwidth",
         "preset tiny", "preset tiny-rf-detr-head"), "passed",
    ), report["parts"]  # fmt: skip
    hunted = {each["kernel"] for each in report["parts"]["races"]["result"]["launches"]}
    sources = (ROOT / "src" / "maskloss" / "ops" / "gpu").glob("*.py")
    launched = set(re.findall(r"(\w+)\[\(", "".join(source.read_text() for source in sources)))
    assert launched <= hunted | {"tuple", "dict"}, launched - hunted
    assert report["parts"]["compute-sanitizer racecheck"]["result"]["last"] == ["========= ERROR SUMMARY: 0 errors"]
    assert "| `tiny` | maskloss |" in (tmp_path / "out" / verify.PAGE).read_text()
