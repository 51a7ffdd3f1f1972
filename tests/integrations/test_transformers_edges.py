"""The edges: where a patched model does as Transformers does, and where it deliberately does better."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from support import tiny
from support.forced import answered, fix_seed, recorded

pytest.importorskip("transformers")
patch = pytest.importorskip("maskloss.integrations.transformers").patch

FAMILIES = ("mask2former", "oneformer", "eomt", "rf_detr")


def both(family: str, masks: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Any]:
    """The loss of the patched and of the unpatched model on the same points."""
    model, batch, rf_detr = tiny.build(family), tiny.batch_for(family, masks), family == "rf_detr"
    with patch(model, backend="reference"), recorded(monkeypatch, one_image=rf_detr) as recorder:
        ours, _ = tiny.run(model, family, batch)
    with answered(monkeypatch, recorder, final_first=not rf_detr, shared=rf_detr):
        theirs, _ = tiny.run(model, family, batch)
    return ours, theirs, model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("counts", [(0, 3), (8, 3)], ids=["no targets in an image", "more targets than queries"])
def test_as_in_transformers(family: str, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """More targets than queries: the best Q of them are matched, and the sum is divided by all of them."""
    ours, theirs, model = both(family, tiny.blobs(counts), monkeypatch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    ours.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", ["mask2former", "oneformer", "eomt"])
def test_a_target_of_no_class_is_matched_by_its_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its label is the number of labels, which stands for "no object"."""
    labels = tiny.labels_of

    def one_without(masks: list[Tensor], seed: int = 0) -> list[Tensor]:
        found = labels(masks, seed)
        found[1][0] = tiny.CLASSES
        return found

    monkeypatch.setattr(tiny, "labels_of", one_without)
    with pytest.warns(UserWarning, match="subtract 1"):
        ours, theirs, _ = both(family, tiny.blobs(), monkeypatch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_targets_at_all(family: str) -> None:
    model, batch = tiny.build(family), tiny.batch_for(family, tiny.blobs((0, 0)))
    theirs, _ = tiny.run(model, family, batch)
    with patch(model, backend="reference"):
        ours, terms = tiny.run(model, family, batch)
    assert all(value.isfinite().all() for value in terms.values())
    assert ours.numel() == 1
    if family == "rf_detr":
        # Transformers returns an empty tensor as the loss of masks, and so of everything.
        assert theirs.numel() == 0
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    ours.sum().backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_different_sizes_lie_on_one_canvas(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the user had padded them, in matching and loss alike; Transformers pads for the loss only, or fails."""
    masks = [tiny.blobs((2,), (64, 48))[0], tiny.blobs((2,), (40, 64))[0]]
    padded = [torch.nn.functional.pad(m, (0, 64 - m.shape[2], 0, 64 - m.shape[1])) for m in masks]
    model, boxes = tiny.build(family), tiny.boxes_of(padded)
    losses = []
    for given in (masks, padded):
        batch = tiny.batch_for(family, given)
        if family == "rf_detr":
            for entry, box in zip(batch["labels"], boxes, strict=True):
                entry["boxes"] = box
        with patch(model, backend="reference"), recorded(monkeypatch):
            losses.append(tiny.run(model, family, batch)[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["masks", "classes"])
def test_a_non_finite_logit_shows_in_loss_and_gradient(family: str, value: float, where: str) -> None:
    """As in Transformers, except for RF-DETR's boxes: no exception, so that a gradient scaler can skip the step."""
    model, batch = tiny.build(family), tiny.batch_for(family)
    heads = {"masks": ("mask_embedder", "mask_embed.", "mask_head.fc3", "query_features_proj"), "classes": ("class",)}
    hit = [p for n, p in model.named_parameters() if any(head in n for head in heads[where]) and p.ndim == 1]
    for parameter in hit:
        parameter.data[:] = value
    assert hit
    with patch(model, backend="reference"):
        loss, _ = tiny.run(model, family, batch)
        loss.sum().backward()
    assert not loss.isfinite().any()
    assert not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_non_finite_boxes_give_a_non_finite_loss() -> None:
    model, batch = tiny.build("rf_detr"), tiny.batch_for("rf_detr")
    for name, parameter in model.named_parameters():
        if "bbox_embed" in name and parameter.ndim == 1:
            parameter.data[:] = float("nan")
    with pytest.raises(ValueError, match="boxes"):
        tiny.run(model, "rf_detr", batch)
    with patch(model, backend="reference"):
        assert not tiny.run(model, "rf_detr", batch)[0].isfinite()


def test_rf_detr_matches_one_group_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers splits the queries of evaluation into as many groups as in training, and matches each of them."""
    model, batch = tiny.build("rf_detr").eval(), tiny.batch_for("rf_detr")
    with patch(model, backend="reference"), recorded(monkeypatch) as recorder:
        tiny.run(model, "rf_detr", batch)
    assert recorder.calls[0].matches.layer_sizes == (5, 5, 5)
    model.train()
    with patch(model, backend="reference"), recorded(monkeypatch) as recorder:
        tiny.run(model, "rf_detr", batch)
    assert recorder.calls[0].matches.layer_sizes == (10, 10, 10)


def test_rf_detr_matches_on_a_share_of_the_masks_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers takes height and width from the boxes' shape: here 2 * 12 * 4 // 4 = 24 points."""
    model, batch = tiny.build("rf_detr"), tiny.batch_for("rf_detr")
    with patch(model, backend="reference"), recorded(monkeypatch) as recorder:
        tiny.run(model, "rf_detr", batch)
    assert recorder.calls[0].match_points == 16 * 16 // 4


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_logits_are_summed_in_float32(family: str) -> None:
    """Transformers fails without autocast: it samples with float32 points."""
    model, batch = tiny.build(family), tiny.batch_for(family)
    exact = tiny.run(model, family, batch)[0]
    model.bfloat16()
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with patch(model, backend="reference"):
        loss, terms = tiny.run(model, family, batch)
    assert terms[next(name for name in terms if "mask" in name)].dtype == torch.float32
    torch.testing.assert_close(loss.float(), exact, rtol=0.1, atol=0)


def test_autocast_gives_float32_losses() -> None:
    model, batch = tiny.build("mask2former"), tiny.batch_for("mask2former")
    with patch(model, backend="reference"), torch.autocast("cpu", dtype=torch.bfloat16):
        loss, terms = tiny.run(model, "mask2former", batch)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(value.isfinite() for value in terms.values())


def test_masks_beyond_zero_and_one_are_refused() -> None:
    """Transformers trains on masks in [0, 255] as if they were probabilities."""
    model, batch = tiny.build("mask2former"), tiny.batch_for("mask2former", [m * 255 for m in tiny.blobs()])
    with patch(model), pytest.raises(ValueError, match=r"soft masks must lie in \[0, 1\]"):
        model(**batch)


# ------------------------------------------------------------------------------------------------------- two ranks


def _rank(rank: int, folder: str, queue: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASKLOSS_BACKEND": "reference"}
    torch.set_num_threads(1)
    from accelerate import PartialState

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    PartialState(cpu=True, backend="gloo")
    torch.manual_seed(0)
    model, masks = tiny.build("mask2former"), tiny.blobs((2, 4) if rank == 0 else (1, 4), seed=rank)
    theirs = model.criterion.get_num_masks(tiny.labels_of(masks), device="cpu").item()
    from maskloss.step import Step

    monkeypatch = pytest.MonkeyPatch()
    fix_seed(monkeypatch, 5)
    batch = tiny.batch_for("mask2former", masks)
    with patch(model):
        _, terms = tiny.run(model, "mask2former", batch)
        monkeypatch.setattr(Step, "divisor", lambda *_, **__: 1.0)
        _, sums = tiny.run(model, "mask2former", batch)
    queue.put((rank, theirs, (sums["loss_mask@0"] / terms["loss_mask@0"]).item()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_masks_are_counted_over_all_ranks(tmp_path: Path) -> None:
    """11 masks on 2 ranks are 5.5 for each. Transformers averages over the ranks and divides by them again: 2.75."""
    pytest.importorskip("accelerate")
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(_rank, args=(str(tmp_path), queue), nprocs=2)  # type: ignore[no-untyped-call]
    found = sorted(queue.get() for _ in range(2))
    assert [theirs for _, theirs, _ in found] == [2.75, 2.75]
    assert [ours for *_, ours in found] == pytest.approx([5.5, 5.5])
