"""Forty training steps, patched and unpatched: loss curves that cannot be told apart."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from support import tiny

pytest.importorskip("transformers")
patch = pytest.importorskip("maskloss.integrations.transformers").patch

STEPS, SEEDS = 40, 5


def curve(*, seed: int, patched: bool = False, factors: bool = False) -> Tensor:
    """The losses of 40 steps from one initialisation on one stream of batches; only the points differ by seed."""
    torch.manual_seed(0)
    model = tiny.mask2former(decoder_layers=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    handle = patch(model, backend="reference", factors=factors) if patched else None
    torch.manual_seed(seed)
    losses = []
    for step in range(STEPS):
        masks = tiny.blobs(seed=step % 4)
        targets = {"mask_labels": masks, "class_labels": tiny.labels_of(masks, seed=step % 4)}
        loss = model(pixel_values=tiny.pixels(seed=step % 4), **targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if handle is not None:
        handle.undo()
    return torch.tensor(losses)


def energy(distances: Tensor, first: list[int]) -> float:
    """The energy statistic of two groups of curves, from the distances between all of them.

        mean distance across the groups, less half the mean distances within each

    It is near 0 if the groups come from one distribution, and larger otherwise.
    """
    second = [i for i in range(len(distances)) if i not in first]

    def mean(rows: list[int], columns: list[int]) -> float:
        block = distances[rows][:, columns]
        pairs = len(rows) * len(columns) - (len(rows) if rows == columns else 0)
        return float(block.sum()) / pairs

    return mean(first, second) - (mean(first, first) + mean(second, second)) / 2


@pytest.mark.slow
@pytest.mark.parametrize("factors", [False, True], ids=["dense", "factors"])
def test_loss_curves_cannot_be_told_apart(factors: bool) -> None:
    """A permutation test of five patched against five unpatched curves, over all 252 ways to split the ten.

    The distance of two curves is the mean absolute difference over the steps. Asserted: the split by patching is not
    among the most separated 5 %, patched curves lie as near to unpatched ones as those to each other (within a
    quarter of that noise), and both learn.
    """
    curves = torch.stack([curve(patched=p, factors=factors and p, seed=s) for p in (False, True) for s in range(SEEDS)])
    distances = (curves[:, None] - curves).abs().mean(2)
    statistic = energy(distances, list(range(SEEDS)))
    splits = [energy(distances, list(split)) for split in itertools.combinations(range(2 * SEEDS), SEEDS)]
    p_value = sum(other >= statistic - 1e-12 for other in splits) / len(splits)
    noise = float(distances[:SEEDS, :SEEDS].sum()) / (SEEDS * (SEEDS - 1))
    across = float(distances[:SEEDS, SEEDS:].mean())
    print(f"p = {p_value:.3f}, across / noise = {across / noise:.3f}")
    assert p_value > 0.05
    assert across < 1.25 * noise
    assert (curves[:, -4:].mean(1) < 0.8 * curves[:, :4].mean(1)).all()


def test_the_statistic_tells_other_curves_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    curves = torch.randn(10, STEPS, generator=generator)
    curves[5:] += 0.5
    distances = (curves[:, None] - curves).abs().mean(2)
    splits = [energy(distances, list(split)) for split in itertools.combinations(range(10), 5)]
    assert sum(other >= energy(distances, list(range(5))) for other in splits) / len(splits) < 0.05
