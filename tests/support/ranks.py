"""A small model and its steps, on one process and on several: what `test_distributed` compares.

In a file of its own because the processes of a distributed run import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from maskloss import MaskCriterion, MaskFactors, MaskLoss, MaskLossError, PointSampling, step, step_totals

RANKS, IMAGES, QUERIES, CLASSES, LAYERS, FEATURES, SIDE = 2, 4, 5, 3, 2, 6, 9
SEED = 11
# Targets of each image; rank r has images 2r and 2r + 1.
COUNTS = {
    "uneven, more targets than queries": (2, 0, 7, 1),
    "a rank without targets": (3, 2, 0, 0),
    "no targets at all": (0, 0, 0, 0),
}
# Pairs of prediction and target on each rank, and which of them count.
PAIRS = (3, 1)
KEPT = ((True, False, True), (False,))
BACKENDS = ("reference", "cpu")

Grads = dict[str, Tensor]


class Model(nn.Module):
    """Features `[B, Q, F]` to the class and mask logits of every layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.classes = nn.ModuleList(nn.Linear(FEATURES, CLASSES + 1) for _ in range(LAYERS))
        self.masks = nn.ModuleList(nn.Linear(FEATURES, SIDE * SIDE) for _ in range(LAYERS))

    def forward(self, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        masks = [head(features).unflatten(-1, (SIDE, SIDE)) for head in self.masks]
        return [head(features) for head in self.classes], masks


class Products(nn.Module):
    """Features `[B, Q, F]` to the class logits of every layer, its embeddings, and the pixels that they share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.classes = nn.ModuleList(nn.Linear(FEATURES, CLASSES + 1) for _ in range(LAYERS))
        self.embeddings = nn.ModuleList(nn.Linear(FEATURES, 4) for _ in range(LAYERS))
        self.pixels = nn.Parameter(torch.randn(4, SIDE, SIDE))

    def forward(self, features: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        classes, embeddings = ([head(features) for head in heads] for heads in (self.classes, self.embeddings))
        return classes, embeddings, self.pixels.expand(len(features), -1, -1, -1)


def factored_step(
    model: nn.Module, features: Tensor, targets: list[dict[str, Tensor]], *, dense: bool = False
) -> tuple[Tensor, Grads]:
    """A step with masks as factors, or with what they stand for: its loss and gradients."""
    classes, embeddings, pixels = model(features)
    factors = [MaskFactors(each, pixels) for each in embeddings]
    layers = [each.dense() for each in factors] if dense else factors
    total = criterion("cpu")(classes, layers, targets, seed=SEED).total
    total.backward()
    return total.detach(), gradients(model)


def batch(case: str) -> tuple[Tensor, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(IMAGES, QUERIES, FEATURES, generator=generator)
    targets = [
        {
            "masks": torch.rand(count, 20, 30, generator=generator) > 0.5,
            "labels": torch.randint(CLASSES, (count,), generator=generator),
        }
        for count in COUNTS[case]
    ]
    return features, targets


def criterion(backend: str, **options: Any) -> MaskCriterion:
    return MaskCriterion(CLASSES, sampling=PointSampling(num_points=50), backend=backend, **options)


def gradients(model: nn.Module) -> Grads:
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def whole_batch(case: str, backend: str) -> tuple[Tensor, Grads]:
    """The step on one process: its loss and gradients."""
    model, (features, targets) = Model(), batch(case)
    total = criterion(backend)(*model(features), targets, seed=SEED).total
    total.backward()
    return total.detach(), gradients(model)


def accumulated(model: nn.Module, case: str, backend: str, micro_batches: Sequence[Sequence[int]]) -> Tensor:
    """Go through micro-batches, given as numbers of images; the loss of all, and gradients left in the model."""
    features, targets = batch(case)
    counts = [[len(targets[image]["labels"]) for image in images] for images in micro_batches]
    totals = step_totals(counts, QUERIES)
    loss = torch.zeros(())
    for number, images in enumerate(micro_batches):
        held = isinstance(model, DistributedDataParallel) and number < len(micro_batches) - 1
        with model.no_sync() if held else nullcontext():
            out = criterion(backend)(
                *model(features[list(images)]),
                [targets[image] for image in images],
                totals=totals,
                image_ids=list(images),
                seed=SEED,
            )
            out.total.backward()
        loss += out.total.detach()
    return loss


def weighted_step(model: nn.Module, images: Sequence[int], kind: str) -> Tensor:
    """The loss of images with weights of classes and instances; "given": with matches of different numbers by layer."""
    features, targets = batch("uneven, more targets than queries")
    weights = [torch.linspace(0.25, 2.0, len(each["labels"])) for each in targets]
    given = [([0], [0]), ([], []), ([1, 0], [2, 6]), ([], [])]
    matches = {"matches": [[given[i] for i in images], [([], [])] * len(images)]} if kind == "given" else {}
    out = criterion("reference", class_weights=[0.5, 2.0, 1.5])(
        *model(features[list(images)]),
        [targets[image] for image in images],
        instance_weights=[weights[image] for image in images],
        seed=SEED,
        **matches,
    )
    out.total.backward()
    return out.total.detach()


def mixed_step(model: nn.Module, images: Sequence[int]) -> Tensor:
    """The loss of images of which only the first lacks a mask: half of the ranks know nothing of weights."""
    features, targets = batch("uneven, more targets than queries")
    targets[0]["has_mask"] = torch.tensor([True, False])
    out = criterion("reference", class_weights=[0.5, 2.0, 1.5])(
        *model(features[list(images)]), [targets[image] for image in images], seed=SEED
    )
    out.total.backward()
    return out.total.detach()


def alone(rank: int) -> dict[str, Tensor]:
    """What rank 0 computes while rank 1 does something else: a loss that waits for the other never returns."""
    features, targets = batch("uneven, more targets than queries")
    classes, masks = Model()(features[:2])
    found: dict[str, Tensor] = {}
    if rank == 0:
        with torch.no_grad():
            found["no gradient"] = criterion("reference")(classes, masks, targets[:2], seed=SEED).total
        plain = [[layer.detach() for layer in layers] for layers in (classes, masks)]
        found["no graph"] = criterion("reference")(*plain, targets[:2], seed=SEED).total
        found["argument"] = criterion("reference")(classes, masks, targets[:2], seed=SEED, group=False).total
        with step(group=False):
            found["block"] = criterion("reference")(classes, masks, targets[:2], seed=SEED).total
            found["pairs"] = MaskLoss(backend="reference")(masks[0][0, :2], targets[0]["masks"], seed=SEED).total
    return found


def grouped(rank: int) -> dict[str, Tensor]:
    """A loss without a gradient that counts over a group of both ranks, or of this one only."""
    features, targets = batch("uneven, more targets than queries")
    mine = slice(2 * rank, 2 * rank + 2)
    both, *single = [dist.new_group(members) for members in ([0, 1], [0], [1])]
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, group in (("both", both), ("one", single[rank])):
            found[name] = criterion("reference")(*Model()(features[mine]), targets[mine], seed=SEED, group=group).total
    found["totals"] = torch.tensor(step_totals([[3 + rank]], QUERIES, group=single[rank]).instances)
    with pytest.raises(MaskLossError, match="a process group that this rank is in"):
        criterion("reference")(*Model()(features[mine]), targets[mine], group=single[1 - rank])
    return found


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    count = sum(PAIRS)
    logits = torch.randn(count, SIDE, SIDE, generator=generator)
    return logits, torch.rand(count, 12, 12, generator=generator) > 0.5, torch.rand(count, 40, 2, generator=generator)


def pair_gradient(backend: str, mine: slice, **options: Any) -> Tensor:
    """The gradient of `MaskLoss` for some of the pairs, at given points."""
    logits, masks, points = (each[mine] for each in pairs())
    logits.requires_grad_()
    MaskLoss(backend=backend)(logits, masks, points=points, **options).total.backward()
    assert logits.grad is not None
    return logits.grad


def run(rank: int, folder: str) -> None:
    """Be one of two ranks; leave the results in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(minutes=5),
    )
    mine = list(range(IMAGES))[2 * rank : 2 * rank + 2]
    pairs_here = slice(0, PAIRS[0]) if rank == 0 else slice(PAIRS[0], None)
    results: dict[Any, Any] = {"alone": alone(rank), "grouped": grouped(rank)}
    for case in COUNTS:
        features, targets = batch(case)
        products = DistributedDataParallel(Products())
        results["factors", case] = factored_step(products, features[mine], [targets[image] for image in mine])
    for backend in BACKENDS:
        for case in COUNTS:
            model = DistributedDataParallel(Model())
            features, targets = batch(case)
            total = criterion(backend)(*model(features[mine]), [targets[image] for image in mine], seed=SEED).total
            total.backward()
            results["default", case, backend] = (total.detach(), gradients(model))
            loss = accumulated(model, case, backend, [[image] for image in mine])
            results["accumulated", case, backend] = (loss, gradients(model))
        results["pairs", backend] = pair_gradient(backend, pairs_here)
        keep = torch.tensor(KEPT[rank])
        results["kept pairs", backend] = pair_gradient(backend, pairs_here, instance_weights=keep)
    for kind in ("matched", "given"):
        model = DistributedDataParallel(Model())
        results["weighted", kind] = (weighted_step(model, mine, kind), gradients(model))
    model = DistributedDataParallel(Model())
    results["mixed"] = (mixed_step(model, mine), gradients(model))
    weights = {"instance_weights": [[torch.ones(3 + rank) / 2, torch.ones(2)]], "class_weights": [1.0, 3.0]}
    labels = [[torch.zeros(3 + rank).long(), torch.ones(2).long()]]
    results["weighted totals"] = step_totals([[3 + rank, 2]], QUERIES, labels=labels, **weights)
    results["totals"] = step_totals([[3 + rank, 9], [0]], QUERIES)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
