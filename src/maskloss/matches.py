"""Which prediction belongs to which target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from maskloss._abi import IMAGE, INDEX_COLUMNS, LAYER, QUERY, TARGET
from maskloss._numbers import check_integer
from maskloss._tracing import as_device, as_tensor, savable
from maskloss.errors import Cause, describe, reported

Pairs = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Matches:
    """Pairs of a prediction and a target, for every image and decoder layer.

    Attributes:
        index: int64 `[N, 4]`, rows (layer, image, query, target within its image), sorted by layer.
        layer_sizes: the number of rows of each layer.
        num_queries: Q, predictions of an image.
        num_targets: targets of each image.
        classes: int64 `[L, B, Q]`, the class that each query should have, `num_classes` for one without a target. None
            for matches that were given as pairs.
        num_classes: the number of classes that the matching knew.
        counts: the number of rows of each layer and image, `[L * B]`, where the rows of a layer are sorted by image.
            None: not known on the host; masks as factors then have to ask the device.
    """

    index: Tensor
    layer_sizes: tuple[int, ...]
    num_queries: int
    num_targets: tuple[int, ...]
    classes: Tensor | None = None
    num_classes: int | None = None
    counts: tuple[int, ...] | None = None

    @property
    def batch_size(self) -> int:
        """The number of images."""
        return len(self.num_targets)

    @property
    def is_even(self) -> bool:
        """Whether all layers have the same number of pairs."""
        # A loop, because a set would resolve symbolic sizes.
        return all(size == self.layer_sizes[0] for size in self.layer_sizes[1:])

    def __len__(self) -> int:
        """Return N, the number of pairs of all layers."""
        return sum(self.layer_sizes)

    def target_rows(self, first_rows: Tensor) -> Tensor:
        """Number the matched targets over the whole batch, int64 `[N]`; `first_rows` `[B]`: where each image begins."""
        return first_rows[self.index[:, IMAGE]] + self.index[:, TARGET]

    def by_layer(self, values: Tensor) -> Tensor:
        """Sum values of the pairs `[K, N]` by layer: `[K, L]`."""
        sizes = self.layer_sizes
        if self.is_even:
            return values.view(len(values), len(sizes), -1).sum(2)
        return torch.stack([part.sum(1) for part in values.split(list(sizes), dim=1)], dim=1)

    def of_layers(self, layers: Sequence[int]) -> Matches:
        """Keep the pairs of some layers, in their order, which are numbered anew."""
        if len(layers) == len(self.layer_sizes):
            return self
        parts, batch = self.index.split(list(self.layer_sizes)), self.batch_size
        index = torch.cat([parts[layer] for layer in layers])
        sizes = tuple(self.layer_sizes[layer] for layer in layers)
        fresh = [torch.full((size,), number, device=index.device) for number, size in enumerate(sizes)]
        index[:, LAYER] = torch.cat(fresh)
        classes = None if self.classes is None else torch.stack([self.classes[layer] for layer in layers])
        counts = None
        if self.counts is not None:
            counts = tuple(n for layer in layers for n in self.counts[layer * batch : (layer + 1) * batch])
        return replace(self, index=index, layer_sizes=sizes, classes=classes, counts=counts)

    @reported("Matches.pairs")
    def pairs(self, layer: int = -1) -> list[tuple[Tensor, Tensor]]:
        """List the pairs of one layer as DETR does: (queries, targets) of each image, both int64."""
        count = len(self.layer_sizes)
        number = check_integer("layer", layer, -count, count - 1, hint="-1 is the final layer")
        rows = self.index.split(list(self.layer_sizes))[number]
        return [
            (mine[:, QUERY], mine[:, TARGET])
            for mine in (rows[rows[:, IMAGE] == image] for image in range(self.batch_size))
        ]

    @staticmethod
    def one_to_one(count: int, device: torch.device) -> Matches:
        """Match prediction n with target n of a single image.

        Args:
            count: the number of pairs.
            device: where the matches are wanted.

        Returns:
            The matches of one layer.
        """
        index = torch.zeros(count, INDEX_COLUMNS, dtype=torch.int64, device=device)
        index[:, QUERY] = index[:, TARGET] = torch.arange(count, device=device)
        return Matches(index, (count,), count, (count,))

    @staticmethod
    @reported("Matches.from_pairs")
    def from_pairs(pairs: Pairs, *, num_queries: int, num_targets: Sequence[int]) -> Matches:
        """Take the pairs of one layer from DETR's form, and check that they exist.

        Args:
            pairs: (queries, targets) of each image, two int64 tensors of one length. They are looked at on the host,
                so leave them on the CPU, where an assignment makes them.
            num_queries: Q, predictions of an image.
            num_targets: targets of each image.

        Returns:
            The matches, on the CPU.

        Raises:
            MaskLossError: a list of another length than `num_targets`, queries and targets that do not pair up, or an
                index out of range.
        """
        check_integer("num_queries", num_queries, 0, hint="it is Q of the logits")
        if not isinstance(num_targets, Sequence):
            raise Cause("num_targets must be a list", f"got {describe(num_targets)}", "list the targets of each image")
        for count in num_targets:
            check_integer("a number of targets", count, 0, hint="num_targets lists the targets of each image")
        if not isinstance(pairs, Sequence) or len(pairs) != len(num_targets):
            given = f"{len(pairs)} entries" if isinstance(pairs, Sequence) else describe(pairs)
            raise Cause(
                "there must be matches for every image",
                f"{given} for {len(num_targets)} images",
                "an image without targets has two empty tensors",
            )
        rows = []
        for image, (pair, count) in enumerate(zip(pairs, num_targets, strict=True)):
            queries, targets = _check_pair(pair, image)
            for name, found, limit in (("queries", queries, num_queries), ("targets", targets, count)):
                if len(found) and not 0 <= int(found.min()) <= int(found.max()) < limit:
                    raise Cause(
                        f"the {name} of a match must lie in [0, {limit})",
                        f"those of image {image} reach from {int(found.min())} to {int(found.max())}",
                        "matches index the queries and the targets of one image, from 0",
                    )
            fixed = torch.zeros_like(queries)
            rows.append(torch.stack([fixed, fixed + image, queries, targets], dim=1))
        index = torch.cat(rows) if rows else torch.empty(0, INDEX_COLUMNS, dtype=torch.int64, device="cpu")
        counts = tuple(len(part) for part in rows)
        return Matches(index, (len(index),), num_queries, tuple(num_targets), counts=counts)

    @reported("Matches.to")
    def to(self, device: torch.device | str) -> Matches:
        """Move the tensors to a device."""
        device = as_device(device)
        classes = None if self.classes is None else savable(self.classes.to(device, non_blocking=True))
        return replace(self, index=savable(self.index.to(device, non_blocking=True)), classes=classes)


def check_fit(matches: Matches, num_queries: int, num_targets: Sequence[int]) -> None:
    """Raise if matches have other numbers of queries or targets."""
    if (matches.num_queries, matches.num_targets) != (num_queries, tuple(num_targets)):
        raise Cause(
            "matches must be those of these predictions and targets",
            f"they pair {matches.num_queries} queries with {list(matches.num_targets)} targets, "
            f"here are {num_queries} queries and {list(num_targets)} targets",
            "match again after changing the batch",
        )


def matches_of_layers(
    matches: Matches | Pairs | Sequence[Pairs], layers: int, num_queries: int, num_targets: Sequence[int]
) -> Matches:
    """Normalize the given matches to those of all layers; matches for a single layer are used for all.

    Args:
        matches: `Matches` of one layer or of all; a pair (queries, targets) for each image, as DETR's matchers return
            them; or a list with such a list for each layer.
        layers: L.
        num_queries: Q.
        num_targets: targets of each image.

    Raises:
        Cause: matches of another number of layers, queries or targets, or a query that is matched twice in a layer.
    """
    if not isinstance(matches, Matches):
        if not isinstance(matches, Sequence):
            raise Cause(
                "matches must be Matches, or a list of pairs (queries, targets)",
                f"got {describe(matches)}",
                "give one pair of 1-D tensors for each image, or a list of them for each layer",
            )
        listed = [matches] if not matches or _is_pair(matches[0]) else matches
        parts = [Matches.from_pairs(pairs, num_queries=num_queries, num_targets=num_targets) for pairs in listed]  # type: ignore[arg-type]
        matches = join_layers(parts)
        place = matches.index[:, :TARGET]
        if len(place.unique(dim=0)) < len(place):
            raise Cause(
                "a query can have one target only",
                "a query of an image is matched twice in a layer",
                "several queries may share a target, but a query has one class and one mask",
            )
    check_fit(matches, num_queries, num_targets)
    given = len(matches.layer_sizes)
    if given == 1 < layers:
        return _repeated(matches, layers)
    if given != layers:
        raise Cause(
            "there must be matches for every decoder layer, or those of one for all",
            f"matches of {given} layers for {layers} layers of logits",
            "list the pairs of each layer, the final one last",
        )
    return matches


def join_layers(layers: Sequence[Matches]) -> Matches:
    """Join the matches of single layers, with the same numbers of queries and targets, into those of all."""
    sizes = tuple(size for part in layers for size in part.layer_sizes)
    index = torch.cat([part.index for part in layers])
    index[:, LAYER] = torch.repeat_interleave(torch.tensor(sizes, device=index.device))
    counts = tuple(count for part in layers for count in part.counts or ())
    return Matches(index, sizes, layers[0].num_queries, layers[0].num_targets, counts=counts or None)


def _repeated(matches: Matches, layers: int) -> Matches:
    """Give the pairs of a single layer to each of several layers."""
    index = matches.index.repeat(layers, 1)
    index[:, LAYER] = torch.arange(layers, device=index.device).repeat_interleave(len(matches.index))
    classes = None if matches.classes is None else matches.classes.expand(layers, -1, -1)
    counts = None if matches.counts is None else matches.counts * layers
    return replace(matches, index=index, layer_sizes=matches.layer_sizes * layers, classes=classes, counts=counts)


def _is_pair(entry: Any) -> bool:
    """Whether an entry is the pair (queries, targets) of an image, and not the list of the pairs of a layer."""
    if not isinstance(entry, Sequence) or len(entry) != 2:
        return False
    return not any(isinstance(side, Sequence) and any(_is_list(each) for each in side) for side in entry)


def _is_list(entry: Any) -> bool:
    return isinstance(entry, Sequence) or (hasattr(entry, "ndim") and entry.ndim > 0)


def wanted_classes(
    matches: Matches, labels: Tensor, first_rows: Tensor, shape: Sequence[int], no_object: int
) -> Tensor:
    """Return the class that each query should have, `no_object` for one without a target.

    Args:
        matches: their classes are reused if they have them for the same number of classes.
        labels: int64 `[T_all]`.
        first_rows: int64 `[B]`, where the labels of each image begin.
        shape: (L, B, Q).
        no_object: the number of classes.

    Returns:
        int64 `[L, B, Q]`.
    """
    if matches.classes is not None and matches.num_classes == no_object:
        return matches.classes
    layer, image, query, _ = matches.index.unbind(1)
    wanted = torch.full(tuple(shape), no_object, device=matches.index.device)
    wanted[layer, image, query] = labels[matches.target_rows(first_rows)]
    return wanted


def _check_pair(pair: Any, image: int) -> tuple[Tensor, Tensor]:
    """Convert (queries, targets) of one image to int64 on the CPU, and check that they pair up."""
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise Cause(
            "the matches of an image must be a pair (queries, targets)",
            f"those of image {image} are {describe(pair)}",
            "give one pair of 1-D tensors for each image",
        )
    try:
        queries, targets = (as_tensor(side).cpu() for side in pair)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        raise Cause(
            "the matches of an image must be two 1-D tensors (queries, targets)",
            f"those of image {image} are {describe(pair)}",
            "give indices on the host",
        ) from None
    if queries.ndim != 1 or queries.shape != targets.shape:
        raise Cause(
            "queries and targets of an image must pair up",
            f"image {image} has {list(queries.shape)} queries and {list(targets.shape)} targets",
            "give two 1-D tensors of the same length",
        )
    for side in (queries, targets):
        if len(side) and (side.is_floating_point() or side.is_complex() or side.dtype == torch.bool):
            raise Cause("matches must be integers", f"those of image {image} are {describe(side)}", "they are indices")
    return queries.long(), targets.long()
