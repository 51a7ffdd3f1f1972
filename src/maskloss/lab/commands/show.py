"""`maskloss show`: one picture of what the loss does with one instance."""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from maskloss._numbers import check_integer
from maskloss.criterion import MaskCriterion
from maskloss.errors import Cause, reported, require
from maskloss.lab.files import check_writable, write_whole
from maskloss.lab.results.subjects import Subject, from_digits, from_prediction, from_run
from maskloss.lab.terminal import say, tell
from maskloss.plots import Costs, Inspection, inspect_points, instance_figure
from maskloss.step import Step
from maskloss.targets import MaskTargets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LESS_MEMORY = "take a smaller --num-points"
DESCRIPTION = (
    "Draw what the loss looks at in one instance: candidates, chosen and uniform points, the loss at each of them, how "
    "they were chosen, the terms, and the matching. The instance comes from a training run and one of its held-out "
    "scenes, from a prediction file and its truth, or, without arguments, from a scene of handwritten digits."
)
ENDINGS = (".png", ".svg", ".pdf")
# Fewer pixels per inch cannot be read; more would take gigabytes.
DPI = (10, 1200)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `maskloss show`."""
    parser.description = DESCRIPTION
    parser.add_argument("run_folder", nargs="?", type=Path, metavar="RUN", help="folder of a run of maskloss train")
    # fmt: off
    parser.add_argument("--image", metavar="WHICH",
        help="with RUN: number or name of a held-out scene; with --data: a file name; else a file")
    parser.add_argument(
        "--prediction", type=Path, metavar="FILE", help=".npy or .pt with mask logits [Q, h, w], or a dict of tensors"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="folder of data, as maskloss train reads it: the truth"
    )
    parser.add_argument(
        "--target", type=Path, metavar="FILE", help="the truth: .npy, .pt or an image, masks [T, H, W] or a label map"
    )
    parser.add_argument("--instance", type=int, metavar="N", help="which target, from 0; default: the largest")
    parser.add_argument("--num-points", type=int, metavar="N",
        help="points per instance; default: those of the run, else 12544; digits: 2048")
    # fmt: on
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the points; default: 0")
    parser.add_argument(
        "--out", type=Path, default=Path("show.png"), metavar="FILE", help=".png, .svg or .pdf; default: show.png"
    )
    parser.add_argument("--dpi", type=int, default=130, metavar="N", help="pixels per inch; default: 130")


def main(options: argparse.Namespace) -> int:
    """Draw the picture, write it, and print what is on it."""
    if options.out.suffix.lower() not in ENDINGS:
        raise Cause(f"--out must end in {', '.join(ENDINGS)}", f"got {options.out.name}", "--out show.svg")
    check_integer("--dpi", options.dpi, *DPI, hint="130 is usual")
    check_integer("--seed", options.seed, 0, 2**63 - 1, hint="take another")
    check_writable(options.out, "--out")
    subject = gather(options)
    if subject.letters.note:
        say(subject.letters.note)
    with subject.letters.used():
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
    """Match, inspect one instance, and draw it; the last result names it."""
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
