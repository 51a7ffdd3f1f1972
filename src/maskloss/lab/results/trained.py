"""The model of a run, from Python: images in, arrays out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskloss._numbers import check_integer, check_number
from maskloss.errors import Cause, describe, reported
from maskloss.lab.config import TrainConfig
from maskloss.lab.data import tiff
from maskloss.lab.data.images import as_image, read_image, read_size, to_channels, to_unit
from maskloss.lab.data.options import PIECE
from maskloss.lab.models.registry import load_learner
from maskloss.lab.results.inference import FOUND, MOST, Instance, Prediction, Predictor
from maskloss.lab.runfolder import Facts, read_facts

# COCO's run lengths are numbers of 32 bits.
_MOST_COUNTED = 1 << 32


class FoundObjects:
    """What a trained model found in one image, best first.

    Args:
        prediction: the instances.
        classes: names, by label.

    Attributes:
        scores: float64 `[K]`, falling, in [0, 1].
        labels: int64 `[K]`, the places of their classes among those of the run.
        classes: the names of their classes, `[K]`.
    """

    def __init__(self, prediction: Prediction, classes: Sequence[str]) -> None:
        self._prediction = prediction
        instances = prediction.instances
        self.scores: NDArray[np.float64] = np.array([each.score for each in instances], dtype=np.float64)
        self.labels: NDArray[np.int64] = np.array([each.label for each in instances], dtype=np.int64)
        self.classes: NDArray[np.str_] = np.array([classes[each.label] for each in instances], dtype=np.str_)

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self.scores)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """The masks, bool `[K, H, W]`; made anew each time, since many of a large image fill the memory."""
        height, width = self._prediction.height, self._prediction.width
        whole = [each.whole(height, width) for each in self._prediction.instances]
        return np.stack(whole) if whole else np.zeros((0, height, width), dtype=bool)

    @property
    def boxes(self) -> NDArray[np.int64]:
        """Left, top, right and bottom of the masks, int64 `[K, 4]`, in pixels; right and bottom lie outside."""
        sides = [each.box for each in self._prediction.instances]
        return np.array(sides, dtype=np.int64).reshape(-1, 4)[:, [1, 0, 3, 2]]

    def label_map(self) -> NDArray[np.int32]:
        """Number the pixels, int32 `[H, W]`: 0 is background; where instances overlap, the best one wins."""
        return self._prediction.label_map(0.0)[0]

    def rle(self) -> list[dict[str, Any]]:
        """Return the run lengths of the masks as COCO writes them."""
        size = self._prediction.height, self._prediction.width
        return [each.run_lengths(*size) for each in self._prediction.instances]

    def __repr__(self) -> str:
        return f"FoundObjects({len(self)} in {self._prediction.height} x {self._prediction.width} pixels)"


class Slide:
    """An image that is too large to be read at once: a part is read when it is asked for."""

    def __init__(self, path: Path, facts: Facts) -> None:
        self.path, self.facts = path, facts
        pieces = [window for _, window in tiff.windows(path, PIECE)]
        height, width = (max(each[side] + each[side + 2] for each in pieces) for side in (0, 1))
        if height * width >= _MOST_COUNTED:
            what = f"{path} has {height:,} x {width:,} = {height * width:,}"
            raise Cause(f"an image must have fewer than {_MOST_COUNTED:,} pixels", what, "cut it into smaller images")
        self.shape = torch.Size((facts.channels, height, width))
        # Evenly chosen squares of equal size say what is black and what is white.
        side = min(PIECE, height, width) // 4
        chosen = [pieces[place] for place in np.linspace(0, len(pieces) - 1, min(len(pieces), 16)).astype(int)]
        self._sample = np.concatenate([self._read(each.top, each.left, side, side) for each in chosen])

    def __getitem__(self, part: tuple[slice, slice, slice]) -> Tensor:
        _, rows, columns = part
        pixels = self._read(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
        return _planes(to_unit(pixels, self.facts.percentile, self._sample))

    def _read(self, top: int, left: int, height: int, width: int) -> NDArray[Any]:
        path = self.path.with_name(f"{self.path.name}#{top},{left},{height}x{width}.tif")
        return to_channels(read_image(path), self.facts.channels, self.path)

    def overview(self, step: int) -> Tensor:
        """Return every pixel whose row and column are multiples of `step`, `[C, h, w]`."""
        side = max(1, PIECE // step) * step
        rows, columns = (
            [slice(start, min(start + side, length)) for start in range(0, length, side)] for length in self.shape[1:]
        )
        strips = [torch.cat([self[:, down, across][:, ::step, ::step] for across in columns], dim=2) for down in rows]
        return torch.cat(strips, dim=1)


def _planes(image: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


class TrainedRun:
    """The model of a run, ready to predict; `load_run` makes one.

    Args:
        folder: that `maskloss train` wrote.
        facts: of the run.
        predictor: of its model.

    Attributes:
        folder: of the run.
        facts: of the run.
        predictor: for images that are tensors already.
    """

    def __init__(self, folder: Path, facts: Facts, predictor: Predictor) -> None:
        self.folder, self.facts, self.predictor = folder, facts, predictor

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by label."""
        return list(self.facts.classes)

    @reported("TrainedRun.predict")
    def predict(self, image: Any, *, threshold: float = FOUND) -> FoundObjects:
        """Find instances in an image of any size; large ones are cut into tiles.

        Args:
            image: the path of a file; an array `[H, W]` or `[H, W, C]`, or an image of Pillow, whose values are taken
                as those of a file: 8 bits, integers or floats; or a float tensor `[C, H, W]`.
            threshold: the least score that is kept, in [0, 1]. 0 keeps all.

        Returns:
            What was found, best first.

        Raises:
            MaskLossError: an image that cannot be read, or has other channels than the data of the run.
        """
        check_number("threshold", threshold, 0, 1, hint="0.5 is the default")
        [prediction] = self.predictor([self.read(image)])
        kept: list[Instance] = [each for each in prediction.instances if each.score >= threshold]
        return FoundObjects(prediction._replace(instances=kept), self.facts.classes)

    def read(self, image: Any) -> Tensor | Slide:
        """Bring an image to what the model takes: float32 `[C, H, W]` in [0, 1]; one that is too large in pieces."""
        if isinstance(image, (str, os.PathLike)):
            path = Path(image)
            if self.predictor.cut and tiff.is_tiff(path) and math.prod(read_size(path)) > tiff.MOST_PIXELS:
                return Slide(path, self.facts)
            pixels = read_image(path)
        else:
            path = Path("the image")
            pixels = as_image(_array(image), path)
        shown = to_unit(to_channels(pixels, self.facts.channels, path), self.facts.percentile)
        return _planes(shown)

    def __repr__(self) -> str:
        return f"TrainedRun({self.folder}, {self.predictor.learner.describe()})"


@reported("load_run")
def load_run(folder: str | os.PathLike[str], *, device: str | None = None, tile: int | None = None) -> TrainedRun:
    """Load the model of a run.

    Args:
        folder: that `maskloss train` wrote. An interrupted run has the weights that it would keep.
        device: "cpu" or "cuda". Default: cuda where there is a device.
        tile: side of the tiles into which large images are cut, in pixels, at least 16. Default: as in training.

    Returns:
        The run; `run.predict(image)` finds instances.

    Raises:
        MaskLossError: no run, or weights that are missing or damaged.
    """
    path = Path(folder)
    facts = read_facts(path)
    if tile is not None:
        check_integer("--tile", tile, 16, hint="leave it out to take that of the run")
    learner = load_learner(path, facts, TrainConfig(device=device).torch_device)
    cut = tile is not None or facts.config.crop is not None
    size, most = facts.config.size or 0, max(MOST, learner.num_queries)
    return TrainedRun(path, facts, Predictor(learner, size, tile or facts.tile, cut, most))


def _array(image: Any) -> NDArray[Any]:
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        return np.asarray(image.permute(1, 2, 0) if image.ndim == 3 else image)
    if hasattr(image, "getexif"):
        from PIL import ImageOps

        upright = ImageOps.exif_transpose(image)
        plain = upright.mode in {"1", "L", "RGB", "RGBA", "F", "I"} or upright.mode[:4] == "I;16"
        image = upright if plain else upright.convert("RGB")
    array = np.asarray(image)
    if array.dtype.kind not in "biuf":
        raise Cause("an image must be a path, an array or a tensor", f"got {describe(image)}", "numpy.asarray(image)")
    return array
