"""Scenes from a folder of one's own, read from the disk as they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss.errors import Cause, MaskLossError
from maskloss.lab.data import truth
from maskloss.lab.data.augment import LARGEST, plain_view, random_view, recolor
from maskloss.lab.data.catalog import Catalog, Found
from maskloss.lab.data.images import common_channels, read_image, to_channels, to_unit
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import SKIP, SUSPICIOUS, Finding, Problems, sentence
from maskloss.lab.data.recognize import recognize
from maskloss.lab.data.scenes import Batch, Probe, Scene, fit, in_color, step_generator
from maskloss.lab.data.split import relative
from maskloss.lab.data.truth import Loaded, View
from maskloss.targets import MaskTargets

NORMALIZE = ("auto", "percentile", "range")
# A crop can have more instances than its share of the image's area, as they are not spread evenly.
_CROWDED = 1.5
# This many broken images in a row are no accident.
_PATIENCE = 20


class Reading(NamedTuple):
    """How images are brought to what the model sees."""

    size: int  # side of the square that the model sees, pixels
    crop: int | None  # side of the square that is cut out of an image for it; None: images are shown whole
    percentile: bool  # whether 8-bit images are stretched between percentiles too
    channels: int  # of the images
    augment: bool  # whether training images are changed at random
    most: int | None = None  # the most instances that the model can find in an image; None: any number

    def image(self, loaded: Loaded, view: View, frame: int) -> Tensor:
        """Show a view of an image to the model: `[C, size, size]` in [0, 1]."""
        shown = to_channels(loaded.image, self.channels, Path(loaded.entry.file))
        if shown.dtype == np.uint8 and not self.percentile:
            # Resized as bytes, which is several times faster.
            return fit(view.apply(shown), frame, self.size) / 255
        return fit(view.apply(to_unit(shown, self.percentile)), frame, self.size)


class FolderScenes:
    """Scenes from a folder with images and annotations.

    Most arguments are options of `TrainConfig`, which documents them. With `score`, "all" or the name of a part, these
    images are only to be scored on; `classes` are those of a trained model, which the data must have.
    """

    def __init__(
        self,
        folder: str,
        size: int | None = None,
        *,
        crop: int | None = None,
        options: DataOptions = DataOptions(),  # noqa: B008 (immutable)
        normalize: str = "auto",
        augment: bool = True,
        on_error: str = "stop",
        score: str | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.problems = Problems(on_error)
        self.root = Path(folder)
        self.found: Found = recognize(self.root, options._replace(crop=crop), self.problems, score, classes)
        self.title = f"images of {self.root.resolve().name}"
        self.class_names: Sequence[str] = self.found.class_names
        self.category_ids: Sequence[int] = self.found.category_ids
        self.one_class_maps = self.found.microscopy
        percentile = normalize == "percentile" or (normalize == "auto" and self.one_class_maps)
        usual = self.found.train if score is None else self.found.held_out
        self.channels = common_channels(_first_image(usual, self.problems))
        self.reading = Reading(size or _usual_size(usual, crop), crop, percentile, self.channels, augment)
        self.held_out: Sequence[Scene] = HeldOut(self.found.held_out, self.reading)
        parts = self.found.train, self.found.held_out
        self.most_instances = max(int(_expected(each, crop).max(initial=0)) for each in parts)
        self._order = lru_cache(maxsize=4)(self._permutation)

    def limit(self, most: int) -> None:
        """Ask for as many instances of an image as a model can find; the smallest others become ignore regions."""
        self.reading = self.reading._replace(most=most)
        where = "an image" if self.reading.crop is None else "a crop, by the usual share of its image,"
        what = f"instances beyond the {most} that the model can find in {where} made ignore regions, the smallest ones"
        beyond = _expected(self.found.train, self.reading.crop) - most
        crowded = np.flatnonzero(beyond > 0)
        for number in crowded[np.argsort(-beyond[crowded], kind="stable")]:
            self.problems.note(SUSPICIOUS, what, self.found.train[int(number)].name, int(beyond[number]))

    @property
    def findings(self) -> list[Finding]:
        """What a person should know of the data."""
        return self.problems.findings

    @property
    def held_out_files(self) -> list[str]:
        """The images that are held out, relative to the folder."""
        return [relative(Path(file), self.root) for file in self.found.held_out.files]

    def __getstate__(self) -> dict[str, object]:
        # Workers that are not forked get a copy; a cache cannot be pickled, and is only a cache.
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._order = lru_cache(maxsize=4)(self._permutation)

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        return torch.randperm(len(self.found.train), generator=step_generator(seed, epoch))

    @property
    def num_training(self) -> int:
        """The number of images to train on."""
        return len(self.found.train)

    @property
    def class_counts(self) -> list[int]:
        """The number of training instances of each class."""
        train = self.found.train
        labels = [each.label for number in range(len(train)) for each in train[number].objects]
        return [int(count) for count in np.bincount(labels, minlength=len(self.class_names))]

    @property
    def largest(self) -> int:
        """The longest side of any training image, pixels."""
        return int(self.found.train.sizes.max())

    def probe(self, number: int) -> Probe:
        """Return the square in the middle of a held-out image."""
        loaded = truth.load(self.found.held_out[number])
        height, width = loaded.entry.height, loaded.entry.width
        side = min(height, width, self.reading.crop or height)
        view = View((height - side) // 2, (width - side) // 2, side, side)
        packed = loaded.pack(view, view.size, self.reading.most)
        shown = to_unit(to_channels(loaded.image, self.channels, Path(loaded.entry.file)), self.reading.percentile)
        picture = torch.from_numpy(np.ascontiguousarray(view.apply(shown))).permute(2, 0, 1)
        image = self.reading.image(loaded, view, side)
        return Probe(image, in_color(picture), packed.masks, packed.labels, loaded.entry.name)

    def batch(self, step: int, positions: range, batch_size: int, seed: int) -> Batch:
        """Take images of a step: every image comes up once before any comes up again."""
        skipped: list[str] = []
        images, masks, labels = [], [], []
        for position in positions:
            place = step * batch_size + position
            image, packed = self._sample(place, seed, skipped)
            images.append(image)
            masks.append(packed.masks)
            labels.append(packed.labels)
        return Batch(
            torch.stack(images), MaskTargets.cat(masks), torch.cat(labels), torch.tensor(list(positions)), skipped
        )

    def _sample(self, place: int, seed: int, skipped: list[str]) -> tuple[Tensor, truth.Packed]:
        count = len(self.found.train)
        epoch, where = divmod(place, count)
        number = int(self._order(seed, epoch)[where])
        for attempt in range(_PATIENCE):
            entry = self.found.train[(number + attempt) % count]
            try:
                loaded = truth.load(entry)
                generator = step_generator(seed, place, 1)
                draw = self.reading
                if draw.augment:
                    view, frame = random_view(entry.height, entry.width, draw.crop, self.one_class_maps, generator)
                else:
                    view, frame = plain_view(entry.height, entry.width, draw.crop, generator)
                packed = loaded.pack(view, frame, draw.most)
                image = draw.image(loaded, view, frame[0])
                return (recolor(image, generator) if draw.augment else image), packed
            except MaskLossError as error:
                if self.problems.on_error != SKIP:
                    raise
                skipped.append(sentence(error))
        raise Cause(
            "there must be images that can be read", f"{_PATIENCE} in a row cannot; {skipped[-1]}", "look at the disk"
        )

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What the data are."""
        train, held_out = self.found.train, self.found.held_out
        per_image = np.concatenate([train.counts, held_out.counts])
        sizes = np.concatenate([train.sizes, held_out.sizes])
        low, high = sizes.min(0), sizes.max(0)
        span = f"{low[0]} x {low[1]}" + ("" if (low == high).all() else f" to {high[0]} x {high[1]}")
        names = ", ".join(self.class_names[:6]) + (", ..." if len(self.class_names) > 6 else "")
        depth = {True: "stretched between percentiles", False: "by the range of their type"}[self.reading.percentile]
        shown = f"{self.reading.size} x {self.reading.size}"
        if self.reading.crop:
            shown += f", from crops of {self.reading.crop} x {self.reading.crop}"
        return [
            ("found", "; ".join(self.found.how)),
            ("images", f"{len(train):,} for training, {len(held_out):,} held out"),
            (
                "instances",
                f"{int(train.counts.sum()):,} for training, {int(held_out.counts.sum()):,} held out; "
                f"{np.median(per_image):g} in an image, {per_image.max()} at most",
            ),
            ("image sizes", span),
            ("classes", f"{len(self.class_names)}: {names}"),
            ("channels", f"{self.channels}, values {depth}"),
            ("shown to the model", shown),
        ]


class HeldOut(Sequence[Scene]):
    """Held-out scenes, read as they are asked for."""

    def __init__(self, catalog: Catalog, reading: Reading) -> None:
        self.catalog, self.reading = catalog, reading

    def __len__(self) -> int:
        return len(self.catalog)

    @overload
    def __getitem__(self, number: int) -> Scene: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Scene]: ...
    def __getitem__(self, number: int | slice) -> Scene | Sequence[Scene]:
        """Read a scene, or choose some without reading them."""
        if isinstance(number, slice):
            chosen = range(len(self))[number]
            return HeldOut(self.catalog.select(chosen), self.reading)
        if not 0 <= number < len(self):
            raise IndexError(number)
        loaded = truth.load(self.catalog[number])
        entry = loaded.entry
        view = View.whole(entry.height, entry.width)
        packed, regions, ignored = loaded.pack(view, view.size), loaded.regions(), loaded.ignored()
        pixels = to_unit(to_channels(loaded.image, self.reading.channels, Path(entry.file)), self.reading.percentile)
        return Scene(
            image=torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
            targets=packed.masks,
            labels=packed.labels,
            crowd=regions.masks,
            crowd_labels=regions.labels,
            ignored=None if ignored is None else torch.from_numpy(ignored),
            name=entry.name,
        )


def _first_image(catalog: Catalog, problems: Problems) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """Read the first image that can be read."""
    for number in range(min(len(catalog), _PATIENCE)):
        with problems.tolerated():
            return read_image(Path(catalog[number].file))
    raise Cause("there must be images that can be read", f"the first {_PATIENCE} cannot", "see what was skipped")


def _usual_size(catalog: Catalog, crop: int | None) -> int:
    """Return the usual longer side of the images, at most 256, as a multiple of 16."""
    side = crop or int(np.median(catalog.sizes.max(1)))
    return max(32, min(256, round(side / 16) * 16))


def _expected(catalog: Catalog, crop: int | None) -> NDArray[np.int64]:
    """Return how many instances of each image the model has to find at once; of crops, about as many as the fullest."""
    if crop is None:
        return catalog.counts
    shown = np.minimum(1.0, (LARGEST * crop) ** 2 / catalog.sizes.prod(1))
    expected: NDArray[np.int64] = np.ceil(np.minimum(1.0, _CROWDED * shown) * catalog.counts).astype(np.int64)
    return expected
