"""`maskloss show`: one picture of what the loss does with one instance."""

from __future__ import annotations

import argparse
import copy
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, one_hot

from maskloss._numbers import check_integer
from maskloss.criterion import MaskCriterion
from maskloss.errors import Cause, describe, reported, require
from maskloss.lab.data import recognize
from maskloss.lab.data.images import read_image, read_label_map, to_unit
from maskloss.lab.data.problems import Problems
from maskloss.lab.data.scenes import in_color
from maskloss.lab.data.truth import View, load
from maskloss.lab.files import check_file, check_writable, explain, write_whole
from maskloss.lab.terminal import tell
from maskloss.plots import Costs, Inspection, inspect_points, instance_figure
from maskloss.points import PointSampling
from maskloss.step import Step
from maskloss.targets import MaskTargets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LESS_MEMORY = "take a smaller --num-points"
DESCRIPTION = (
    "Draw what the loss looks at in one instance: candidates, chosen and uniform points, the loss at each of them, how "
    "they were chosen, the terms, and the matching. From a training run and one of its held-out scenes; from a "
    "prediction file and its truth; or, without arguments, from a scene of handwritten digits."
)
# Of the made-up prediction: few enough to tell them apart.
SHOWN_POINTS = 2048
ENDINGS = (".png", ".svg", ".pdf")
# What a prediction file may hold.
HELD = ("mask_logits", "class_logits", "masks", "labels", "ignore")
# Fewer pixels per inch cannot be read; more would take gigabytes.
DPI = (10, 1200)


@dataclass
class Subject:
    """What the picture is drawn from.

    Attributes:
        mask_logits: predictions of all queries, `[Q, h, w]`.
        masks: the truth, `[T, H, W]`, bool.
        criterion: which matches and compares them.
        class_logits: of all queries, `[Q, C + 1]`; None: matched by masks alone.
        labels: of the truth, int64 `[T]`.
        names: of the instances.
        image: `[3, h, w]` in [0, 1]; None: there is none.
        ignore: bool `[H, W]`, where points weigh nothing.
        window: left, top, width and height of the part in which points are drawn.
        heading: of the picture.
    """

    mask_logits: Tensor
    masks: Tensor
    criterion: MaskCriterion
    class_logits: Tensor | None = None
    labels: Tensor | None = None
    names: Sequence[str] = field(default_factory=tuple)
    image: Tensor | None = None
    ignore: Tensor | None = None
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    heading: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `maskloss show`."""
    parser.description = DESCRIPTION
    parser.add_argument("run_folder", nargs="?", type=Path, metavar="RUN", help="folder of a run of maskloss train")
    parser.add_argument(
        "--image",
        metavar="…",
        help="with RUN: number or name of a held-out scene; with --data: a file name; else a file",
    )
    parser.add_argument(
        "--prediction", type=Path, metavar="FILE", help=".npy or .pt with mask logits [Q, h, w], or a dict of tensors"
    )
    parser.add_argument("--data", type=Path, metavar="…", help="folder of data, as maskloss train reads it: the truth")
    parser.add_argument(
        "--target", type=Path, metavar="FILE", help="the truth: .npy, .pt or an image, masks [T, H, W] or a label map"
    )
    parser.add_argument("--instance", type=int, metavar="…", help="which target, from 0; default: the largest")
    parser.add_argument(
        "--num-points",
        type=int,
        metavar="…",
        help="points per instance; default: those of the run, else 12544; digits: 2048",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="…", help="of the points; default: 0")
    parser.add_argument(
        "--out", type=Path, default=Path("show.png"), metavar="FILE", help=".png, .svg or .pdf; default: show.png"
    )
    parser.add_argument("--dpi", type=int, default=130, metavar="…", help="pixels per inch; default: 130")


def main(options: argparse.Namespace) -> int:
    """Draw the picture, write it, and print what is on it."""
    if options.out.suffix.lower() not in ENDINGS:
        raise Cause(f"--out must end in {', '.join(ENDINGS)}", f"got {options.out.name}", "--out show.svg")
    check_integer("--dpi", options.dpi, *DPI, hint="130 is usual")
    check_integer("--seed", options.seed, 0, 2**63 - 1, hint="take another")
    check_writable(options.out, "--out")
    subject = gather(options)
    figure, found, text = draw(subject, options.instance, options.seed)
    write(figure, options.out, options.dpi)
    terms = f"cross-entropy {found.ce:.4f}, Dice {found.dice:.4f}, total {found.total:.4f}"
    tell(f"{text}: {terms}")
    tell(options.out)
    return 0


@reported("show")
def gather(options: argparse.Namespace) -> Subject:
    """Find out what is to be shown, and read it."""
    given = [name for name in ("run_folder", "prediction") if getattr(options, name) is not None]
    truth = [name for name in ("data", "target") if getattr(options, name) is not None]
    if len(given) == 2 or len(truth) == 2 or (truth and given != ["prediction"]):
        raise Cause(
            "show takes a run, or a prediction with its truth",
            f"given: {', '.join(given + truth)}",
            "RUN --image 3, or --prediction FILE with --target FILE or --data FOLDER --image NAME",
        )
    if options.run_folder is not None:
        subject = from_run(options.run_folder, options.image)
    elif options.prediction is not None:
        subject = from_prediction(options.prediction, options.target, options.data, options.image)
    elif options.image is not None:
        raise Cause("an image needs a prediction", "there is only --image", "add RUN, or --prediction and --target")
    else:
        subject = from_digits(options.seed)
    return replace(subject, criterion=_for_drawing(subject.criterion, options.num_points))


@torch.no_grad()
def draw(subject: Subject, instance: int | None, seed: int) -> tuple[Figure, Inspection, str]:
    """Match, inspect one instance, and draw it; the last result names it.

    Raises:
        MaskLossError: a prediction that is not finite, no target, an instance that does not exist, or one that was not
            matched.
    """
    criterion, count = subject.criterion, len(subject.masks)
    _check_finite(subject)
    if count == 0:
        raise Cause("there must be a target", "the truth is empty", "take another image")
    if instance is None:
        instance = int(subject.masks.flatten(1).sum(1).argmax())
    if not 0 <= instance < count:
        raise Cause(f"instance must be in 0 … {count - 1}", f"got {instance}", "they are numbered as in the truth")
    matrix, pairs = _match(subject, seed)
    queries, targets = pairs
    if instance not in targets.tolist():
        raise Cause("the instance must have a query", f"instance {instance} was not matched", "take another instance")
    # In the order of the targets, since the points of an instance depend on its number.
    logits = subject.mask_logits.float()
    matched = logits.new_zeros(count, *logits.shape[1:])
    matched[targets] = logits[queries]
    found = inspect_points(
        matched, subject.masks, loss=criterion.mask_loss, ignore=subject.ignore, window=subject.window, seed=seed
    )[instance]
    names = list(subject.names) or [f"target {number}" for number in range(count)]
    query = int(queries[targets.tolist().index(instance)])
    costs = Costs(matrix, pairs, names, instance)
    figure = instance_figure(found, image=subject.image, costs=costs, name=names[instance], heading=subject.heading)
    return figure, found, f"{names[instance]} (instance {instance}, query {query})"


def write(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure; the same figure gives the same bytes."""
    kind = path.suffix.lower()
    metadata = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[kind]
    with require("matplotlib", "plots").rc_context({"svg.hashsalt": "maskloss"}):
        write_whole(path, lambda to: figure.savefig(to, dpi=dpi, format=kind[1:], metadata=metadata))


def _match(subject: Subject, seed: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Compute the costs `[Q, T]` and the pairs of the one image."""
    matcher = copy.copy(subject.criterion.matcher)
    targets = _targets(subject)
    labels = subject.labels
    classes = subject.class_logits
    if classes is None or labels is None:
        classes, labels = torch.zeros(len(subject.mask_logits), 2), torch.zeros(len(subject.masks), dtype=torch.int64)
        matcher.class_weight = 0.0
    layer, logits = classes.float()[None], subject.mask_logits.float()[None]
    matches = matcher(layer, logits, [{"masks": targets, "labels": labels}], seed=seed, image_ids=[0])
    step = Step(targets, labels, torch.zeros(1, dtype=torch.int64), torch.tensor(seed))
    costs = matcher.costs(layer[None], [logits], step)
    [pairs] = matches.pairs()
    return costs[0, 0, :, : len(labels)], pairs


def _targets(subject: Subject) -> MaskTargets:
    height, width = subject.masks.shape[1:]
    left, top, wide, high = subject.window
    valid = (round(top * height), round(left * width), round(high * height), round(wide * width))
    return MaskTargets.from_masks(subject.masks, ignore=subject.ignore, valid=valid)


def _for_drawing(criterion: MaskCriterion, num_points: int | None) -> MaskCriterion:
    """Copy a criterion, which may be that of a model, to one without kernels and with as many points as wanted.

    Kernels would have to be compiled for a single picture.
    """
    copied = copy.deepcopy(criterion)
    for part in (copied.mask_loss, copied.matcher):
        part.options = replace(part.options, backend="reference")
    if num_points is not None:
        copied.mask_loss.sampling = replace(copied.mask_loss.sampling, num_points=num_points)
        copied.matcher.num_points = num_points
    return copied


def _check_finite(subject: Subject) -> None:
    """Raise if there is nothing to draw because the loss is NaN; say where that comes from."""
    named = {"mask_logits": subject.mask_logits, "class_logits": subject.class_logits}
    for name, logits in named.items():
        if logits is None or logits.isfinite().all():
            continue
        bad = (~logits.isfinite()).flatten(1)
        queries = bad.any(1).nonzero().flatten().tolist()
        first = logits[queries[0]].flatten()
        values = first[bad[queries[0]]]
        raise Cause(
            f"{name} must be finite: the loss of anything else is NaN",
            f"{len(queries)} of {len(logits)} queries hold other values; query {queries[0]} has {float(values[0])} in "
            f"{len(values):,} of {len(first):,} places",
            'the picture would be empty; "The loss is NaN" in the troubleshooting page lists where such values come '
            "from",
        )


# ------------------------------------------------------------------------------------------------------------- sources


@torch.no_grad()
def from_run(folder: Path, image: str | None) -> Subject:
    """Let the model of a training run predict one of its held-out scenes; default: the most crowded of the first."""
    from maskloss.lab.loop.run import criterion_of, load_learner, open_source
    from maskloss.lab.loop.runfolder import read_facts
    from maskloss.lab.results import snapshots

    facts = read_facts(folder)
    source = open_source(facts.config)
    names = [each.name for each in source.held_out]
    number = snapshots.telling(source) if image is None else _scene_number(image, names)
    learner = load_learner(folder, facts, torch.device("cpu")).eval()
    probe = source.probe(number)
    output = learner.predict(probe.image[None], torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    return Subject(
        mask_logits=output.mask_logits[0].detach(),
        masks=probe.masks.dense(),
        criterion=criterion_of(learner, len(facts.classes)),
        class_logits=output.class_logits[0].detach(),
        labels=probe.labels,
        names=_numbered([facts.classes[label] for label in probe.labels.tolist()]),
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
    picture = None
    if data is not None:
        if image is None:
            raise Cause("--data needs --image", "there is no --image", "name an image of the folder")
        masks, labels, names, ignore, picture = _annotated(data, image)
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
    return read_label_map(path)


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


def _annotated(folder: Path, image: str) -> tuple[Tensor, Tensor, list[str], Tensor | None, Tensor]:
    """Read masks, labels, names, the ignore region and the picture of an image, as training reads them."""
    kind, *parts = recognize.find(folder, None, Problems())
    found = [
        (categories, entry)
        for categories, entries, _ in filter(None, parts)
        for entry in entries
        if f"/{Path(entry.file).as_posix()}".endswith(f"/{image}")
    ]
    if len(found) != 1:
        told = f"{folder} has {len(found) or 'no annotated'} images of the name {image}"
        raise Cause("--image must name an annotated image", told, "name it with its folder, as a/b.png")
    [(categories, entry)] = found
    loaded = load(entry)
    view = View.whole(entry.height, entry.width)
    packed, ignored = loaded.pack(view, view.size), loaded.ignored()
    names = list(categories.values())
    return (
        packed.masks.dense(),
        packed.labels,
        [names[label] for label in packed.labels.tolist()],
        None if ignored is None else torch.from_numpy(ignored),
        in_color(_pixels(to_unit(loaded.image, percentile=kind == "labels"))),
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
