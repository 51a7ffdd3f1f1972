"""What a picture of `maskloss show` is drawn from: a run, a prediction file with its truth, or a scene of digits."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, one_hot

from maskloss.criterion import MaskCriterion
from maskloss.errors import Cause, describe
from maskloss.lab.data.images import read_image, to_unit
from maskloss.lab.data.maps import read_map
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import Problems
from maskloss.lab.data.recognize import recognize
from maskloss.lab.data.scenes import in_color
from maskloss.lab.data.split import ALL
from maskloss.lab.data.truth import View, load
from maskloss.lab.files import check_file, explain
from maskloss.lab.results.lettering import Lettering
from maskloss.points import PointSampling

# Of the made-up prediction: few enough to tell them apart.
SHOWN_POINTS = 2048
# What a prediction file may hold.
HELD = ("mask_logits", "class_logits", "masks", "labels", "ignore")


@dataclass
class Subject:
    """What the picture is drawn from."""

    mask_logits: Tensor  # predictions of all queries, `[Q, h, w]`
    masks: Tensor  # the truth, `[T, H, W]`, bool
    criterion: MaskCriterion  # which matches and compares them
    class_logits: Tensor | None = None  # of all queries, `[Q, C + 1]`; None: matched by masks alone
    labels: Tensor | None = None  # of the truth, int64 `[T]`
    names: Sequence[str] = field(default_factory=tuple)  # of the instances, as pictures show them
    letters: Lettering = field(default_factory=lambda: Lettering([], []))  # what their names are written with
    image: Tensor | None = None  # `[3, h, w]` in [0, 1]; None: there is none
    ignore: Tensor | None = None  # bool `[H, W]`, where points weigh nothing
    # left, top, width and height of the part in which points are drawn
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    heading: str = ""  # of the picture


@torch.no_grad()
def from_run(folder: Path, image: str | None) -> Subject:
    """Let the model of a training run predict one of its held-out scenes; default: the most crowded of the first."""
    from maskloss.lab.models.registry import load_learner, open_source
    from maskloss.lab.results import snapshots
    from maskloss.lab.runfolder import read_facts

    facts = read_facts(folder)
    source = open_source(facts.config)
    names = [each.name for each in source.held_out]
    number = snapshots.telling(source) if image is None else _scene_number(image, names)
    learner = load_learner(folder, facts, torch.device("cpu")).eval()
    letters = Lettering(facts.classes, facts.category_ids)
    probe = source.probe(number)
    output = learner.predict(probe.image[None], torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    return Subject(
        mask_logits=output.mask_logits[0].detach(),
        masks=probe.masks.dense(),
        criterion=learner.mask_criterion(),
        class_logits=output.class_logits[0].detach(),
        labels=probe.labels,
        names=_numbered([letters.names[label] for label in probe.labels.tolist()]),
        letters=letters,
        image=probe.picture,
        heading=f"{probe.name}, run {folder.resolve().name}",
    )


def _scene_number(image: str, names: Sequence[str]) -> int:
    if image in names:
        return list(names).index(image)
    if image.isdigit() and int(image) < len(names):
        return int(image)
    raise Cause(
        "--image must be the number or the name of a held-out scene",
        f"got {image!r}, there are {len(names)}: {', '.join(names[:3])} …",
        f"0 … {len(names) - 1}",
    )


def from_digits(seed: int) -> Subject:
    """Draw a scene of handwritten digits, and make up a prediction: the truth, blurred, moved and doubted in places."""
    from maskloss.lab.data.digits import DigitScenes

    source = DigitScenes(128, 16)
    scene = max(source.held_out, key=lambda each: len(each.labels))
    generator = torch.Generator().manual_seed(seed)
    masks, labels = scene.masks(), scene.labels
    soft = masks[:, None].float()
    for _ in range(2):
        soft = avg_pool2d(soft, 7, stride=1, padding=3)
    small = interpolate(soft, scale_factor=0.5, mode="bilinear")[:, 0]
    doubt = interpolate(torch.randn(len(masks), 1, 6, 6, generator=generator), 64, mode="bicubic")[:, 0]
    good = 16 * (small.roll((1, -1), (1, 2)) - 0.45) + 0.8 * doubt
    idle = 2.0 * interpolate(torch.randn(3, 1, 5, 5, generator=generator), 64, mode="bicubic")[:, 0] - 4
    # Queries come in no order.
    order = torch.randperm(len(masks) + 3, generator=generator)
    classes = torch.cat([3.5 * one_hot(labels, 11), 3.5 * one_hot(torch.full((3,), 10), 11)])
    classes = classes + 0.6 * torch.randn(classes.shape, generator=generator)
    return Subject(
        mask_logits=torch.cat([good, idle])[order],
        masks=masks,
        criterion=MaskCriterion(10, sampling=PointSampling(num_points=SHOWN_POINTS)),
        class_logits=classes[order],
        labels=labels,
        names=_numbered([source.class_names[label] for label in labels.tolist()]),
        image=scene.image,
        heading="Handwritten digits, and a made-up prediction",
    )


def from_prediction(path: Path, target: Path | None, data: Path | None, image: str | None) -> Subject:
    """Read a prediction from a file, and its truth from the same file, another one, or a folder."""
    content = _read(path)
    if not isinstance(content, Mapping):
        content = {"mask_logits": content}
    if "mask_logits" not in content:
        raise Cause(
            "a prediction file must hold mask logits",
            f"{path} holds {', '.join(map(str, content)) or 'nothing'}",
            'save a tensor [Q, h, w], or a dict with "mask_logits"',
        )
    held = {name: _tensor(content[name], name, path) for name in HELD if name in content}
    logits = _without_batch(held["mask_logits"], 3, "mask_logits", "[Q, h, w]").float()
    labels, ignore = held.get("labels"), held.get("ignore")
    names: list[str] = []
    letters = Lettering([], [])
    picture = None
    if data is not None:
        if image is None:
            raise Cause("--data needs --image", "there is no --image", "name an image of the folder")
        masks, labels, names, letters, ignore, picture = _annotated(data, image)
    else:
        truth = held.get("masks") if target is None else _read(target)
        if truth is None:
            raise Cause("a prediction needs its truth", "there is none", '--target FILE, or "masks" in the file')
        masks = _masks(_tensor(truth, "the truth", target or path), target or path)
        picture = None if image is None else in_color(_pixels(to_unit(read_image(Path(image)), percentile=False)))
    ignore = None if ignore is None else ignore.bool()
    classes = held.get("class_logits")
    count = 1
    if classes is not None and labels is not None:
        classes = _without_batch(classes, 2, "class_logits", "[Q, C + 1]").float()
        count = max(classes.shape[1] - 1, 1)
    sampling = PointSampling()
    return Subject(
        mask_logits=logits,
        masks=masks,
        criterion=MaskCriterion(count, sampling=sampling),
        class_logits=classes if labels is not None else None,
        labels=labels,
        names=_numbered(names),
        letters=letters,
        image=picture,
        ignore=ignore,
        heading=path.name if image is None else f"{Path(image).name}, {path.name}",
    )


def _read(path: Path) -> Any:
    """Read an array, tensors, or a label map; nothing in a file is ever run."""
    rule = "every file must hold an array, tensors or an image"
    check_file(path, rule)
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix in {".pt", ".pth"}:
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise Cause(
            "a file must hold nothing but tensors",
            f"{path} holds other objects, or is damaged",
            "torch.save a tensor, or a dict of them",
        ) from None
    except Exception as error:  # noqa: BLE001 (a broken file can make a parser fail in any way)
        raise Cause(rule, f"{path}: {explain(error)}", ".npy, .pt or .png") from None
    return read_map(path)


def _tensor(value: Any, name: str, path: Path) -> Tensor:
    """Return an ordinary tensor of numbers: float32 or float64, int64 or bool."""
    wrong = Cause(f"{name} must be a tensor of numbers", f"{path} holds {describe(value)}", "save it with torch.save")
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        # In the order of bytes and of the types that torch computes with.
        kind = {"f": np.float64 if value.dtype.itemsize > 4 else np.float32, "b": np.bool_}
        value = torch.from_numpy(value.astype(kind.get(value.dtype.kind, np.int64)))
    if not isinstance(value, Tensor) or value.is_nested or value.layout is not torch.strided:
        raise wrong
    if value.is_quantized or value.is_complex() or value.device.type == "meta":
        raise wrong
    return value if value.is_floating_point() or value.dtype == torch.bool else value.to(torch.int64)


def _without_batch(value: Tensor, rank: int, name: str, shape: str) -> Tensor:
    """Take the only image of a batch."""
    value = value[0] if value.ndim == rank + 1 and len(value) == 1 else value
    if value.ndim != rank:
        raise Cause(f"{name} must be {shape} of one image", f"got {describe(value)}", "save one image's")
    return value


def _masks(truth: Tensor, path: Path) -> Tensor:
    """Convert masks `[T, H, W]`, or a label map `[H, W]` with 0 for the background, to bool `[T, H, W]`."""
    if truth.is_floating_point() and not truth.isfinite().all():
        raise Cause("the truth must be finite", f"{path} holds nan or infinite values", "they make the loss NaN")
    if truth.ndim == 2 and not truth.is_floating_point():
        ids = truth.unique()
        found: Tensor = truth == ids[ids != 0][:, None, None]
        return found
    if truth.ndim != 3:
        raise Cause(
            "the truth must be masks [T, H, W] or a label map [H, W]", f"{path} holds {describe(truth)}", "see --target"
        )
    masks: Tensor = truth > 0.5 if truth.is_floating_point() else truth != 0
    return masks


def _annotated(folder: Path, image: str) -> tuple[Tensor, Tensor, list[str], Lettering, Tensor | None, Tensor]:
    """Read masks, labels, names, their letters, ignore region and picture of an image, as training reads them."""
    data = recognize(folder, DataOptions(), Problems(), score=ALL)
    files = data.held_out.files
    found = [number for number, file in enumerate(files) if f"/{Path(file).as_posix()}".endswith(f"/{image}")]
    if len(found) != 1:
        told = f"{folder} has {len(found) or 'no annotated'} images of the name {image}"
        raise Cause("--image must name an annotated image", told, "name it with its folder, as a/b.png")
    entry = data.held_out[found[0]]
    loaded = load(entry)
    view = View.whole(entry.height, entry.width)
    packed, ignored = loaded.pack(view, view.size), loaded.ignored()
    letters = Lettering(data.class_names, data.category_ids)
    return (
        packed.masks.dense(),
        packed.labels,
        [letters.names[label] for label in packed.labels.tolist()],
        letters,
        None if ignored is None else torch.from_numpy(ignored),
        in_color(_pixels(to_unit(loaded.image, percentile=data.microscopy))),
    )


def _pixels(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def _numbered(names: Sequence[str]) -> list[str]:
    """Number instances of one name: "3", "3 (2)"."""
    seen: dict[str, int] = {}
    numbered = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        numbered.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return numbered
