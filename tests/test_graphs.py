"""Padded targets change nothing; what is captured is what a stream would run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from maskloss import MaskCriterion, MaskFactors, MaskLossError, MaskTargets, PointSampling, graphs
from maskloss._abi import IMAGE, TARGET

CLASSES, QUERIES, SIZE = 5, 12, 16
SAMPLING = PointSampling(num_points=64)


def batch(counts: tuple[int, ...], form: str = "bits") -> list[dict[str, Any]]:
    found = []
    for count in counts:
        masks: Any = torch.rand(count, 21, 30) > 0.6
        if form == "labels":
            maps = torch.randint(count + 1, (21, 30))
            masks = MaskTargets.from_label_map(maps, list(range(1, count + 1)), allow_missing=True)
        elif form == "values":
            masks = MaskTargets.from_masks(torch.rand(count, 21, 30), soft=True)
        elif form == "ignore":
            masks = MaskTargets.from_masks(masks, ignore=torch.rand(21, 30) > 0.7)
        found.append({"masks": masks, "labels": torch.randint(CLASSES, (count,))})
    return found


def predictions(images: int, softmax: bool = True, layers: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    classes = [torch.randn(images, QUERIES, CLASSES + softmax, requires_grad=True) for _ in range(layers)]
    return classes, [torch.randn(images, QUERIES, SIZE, SIZE, requires_grad=True) for _ in range(layers)]


def compared(criterion: MaskCriterion, counts: tuple[int, ...], size: int, form: str = "bits", **sizes: int) -> None:
    """The same losses, matches, losses of instances and gradients, padded and not."""
    targets = batch(counts, form)
    classes, logits = predictions(len(counts), criterion.classification == "softmax")
    padded = graphs.pad_targets(targets, size, data_size=9000, **sizes)
    plain = criterion(classes, logits, targets, seed=3)
    found = graphs.padded_loss(criterion, classes, logits, padded, seed=3)
    for name in ("total", "loss_class", "loss_mask", "loss_dice"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), rtol=1e-6, atol=1e-7)
    index = found.matches.index
    real = index[:, TARGET] < torch.tensor(counts)[index[:, IMAGE]]
    assert torch.equal(index[real], plain.matches.index)
    assert len(index) >= len(plain.matches.index)
    for mine, theirs in zip(found.per_instance, plain.per_instance, strict=True):
        assert torch.equal(mine[real], theirs)
    leaves = [*classes, *logits]
    mine, theirs = (torch.autograd.grad(out.total, leaves) for out in (found, plain))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    for layer, image, query, _ in index[~real].tolist():
        assert not mine[len(classes) + layer][image, query].any()


@pytest.mark.parametrize("classification", ["softmax", "focal"])
@pytest.mark.parametrize(("counts", "size"), [((3, 5), 8), ((0, 4), 4), ((5, 5), 5), ((0, 0), 6), ((12, 7), 12)])
def test_padded_targets_change_nothing(counts: tuple[int, ...], size: int, classification: str, backend: str) -> None:
    compared(MaskCriterion(CLASSES, classification=classification, sampling=SAMPLING, backend=backend), counts, size)


@pytest.mark.parametrize(("counts", "size"), [((3, 5), 20), ((15, 2), 16), ((20, 13), 32)])
def test_more_targets_than_queries(counts: tuple[int, ...], size: int) -> None:
    """A padded target never takes the query of a real one."""
    compared(MaskCriterion(CLASSES, sampling=SAMPLING), counts, size)


@pytest.mark.parametrize("form", ["labels", "values", "ignore"])
def test_every_encoding(form: str, backend: str) -> None:
    compared(MaskCriterion(CLASSES, sampling=SAMPLING, backend=backend), (2, 4), 8, form, ignore_size=500)


@pytest.mark.parametrize("options", [{"groups": 3}, {"focal_alpha": 0.25, "focal_gamma": 2.0}])
def test_groups_and_focal_masks(options: dict[str, Any]) -> None:
    compared(MaskCriterion(CLASSES, sampling=SAMPLING, **options), (2, 3), 4)
    compared(MaskCriterion(CLASSES, sampling=SAMPLING, **options), (2, 3), 8)


def test_masks_as_factors() -> None:
    criterion, targets = MaskCriterion(CLASSES, sampling=SAMPLING), batch((2, 3))
    classes, _ = predictions(2)
    features = torch.randn(2, 8, SIZE, SIZE)
    layers = [MaskFactors(torch.randn(2, QUERIES, 8), features) for _ in range(2)]
    padded = graphs.pad_targets(targets, 8, data_size=9000)
    mine = graphs.padded_loss(criterion, classes, layers, padded, seed=3)
    torch.testing.assert_close(mine.total, criterion(classes, layers, targets, seed=3).total, rtol=1e-6, atol=0)


def test_extra_costs_decide_along() -> None:
    criterion, targets = MaskCriterion(CLASSES, sampling=SAMPLING), batch((2, 3))
    classes, logits = predictions(2)
    extra = torch.randn(2, 2, QUERIES, 8) * 30
    given = [extra[:, image, :, : len(entry["labels"])] for image, entry in enumerate(targets)]
    padded = graphs.pad_targets(targets, 8, data_size=9000)
    mine = graphs.padded_loss(criterion, classes, logits, padded, extra_costs=extra, seed=3)
    plain = criterion(classes, logits, targets, extra_costs=given, seed=3)
    assert torch.equal(mine.loss_class.isfinite(), torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(mine.total, plain.total, rtol=1e-6, atol=0)
    without = criterion(classes, logits, targets, seed=3)
    assert not torch.equal(plain.matches.index, without.matches.index)


def test_a_batch_takes_the_place_of_another() -> None:
    criterion = MaskCriterion(CLASSES, sampling=SAMPLING)
    classes, logits = predictions(2)
    static = graphs.pad_targets(batch((2, 3)), 8, data_size=9000)
    addresses = [each.data_ptr() for each in static.tensors]
    targets = batch((6, 1))
    static.copy_(graphs.pad_targets(targets, 8, data_size=9000))
    assert [each.data_ptr() for each in static.tensors] == addresses
    found = graphs.padded_loss(criterion, classes, logits, static, seed=4)
    torch.testing.assert_close(found.total, criterion(classes, logits, targets, seed=4).total, rtol=1e-6, atol=0)
    assert static.to("meta").labels.device.type == "meta"


def test_what_does_not_fit_is_an_error() -> None:
    targets = batch((2, 3))
    with pytest.raises(MaskLossError, match=r"targets of an image must fit into the padded size\n.*\n.*3 into 2"):
        graphs.pad_targets(targets, 2, data_size=9000)
    with pytest.raises(MaskLossError, match="elements of data must fit"):
        graphs.pad_targets(targets, 4, data_size=10)
    with pytest.raises(MaskLossError, match=r"bytes of ignore regions must fit"):
        graphs.pad_targets(batch((2, 3), "ignore"), 4, data_size=9000)
    with pytest.raises(MaskLossError, match=r"one of the buckets must hold all targets(.|\n)*9 targets in \[4, 8\]"):
        graphs.bucket(9, (4, 8))
    static = graphs.pad_targets(targets, 4, data_size=9000)
    for other in (
        graphs.pad_targets(targets, 8, data_size=9000),
        graphs.pad_targets(batch((2, 3), "values"), 4, data_size=9000),
    ):
        with pytest.raises(MaskLossError, match="targets of a graph must have the sizes and the encoding"):
            static.copy_(other)
    weighted = MaskCriterion(CLASSES, class_weights=[1.0] * CLASSES)
    with pytest.raises(MaskLossError, match="must have no class_weights, and no rules"):
        graphs.padded_loss(weighted, *predictions(2), static)
    nothing = MaskCriterion(CLASSES, class_weight=0, mask_weight=0, dice_weight=0)
    with pytest.raises(MaskLossError, match="at least one weight must be positive, or extra_costs given"):
        graphs.padded_loss(nothing, *predictions(2), static)
    with pytest.raises(MaskLossError, match="a CUDA graph needs a CUDA device"):
        graphs.capture(lambda: None)


def test_a_capture_warms_up_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what is asked of CUDA, with a machine that has none."""
    done: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            done.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    @contextmanager
    def inside(what: Any) -> Iterator[None]:
        name = "capture" if isinstance(what, Graph) else what.name
        done.append(f"on {name}")
        yield
        done.append(f"off {name}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (
        ("Stream", Stream), ("current_stream", lambda: Stream("main")), ("stream", inside), ("CUDAGraph", Graph),
        ("graph", inside),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    captured = graphs.capture(lambda: done.append("step") or len(done), warmup=2)
    assert done == [
        "side waits for main", "on side", "step", "step", "off side", "main waits for side", "on capture", "step",
        "off capture",
    ]  # fmt: skip
    assert captured.replay() == captured.result == 8
    assert done[-1] == "replay"
