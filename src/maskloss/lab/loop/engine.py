"""The loop: steps, checkpoints, evaluations on the way, and signals."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskloss.distributed import step_totals
from maskloss.errors import Cause
from maskloss.lab import files
from maskloss.lab.config import BEST, TrainConfig
from maskloss.lab.data.problems import Problems
from maskloss.lab.data.scenes import Batch, Scene, Sharing, Source, batches, hashed
from maskloss.lab.loop import checkpoint
from maskloss.lab.loop.average import Average
from maskloss.lab.loop.checkpoint import Position
from maskloss.lab.loop.claim import drop_replaced
from maskloss.lab.loop.metrics import Metrics
from maskloss.lab.loop.progress import Interrupted, Listener, Progress
from maskloss.lab.loop.signals import Signals
from maskloss.lab.models.learners import Learner
from maskloss.lab.results.evaluate import Evaluation, Judged, evaluate
from maskloss.lab.results.inference import MOST, Prediction, Predictor
from maskloss.lab.results.snapshots import take, write_snapshot
from maskloss.lab.runfolder import SNAPSHOTS, Facts, best_of, scores_of, since_best, steps_of

# Steps that one line of metrics averages, and scenes that an evaluation during training looks at.
LOG_EVERY, GLANCE = 10, 100
# One step in ten is measured in its parts: to measure, a GPU has to be waited for.
MEASURE_EVERY = 10
# Snapshots of the points, as shares of the run.
SNAPSHOT_AT = (0.02, 0.1, 0.3, 1.0)


class Kept(NamedTuple):
    """Which weights a run keeps."""

    step: int  # that they are from
    told: str  # the same in a few words, with what ended the run


class Engine:
    """A run in progress."""

    def __init__(
        self, facts: Facts, source: Source, learner: Learner, folder: Path, accelerator: Any, listener: Listener
    ) -> None:
        self.facts, self.source, self.folder = facts, source, folder
        self.accelerator, self.listener = accelerator, listener
        self.config: TrainConfig = facts.config
        self.steps, self.step = facts.config.num_steps, 0
        parts = self.config.evaluations
        self._evaluate_at = {round(self.steps * part / parts) for part in range(parts + 1)}
        self._snapshot_at = {max(1, round(self.steps * portion)) for portion in SNAPSHOT_AT}
        self.learner = learner.to(accelerator.device)
        groups = learner.groups(self.config)
        self.shares = [group.pop("share", 1.0) for group in groups]
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.lr or 0.0, betas=(0.9, 0.99))
        self.average = Average(learner.network, self.config.ema_decay) if self.config.ema else None
        self.model: nn.Module = accelerator.prepare_model(learner)
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.main = bool(accelerator.is_main_process)
        self.plan = Sharing(self.config.batch_size, self.config.accumulate, self.rank, self.ranks)
        self.predictor = Predictor(
            learner, self.config.size or 0, facts.tile, self.config.crop is not None, max(MOST, learner.num_queries)
        )
        self.seconds = 0.0
        self.skipped: list[str] = []
        self._pending: list[Tensor] = []
        self._terms: list[str] = []
        self._signals = Signals()

    # ------------------------------------------------------------ the loop

    def fit(self, begin: int | None) -> list[dict[str, Any]]:
        """Take the steps that are left.

        Args:
            begin: the step of the checkpoint to go on from, 0 without one; None: this is a new run.
        """
        config, begun = self.config, begin or 0
        # What a model draws for itself, dropout above all; other on every process.
        torch.manual_seed(hashed(config.seed, self.rank, 2))
        if begun:
            self._restore(begun)
        self.metrics = Metrics(self.folder, None if begin is None else begun, self.main)
        self.model.train()
        self.accelerator.wait_for_everyone()
        self.step = begun
        with self._signals.heeded(self.listener.note), contextlib.ExitStack() as opened:
            self._look_back(begun)
            if begun:
                self._end_if_asked(begun, self._asked_to_stop())
            left = range(begun + 1, begun + 1 if self._has_stalled() else self.steps + 1)
            loaded = batches(self.source, self.plan, config.seed, left, config.num_workers, self._pins)
            opened.enter_context(contextlib.closing(loaded))  # type: ignore[type-var]
            since, self._reported = time.perf_counter(), time.perf_counter()
            for step in left:
                self.learner.clock.running = step % MEASURE_EVERY == 0
                with self.learner.clock.part("data"):
                    micro = next(loaded)
                self._pending.append(self._step(step, micro))
                if self.average is not None:
                    self.average.update(step)
                self.seconds += time.perf_counter() - since
                if step % LOG_EVERY == 0 or step == self.steps:
                    self._log(step)
                stopped = self._asked_to_stop()
                best = self._look_back(step)
                stopped = stopped or self._asked_to_stop()
                stalled = step in self._evaluate_at and self._has_stalled()
                if stopped or stalled or best or step % config.checkpoint_every == 0 or step == self.steps:
                    self._save(step)
                self.step = step
                if stalled:
                    break
                self._end_if_asked(step, stopped)
                since = time.perf_counter()
            if self.main and self.step < self.steps:
                self._snapshot(self.step)
        return self.metrics.lines

    def _step(self, step: int, micro: list[Batch]) -> Tensor:
        """Take one step, counted from 1, and return the loss and its terms on the device."""
        config, clock = self.config, self.learner.clock
        rate = (config.lr or 0.0) * schedule(step / self.steps, config.schedule, config.warmup)
        for group, portion in zip(self.optimizer.param_groups, self.shares, strict=True):
            group["lr"] = rate * portion
        for text in (each for batch in micro for each in batch.skipped):
            if text not in self.skipped:
                self.skipped.append(text)
                self.listener.skipped(text)
        counts, weights = [batch.masks.num_targets for batch in micro], self.learner.class_weights
        totals = step_totals(
            counts,
            self.learner.num_queries,
            labels=[each.labels.split(list(each.masks.num_targets)) for each in micro] if weights else None,
            class_weights=weights,
            device=self.accelerator.device,
        )
        self.optimizer.zero_grad()
        summed: dict[str, Tensor] = {}
        for number, batch in enumerate(micro):
            last = number == len(micro) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                moved = batch.to(self.accelerator.device)
                losses = self.model(moved, totals, (config.seed << 32) + step)
                with clock.backward():
                    # Not the accelerator's own backward, which would divide by the micro-batches: the totals do that.
                    scaler = self.accelerator.scaler
                    (losses.total if scaler is None else scaler.scale(losses.total)).backward()
            for name, value in {"total": losses.total.detach(), **losses.terms}.items():
                summed[name] = summed[name] + value if name in summed else value
        with clock.part("optimizer"):
            self._update()
        self._terms = list(summed)
        return torch.stack([value.float() for value in summed.values()])

    def _update(self) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.learner.network.parameters(), self.config.clip)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()

    @property
    def _pins(self) -> bool:
        return bool(self.accelerator.device.type == "cuda")

    # ------------------------------------------------------------ what happens on the way

    def _log(self, step: int) -> None:
        mean = torch.stack(self._pending).mean(0)
        if self.ranks > 1:
            mean = self.accelerator.reduce(mean, reduction="mean")
        terms = dict(zip(self._terms, mean.tolist(), strict=True))
        if not math.isfinite(terms["total"]) and self.accelerator.scaler is None:
            raise Cause("the loss must stay finite", f"it is {terms['total']} at step {step:,}", "lower --lr")
        count, self._pending = len(self._pending), []
        self.metrics.add({"step": step, "lr": self.optimizer.param_groups[0]["lr"], **files.plain(terms)})
        now = time.perf_counter()
        self.listener.step(Progress(step, terms, speed(count * self.config.batch_size, now - self._reported)))
        self._reported = now

    def _look_back(self, step: int) -> bool:
        """Take a snapshot and glance at held-out scenes, where a step is due for them and has not had them.

        Returns:
            Whether the step is the best so far, and is to be kept for that.
        """
        if self.main and step in self._snapshot_at:
            self._snapshot(step)
        if step not in self._evaluate_at or self.metrics.has(step, "held_out"):
            return False
        scores = self.evaluate(most=GLANCE, stopped=lambda: bool(self._signals.number))
        if scores is not None:
            self.metrics.add({"step": step, "held_out": scores.as_dict()})
            if step:
                self.listener.evaluation((step, scores))
        self._reported = time.perf_counter()
        found = scores_of(self.metrics.lines)
        return scores is not None and self.config.keep == BEST and best_of(self.metrics.lines, [*found]) == step

    def _snapshot(self, step: int) -> None:
        with self._quick():
            write_snapshot(self.folder / SNAPSHOTS, take(self.learner, self.source, step))

    def _has_stalled(self) -> bool:
        """Whether the score has not risen for so long that training ends."""
        return 0 < self.config.patience <= since_best(self.metrics.lines)

    def evaluate(
        self,
        each: Callable[[int, Scene, Prediction], None] = lambda *_: None,
        most: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Evaluation | None:
        """Score the model on held-out scenes, all of them or the first ones; None if it was stopped."""
        scenes = self.source.held_out if most is None else self.source.held_out[:most]
        problems = Problems(self.config.on_error)
        with self._quick(), self._averaged():
            scores = evaluate(
                self.predictor,
                scenes,
                self.source.class_names,
                one_class_maps=self.source.one_class_maps,
                problems=problems,
                share=(self.rank, self.ranks),
                gather=self._gather,
                each=each,
                # All processes or none: the others would wait for one that has left.
                stopped=stopped if self.ranks == 1 else lambda: False,
            )
        self.skipped += [text for text in problems.skipped if text not in self.skipped]
        return scores

    def _gather(self, judged: list[Judged]) -> list[Judged]:
        if self.ranks == 1:
            return judged
        parts: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(parts, judged)
        return [one for part in parts for one in part]

    @contextlib.contextmanager
    def _quick(self) -> Iterator[None]:
        """Leave torch's generator as it is, and nothing to differentiate."""
        with torch.random.fork_rng(devices=[]), torch.no_grad(), self.accelerator.autocast():
            yield

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Let the model have the average for its weights, if there is one and it does not have it for good."""
        return contextlib.nullcontext() if self.average is None else self.average.shown()

    # ------------------------------------------------------------ checkpoints, signals

    def _save(self, step: int) -> None:
        scaler = self.accelerator.scaler
        if self.main:
            files.flush_file(self.metrics.path)  # a checkpoint must not survive a power cut without its metrics
        pending = torch.stack(self._pending).tolist() if self._pending else []
        position = Position(
            step=step,
            seconds=self.seconds,
            clock=dict(self.learner.clock.seconds),
            scaler={} if scaler is None else scaler.state_dict(),
            pending=pending,
            terms=self._terms,
            ranks=self.ranks,
        )
        checkpoint.write(
            self.folder,
            position,
            self.learner.network,
            self.optimizer,
            self.average,
            keep_best=self.config.keep == BEST,
            rank=self.rank,
            wait=self.accelerator.wait_for_everyone,
        )
        if self.main:
            drop_replaced(self.folder)

    def _restore(self, step: int) -> None:
        position = checkpoint.read(
            self.folder, step, self.learner.network, self.optimizer, self.average, rank=self.rank
        )
        self.seconds = position.seconds
        self.learner.clock.seconds.update(position.clock)
        if position.scaler:
            if self.accelerator.scaler is None:
                raise Cause("a run must be resumed with its precision", "this one scales its losses", "see run.json")
            self.accelerator.scaler.load_state_dict(position.scaler)
        # Single precision goes through JSON and back without loss, but for what JSON cannot hold.
        rows = [[math.nan if value is None else value for value in row] for row in position.pending]
        self._pending = list(torch.tensor(rows, device=self.accelerator.device).unbind())
        self._terms = position.terms

    def settle(self) -> Kept:
        """Leave the model with the weights that the run keeps."""
        self.accelerator.wait_for_everyone()
        lines, last = self.metrics.lines, self.step
        best = best_of(lines, steps_of(self.folder)) if self.config.keep == BEST else None
        average, self.average = self.average, None
        if best is not None and best != last:
            checkpoint.load_kept(self.folder, best, self.learner.network)
        elif average is not None:
            average.swap()
        what = "weights" if average is None else "averaged weights"
        told = f"the {what} of the last step" if best is None else f"the {what} of step {best:,}, the best of "
        if best is not None:
            told += f"{len(scores_of(lines))} evaluations"
        if last < self.steps:
            told += f"; ended at step {last:,} of {self.steps:,}, as no score has been higher since"
        return Kept(best or last, told)

    def _end_if_asked(self, step: int, asked: bool) -> None:
        """Raise if a signal asked to stop, unless nothing is left to do: the last step is taken, and scored."""
        if asked and (step < self.steps or not self.metrics.has(step, "held_out")):
            raise Interrupted(self.folder, step, self.steps, self._signals.number or signal.SIGTERM)

    def _asked_to_stop(self) -> bool:
        """Whether any process was asked to stop: all have to stop after the same step."""
        asked = bool(self._signals.number)
        if self.ranks == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)


def speed(images: int, seconds: float) -> float:
    """Return images a second; nan where a clock stands still."""
    return images / seconds if seconds > 0 else math.nan


def schedule(progress: float, kind: str = "cosine", warmup: float = 0.05) -> float:
    """Return the learning rate as a share of the highest one, when this share of the steps is taken, in (0, 1].

    In the first `warmup` of them it rises linearly; then "cosine" and "linear" fall to zero, and "constant" stays.
    """
    if progress < warmup:
        return progress / warmup
    gone = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    if kind == "linear":
        return 1 - gone
    return 1.0 if kind == "constant" else 0.5 * (1 + math.cos(math.pi * gone))
