"""Compiling the CPU kernels: the cache on disk and its troubles, signals, forks, and several processes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import maskloss
from maskloss.ops.cpu import compile as cpu_compile
from maskloss.ops.cpu import threads as cpu_threads
from maskloss.ops.cpu.threads import take

COMPILING = "maskloss: compiling CPU kernels, once per machine (about 20 s)\n"
CANNOT_KEEP = "maskloss: compiled kernels cannot be kept, so each process compiles its own; set NUMBA_CACHE_DIR"


def fill(counter, items, values, coordinates, integers, out):  # type: ignore[no-untyped-def]
    while True:
        item = take(counter)
        if item >= items:
            break
        out[item] = item


def clear(counter, items, values, coordinates, integers, out):  # type: ignore[no-untyped-def]
    out[:] = 0


class Process:
    """What a new process would do: nothing is compiled yet, and nothing has been said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(cpu_compile, "_said", set())
        self.kernels = [cpu_compile.kernel(fill), cpu_compile.kernel(clear)]
        self.out = np.empty(100, np.int64)
        for kernel in self.kernels:
            cpu_threads.launch(kernel, 100, (np.float32, np.float32), (0, 0, 0), (self.out,))
            assert (self.out == (0 if kernel is self.kernels[1] else np.arange(100))).all()
        self.loaded = [bool(kernel.stats.cache_hits) for kernel in self.kernels]
        self.said = capsys.readouterr().err


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], Process]:
    return lambda: Process(monkeypatch, capsys)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is."""
    monkeypatch.setattr(cpu_compile.config, "CACHE_DIR", str(tmp_path))
    return tmp_path / "maskloss"


def test_compiled_once_per_machine_and_said_so(folder: Path, process: Callable[[], Process]) -> None:
    first, second = process(), process()
    assert (first.loaded, first.said) == ([False, False], COMPILING)
    assert (second.loaded, second.said) == ([True, True], "")
    assert len(list(folder.glob("*/*.kernel"))) == 2


def test_a_kernel_is_not_taken_for_one_that_is_gone(folder: Path, process: Callable[[], Process]) -> None:
    """Python gives the id of an object that is gone to a new one: what is compiled is not known by ids."""
    kernels = [weakref.ref(kernel) for kernel in process().kernels]
    gc.collect()
    assert all(kernel() is not None for kernel in kernels)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content[:1000] + bytes([content[1000] ^ 1]) + content[1001:],
        lambda content: b"\x80\x05N." * 100,
        lambda content: sha256(b"\x80\x05N.").digest() + b"\x80\x05N.",
    ],
    ids=["empty", "short", "truncated", "one bit", "something else", "another object"],
)
def test_a_damaged_file_is_written_anew(
    damage: Callable[[bytes], bytes], folder: Path, process: Callable[[], Process]
) -> None:
    process()
    for file in folder.glob("*/*.kernel"):
        file.write_bytes(damage(file.read_bytes()))
    after, last = process(), process()
    assert after.loaded == [False, False]
    assert after.said.startswith("maskloss: a compiled kernel is damaged and is compiled anew: ")
    assert after.said.count("is damaged") == 1
    assert (last.loaded, last.said) == ([True, True], "")


def test_works_without_a_directory_for_the_cache(folder: Path, process: Callable[[], Process]) -> None:
    folder.write_text("a file")
    said = process().said
    assert said.startswith(COMPILING + CANNOT_KEEP)
    assert "Not a directory" in said
    assert said.count("\n") == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the size of files")
def test_no_room_for_the_cache(folder: Path, process: Callable[[], Process]) -> None:
    """Files cannot grow, as on a full disk: said once, and the results are right."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        said = process().said
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said.count(CANNOT_KEEP) == 1
    assert "File too large" in said
    assert {path.suffix for path in folder.glob("*/*")} <= {".lock"}
    assert process().loaded == [False, False]
    assert process().loaded == [True, True]


def test_a_cache_that_cannot_be_written_is_read(
    folder: Path, process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose image was built with the kernels in it."""

    def refuse() -> Path:
        raise PermissionError("read-only")

    process()
    monkeypatch.setattr(cpu_compile, "_open_folder", refuse)
    second = process()
    assert (second.loaded, second.said) == ([True, True], "")


def test_options_of_numba_have_code_of_their_own(
    folder: Path, process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    process()
    with monkeypatch.context() as patch:
        patch.setattr(cpu_compile.config, "BOUNDSCHECK", 0 if cpu_compile.config.BOUNDSCHECK else 1)
        assert process().loaded == [False, False]
        assert process().loaded == [True, True]
    assert process().loaded == [True, True]


@pytest.mark.parametrize("name", ["positions.py", "points.py", "_abi.py"])
def test_a_change_in_any_kernel_file_invalidates_the_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version = cpu_compile._version()
    assert version == cpu_compile._version.__wrapped__()
    read_bytes = Path.read_bytes

    def changed(path: Path) -> bytes:
        return read_bytes(path) + b"# changed" * (path.name == name)

    monkeypatch.setattr(Path, "read_bytes", changed)
    assert version != cpu_compile._version.__wrapped__()


def test_old_versions_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_compile.config, "CACHE_DIR", str(tmp_path))
    for number in range(20):
        old = tmp_path / "maskloss" / f"{number:016x}"
        old.mkdir(parents=True)
        (old / "some.kernel").write_bytes(b"code")
        os.utime(old, (number, number))
    (tmp_path / "maskloss" / "something else").mkdir()
    folder = cpu_compile._open_folder()
    left = {path.name for path in folder.parent.iterdir()}
    assert left == {folder.name, "something else", *(f"{number:016x}" for number in range(5, 20))}


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_compile.config, "CACHE_DIR", "")
    monkeypatch.setattr(cpu_compile.AppDirs, "user_cache_dir", "/home/somebody/.cache/maskloss")
    assert cpu_compile.directory() == Path("/home/somebody/.cache/maskloss")
    monkeypatch.setattr(cpu_compile.AppDirs, "user_cache_dir", "~/.cache/maskloss")
    with pytest.raises(FileNotFoundError, match="not an absolute path"):
        cpu_compile.directory()


SCRIPT = """
import numpy as np
from maskloss.ops.cpu.compile import kernel
from maskloss.ops.cpu.threads import launch, take

@kernel
def fill(counter, items, values, coordinates, integers, out):
    while True:
        item = take(counter)
        if item >= items:
            break
        out[item] = item

def run():
    out = np.empty(1000, np.int64)
    launch(fill, 1000, (np.float32, np.float32), (0, 0, 0), (out,))
    assert (out == np.arange(1000)).all()
"""


def start(folder: Path, code: str, **environment: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    if not script.exists():  # a process may be reading it
        script.write_text(code)
    own = {"PYTHONPATH": str(Path(maskloss.__file__).parents[1]), "NUMBA_CACHE_DIR": str(folder / "cache")}
    pipe = subprocess.PIPE
    command = [sys.executable, str(script)]
    return subprocess.Popen(command, env={**os.environ, **own, **environment}, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out.strip()


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    code = SCRIPT + 'run(); print("loaded" if fill.stats.cache_hits else "compiled")'
    together = [start(tmp_path, code) for _ in range(2)]
    assert sorted(finish(process) for process in together) == ["compiled", "loaded"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signal.setitimer and os.fork")
def test_signals_during_a_compilation(tmp_path: Path) -> None:
    """Each exception of a handler is raised at once, the kernel is finished all the same, and a fork waits for it."""
    code = """
import os, signal, sys, time
raised = caught = 0

def ring(number, frame):
    global raised
    raised += 1
    raise TimeoutError

signal.signal(signal.SIGALRM, ring)
began = time.monotonic()
while fill.signatures == []:
    told = raised
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        run()
        while raised == told:
            pass
    except TimeoutError:
        caught += 1
    except RuntimeError as error:
        sys.exit(f"after {caught}: {error!r}")
    if not os.fork():
        run()
        os._exit(0)
    assert os.wait()[1] == 0
assert caught == raised > 0, (caught, raised)
run()
print(raised)
"""
    finish(start(tmp_path, SCRIPT + code))


def test_without_a_compiler(tmp_path: Path) -> None:
    """The default is the reference, said aloud; who asked for the kernels is told why they cannot run."""
    code = """
import warnings
import torch
from maskloss import MaskLoss, MaskLossError

logits, masks = torch.randn(1, 8, 8), torch.ones(1, 9, 9, dtype=torch.bool)
with warnings.catch_warnings(record=True) as said:
    loss = MaskLoss()(logits, masks, seed=0).total
assert loss == MaskLoss(backend="reference")(logits, masks, seed=0).total
print([str(warning.message) for warning in said])
try:
    MaskLoss(backend="cpu")(logits, masks)
except MaskLossError as error:
    print(error)
"""
    out = finish(start(tmp_path, code, NUMBA_DISABLE_JIT="1"))
    cause = "Numba compiles nothing while NUMBA_DISABLE_JIT is set"
    assert f"['maskloss: {cause}, so cpu tensors run on the slower reference backend']" in out
    assert f"cause: {cause}\n  hint: unset NUMBA_DISABLE_JIT, or use backend='reference'" in out
