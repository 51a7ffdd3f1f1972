"""Target masks: every way in, what they hold, how they join and travel."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from maskloss import MaskLossError, MaskTargets
from maskloss import _abi as abi
from maskloss.targets import bits, label_maps, mask_targets
from support.encodings_of_masks import LABEL_DTYPES, SIZES, WAYS, every_way, packed, parts_of, run_lengths, some_masks

# ------------------------------------------------------------------------------------------------------- what they hold


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize(
    ("convert", "encoding"),
    [
        pytest.param(lambda masks: masks, "bits", id="bool"),
        pytest.param(lambda masks: masks.byte(), "bits", id="uint8"),
        pytest.param(lambda masks: masks.long(), "bits", id="int64"),
        pytest.param(lambda masks: masks.numpy(), "bits", id="array of bool"),
        pytest.param(lambda masks: masks.numpy()[:, ::-1].astype(np.uint8)[:, ::-1], "bits", id="array of uint8"),
        pytest.param(lambda masks: masks.float(), "bits", id="float32"),
        pytest.param(lambda masks: masks.bfloat16(), "bits", id="bfloat16"),
        pytest.param(lambda masks: masks.transpose(1, 2).contiguous().transpose(1, 2), "bits", id="not contiguous"),
    ],
)
def test_dense_masks(size: tuple[int, int], count: int, convert: Callable[[Tensor], Tensor], encoding: str) -> None:
    masks = some_masks(*size, count)
    targets = MaskTargets.from_masks(convert(masks))
    assert (targets.encoding, targets.num_targets, targets.num_masks, len(targets)) == (encoding, (count,), count, 1)
    assert torch.equal(targets.dense(), masks)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_soft_masks(size: tuple[int, int], dtype: torch.dtype) -> None:
    values = torch.rand(3, *size).to(dtype)
    values[0, 0, 0] = 0.5
    targets = MaskTargets.from_masks(values.transpose(1, 2).contiguous().transpose(1, 2))
    assert targets.encoding == "values"
    assert targets.data.dtype == dtype
    assert torch.equal(targets.dense(), values)


def test_soft_is_decided_by_the_values_or_the_caller() -> None:
    masks = some_masks(6, 9)
    assert MaskTargets.from_masks(masks.float(), soft=True).encoding == "values"
    assert MaskTargets.from_masks(masks, soft=True).encoding == "bits", "bool masks hold nothing soft"
    thresholded = MaskTargets.from_masks(masks.float() * 0.3, soft=False)
    assert torch.equal(thresholded.dense(), masks)
    both = MaskTargets.from_masks([masks, masks.float() * 0.5])
    assert both.encoding == "values", "one encoding for the images of a batch"
    assert torch.equal(both.dense(0), masks.float())
    assert torch.equal(both.dense(1), masks * 0.5)


def test_packing_where_values_may_not_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device masks are packed by a product of eight bytes, not by NumPy: the bits are the same."""
    every_byte = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    images = [every_byte[None], torch.rand(0, 4, 4) > 0.5, torch.rand(1, 1, 7), (torch.rand(2, 5, 13) > 0.5)[:, ::2]]
    images += [torch.randint(2, (2, 3, 16), dtype=torch.uint8), torch.rand(3, 2, 9, dtype=torch.float64) > 0.5]
    wanted = [np.packbits((image != 0).numpy(), axis=-1, bitorder="little").reshape(-1) for image in images]
    assert torch.equal(bits.pack_elsewhere(images), torch.from_numpy(np.concatenate(wanted)))
    one = torch.rand(3, 8 * 6)[:, 1:25].unflatten(-1, (4, 6)) > 0.5  # begins in the middle of a word
    assert torch.equal(bits.pack_elsewhere([one]), bits.pack(one).flatten())
    monkeypatch.setattr(mask_targets, "on_host", lambda _: False)
    for image in images:
        assert torch.equal(MaskTargets.from_masks(image, soft=False).dense(), image != 0)


@pytest.mark.parametrize("size", SIZES)
def test_packed_masks(size: tuple[int, int]) -> None:
    masks = some_masks(*size)
    targets = packed(masks)
    assert targets.encoding == "bits"
    assert torch.equal(targets.dense(), masks)


def test_bits_beyond_the_width_are_not_read() -> None:
    dirty = torch.full((1, 3, 2), 0xFF, dtype=torch.uint8)
    targets = MaskTargets.from_packed(dirty, 11)
    assert torch.equal(targets.dense(), torch.ones(1, 3, 11, dtype=torch.bool))
    assert bool((dirty == 0xFF).all()), "the caller's tensor stays as it is"
    assert targets.data.tolist() == [0xFF, 0b111] * 3


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
@pytest.mark.parametrize("size", [(2, 3), (13, 17), (1, 70)])
def test_label_maps(dtype: torch.dtype, size: tuple[int, int]) -> None:
    limits = torch.iinfo(dtype)
    values = torch.tensor([limits.min, limits.max, 0, 5])
    labels = values[torch.arange(size[0] * size[1]) % 4].view(size)
    ids = [5, limits.max, limits.min, 5]
    targets = MaskTargets.from_label_map(labels.to(dtype), ids)
    assert (targets.encoding, targets.num_targets) == ("labels", (4,))
    assert torch.equal(targets.dense(), labels == torch.tensor(ids)[:, None, None])


@pytest.mark.parametrize("ids", [torch.tensor([3, 1], dtype=torch.uint8), np.array([3, 1]), (3, 1)])
def test_ids_in_any_form(ids: Any) -> None:
    labels = torch.tensor([[1, 3], [3, 0]])
    assert MaskTargets.from_label_map(labels, ids).dense().int().tolist() == [[[0, 1], [1, 0]], [[1, 0], [0, 0]]]


def test_large_ids_among_few() -> None:
    """Ids too large for a table are found by search; the ones wanted may be none of them."""
    labels = torch.tensor([[1 << 40, 7], [-(1 << 40), 1 << 40]])
    ids = [1 << 40, -(1 << 40), 1 << 41, -5]
    targets = MaskTargets.from_label_map(labels, ids, allow_missing=True)
    assert torch.equal(targets.dense(), labels == torch.tensor(ids)[:, None, None])


def test_a_list_of_label_maps() -> None:
    maps = [torch.tensor([[1, 3], [3, 0]]), torch.zeros(0, 4, dtype=torch.uint8), torch.tensor([[7, 7, 2]])]
    ids: list[Any] = [[3, 1], [], torch.tensor([2, 7])]
    joined = MaskTargets.cat([MaskTargets.from_label_map(*each) for each in zip(maps, ids, strict=True)])
    assert same(MaskTargets.from_label_map(maps, ids), joined)
    assert joined.dense(2).int().tolist() == [[[0, 0, 1]], [[1, 1, 0]]]


def test_ids_that_may_not_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device ids are copied, not listed; without looking at the map, a mask may lie anywhere in it."""
    maps, ids = [torch.tensor([[1, 3], [3, 0]]), torch.tensor([[5, 6, 5]])], [torch.tensor([3, 1]), torch.tensor([5])]
    seen = MaskTargets.from_label_map(maps, ids)
    for module in (mask_targets, label_maps):
        monkeypatch.setattr(module, "on_host", lambda _: False)
    monkeypatch.setattr(label_maps, "listed_ids", None)
    unseen = MaskTargets.from_label_map(maps, ids)
    for image in range(2):
        assert torch.equal(unseen.dense(image), seen.dense(image))


@pytest.mark.parametrize("shape", [(3, 4), (0, 4)])
def test_label_maps_without_targets(shape: tuple[int, int]) -> None:
    targets = MaskTargets.from_label_map(torch.ones(shape, dtype=torch.int32), [])
    assert (targets.num_masks, targets.num_targets) == (0, (0,))
    missing = MaskTargets.from_label_map(torch.ones(shape, dtype=torch.int32), [4, 5], allow_missing=True)
    assert not missing.dense().any()
    assert missing.num_targets == (2,)


class TestCoco:
    """Against pycocotools, which defines the format."""

    POLYGONS = (
        [[1.0, 1.0, 30.5, 2.2, 28.0, 20.0, 3.3, 17.7]],
        [[5, 5, 12, 5, 12, 12, 5, 12], [20, 8, 33, 8, 26, 19]],
        [[-5.0, -5.0, 60.0, -5.0, 60.0, 50.0, -5.0, 50.0]],
        [[2, 2, 2, 2, 2, 2]],
        [[40, 30, 50, 30, 50, 40]],
    )

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("form", ["text", "bytes", "list", "tuple"])
    def test_run_lengths(self, size: tuple[int, int], form: str) -> None:
        masks = some_masks(*size)
        segmentations = []
        for mask in masks:
            rle = self.api().encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            assert self.api().frPyObjects(run_lengths(mask), *size)["counts"] == rle["counts"]
            segmentations.append({
                "text": {**rle, "counts": rle["counts"].decode()},
                "bytes": rle,
                "list": run_lengths(mask),
                "tuple": {"size": size, "counts": tuple(run_lengths(mask)["counts"])},
            }[form])  # fmt: skip
        targets = MaskTargets.from_coco(segmentations, *size)
        assert targets.encoding == "bits"
        assert torch.equal(targets.dense(), masks)

    def test_long_runs(self) -> None:
        """Runs of several characters, and falls from one run to the next."""
        mask = torch.zeros(1000, 1500, dtype=torch.bool)
        mask[3:900, 17:1400] = True
        mask[500, ::7] = False
        rle = self.api().encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        assert torch.equal(MaskTargets.from_coco([rle], 1000, 1500).dense()[0], mask)

    def test_polygons(self) -> None:
        height, width = 25, 41
        targets = MaskTargets.from_coco(self.POLYGONS, height, width)
        for mask, polygons in zip(targets.dense(), self.POLYGONS, strict=True):
            floats = [[float(value) for value in polygon] for polygon in polygons]
            decoded = self.api().decode(self.api().merge(self.api().frPyObjects(floats, height, width)))
            assert torch.equal(mask, torch.from_numpy(decoded).bool())
        assert targets.dense().flatten(1).sum(1).tolist()[2] == height * width, "clipped at the border"

    @pytest.mark.parametrize(
        ("segmentation", "message"),
        [
            ({"size": [2, 2], "counts": [0.9, 4.9]}, r"a count of segmentation 0 must be an integer.*\n.*\n.*=0\.9"),
            ({"size": [2, 2], "counts": [0, 4.0]}, "must be an integer"),
            ({"size": [2, 2], "counts": ["0", "4"]}, "must be an integer"),
            ({"size": [2, 2], "counts": [None, 4]}, "must be an integer"),
            ({"size": [2, 2], "counts": [float("nan"), 4]}, "must be an integer"),
            ({"size": [2, 2], "counts": [[0, 4]]}, "must be an integer"),
            ({"size": [2, 2], "counts": [True, 3]}, "must be an integer"),
            ({"size": [2, 2], "counts": "\u00e9"}, "compressed counts must be"),
            ({"size": [2, 2], "counts": "04 "}, "compressed counts must be"),
            ([[0, 0, 1, 0, True, 1]], "coordinates of a polygon must be numbers"),
            ([[0, 0, 1, 0, 10**400, 1]], "coordinates of a polygon must be numbers"),
        ],
    )
    def test_numbers_that_are_none(self, segmentation: Any, message: str) -> None:
        with pytest.raises(MaskLossError, match=message):
            MaskTargets.from_coco([segmentation], 2, 2)

    def test_counts_of_numpy(self) -> None:
        counts = [np.int64(1), np.uint8(3)]
        targets = MaskTargets.from_coco([{"size": [2, 2], "counts": counts}], 2, 2)
        assert targets.dense().tolist() == [[[False, True], [True, True]]]

    def test_counts_without_an_end(self) -> None:
        """Half a million characters of one number: quadratic time for whoever adds them up."""
        begin = time.thread_time()  # whatever else the machine does
        with pytest.raises(MaskLossError, match="compressed counts must be"):
            MaskTargets.from_coco([{"size": [2, 2], "counts": "o" * 500_000}], 2, 2)
        assert time.thread_time() - begin < 1

    @staticmethod
    def api() -> Any:
        return pytest.importorskip("pycocotools.mask")

    def test_nothing(self) -> None:
        targets = MaskTargets.from_coco([], 7, 9)
        assert (targets.num_masks, tuple(targets.dense().shape)) == (0, (0, 7, 9))


@every_way
@pytest.mark.parametrize("canvas", [None, (13, 17), (20, 17), (32, 40)])
def test_canvas(make: Callable[..., MaskTargets], canvas: tuple[int, int] | None) -> None:
    _, masks = parts_of(13, 17)
    height, width = canvas or (13, 17)
    expected = pad(masks, (0, width - 17, 0, height - 13))
    assert torch.equal(make(masks, canvas=canvas).dense().bool(), expected)


def test_bits_are_cut_to_their_boxes() -> None:
    masks = torch.zeros(2, 1000, 1000, dtype=torch.bool)
    masks[0, 500:510, 800:816] = True
    assert MaskTargets.from_masks(masks).nbytes == 10 * 2


# -------------------------------------------------------------------------------------------------------------- joining


def test_images_of_different_sizes() -> None:
    images = [some_masks(*size, count) for size, count in zip(SIZES, (3, 0, 5, 1, 0, 2, 5), strict=True)]
    parts = [MaskTargets.from_masks(image) for image in images]
    joined = MaskTargets.cat(parts)
    nested = MaskTargets.cat([MaskTargets.cat(parts[:3]), MaskTargets.cat(parts[3:4]), MaskTargets.cat(parts[4:])])
    together = MaskTargets.from_masks(images)
    for targets in (joined, nested, together):
        assert targets.num_targets == (3, 0, 5, 1, 0, 2, 5)
        assert (targets.num_masks, len(targets)) == (16, 7)
        for image, masks in enumerate(images):
            assert torch.equal(targets.dense(image), masks)


@every_way
def test_images_without_targets_fit_any_encoding(make: Callable[..., MaskTargets]) -> None:
    _, masks = parts_of(6, 9)
    others = [way(torch.zeros(0, 5, 3, dtype=torch.bool)) for way in WAYS.values()]
    joined = MaskTargets.cat([*others, make(masks), *others])
    assert joined.encoding == make(masks).encoding
    assert torch.equal(joined.dense(len(others)).bool(), masks)
    assert tuple(joined.dense(0).shape) == (0, 5, 3)
    nobody = MaskTargets.cat(others)
    assert (nobody.num_masks, len(nobody)) == (0, len(others))


@every_way
def test_batches_join_as_images_do(make: Callable[..., MaskTargets]) -> None:
    """Where the pixels, rows and ignore regions of each image begin follows from the sizes of those before it."""
    region = torch.rand(6, 9) > 0.5
    _, masks = parts_of(6, 9)
    images = [make(masks, ignore=region), make(masks), make(masks[:0]), make(masks[:2], ignore=~region), make(masks)]
    flat = MaskTargets.cat(images)
    nested = MaskTargets.cat([MaskTargets.cat(images[:3]), MaskTargets.cat([MaskTargets.cat(images[3:4]), images[4]])])
    assert same(flat, nested)
    for image, one in enumerate(images):
        assert torch.equal(flat.dense(image), one.dense())
    assert flat.counts.tolist() == list(flat.num_targets)
    assert flat.first_rows.tolist() == np.cumsum([0, *flat.num_targets])[:-1].tolist()
    starts = flat.images[:, abi.IGNORE_BASE].tolist()
    for image, wanted in ((0, region), (3, ~region)):
        packed = flat.ignore[starts[image] : starts[image] + 12].view(6, 2)
        assert torch.equal(packed, bits.pack(wanted))


def test_label_maps_of_different_dtypes() -> None:
    labels, masks = parts_of(6, 9)
    joined = MaskTargets.cat([MaskTargets.from_label_map(labels.to(dtype), [1, 2, 3, 4]) for dtype in LABEL_DTYPES])
    for image in range(len(LABEL_DTYPES)):
        assert torch.equal(joined.dense(image), masks)


# ---------------------------------------------------------------------------------------------- moving and showing them


def same(left: MaskTargets, right: MaskTargets) -> bool:
    tensors = zip(left.tensors, right.tensors, strict=True)
    return left.num_targets == right.num_targets and all(torch.equal(a, b) for a, b in tensors)


def test_to() -> None:
    targets = MaskTargets.from_masks(some_masks(6, 9), ignore=torch.ones(6, 9, dtype=torch.bool))
    assert targets.to("cpu") is targets
    moved = targets.to("meta")
    assert [tensor.device.type for tensor in moved.tensors] == ["meta"] * 5
    assert moved.device.type == "meta"
    assert moved.num_targets == targets.num_targets
    assert "5 masks" in repr(moved)


@pytest.mark.gpu
def test_to_a_gpu_and_pinned_memory() -> None:
    targets = MaskTargets.from_masks(some_masks(6, 9), ignore=torch.ones(6, 9, dtype=torch.bool))
    pinned = targets.pin_memory()
    assert all(tensor.is_pinned() for tensor in pinned.tensors if tensor.numel())
    there = pinned.to("cuda", non_blocking=True)
    assert there.device.type == "cuda"
    assert torch.equal(there.dense().cpu(), targets.dense())
    assert same(there.to("cpu"), targets)


@every_way
def test_pickle(make: Callable[..., MaskTargets]) -> None:
    targets = make(parts_of(6, 9)[1], canvas=(8, 12), valid=(0, 0, 6, 9))
    again = pickle.loads(pickle.dumps(targets))
    assert again.encoding == targets.encoding
    assert same(again, targets)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([(2, 30, 40)], "MaskTargets(2 masks in 1 image, bits, 30 x 40, 300 bytes, cpu)"),
        ([(1, 30, 40), (0, 30, 40)], "MaskTargets(1 mask in 2 images, bits, 30 x 40, 150 bytes, cpu)"),
        ([(1, 3, 8), (1, 4, 8)], "MaskTargets(2 masks in 2 images, bits, 2 sizes, 7 bytes, cpu)"),
    ],
)
def test_repr(images: Sequence[tuple[int, int, int]], expected: str) -> None:
    assert repr(MaskTargets.from_masks([torch.ones(shape, dtype=torch.bool) for shape in images])) == expected


def test_a_default_device_elsewhere() -> None:
    """Masks stay where they are, also where there are none."""
    with torch.device("meta"):
        targets = MaskTargets.from_masks([torch.zeros(n, 4, 4, dtype=torch.bool, device="cpu") for n in (0, 2)])
        empty = MaskTargets.from_masks(torch.zeros(0, 4, 4, dtype=torch.bool, device="cpu"))
    assert targets.device.type == empty.device.type == "cpu"
    assert targets.num_targets == (0, 2)


def test_targets_do_not_change() -> None:
    targets = MaskTargets.from_masks(some_masks(6, 9))
    with pytest.raises(AttributeError):
        targets.data = torch.zeros(1)  # type: ignore[misc]
