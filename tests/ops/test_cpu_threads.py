"""The threads of the CPU kernels: PyTorch's own or a pool, several callers, forked children, and signals."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskloss.ops import cpu
from maskloss.ops.cpu import hungarian
from maskloss.ops.cpu import openmp as cpu_openmp
from maskloss.ops.cpu import pool as cpu_pool
from maskloss.ops.cpu import scratch as scratch_spaces
from maskloss.ops.cpu import threads as cpu_threads
from maskloss.targets import MaskTargets
from support.batches import Batch

SAMPLING = (256, 768, 192)
RUN_ON_POOL = cpu_pool.run
THREADS_OF_A_LAUNCH = """
import os, threading
import numpy as np
import torch
from maskloss.ops.cpu import threads

torch.set_num_threads(3)
large = torch.ones(1 << 20)
large.exp()
tasks = set(os.listdir("/proc/self/task"))
threads.prepare = lambda *_: None  # which would start a thread, to compile the kernel
barrier, seen = threading.Barrier(3), set()

def meet(counter, items, *scratch):
    barrier.wait(timeout=200)
    seen.add(str(threading.get_native_id()))

threads.launch(meet, 3, (np.float32, np.float32), (0, 0, 0), ())
assert len(seen) == 3, seen
assert seen <= tasks, (seen, tasks)
large.exp()
assert set(os.listdir("/proc/self/task")) == tasks
"""


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "FEW_PIXELS", 0)  # masks are packed on several threads, however few
    torch.set_num_threads(2)


@pytest.fixture(params=["openmp", "pool"])
def threads_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose threads run the kernels; a test fails if others are asked."""
    kind: str = request.param
    if kind == "openmp" and not cpu_openmp.available():
        pytest.skip("PyTorch's threads cannot be had here")
    if kind == "pool":
        monkeypatch.setattr(cpu_openmp, "available", lambda: False)
        monkeypatch.setattr(cpu_openmp, "run", refuse)
    else:
        monkeypatch.setattr(cpu_pool, "run", refuse)
    return kind


def refuse(*args: Any) -> Any:
    raise AssertionError(f"were asked for threads: {args}")


def step(seed: int = 0) -> list[Tensor]:
    """Every result of one training step: targets, points, losses, gradients, costs; two instances share a plane."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(2, 4, 37, 53, generator=generator) for _ in range(3)]
    targets = MaskTargets.from_masks([torch.rand(5, 64, 80, generator=generator) < 0.4 for _ in range(2)])
    index = torch.tensor([(l, b, q % 4, q) for l in range(3) for b in range(2) for q in range(5)])  # noqa: E741
    ids, key = torch.tensor([0, 1]), torch.tensor(seed)
    batch = Batch(logits, index, [10] * 3, targets, ids, key)
    saved = batch.loss(cpu, SAMPLING)
    grads, costs, points = batch.gradients(cpu, saved, SAMPLING), batch.costs(cpu, 256), batch.points(cpu, SAMPLING)
    maps = logits[0].flatten(0, 1)
    values = cpu.point_sample(maps, index[:, 2], points, "bilinear", "zeros")
    back = cpu.point_sample_backward(values, maps, index[:, 2], points, "bilinear", "zeros")
    return [*saved, *grads, *costs, points, values, back, *targets.tensors]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 33])
def test_results_do_not_depend_on_the_number_of_threads(threads_of: str, threads: int) -> None:
    torch.set_num_threads(1)
    alone = step()
    torch.set_num_threads(threads)
    for _ in range(3):
        assert same(step(), alone)


def test_one_thread_needs_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(cpu_pool, "run", refuse)
    monkeypatch.setattr(cpu_openmp, "run", refuse)
    step()


def test_several_callers_at_once(threads_of: str) -> None:
    expected = [step(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as callers:
        for results in callers.map(lambda seed: (seed, step(seed)), list(range(4)) * 6):
            assert same(results[1], expected[results[0]])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_threads_are_those_of_torch() -> None:
    """A kernel adds no thread to those that PyTorch has started, and its work is done on all of them.

    In a process of its own: here, threads of other tests come and go.
    """
    if not cpu_openmp.available():
        pytest.skip("PyTorch's threads cannot be had here")
    subprocess.run([sys.executable, "-c", THREADS_OF_A_LAUNCH], check=True, timeout=300)


def test_fewer_items_than_threads_keep_the_team() -> None:
    """OpenMP would end the threads that a smaller team leaves out, and start them again in the next region."""
    if not cpu_openmp.available():
        pytest.skip("PyTorch's threads cannot be had here")
    torch.set_num_threads(4)
    calls: list[int] = []

    def note(counter: Any, items: int, *scratch: Any) -> None:
        if items:
            calls.append(threading.get_native_id())

    cpu_threads.launch(note, 2, (np.float32, np.float32), (0, 0, 0), ())
    assert len(set(calls)) == 4


def test_a_growing_pool_serves_callers_of_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_openmp, "available", lambda: False)
    expected = step()
    stop = threading.Event()
    wrong: list[int] = []

    def keep_calling() -> None:
        while not stop.is_set():
            if not same(step(), expected):
                wrong.append(1)

    caller = threading.Thread(target=keep_calling)
    caller.start()
    try:
        for threads in (2, 5, 9, 2, 12):
            torch.set_num_threads(threads)
            assert same(step(), expected)
    finally:
        stop.set()
        caller.join()
    assert not wrong


def run_in_child(work: Any) -> int:
    """Fork, run `work` in the child, and return the child's exit code: 0 if `work` returned true."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("lent", [True, False])
def test_forked_children_build_their_own_pool(lent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not lent:
        monkeypatch.setattr(cpu_openmp, "available", lambda: False)
    expected = step()
    torch.ones(1 << 20).exp()  # the parent's OpenMP threads have run
    monkeypatch.undo()

    def child() -> bool:
        torch.set_num_threads(2)
        alone = not cpu_openmp.available() and not cpu_pool._threads
        return alone and same(step(), expected) and bool(cpu_pool._threads)

    assert run_in_child(child) == 0
    assert same(step(), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_computes(threads_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_pool, "run", RUN_ON_POOL)  # of a child
    expected = step()
    stop = threading.Event()

    def keep_calling() -> None:
        while not stop.is_set():
            step()

    caller = threading.Thread(target=keep_calling)
    caller.start()
    try:
        codes = [run_in_child(lambda: torch.set_num_threads(2) is None and same(step(), expected)) for _ in range(8)]
    finally:
        stop.set()
        caller.join()
    assert codes == [0] * 8


class Batches(torch.utils.data.Dataset[list[Tensor]]):
    """Kernels called in data-loading workers."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, seed: int) -> list[Tensor]:
        return step(seed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_data_loading_workers() -> None:
    expected = [step(seed) for seed in range(4)]
    loader = torch.utils.data.DataLoader(Batches(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert all(same(*pair) for pair in zip(loader, expected, strict=True))


def test_an_error_in_a_kernel_reaches_the_caller(threads_of: str) -> None:
    def broken(counter: Any, items: int, *scratch: Any) -> None:
        if items:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        cpu_threads.launch(broken, 5, (np.float32, np.float32), (0, 0, 0), ())


class Alarm(BaseException):
    """What a signal's handler raises: nothing that a kernel's caller would catch by chance."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signal.setitimer")
def test_no_exception_of_a_signal_is_lost(threads_of: str) -> None:
    """Handlers run between any two steps of Python on the main thread, also where nothing can catch what they raise."""
    raised = caught = 0
    moments = random.Random(1)

    def ring(number: int, frame: Any) -> None:
        nonlocal raised
        raised += 1
        raise Alarm

    def work() -> None:
        cpu_threads.launch(hungarian.assign, 8, (np.float64, np.float32), hungarian.work_space(3, 3), args)

    args = np.zeros((8, 1, 3, 3), np.float32), np.full(1, 3), np.arange(8) * 3, np.zeros((24, 4), np.int64)
    work()  # compiled
    before = signal.signal(signal.SIGALRM, ring)
    gc.disable()  # Hypothesis has it call a function, and what a handler raises there is lost
    try:
        while raised < 500:
            told = raised
            try:
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-5, 4e-4))
                while raised == told:
                    work()
            except Alarm:
                caught += 1
    finally:
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert caught == raised
    assert args[-1][:, 0].tolist() == sorted([*range(8)] * 3)


def test_two_exceptions_are_both_told(threads_of: str) -> None:
    """What ends the program is raised, and an error of another thread is its context."""
    barrier = threading.Barrier(2)
    kinds = [KeyboardInterrupt("now"), MemoryError("no room")]

    def broken(counter: Any, items: int, *scratch: Any) -> None:
        if items:
            barrier.wait(timeout=200)
            raise kinds.pop()

    with pytest.raises(KeyboardInterrupt, match="now") as raised:
        cpu_threads.launch(broken, 5, (np.float32, np.float32), (0, 0, 0), ())
    assert isinstance(raised.value.__context__, MemoryError)


def test_other_unraisable_exceptions_go_where_they_went(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu_openmp.available():
        pytest.skip("PyTorch's threads cannot be had here")
    told: list[str] = []

    def hook(lost: Any) -> None:
        told.append(repr(lost.exc_value))

    class Fragile:
        def __del__(self) -> None:
            raise ValueError("on the way out")

    def drop(counter: Any, items: int, *scratch: Any) -> None:
        if items:
            Fragile()

    monkeypatch.setattr(sys, "unraisablehook", hook)
    cpu_threads.launch(drop, 2, (np.float32, np.float32), (0, 0, 0), ())
    assert "ValueError('on the way out')" in told
    assert sys.unraisablehook is hook


def test_no_work_compiles_nothing() -> None:
    def never(*args: Any) -> None:
        raise AssertionError

    cpu_threads.launch(never, 0, (np.float32, np.float32), (0, 0, 0), ())


def test_large_scratch_arrays_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch_spaces, "_KEEP_BYTES", 1000)
    halves = (np.float16, np.float16)
    with scratch_spaces.scratch(halves, (10_000, 0, 0)) as [large, *_]:
        assert large.shape == (10_000,)
    with scratch_spaces.scratch(halves, (300, 0, 0)) as [small, *_]:
        assert small.base is not large.base
    with scratch_spaces.scratch(halves, (200, 0, 0)) as [again, *_]:
        assert again.base is small.base
        with scratch_spaces.scratch(halves, (200, 0, 0)) as [other, *_]:
            assert other.base is not small.base


def test_work_spaces_begin_with_garbage_in_tests() -> None:
    """So that a value which no kernel wrote shows (see `support.garbage`)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch_spaces, "_spaces", [])
        with scratch_spaces.scratch((np.float32, np.float64), (5, 4, 3)) as [values, points, integers]:
            assert np.isnan(values).all()
            assert np.isnan(points).all()
            assert integers.tolist() == [113] * 3
