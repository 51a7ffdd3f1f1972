"""What is the same to the last bit, however often, on however many threads, in whatever process: docs/promises.md."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

import pytest
import torch

from support import repeats


def test_repeats(backend: str) -> None:
    assert len({repeats.digest(backend) for _ in range(4)}) == 1


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_numbers_of_threads(threads: int) -> None:
    assert repeats.digest("cpu", threads) == repeats.digest("cpu", 1)


@pytest.mark.parametrize("layout", ["independent", "stratified"])
def test_the_batch_around_an_image(backend: str, layout: str) -> None:
    """Matches and losses of an image are those that it has alone, or in another order of the images."""
    whole, _ = repeats.run(backend, layout=layout)
    for images in ([2, 0], [2], [0], [1, 2, 0]):
        part, _ = repeats.run(backend, images, layout)
        for here, image in enumerate(images):
            mine, its = part.matches.index[:, 1] == here, whole.matches.index[:, 1] == image
            assert torch.equal(part.matches.index[mine][:, 2:], whole.matches.index[its][:, 2:])
            if backend == "cpu":  # the reference sums in PyTorch, in an order that depends on the shape
                assert torch.equal(part.per_instance.ce[mine], whole.per_instance.ce[its])
                assert torch.equal(part.per_instance.dice[mine], whole.per_instance.dice[its])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_processes(method: str) -> None:
    """As workers of a data loader are started; on one thread, since PyTorch's threads do not survive a fork."""
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(repeats.digest, ("cpu", 1)).get(timeout=300) == repeats.digest("cpu", 1)


@pytest.mark.long
def test_two_thousand_steps_leave_nothing_behind() -> None:
    """Memory, descriptors and threads after 2,000 steps of changing sizes are those after the first 300."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = (list(map(int, line.split())) for line in done.stdout.splitlines())
    assert after[1:] == before[1:], "descriptors and threads"
    assert after[0] <= 1.02 * before[0], "memory"


STEPS = """
import gc, os, random
import torch
from maskloss import MaskCriterion, PointSampling

torch.set_num_threads(2)
criterion = MaskCriterion(3, sampling=PointSampling(num_points=200), backend="cpu")
drawn = random.Random(0)
sizes = [(drawn.randint(8, 64), drawn.randint(8, 64), drawn.randint(0, 9), drawn.randint(9, 12)) for _ in range(100)]


def one(number):
    height, width, count, queries = sizes[number % len(sizes)]
    masks = [torch.randn(2, queries, height, width, requires_grad=True) for _ in range(2)]
    classes = [torch.randn(2, queries, 4, requires_grad=True) for _ in range(2)]
    targets = [{"masks": torch.rand(count, 2 * height, width) > 0.5, "labels": torch.zeros(count).long()}] * 2
    criterion(classes, masks, targets, seed=number).total.backward()


def state():
    gc.collect()
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(int(status["VmRSS"].split()[0]), len(os.listdir("/proc/self/fd")), int(status["Threads"]))


for number in range(300):
    one(number)
state()
for number in range(300, 2300):
    one(number)
state()
"""
