"""What the loss looks at: the points of the instances of a held-out scene, at moments of the run and at its end."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from maskloss.criterion import MaskCriterion
from maskloss.distributed import StepTotals
from maskloss.errors import MaskLossError
from maskloss.functional import uncertain_points
from maskloss.lab.data.problems import sentence
from maskloss.lab.data.scenes import Probe, Source
from maskloss.lab.models.learners import Learner
from maskloss.lab.models.weights import read_tensors, save_tensors
from maskloss.points import PointSampling

SEED = 1  # of the points in pictures
# Scenes among which the one to follow is chosen, and scenes among whose instances the hardest are looked for.
FIRST, LOOKED_AT = 16, 64


class Snapshot(NamedTuple):
    """What the loss looked at in one scene, at one step."""

    step: int  # how many steps the model had taken
    scene: int  # which held-out scene
    logits: Tensor  # of the query matched with each target, float32 `[T, h, w]`
    points: Tensor  # which the loss chose on them, `[T, P, 2]`
    losses: Tensor  # of each target, `[T, 2]`: cross-entropy and Dice
    num_uncertain: int  # how many of the points are uncertain; they come first


class Hard(NamedTuple):
    """An instance with a high loss."""

    probe: Probe  # the scene that it is in
    target: int  # which instance of it
    loss: float  # cross-entropy and Dice, with Mask2Former's weights
    shot: Snapshot  # logits and points of the scene


def take(learner: Learner, source: Source, step: int) -> Snapshot:
    """Take a snapshot of the scene that a run follows."""
    number = telling(source)
    return look(learner, source.probe(number), number, step)


@torch.no_grad()
def look(learner: Learner, probe: Probe, number: int, step: int) -> Snapshot:
    """Let the criterion match one held-out scene, and draw the points of its loss again.

    Only the final layer of one image is given, whose points are those that `uncertain_points` draws from its seed.
    """
    device = next(learner.network.parameters()).device
    training = learner.training
    learner.eval()
    output = learner.predict(probe.image[None].to(device), torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device))
    learner.train(training)
    logits = output.mask_logits.float()
    sampling = PointSampling(learner.num_points, layout=learner.layout)
    kind = learner.classification
    classes = output.class_logits.shape[-1] - (kind == "softmax")
    criterion = MaskCriterion(classes, classification=kind, sampling=sampling)
    entry = {"masks": probe.masks.to(device), "labels": probe.labels.to(device)}
    # Only one process looks: with totals of its own the criterion does not ask the others for theirs.
    totals = StepTotals(float(len(probe.labels)), float(learner.num_queries))
    out = criterion(output.class_logits.float(), logits, [entry], totals=totals, image_ids=[0], seed=SEED)
    [(queries, targets)] = out.matches.pairs()
    queries, targets = queries.to(device), targets.to(device)
    count = len(probe.labels)
    matched = torch.zeros(count, *logits.shape[2:], device=device)
    matched[targets] = logits[0, queries]
    losses = torch.zeros(count, 2, device=device)
    losses[targets] = torch.stack([out.per_instance.ce, out.per_instance.dice], dim=-1).float()
    points = uncertain_points(matched, sampling=sampling, seed=out.seed) if count else matched.new_zeros(0, 0, 2)
    return Snapshot(step, number, matched.cpu(), points.cpu(), losses.cpu(), sampling.num_uncertain)


def telling(source: Source) -> int:
    """Choose the scene to follow: the most crowded one of the first few."""
    best, most = 0, -1
    for number in range(min(len(source.held_out), FIRST)):
        try:
            count = len(source.probe(number).labels)
        except MaskLossError:
            continue
        if count > most:
            best, most = number, count
    return best


def hardest(learner: Learner, source: Source, step: int, count: int) -> list[Hard]:
    """Find the instances with the highest loss among the first held-out scenes, at most two of a scene."""
    found: list[Hard] = []
    for number in range(min(len(source.held_out), LOOKED_AT)):
        try:
            probe = source.probe(number)
        except MaskLossError:
            continue
        if not len(probe.labels):
            continue
        shot = look(learner, probe, number, step)
        losses = 5 * shot.losses.sum(1)
        worst = losses.argsort(descending=True, stable=True)[:2].tolist()
        found += [Hard(probe, target, float(losses[target]), shot) for target in worst]
        found = sorted(found, key=lambda hard: -hard.loss)[:count]
    return found


def write_snapshot(folder: Path, shot: Snapshot) -> None:
    """Write a snapshot, for the report."""
    folder.mkdir(exist_ok=True)
    facts = torch.tensor([shot.step, shot.scene, shot.num_uncertain])
    tensors = {"logits": shot.logits.half(), "points": shot.points, "losses": shot.losses, "facts": facts}
    save_tensors(folder / f"step-{shot.step:08d}.safetensors", tensors)


def read_snapshots(folder: Path, source: Source, last: int) -> tuple[list[Snapshot], Probe | None, list[str]]:
    """Read the snapshots of a run, in order; they are for pictures only, so what is damaged is left out."""
    number = telling(source)
    try:
        probe = source.probe(number)
    except MaskLossError as error:
        return [], None, [f"pictures of the points: {sentence(error)}"]
    shots: list[Snapshot] = []
    left_out: list[str] = []
    for path in sorted(folder.glob("step-*.safetensors")):
        shot = _read(path)
        if shot is None or shot.scene != number or len(shot.logits) != len(probe.labels):
            left_out.append(f"{folder.name}/{path.name}: it is damaged, or shows other data")
        elif shot.step <= last:
            shots.append(shot)
    return shots, probe if shots else None, left_out


def _read(path: Path) -> Snapshot | None:
    """Read a snapshot; None for what `write_snapshot` did not write."""
    try:
        held = read_tensors(path)
    except MaskLossError:
        return None
    empty = torch.zeros(0)
    facts, logits, points, losses = (held.get(name, empty) for name in ("facts", "logits", "points", "losses"))
    if facts.dtype != torch.int64 or facts.shape != (3,) or logits.ndim != 3 or points.ndim != 3:
        return None
    step, scene, uncertain = facts.tolist()
    count = len(logits)
    fits = points.shape[::2] == (count, 2) and losses.shape == (count, 2) and 0 not in logits.shape[1:]
    finite = all(bool(each.isfinite().all()) for each in (logits, points, losses))
    # A scene without instances has no points.
    if not fits or not finite or uncertain < 0 or (count and uncertain > points.shape[1]):
        return None
    return Snapshot(step, scene, logits.float(), points.float(), losses.float(), uncertain)
