"""Packing by the kernels: the bytes and tables of the NumPy path, whatever the masks hold and wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from maskloss import MaskTargets
from maskloss.ops import cpu
from maskloss.ops.cpu import threads as cpu_threads
from maskloss.targets import bits
from support.encodings_of_masks import SIZES, some_masks
from support.examples import number


@pytest.fixture(autouse=True)
def _on_several_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_threads, "FEW_PIXELS", 0)
        yield


def on_path(backend: str | None, call: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MASKLOSS_BACKEND", raising=False)
        if backend is not None:
            patch.setenv("MASKLOSS_BACKEND", backend)
        return call()


def assert_same(images: Sequence[Tensor]) -> None:
    """The kernels and NumPy, at the seam and as users see them."""
    paths = (None, "reference")
    (data, parts), (wanted, expected) = (on_path(path, partial(bits.pack_and_crop, images)) for path in paths)
    assert data.dtype == wanted.dtype
    assert torch.equal(data, wanted)
    for (place, size), (other, bytes_of) in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(place, other, strict=True)
        assert size == bytes_of
    # Users' masks hold 0 and 1 alone.
    images = [each if each.dtype == torch.bool or not (each > 1).any() else each != 0 for each in images]
    ours, theirs = (on_path(path, partial(MaskTargets.from_masks, images, soft=False)) for path in paths)
    assert (ours.encoding, ours.num_targets) == (theirs.encoding, theirs.num_targets)
    assert all(torch.equal(one, other) for one, other in zip(ours.tensors, theirs.tensors, strict=True))


# ------------------------------------------------------------------------------------------------------------ any masks

Layout = Callable[[Callable[..., Tensor], int, int, int], Tensor]
# Where masks `[t, h, w]` lie, in memory that is full of ones.
LAYOUTS: dict[str, Layout] = {
    "alone": lambda ones, t, h, w: ones(t, h, w),
    "amid others": lambda ones, t, h, w: ones(t + 2, h + 3, w + 12)[1:-1, 1:-2, 5:-7],
    "masks apart": lambda ones, t, h, w: ones(3 * t, h, w)[::3],
    "rows apart": lambda ones, t, h, w: ones(t, 2 * h, w)[:, ::2],
    "pixels apart": lambda ones, t, h, w: ones(t, h, 3 * w)[:, :, ::3],
    "transposed": lambda ones, t, h, w: ones(t, w, h).transpose(1, 2),
    "rows in turn": lambda ones, t, h, w: ones(h, t, w).transpose(0, 1),
}
DTYPES = (torch.bool, torch.uint8, torch.float32)
PIXELS = st.sampled_from([0, 1, 2, 128, 255])


@st.composite
def some_image(draw: st.DrawFn) -> Tensor:
    """Masks of any shape, layout and type; uint8 ones of any values, float ones of 0 and 1, few pixels or many."""
    shape = draw(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 80)))
    fill = draw(st.sampled_from([st.just(0), st.just(1), PIXELS]))
    values = torch.from_numpy(draw(arrays(np.uint8, shape, elements=PIXELS, fill=fill)))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([*LAYOUTS.values()]))
    return layout(partial(torch.ones, dtype=dtype), *shape).copy_(values if dtype == torch.uint8 else values != 0)


@pytest.mark.thorough
@settings(max_examples=number(300))
@given(st.lists(some_image(), min_size=1, max_size=4), st.sampled_from([1, 2]))
def test_any_masks(images: list[Tensor], threads: int) -> None:
    torch.set_num_threads(threads)
    assert_same(images)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [*SIZES, (9, 31), (5, 32), (4, 33), (17, 100), (3, 1030), (70, 6)])
def test_corners(size: tuple[int, int], threads: int) -> None:
    """Single pixels in every corner and two at a time, full and empty masks; around the pixels packed at a time."""
    torch.set_num_threads(threads)
    corners = torch.zeros(4, *size, dtype=torch.bool)
    for corner, mask in enumerate(corners):
        mask[-(corner >> 1), -(corner & 1)] = True
    pairs = (corners[:, None] | corners).flatten(0, 1)
    assert_same([pairs, pairs[:0], some_masks(*size), pairs.byte() * 255])
    assert_same([pairs])


def test_many_masks() -> None:
    """More images and masks than threads, so that each thread meets images without masks, and several with some."""
    images = [torch.rand(number % 4, 8 + number, 40 - number) > 0.9 for number in range(30)]
    assert_same(images)
    assert_same([torch.zeros(0, 5, 5, dtype=torch.uint8)] * 3)


def test_a_mask_for_many() -> None:
    """Expanded masks and rows, which share memory."""
    row, mask = torch.rand(1, 1, 50) > 0.7, torch.rand(1, 9, 50) > 0.7
    assert_same([row.expand(3, 9, 50), mask.expand(4, 9, 50), mask[:, :, :1].expand(1, 9, 50)])


# ------------------------------------------------------------------------------------------------------ which path runs


@pytest.mark.parametrize("backend", [None, "cpu", "gpu"])
def test_kernels_pack_on_the_host(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for losses on a GPU: what such a request is refused for, on a CPU, is a loss."""
    calls: list[int] = []
    pack = cpu.pack_masks
    monkeypatch.setattr(cpu, "pack_masks", lambda images: calls.append(len(images)) or pack(images))
    on_path(backend, partial(MaskTargets.from_masks, [some_masks(6, 9), some_masks(3, 4)]))
    assert calls == [2]


def test_a_few_pixels_are_packed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pixels with little inside are searched together and packed alone."""
    teams: list[bool] = []
    launch = cpu.launch
    monkeypatch.setattr(cpu, "launch", lambda *args: teams.append(args[-1] > cpu_threads.FEW_PIXELS) or launch(*args))
    masks = torch.zeros(2, 16, 32, dtype=torch.bool)
    masks[:, 4:8, 8:24] = True
    for few, wanted in ((1024, [False, False]), (1023, [True, False]), (128, [True, False]), (127, [True, True])):
        monkeypatch.setattr(cpu_threads, "FEW_PIXELS", few)
        assert_same([masks])
        assert teams == 2 * wanted
        teams.clear()


def test_the_reference_needs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("a kernel was asked")

    monkeypatch.setattr(cpu, "pack_masks", refuse)
    monkeypatch.setattr(cpu, "launch", refuse)
    masks = some_masks(6, 9)
    assert torch.equal(on_path("reference", partial(MaskTargets.from_masks, masks)).dense(), masks)
