"""Batches of targets: images and masks taken out, encodings joined, workers and files, memory, numbers."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from maskloss import MaskLoss, MaskLossError, MaskTargets, PointSampling
from maskloss.targets.collate import collate
from maskloss.targets.label_maps import check_ids
from support import workers
from support.encodings_of_masks import every_way, parts_of, some_masks

FRAME = {"canvas": (12, 16), "valid": (1, 2, 7, 9)}


def batch(make: Callable[..., MaskTargets]) -> MaskTargets:
    """Three images: plain; with an ignore region; without masks, on a canvas of its own."""
    _, masks = parts_of(9, 14)
    ignore = torch.rand(9, 14) > 0.5
    return MaskTargets.cat(
        [
            make(masks, **FRAME),
            make(masks[:2].flip(0), ignore=ignore),
            make(masks[:0], canvas=(20, 20)),
            make(masks[1:], **FRAME, ignore=~ignore),
        ]
    )


def same(left: MaskTargets, right: MaskTargets) -> bool:
    tensors = zip(left.tensors, right.tensors, strict=True)
    alike = (left.encoding, left.num_targets) == (right.encoding, right.num_targets)
    return alike and all(torch.equal(a, b) for a, b in tensors)


# ---------------------------------------------------------------------------------------------------- images of a batch


@every_way
def test_images_of_a_batch(make: Callable[..., MaskTargets]) -> None:
    targets = batch(make)
    assert len(targets) == 4
    images = list(targets)
    assert [image.num_targets for image in images] == [(count,) for count in targets.num_targets]
    for number, image in enumerate(images):
        assert len(image) == 1
        assert torch.equal(image.dense(), targets.dense(number))
        assert same(image, targets[number])
        assert same(image, targets[number - 4])
    assert same(MaskTargets.cat(images), targets)


def test_an_image_holds_no_other() -> None:
    """A view would keep the whole batch in memory, and pickle it."""
    targets = MaskTargets.from_masks([some_masks(40, 40, 3)] * 20)
    assert targets[7].data.untyped_storage().nbytes() == targets[7].data.numel() < len(targets.data) / 10


@pytest.mark.parametrize("image", [4, -5])
def test_images_that_are_not_there(image: int) -> None:
    with pytest.raises(IndexError):
        batch(MaskTargets.from_masks)[image]


@pytest.mark.parametrize("image", [slice(2), 1.0, "a", None])
def test_numbers_of_images_that_are_none(image: Any) -> None:
    with pytest.raises(MaskLossError, match="an image is chosen by its number"):
        batch(MaskTargets.from_masks)[image]


# ----------------------------------------------------------------------------------------------------- masks of a batch


@every_way
def test_selected_masks(make: Callable[..., MaskTargets]) -> None:
    targets = batch(make)
    counts = targets.num_targets
    marks = torch.rand(targets.num_masks) > 0.4
    numbers = [torch.randperm(count)[: count // 2 + 1] for count in counts]
    ways = {
        "one tensor of marks": (marks, [part.nonzero()[:, 0] for part in marks.split(list(counts))]),
        "marks of each image": (
            marks.split(list(counts)),
            [part.nonzero()[:, 0] for part in marks.split(list(counts))],
        ),
        "numbers": (numbers, numbers),
        "lists": ([each.tolist() for each in numbers], numbers),
        "int32": ([each.int() for each in numbers], numbers),
        "nothing": ([[]] * 4, [torch.empty(0).long()] * 4),
    }
    for way, (keep, kept) in ways.items():
        selected = targets.select(keep)
        assert selected.num_targets == tuple(map(len, kept)), way
        for image, rows in enumerate(kept):
            assert torch.equal(selected.dense(image), targets.dense(image)[rows]), way
            assert torch.equal(selected[image].dense(), targets.dense(image)[rows]), way
        joined = MaskTargets.cat([selected, targets])
        assert torch.equal(joined.dense(4), targets.dense(0)), way


def test_the_loss_of_selected_masks(backend: str) -> None:
    """It is that of targets made of these masks alone, points included."""
    masks, logits = some_masks(9, 14, 5), torch.randn(2, 8, 8)
    loss = MaskLoss(sampling=PointSampling(50), backend=backend)
    found = loss(logits, MaskTargets.from_masks(masks).select([[3, 1]]), seed=0)
    assert torch.equal(found.total, loss(logits, masks[[3, 1]], seed=0).total)


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        (torch.ones(3, dtype=torch.bool), r"keep must be bool \[T_all\]"),
        (torch.arange(2), r"keep must be bool \[T_all\]"),
        ([[0]], "one entry for each image"),
        (3, "one entry for each image"),
        ([[5], [0]], r"must lie in \[0, 2\)"),
        ([[-1], [0]], r"must lie in \[0, 2\)"),
        ([[0.5], [0]], r"bool \[T\], or numbers of masks"),
        ([[True], [0]], r"bool \[T\], or numbers of masks"),
        (["a", [0]], r"bool \[T\], or numbers of masks"),
    ],
)
def test_selections_that_are_refused(keep: Any, text: str) -> None:
    targets = MaskTargets.from_masks([some_masks(6, 9, 2), some_masks(6, 9, 2)])
    with pytest.raises(MaskLossError, match=text):
        targets.select(keep)


# ------------------------------------------------------------------------------------------------- encodings of a batch

KINDS: dict[str, Callable[..., MaskTargets]] = {
    "labels": lambda masks, labels, **frame: MaskTargets.from_label_map(labels, [1, 2, 3, 4], **frame),
    "bits": lambda masks, labels, **frame: MaskTargets.from_masks(masks, **frame),
    "values": lambda masks, labels, **frame: MaskTargets.from_masks(0.25 + masks.float() / 2, **frame),
}


@pytest.mark.parametrize(
    ("kinds", "encoding"),
    [
        (("bits", "labels"), "bits"),
        (("labels", "bits", "labels"), "bits"),
        (("values", "bits"), "values"),
        (("labels", "values"), "values"),
        (("labels", "bits", "values"), "values"),
    ],
)
def test_encodings_join(kinds: tuple[str, ...], encoding: str) -> None:
    """Nothing changes but the encoding: masks, frames, ignore regions, windows."""
    parts, wanted = [], []
    for number, kind in enumerate(kinds):
        labels, masks = parts_of(9 + number, 13)
        frame = {**FRAME, "ignore": torch.rand(9 + number, 13) > 0.5} if number else {}
        parts.append(KINDS[kind](masks, labels.int(), **frame))
        values = 0.25 + masks.float() / 2 if kind == "values" else masks
        size = FRAME["canvas"] if number else (9, 13)
        wanted.append(pad(values, (0, size[1] - 13, 0, size[0] - 9 - number)))
    joined = MaskTargets.cat(parts)
    assert joined.encoding == encoding
    assert joined.data.dtype == {"bits": torch.uint8, "values": torch.float32}[encoding]
    for image, (part, masks) in enumerate(zip(parts, wanted, strict=True)):
        assert torch.equal(joined.dense(image), masks.to(joined.dense(image).dtype))
        assert torch.equal(joined.windows[image : image + 1], part.windows)
        assert torch.equal(joined[image].ignore, part.ignore)
    assert MaskTargets.cat([*parts, *parts]).num_masks == 2 * joined.num_masks


def test_joined_encodings_have_the_loss_of_their_parts(backend: str) -> None:
    labels, masks = parts_of(9, 13)
    parts = [KINDS["labels"](masks, labels.int(), **FRAME), KINDS["bits"](masks[:2], labels)]
    logits = torch.randn(2, 4, 8, 8)
    pairs = [(torch.arange(4), torch.arange(4)), (torch.arange(2), torch.arange(2))]
    loss = MaskLoss(sampling=PointSampling(60), backend=backend)
    joined = loss(logits, MaskTargets.cat(parts), pairs, seed=0).per_instance.ce
    alone = [
        loss(logits[i : i + 1], part, pairs[i : i + 1], seed=0, image_ids=[i]).per_instance.ce
        for i, part in enumerate(parts)
    ]
    assert torch.equal(joined, torch.cat(alone))


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [((torch.uint8, torch.int64), torch.int64), ((torch.int16, torch.uint8, torch.int32), torch.int32)],
)
def test_label_maps_become_the_widest_type(dtypes: tuple[torch.dtype, ...], widest: torch.dtype) -> None:
    labels, masks = parts_of(6, 9)
    joined = MaskTargets.cat([MaskTargets.from_label_map(labels.to(dtype), [1, 2, 3, 4]) for dtype in dtypes])
    assert joined.data.dtype == widest
    assert all(torch.equal(joined.dense(image), masks) for image in range(len(dtypes)))


# ----------------------------------------------------------------------------------------------------------- own memory


@pytest.mark.parametrize("form", ["label map", "packed", "soft", "bool", "several label maps"])
def test_targets_own_their_pixels(form: str) -> None:
    """Editing what they were made from changes nothing."""
    labels, masks = parts_of(8, 16)
    source: Tensor = {"label map": labels.int(), "soft": masks.float() / 2, "bool": masks}.get(form, labels.int())
    if form == "packed":
        source = (torch.rand(len(masks), 8, 2) * 255).to(torch.uint8)
    make: Callable[[Tensor], MaskTargets] = {
        "label map": lambda each: MaskTargets.from_label_map(each, [1, 2, 3, 4]),
        "several label maps": lambda each: MaskTargets.from_label_map([each, each], [[1, 2], [3, 4]]),
        "packed": lambda each: MaskTargets.from_packed(each, 16),
    }.get(form, MaskTargets.from_masks)
    targets = make(source)
    before = targets.dense().clone()
    assert before.any()
    source.zero_()
    assert torch.equal(targets.dense(), before)


# --------------------------------------------------------------------------------------------------- workers and files


def test_a_loader_joins_targets_by_itself() -> None:
    """PyTorch's default collate function knows them, in workers too, and within what a data set returns."""
    expected = list(DataLoader(workers.Images(), batch_size=3, collate_fn=MaskTargets.cat))
    assert [batch.num_targets for batch in expected] == [(0, 1, 2), (3, 4, 5)]
    for workers_ in (0, 1):
        context = "spawn" if workers_ else None
        found = list(DataLoader(workers.Images(), batch_size=3, num_workers=workers_, multiprocessing_context=context))
        assert all(same(left, right) for left, right in zip(found, expected, strict=True))
    entries = [{"masks": workers.Images()[number], "number": number} for number in range(3)]
    [together] = DataLoader(entries, batch_size=3)
    assert same(together["masks"], expected[0])
    assert together["number"].tolist() == [0, 1, 2]


@every_way
def test_files_are_read_without_trusting_them(make: Callable[..., MaskTargets]) -> None:
    """`torch.load(weights_only=True)`, the default, reads targets."""
    targets, file = batch(make), io.BytesIO()
    torch.save({"targets": targets}, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)["targets"]
    assert isinstance(again, MaskTargets)
    assert same(again, targets)


# ---------------------------------------------------------------------------------------------------- devices, numbers


@pytest.mark.parametrize("target", [torch.int32, torch.int64, torch.float16, torch.zeros(1), None, 1.5, True])
def test_to_takes_devices_only(target: Any) -> None:
    """A dtype would cast the tables, and the loss would be wrong without a word."""
    with pytest.raises(MaskLossError, match="the device must be one that PyTorch knows"):
        MaskTargets.from_masks(some_masks(6, 9)).to(target)


def test_to_a_device_that_does_not_exist() -> None:
    with pytest.raises(MaskLossError, match="the device must be one that PyTorch knows"):
        MaskTargets.from_masks(some_masks(6, 9)).to("float16")


NAN, INF = float("nan"), float("inf")
MASKS, MAP = torch.ones(2, 6, 9, dtype=torch.bool), torch.ones(6, 9, dtype=torch.int32)
PACKED = torch.ones(2, 6, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("text", "make"),
    [
        (
            "the height of the valid window must be a finite number",
            partial(MaskTargets.from_masks, MASKS, valid=(0, 0, NAN, 9)),
        ),
        (
            "the width of the valid window must be a finite number",
            partial(MaskTargets.from_masks, MASKS, valid=(0, 0, 6, INF)),
        ),
        (
            "the top of the valid window must be a finite number",
            partial(MaskTargets.from_masks, MASKS, valid=("0", 0, 6, 9)),
        ),
        (
            "the left of the valid window must be a finite number",
            partial(MaskTargets.from_masks, MASKS, valid=(0, None, 6, 9)),
        ),
        (r"the valid window must be \(top", partial(MaskTargets.from_masks, MASKS, valid="0069")),
        ("the height of the canvas must be an integer", partial(MaskTargets.from_masks, MASKS, canvas=(30.5, 30.5))),
        ("the width of the canvas must be an integer", partial(MaskTargets.from_masks, MASKS, canvas=(30, "30"))),
        ("the width of the canvas must be an integer", partial(MaskTargets.from_masks, MASKS, canvas=(30, NAN))),
        ("the height of the canvas must be an integer", partial(MaskTargets.from_masks, MASKS, canvas=(None, 30))),
        (r"the canvas must be \(height", partial(MaskTargets.from_masks, MASKS, canvas="ab")),
        ("soft must be True, False or None", partial(MaskTargets.from_masks, MASKS.float(), soft="yes")),
        ("width must be an integer", partial(MaskTargets.from_packed, PACKED, width="9")),
        ("width must be an integer", partial(MaskTargets.from_packed, PACKED, width=9.0)),
        ("width must be an integer", partial(MaskTargets.from_packed, PACKED, width=-9)),
        ("an id must be an integer in", partial(MaskTargets.from_label_map, MAP, ["1"])),
        ("an id must be an integer in", partial(MaskTargets.from_label_map, MAP, [None])),
        ("an id must be an integer in", partial(MaskTargets.from_label_map, MAP, [True])),
        ("an id must be an integer in", partial(MaskTargets.from_label_map, MAP, [2**63])),
        ("an id must be an integer in", partial(MaskTargets.from_label_map, MAP, [NAN])),
        ("ids must be an ordinary tensor", partial(MaskTargets.from_label_map, MAP, torch.ones(2).to_sparse())),
        ("ids must be an ordinary tensor", partial(check_ids, torch.ones(2).to_sparse())),
        (
            "labels must be an ordinary tensor",
            partial(collate, [{"masks": MASKS, "labels": torch.ones(2).to_sparse()}]),
        ),
        (r"labels\[:, 0\] has no second", partial(collate, [{"masks": MASKS, "labels": torch.ones(2, 1)}])),
        (r"labels.argmax\(1\) if it is", partial(collate, [{"masks": MASKS, "labels": torch.ones(2, 3)}])),
    ],
)
def test_numbers_that_are_none(text: str, make: Callable[[], Any]) -> None:
    with pytest.raises(MaskLossError, match=text):
        make()


def test_coco_sizes_that_are_none() -> None:
    pytest.importorskip("pycocotools")
    for size in (("6", 9), (6.5, 9), (6, 0), (True, 9)):
        with pytest.raises(MaskLossError, match=r"(height|width) must be an integer"):
            MaskTargets.from_coco([], *size)


@pytest.mark.parametrize("image_ids", [["a"], [2**70], [None], "a", [[1]], [1.0], [True], [-1], torch.ones(1)])
def test_numbers_of_images_that_are_refused(image_ids: Any) -> None:
    with pytest.raises(MaskLossError, match=r"image_ids must (hold one integer in|lie in) \[0, 2\^32\)"):
        MaskLoss()(torch.zeros(2, 6, 6), MASKS, image_ids=image_ids)


@pytest.mark.parametrize("number", [1, 2.5])
def test_whole_and_broken_windows_are_fine(number: float) -> None:
    targets = MaskTargets.from_masks(MASKS, valid=(number, 0, 3, 9))
    assert targets.windows.tolist()[0][1] == pytest.approx(number / 6)
