"""`maskloss doctor`: it says what is there, finds what is wrong, and runs where no extra is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import maskloss
from maskloss.lab.cli import main
from maskloss.lab.commands import doctor
from maskloss.ops.cpu import compile as cpu_compile

LINES = ["versions", "system", "device", "threads", "environment", "backend", "check", "check", "result"]


def told(capsys: pytest.CaptureFixture[str], status: int) -> list[str]:
    """Run the command and return its lines."""
    assert main(["doctor"]) == status
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own, with two whole files in it that are no kernels, which only their names and digests tell."""
    monkeypatch.setattr(cpu_compile.config, "CACHE_DIR", str(tmp_path))
    folder = cpu_compile._open_folder()
    for name in ("one", "two"):
        cpu_compile._write(folder / f"{name}.kernel", cpu_compile.sha256(b"code").digest() + b"code")
    return folder


@pytest.fixture(autouse=True)
def _usual_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor._VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_everything_works(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_check_cache", list)  # that of this machine is no part of the test
    lines = told(capsys, 0)
    expected = LINES if not torch.cuda.is_available() else [*LINES[:-1], "backend", "check", "check", "result"]
    assert [line[:13].strip() for line in lines] == expected
    text = "\n".join(lines)
    assert f"maskloss {maskloss.__version__}" in lines[0]
    assert f"torch {torch.__version__}" in lines[0]
    assert "cpu tensors run on 'cpu'" in text
    assert "reference on cpu, compared with the definition: points equal, matches equal, loss within" in text
    assert lines[-1].endswith("no problem found")


def test_the_home_folder_stays_private(
    capsys: pytest.CaptureFixture[str], kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = kernels.parents[1]
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(home / "triton"))
    monkeypatch.setattr(doctor, "_check_backends", list)
    text = "\n".join(told(capsys, 0))
    assert "~/maskloss, writable, 2 kernels of this version" in text
    assert "TRITON_CACHE_DIR=~/triton" in text
    assert str(home) not in text


def test_a_cache_in_trouble(capsys: pytest.CaptureFixture[str], kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_check_backends", list)
    (kernels / "two.kernel").write_bytes(b"half of a fi")
    *_, problem, result = told(capsys, 1)
    assert problem.endswith("damaged kernels, which will be compiled anew: two.kernel")
    assert result.endswith("1 problem found")

    def refuse() -> Path:
        raise PermissionError("read-only")

    monkeypatch.setattr(cpu_compile, "_open_folder", refuse)
    *_, problem, _ = told(capsys, 1)
    assert "each process compiles its own: read-only (set NUMBA_CACHE_DIR)" in problem


def test_an_empty_cache_is_no_problem(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_compile.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(doctor, "_check_backends", list)
    assert "writable, cold" in "\n".join(told(capsys, 0))


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("loss", lambda value: value * 1.001, "loss"),
        ("loss", lambda value: value * float("nan"), "loss"),
        ("gradient", lambda value: value.roll(1, -1), "gradient"),
        ("points", lambda value: value.flip(1), "points"),
        ("matches", lambda value: value.roll(1, 0), "matches"),
    ],
)
def test_a_wrong_result_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, part: str, change: object, said: str
) -> None:
    right = doctor._step

    def step(backend: str, *args: object) -> doctor.Step:
        found = right(backend, *args)  # type: ignore[arg-type]
        return found._replace(**{part: change(getattr(found, part))}) if backend == "cpu" else found  # type: ignore[operator]

    monkeypatch.setattr(doctor, "_step", step)
    *_, problem, _ = told(capsys, 1)
    assert problem.endswith(f"cpu on cpu does not compute what the definition says: {said}")


def test_a_backend_that_raises_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = doctor._step

    def step(backend: str, *args: object) -> doctor.Step:
        if backend == "cpu":
            raise RuntimeError("a broken\ndriver\x1b[31m")
        return right(backend, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(doctor, "_step", step)
    *_, problem, _ = told(capsys, 1)
    assert problem.endswith(r"cpu on cpu raises RuntimeError: a broken driver\x1b[31m")


def test_a_backend_that_does_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKLOSS_BACKEND", "gpu")
    monkeypatch.setattr(doctor, "_check", lambda *_: [])
    lines = told(capsys, 1)
    assert any("MASKLOSS_BACKEND=gpu" in line for line in lines)
    assert "backend 'gpu' runs on CUDA and ROCm tensors only" in lines[-2]


@pytest.mark.slow
def test_without_extras_and_without_a_compiler(tmp_path: Path) -> None:
    """What none but the extras install is not needed; that Numba compiles nothing is a problem."""
    code = """
import sys
for name in ("rich", "psutil", "matplotlib", "PIL", "sklearn", "pycocotools", "transformers", "accelerate", "yaml"):
    sys.modules[name] = None
from maskloss.lab.cli import main
sys.exit(main(["doctor"]))
"""
    own = {"PYTHONPATH": str(Path(maskloss.__file__).parents[1]), "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **own},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "cpu tensors run on 'reference'" in done.stdout
    assert "Numba compiles nothing while NUMBA_DISABLE_JIT is set (unset NUMBA_DISABLE_JIT" in done.stdout
    assert done.stdout.endswith("result        1 problem found\n")
