"""What the backends share: columns of the tables, random streams, codes, options, and the groups of arguments.

This module imports nothing of the package. Kernels make their compile-time constants from these names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------- tables

# `index`: which prediction belongs to which target; sorted by layer. TARGET counts within the image.
LAYER, IMAGE, QUERY, TARGET = range(4)
INDEX_COLUMNS = 4
# Sums of larger costs of pairs (float64) could overflow.
LARGEST_COST = 1e290
# `MaskTargets.table`, a row for each target: where its crop is stored; the crop within the frame; the frame; its id in
# a label map; where the ignore region of a plane of a clip begins in the clip's. The first PLACE_COLUMNS are known as
# soon as a mask is packed.
OFFSET, STRIDE, TOP, LEFT, CROP_H, CROP_W, FRAME_H, FRAME_W, LABEL, IGNORE_OFFSET = range(10)
PLACE_COLUMNS, TABLE_COLUMNS = 6, 10
# `MaskTargets.images`: three sizes, what the images before add up to (in the same order), and what lies there.
COUNT, SIZE, IGNORE_SIZE, FIRST, BASE, IGNORE_BASE, IGNORE_STRIDE, IGNORE_H, IGNORE_W, IMAGE_H, IMAGE_W = range(11)
SIZES, IMAGE_COLUMNS = 3, 11
# `MaskTargets.windows`: the part of the frame that points are drawn from.
WINDOW_X, WINDOW_Y, WINDOW_W, WINDOW_H = range(4)
WINDOW_COLUMNS = 4
# The last dimension of points.
X, Y, Z = range(3)
POINT_COLUMNS = 2

# ------------------------------------------------------------------------------------------------------ random numbers

# Streams keep apart the draws of one instance; the high half of a counter holds them, the low half the decoder layer.
CANDIDATES, RANDOM, MATCHER = range(3)
STREAM_SHIFT = 16
# Added to a stream, that of the third coordinate of points in a volume.
DEPTH_STREAM = 3
# Threefry-2x32 of Salmon et al. (2011): the parity of the key schedule, and by how much each round rotates.
THREEFRY_PARITY = 0x1BD11BDA
THREEFRY_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# How the points of a draw lie to each other.
LAYOUTS = ("independent", "stratified")
# Random bits of a coordinate within its cell; a word has two coordinates.
CELL_BITS = 16
# An inverse is floor(2^INVERSE_BITS / n): the largest power whose products with a position stay below 2^63. Shifted
# right by POSITION_SHIFT they are coordinates of 24 bits.
INVERSE_BITS = 47
POSITION_SHIFT = INVERSE_BITS + CELL_BITS - 24
# The matcher's points belong to an image, not to one of its targets.
ALL_TARGETS = 0xFFFFFFFF

# --------------------------------------------------------------------------------------------------------------- codes

# Element types. The code of an encoding and that of its element type add up to one number.
F32, F16, BF16, F64 = range(4)
U8, I16, I32, I64 = range(4)
FLOAT_CODES = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16, torch.float64: F64}
INTEGER_CODES = {torch.uint8: U8, torch.int16: I16, torch.int32: I32, torch.int64: I64}
# Encodings of the targets, in order: packed bits, label maps, soft values.
BITS, LABELS, VALUES = 0, 8, 16
ENCODINGS = {"bits": BITS, "labels": LABELS, "values": VALUES}

# Options, as the operations take them. A negative alpha or gamma switches that part of the focal loss off.
PADDING_MODES = ("zeros", "border")
TARGET_MODES = ("bilinear", "nearest")
NO_FOCAL = (-1.0, -1.0)
# Kinds of Dice by number, for kernels, and by name.
STANDARD, SOFT, SEMIMETRIC = range(3)
DICE_KINDS = ("standard", "soft", "semimetric")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Everything is summed in float32, and in float64 where the input is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_border(padding: str) -> bool:
    """Whether a point off the map reads its nearest pixel, and not zero."""
    return padding == "border"


def is_nearest(mode: str) -> bool:
    """Whether a point reads one pixel, and not four."""
    return mode == "nearest"


def is_stratified(layout: str) -> bool:
    """Whether each point has a cell of its own."""
    return layout == "stratified"


def num_bytes(num_bits: int) -> int:
    """Return the number of bytes that hold this many bits; an expression where the number is a symbol."""
    return (num_bits + 7) // 8


def widest(num_targets: Sequence[int]) -> int:
    """Return the largest number of targets; an expression where numbers are symbols, so that one graph serves many."""
    return reduce(torch.sym_max, num_targets, 0)


def price_of_broken(pairs: int, largest: float) -> float:
    """Price a pair whose cost is no number: above all assignments of this many pairs whose costs are at most `largest`.

    No larger than that, as a huge number would drown their digits.
    """
    return 1.0 + 2.0 * pairs * largest


def count_matches(num_targets: Sequence[int], num_queries: int) -> int:
    """Return the number of matched instances of a layer."""
    return sum(matched_counts(num_targets, num_queries))


def matched_counts(num_targets: Sequence[int], num_queries: int) -> tuple[int, ...]:
    """Return the number of matched instances of each image, min(T, Q); an expression where numbers are symbols."""
    return tuple(torch.sym_min(count, num_queries) for count in num_targets)


# ------------------------------------------------------------------------------------------------- groups of arguments


class Instances(NamedTuple):
    """The matched predictions of all layers."""

    logits: Sequence[Tensor]  # one `[B, Q, h, w]` per decoder layer
    rows: Tensor  # int64 `[N, INDEX_COLUMNS]`, the index, sorted by layer
    layer_sizes: Sequence[int]  # how many rows each layer has

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """The dtype of sums."""
        return accumulation_dtype(self.logits[0].dtype)


class Targets(NamedTuple):
    """The targets of a batch: how `data` is to be read, and the tensors of `MaskTargets`, which documents them."""

    encoding: str
    data: Tensor
    table: Tensor
    images: Tensor
    windows: Tensor
    ignore: Tensor


class Draw(NamedTuple):
    """How points are drawn."""

    image_ids: Tensor  # int64 `[B]`, global numbers of the images
    seed: Tensor  # int64 `[]`, on the host or on the device
    num_points: int  # P
    num_candidates: int = 0  # K, from which the uncertain points are chosen
    num_uncertain: int = 0  # points that are chosen; the others are uniform
    layout: str = LAYOUTS[0]  # how candidates and uniform points lie to each other, one of LAYOUTS


class Term(NamedTuple):
    """How logits and targets are read, and which cross-entropy and Dice are computed."""

    padding: str = "zeros"
    target_mode: str = "bilinear"
    alpha: float = NO_FOCAL[0]
    gamma: float = NO_FOCAL[1]
    dice: str = DICE_KINDS[STANDARD]

    @property
    def dice_kind(self) -> int:
        """The number of the kind of Dice."""
        return DICE_KINDS.index(self.dice)

    @property
    def border(self) -> bool:
        """Whether maps are continued at their border."""
        return is_border(self.padding)

    @property
    def nearest(self) -> bool:
        """Whether targets are read at the nearest pixel."""
        return is_nearest(self.target_mode)

    @property
    def focal(self) -> tuple[float, float]:
        """Alpha and gamma."""
        return self.alpha, self.gamma


class Job(NamedTuple):
    """What is computed of predictions: the targets, and where and how both are read."""

    targets: Targets  # of the batch
    draw: Draw  # how points are drawn
    term: Term  # how logits and targets are read
    # float `[N, P, 2]`, of whole clips and volumes `[N, P, 3]`, the caller's points of instances; None: they are drawn,
    # as those of costs always are
    points: Tensor | None = None

    @property
    def drawn(self) -> Draw:
        """`draw` without numbers that mean nothing: those of candidates where none are drawn."""
        if self.points is None and self.draw.num_uncertain:
            return self.draw
        return self.draw._replace(num_candidates=0, num_uncertain=0)

    @property
    def flat(self) -> tuple[Any, ...]:
        """The arguments as schemas have them."""
        return (*self.targets, *self.draw, *self.term, self.points)

    @staticmethod
    def of(flat: Iterable[Any]) -> Job:
        """Invert `flat`; the points may be missing."""
        return Job(*grouped(flat, Targets, Draw, Term))

    def new_losses(
        self, count: int, dtype: torch.dtype, device: torch.device, *, keep: bool
    ) -> tuple[Tensor, Tensor, Saved]:
        """Allocate both losses of this many instances, and what is saved of them; `keep`: the logits too."""
        num_points, soft = self.draw.num_points, self.targets.encoding == "values"
        ce, dice = (torch.empty(count, dtype=dtype, device=device) for _ in range(2))
        chosen = torch.empty(count, num_bytes(self.drawn.num_candidates), dtype=torch.uint8, device=device)
        widths = num_points if soft else 0, num_points if keep else 0
        return ce, dice, Saved(chosen, *(torch.empty(count, width, dtype=dtype, device=device) for width in widths))


class Stack(NamedTuple):
    """How volumes, or the frames of clips, are read along their third axis."""

    frames: int  # how many slices targets have, which are stored one below the other
    linear: bool  # between two slices; False: in the slice that a point lies in


class Saved(NamedTuple):
    """What the forward pass keeps for the backward pass. Everything else is read again, as it is in memory anyway."""

    chosen: Tensor  # the chosen candidates, a bit each, uint8 `[N, ceil(K / 8)]`
    # t at the points, -1 where it is ignored, `[N, P]`. Without columns for bits and labels: to read those again
    # costs less than to write and read what was found.
    soft: Tensor
    logits: Tensor  # z at the points, `[N, P]`. Without columns, unless the planes will be gone: those of factors.


class Factors(NamedTuple):
    """The mask logits of all layers as products (see `MaskFactors`), in the dtype of the products."""

    embeddings: Sequence[Tensor]  # one `[B, Q, D]` per decoder layer
    biases: Sequence[Tensor]  # one `[B, Q]` per decoder layer, or none at all
    features: Sequence[Tensor]  # the distinct `[B, D, h, w]`
    features_of: Sequence[int]  # for each decoder layer, which of the features it has
    scratch_bytes: int  # bound on the planes, or the logits at the matcher's points, that exist at a time


class Gradients(NamedTuple):
    """Gradients `[N]` of the losses of the instances."""

    ce: Tensor
    dice: Tensor


class Reduction(NamedTuple):
    """How the caller sums the losses of instances, as far as it knows: ahead of the backward pass.

    sum over i of v_i (ce_weight ce_i + dice_weight dice_i) / divisor
    """

    ce_weight: float  # weight of the cross-entropies
    dice_weight: float  # weight of Dice
    divisor: float | Tensor  # one number, or one for each layer `[L]`
    weights: Tensor | None = None  # v, of the instances `[N]`; None where all are 1

    def gradients(self, instances: Instances) -> Gradients:
        """Return the gradient of the sum by the losses."""
        rows = instances.rows
        share = torch.ones(len(rows), dtype=instances.accumulation_dtype, device=rows.device)
        if self.weights is not None:
            share *= self.weights
        share /= (
            self.divisor[rows[:, LAYER]] if isinstance(self.divisor, Tensor) and self.divisor.ndim else self.divisor
        )
        return Gradients(self.ce_weight * share, self.dice_weight * share)


def grouped(arguments: Iterable[Any], *kinds: Any) -> Iterator[Any]:
    """Cut flat arguments into groups of the given kinds, in order; those that are left follow one by one."""
    flat = iter(arguments)
    yield from [kind(*islice(flat, len(kind._fields))) for kind in kinds]
    yield from flat
