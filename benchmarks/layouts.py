"""How quiet the layouts of points are: the numbers of docs/stratified.md.

    python benchmarks/layouts.py masks       blobs and predictions of them, 1024 x 1024 and 256 x 256
    python benchmarks/layouts.py digits      predictions and matching of a training run on digits, at three stages
    python benchmarks/layouts.py training    AP on digits after training with either layout

Every standard deviation is that of an instance's loss over draws of its points, with everything else fixed: the root
of the mean variance over the instances.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from maskloss import HungarianMatcher, MaskLoss, MaskTargets, PointSampling
from maskloss.distributed import step_totals
from maskloss.lab.bench.cases import Case
from maskloss.lab.bench.inputs import make_inputs
from maskloss.lab.config import TrainConfig
from maskloss.lab.data.scenes import Scene, Sharing, batches
from maskloss.lab.loop.engine import schedule
from maskloss.lab.loop.progress import Listener
from maskloss.lab.loop.run import train
from maskloss.lab.models.learners import Compact, CompactLearner, Output
from maskloss.lab.models.registry import open_source
from maskloss.step import Step

LAYOUTS = ("independent", "stratified")
MASKS = Case("masks", 1, 12, 12, 3, 5, (256, 256), (1024, 1024))
STAGES = (0.05, 0.3, 1.0)


class Spread(NamedTuple):
    """Means and standard deviations of both terms."""

    ce: float
    dice: float
    ce_spread: float
    dice_spread: float


def matched_pairs(case: Case, layer: int) -> tuple[Tensor, Tensor]:
    """Return predictions `[T, h, w]` of a layer and the targets `[T, H, W]` that they are matched with."""
    inputs = make_inputs(case, seed=0, dtype=torch.float32, device=torch.device("cpu"))
    targets = [{"masks": inputs.masks[0], "labels": inputs.labels[0]}]
    logits = inputs.mask_logits[layer].detach()
    matcher = HungarianMatcher(num_points=3136)
    [(queries, rows)] = matcher(inputs.class_logits[layer].detach(), logits, targets, seed=0).pairs()
    return logits[0, queries], inputs.masks[0][rows]


def spread(logits: Tensor, masks: Tensor | MaskTargets, sampling: PointSampling, draws: int) -> Spread:
    """Draw the points of pairs many times."""
    targets = masks if isinstance(masks, MaskTargets) else MaskTargets.from_masks(masks)
    loss = MaskLoss(sampling=sampling)
    drawn = [loss(logits, targets, seed=seed).per_instance for seed in range(draws)]
    ce, dice = (torch.stack([getattr(each, term) for each in drawn]).double() for term in ("ce", "dice"))
    return Spread(ce.mean().item(), dice.mean().item(), *(term.var(0).mean().sqrt().item() for term in (ce, dice)))


def show(label: str, found: Spread) -> None:
    print(
        f"{label:44} BCE {found.ce:.5f} ± {found.ce_spread:.2e}   Dice {found.dice:.5f} ± {found.dice_spread:.2e}",
        flush=True,
    )


def configurations(numbers: tuple[int, ...]) -> Iterator[PointSampling]:
    for alpha, count, layout in itertools.product((0.0, 0.75), numbers, LAYOUTS):
        yield PointSampling(count, importance_ratio=alpha, layout=layout)


def measure_masks(draws: int) -> None:
    logits, masks = matched_pairs(MASKS, layer=1)
    for sampling in configurations((3136, 12544)):
        label = f"alpha {sampling.importance_ratio:<4} P {sampling.num_points:5} {sampling.layout}"
        show(label, spread(logits, masks, sampling, draws))


# ------------------------------------------------------------------------------------------------------------- digits


class Run:
    """A training run of `maskloss train`, step by step, without what else such a run does."""

    def __init__(self, config: TrainConfig) -> None:
        source = open_source(config)
        self.config = Compact().resolve(config, source, 1)
        self.learner = CompactLearner(self.config, len(source.class_names), source.channels)
        self.optimizer = torch.optim.AdamW(self.learner.groups(self.config), lr=self.config.lr, betas=(0.9, 0.99))
        self.scenes = list(itertools.islice(source.held_out, 48))
        steps = range(1, config.steps + 1)
        self.batches = batches(source, Sharing(config.batch_size), config.seed, steps, 0, False)

    def step(self, number: int) -> None:
        [batch] = next(self.batches)
        share = schedule(number / self.config.steps, self.config.schedule, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = share * self.config.lr
        totals = step_totals([batch.masks.num_targets], self.learner.num_queries)
        self.optimizer.zero_grad()
        self.learner(batch, totals, number).total.backward()
        self.optimizer.step()

    @torch.no_grad()
    def output(self) -> Output:
        self.learner.eval()
        output = self.learner.predict(torch.stack([scene.image for scene in self.scenes]), torch.empty(0))
        self.learner.train()
        return output


class Assignment(NamedTuple):
    """The matching of a batch over many draws."""

    cost_spread: float
    changed: float


@torch.no_grad()
def matching(scenes: list[Scene], output: Output, matcher: HungarianMatcher, draws: int) -> Assignment:
    """Match held-out scenes again and again, with new points each time.

    Returns:
        The standard deviation of a pair's cost, and the share of targets that go with another query than in the draw
        before.
    """
    targets = MaskTargets.cat([scene.targets for scene in scenes])
    labels = torch.cat([scene.labels for scene in scenes])
    classes, masks = output.class_logits[None], [output.mask_logits]
    real = torch.arange(max(targets.num_targets)) < torch.tensor(targets.num_targets)[:, None]
    costs, owners = [], []
    for seed in range(draws):
        common = (classes, masks, Step(targets, labels, torch.arange(len(scenes)), torch.tensor(seed)))
        costs.append(matcher.costs(*common)[0].double())
        rows = matcher.match(*common).index
        owners.append(rows[(rows[:, 1] * 1000 + rows[:, 3]).argsort(), 2])
    variance = torch.stack(costs).var(0).transpose(1, 2)[real]
    chosen = torch.stack(owners)
    return Assignment(variance.mean().sqrt().item(), (chosen[1:] != chosen[:-1]).double().mean().item())


@torch.no_grad()
def stage(run: Run, step: int, draws: int) -> None:
    output = run.output()
    targets = [{"masks": scene.targets, "labels": scene.labels} for scene in run.scenes]
    rows = run.learner.criterion.matcher(output.class_logits, output.mask_logits, targets, seed=0).index
    logits = output.mask_logits[rows[:, 1], rows[:, 2]]
    truth = torch.stack([run.scenes[image].targets.dense()[target] for _, image, _, target in rows.tolist()])
    print(f"step {step}: {len(rows)} instances")
    for sampling in configurations((64, 128, 256)):
        label = f"alpha {sampling.importance_ratio:<4} P {sampling.num_points:5} {sampling.layout}"
        show(label, spread(logits, truth, sampling, draws))
    for count, layout in itertools.product((64, 128, 256), LAYOUTS):
        found = matching(run.scenes, output, HungarianMatcher(num_points=count, layout=layout), draws)
        print(
            f"matching P {count:4} {layout:12} cost ± {found.cost_spread:.3e}, {found.changed:.2%} change", flush=True
        )


def measure_digits(draws: int, steps: int) -> None:
    run = Run(TrainConfig(steps=steps))
    for step in range(1, steps + 1):
        run.step(step)
        if step in {max(1, round(steps * share)) for share in STAGES}:
            stage(run, step, draws)


def measure_training(seeds: int, steps: int, points: int) -> None:
    few = points // 4
    for seed in range(seeds):
        for count, layout in ((points, "independent"), (few, "independent"), (few, "stratified")):
            config = TrainConfig(steps=steps, seed=seed, num_points=count, layout=layout)
            with tempfile.TemporaryDirectory() as folder:
                found = train(config, Path(folder) / "run", Listener.silent()).evaluation
            print(f"seed {seed} P {count:4} {layout:12} AP {found.ap:.4f} AP50 {found.ap50:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("masks", "digits", "training"))
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--points", type=int, default=1024, help="of `training`; a quarter of them is measured too")
    options = parser.parse_args()
    if options.what == "masks":
        measure_masks(options.draws)
    elif options.what == "digits":
        measure_digits(options.draws, options.steps)
    else:
        measure_training(options.seeds, options.steps, options.points)


if __name__ == "__main__":
    main()
