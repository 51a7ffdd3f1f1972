"""The training run: from a configuration to a folder with a trained model, its scores and its report."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import re
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

from maskloss.errors import Cause, require
from maskloss.lab import files
from maskloss.lab.config import TrainConfig
from maskloss.lab.data.folder import FolderScenes
from maskloss.lab.data.problems import by_kind
from maskloss.lab.data.scenes import PATIENCE, LostReader, Scene, Source
from maskloss.lab.data.survey import LOOKED_AT, survey
from maskloss.lab.loop.claim import claimed, reopened
from maskloss.lab.loop.engine import Engine, speed
from maskloss.lab.loop.loggers import check_loggers, logging_for
from maskloss.lab.loop.progress import Begin, Interrupted, Listener
from maskloss.lab.models.learners import Learner, count_weights
from maskloss.lab.models.registry import Prepared, kind_of, prepare, weights_path
from maskloss.lab.models.weights import save_tensors
from maskloss.lab.results import report
from maskloss.lab.results.evaluate import Evaluation
from maskloss.lab.results.gallery import Gallery
from maskloss.lab.results.inference import Prediction
from maskloss.lab.results.snapshots import hardest, read_snapshots
from maskloss.lab.runfolder import (
    HELD_OUT,
    MODEL,
    REPORT,
    SNAPSHOTS,
    SUMMARY,
    Facts,
    read_facts,
    read_lines,
    since_best,
    steps_of,
)

# What gloo and NCCL say when they lose a process.
_LOST_RANK = r"gloo|NCCL|Application timeout|[Cc]onnection (closed|reset|refused)"
# Instances with a high loss that the report shows.
HARDEST = 6
# Options that a run may be given anew when it is resumed.
CHANGEABLE = ("device", "steps", "epochs", "patience")


class Result(NamedTuple):
    """What a run leaves behind."""

    folder: Path
    files: list[Path]
    evaluation: Evaluation
    kept: str
    seconds: float


def train(config: TrainConfig, folder: Path | None, listener: Listener, *, overwrite: bool = False) -> Result:
    """Train, evaluate, and write everything into a new folder.

    On one machine, the same configuration writes the same metrics and the same weights, bit for bit.

    Args:
        config: what to do.
        folder: where to write; must not exist, or be empty; None: `runs/<time>`.
        listener: whom to tell.
        overwrite: replace a run that is in the folder; it is removed when the new one has a checkpoint.

    Raises:
        MaskLossError: a folder in use, scenes that cannot be read, or a loss that is not finite.
        Interrupted: a signal ended it; there is a checkpoint.
        MissingExtraError: a package of the extra `train` is not installed.
    """
    check_loggers(config.log)
    with _accelerator(config) as accelerator, contextlib.ExitStack() as held:
        main = accelerator.is_main_process
        claim = held.enter_context(claimed(folder, overwrite=overwrite)) if main else None
        if folder is None:
            # By one clock: other processes may read theirs a second later.
            with _explained(None, config.num_steps):
                folder = _told_by_first(claim.folder if claim else None, accelerator)
        prepared = prepare(config, accelerator.num_processes)
        if claim:
            claim.make_room()
            prepared.facts.write(folder)
            prepared.learner.save_description(folder / MODEL)
            _write_held_out(folder, prepared.source)
        with _explained(folder, config.num_steps):
            return _run(prepared, folder, listener, accelerator, None)


def resume(folder: Path, listener: Listener, **changes: Any) -> Result:
    """Go on with a run: with an interrupted one to the weights that it would have reached undisturbed.

    With other `steps` or `epochs`, a run goes on to these, a finished one too. The learning rate of each step is that
    of a run with as many steps from the beginning, so after the end of the first schedule it rises again.

    Args:
        folder: of the run.
        listener: whom to tell.
        changes: what is not as it was before: options of `CHANGEABLE`.

    Raises:
        MaskLossError: no run, one that is finished or in use, or a checkpoint that is damaged.
    """
    facts = read_facts(folder)
    longer = bool({"steps", "epochs"} & set(changes))
    finished = (folder / SUMMARY).is_file()
    if finished and not longer:
        raise Cause(
            "only a run that was interrupted can be resumed",
            f"{folder} is finished",
            f"open {folder / REPORT}, or go on past its end with --steps",
        )
    steps = steps_of(folder)
    if finished and not steps:
        raise Cause(
            "a run must have a checkpoint to go on from",
            f"{folder} has none left",
            f"begin another one with its weights: --model {folder}",
        )
    begun = steps[-1] if steps else 0
    # Steps that stand in run.json, and epochs that were asked for, would exclude each other.
    given: dict[str, Any] = ({"steps": None} if longer else {}) | changes
    config = dataclasses.replace(facts.config, **given)
    stalled = since_best(read_lines(folder))
    if longer and 0 < config.patience <= stalled:
        told = f"there have been {stalled} evaluations without a higher AP, and --patience is {config.patience}"
        raise Cause("a run must have patience left to go on", told, "add a larger --patience, or 0")
    check_loggers(config.log)
    with _accelerator(config, folder) as accelerator:
        if accelerator.num_processes != facts.ranks:
            raise Cause(
                "resume with the same number of processes",
                f"{folder} had {facts.ranks}, there are {accelerator.num_processes}",
                "which images a process takes depends on it",
            )
        with reopened(folder) if accelerator.is_main_process else contextlib.nullcontext():
            prepared = prepare(config, facts.ranks, folder)
            if prepared.facts.classes != facts.classes:
                raise Cause("the data must have the classes of the run", f"{config.data} has others", "see run.json")
            wanted = prepared.facts.config.num_steps
            if longer and (wanted < begun or (finished and wanted == begun)):
                raise Cause("a run must have steps left to go on", f"{begun:,} are taken of {wanted:,}", "take more")
            if accelerator.is_main_process and set(changes) - {"device"}:
                _reopen(folder, facts._replace(config=prepared.facts.config))
            with _explained(folder, wanted):
                return _run(prepared, folder, listener, accelerator, begun)


def _reopen(folder: Path, facts: Facts) -> None:
    """Let a run have other options. It stops being a finished one first, so that it can be resumed at any instant."""
    for path in (folder / SUMMARY, folder / REPORT, weights_path(folder, facts.config)):
        path.unlink(missing_ok=True)
    facts.write(folder)


def _run(prepared: Prepared, folder: Path, listener: Listener, accelerator: Any, begin: int | None) -> Result:
    """Train from where the run is, and write what a finished run has. The first process tells, and logs."""
    if not accelerator.is_main_process:
        return _finish(prepared, folder, Listener.silent(), accelerator, begin)
    with logging_for(prepared.facts, listener) as both:
        return _finish(prepared, folder, both, accelerator, begin)


def _finish(prepared: Prepared, folder: Path, listener: Listener, accelerator: Any, begin: int | None) -> Result:
    started = time.perf_counter()
    facts, source, learner, told = prepared
    told = [*source.facts, *told]
    main = accelerator.is_main_process
    if main and isinstance(source, FolderScenes):
        survey(source, LOOKED_AT)
    about = [("model", learner.describe()), ("run", _describe(facts, source.num_training))]
    listener.facts([*told, *by_kind(source.findings), *about])
    listener.begin(Begin(folder, begin or 0, facts.config.num_steps))
    with _threads(facts.config.threads), torch.random.fork_rng(devices=[]):
        engine = Engine(facts, source, learner, folder, accelerator, listener)
        history = engine.fit(begin)
        kept = engine.settle()
        listener.note("Looking at all held-out images")
        gallery, images = Gallery(), len(source.held_out)

        def keep(number: int, scene: Scene, prediction: Prediction) -> None:
            gallery.keep(number, scene, prediction)
            listener.looked((number + 1, images))

        evaluation = engine.evaluate(keep)
        assert evaluation is not None
    if main:
        _save_model(folder, facts.config, learner)
        listener.note("Drawing the report")
        shots, probe, left_out = read_snapshots(folder / SNAPSHOTS, source, engine.step)
        left_out += engine.metrics.ruined
        for text in left_out:
            listener.skipped(text)
        summary = {
            "evaluation": evaluation.as_dict(whole=True),
            "steps": engine.step,
            "kept_step": kept.step,
            "kept": kept.told,
            "weights": count_weights(learner),
            "model": learner.describe(),
            "data": dict(told),
            "findings": [{"kind": each.kind, "text": str(each)} for each in source.findings],
            "skipped": [*engine.skipped, *left_out],
            "training_seconds": round(engine.seconds, 1),
            "images_per_second": round(speed(engine.step * facts.config.batch_size, engine.seconds), 1),
            "time_shares": {name: round(value, 4) for name, value in learner.clock.shares().items()},
            "machine": _machine(facts, accelerator),
        }
        made_of = report.Material(
            facts,
            source.title,
            summary,
            evaluation,
            history,
            gallery.shown,
            shots,
            probe,
            hardest(learner, source, kept.step, HARDEST),
        )
        written = report.write(folder, made_of)
        # Last: with it the run is finished.
        files.write_json(folder / SUMMARY, summary)
    accelerator.wait_for_everyone()
    paths = [*written, weights_path(folder, facts.config), folder / SUMMARY] if main else []
    return Result(folder, paths, evaluation, kept.told, time.perf_counter() - started)


def _write_held_out(folder: Path, source: Source) -> None:
    """Write the names of the held-out images, one in each line, as --val takes them."""
    if isinstance(source, FolderScenes):
        names = "".join(f"{name}\n" for name in source.held_out_files)
        files.write_text(folder / HELD_OUT, names)


def _save_model(folder: Path, config: TrainConfig, learner: Learner) -> None:
    path = weights_path(folder, config)
    path.parent.mkdir(exist_ok=True)
    save_tensors(path, learner.network.state_dict())


@contextlib.contextmanager
def _accelerator(config: TrainConfig, folder: Path | None = None) -> Iterator[Any]:
    """Set up devices and processes, and take them down again.

    Accelerate does it: torchrun and its own launcher, gloo and NCCL, mixed precision and loss scaling on every kind of
    device, in a few megabytes of plain Python that Transformers' Trainer rests on too.
    """
    accelerate = require("accelerate", "train")
    state = require("accelerate.state", "train")
    device = config.torch_device
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    handlers = [
        accelerate.DistributedDataParallelKwargs(find_unused_parameters=kind_of(config, folder).has_unused_weights),
        accelerate.InitProcessGroupKwargs(timeout=timedelta(seconds=PATIENCE)),
    ]
    accelerator = accelerate.Accelerator(
        cpu=device.type == "cpu", mixed_precision=config.precision, kwargs_handlers=handlers
    )
    try:
        yield accelerator
        accelerator.end_training()
    finally:
        # Another run of this process may have other settings.
        state.AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def _explained(folder: Path | None, steps: int) -> Iterator[None]:
    """Say in one sentence what ended a run, and how it goes on from its last checkpoint, if it has one."""
    try:
        yield
    except KeyboardInterrupt:
        if folder is None or not steps_of(folder):
            raise
        raise Interrupted(folder, steps_of(folder)[-1], steps, signal.SIGINT) from None
    except OSError as error:
        if folder is None or not steps_of(folder):
            raise
        where = f": {error.filename}" if error.filename else ""
        raise Cause(
            "a run must be able to read and write its files",
            f"{files.explain(error)}{where}",
            f"nothing is lost, go on with: maskloss train --resume {folder}",
        ) from None
    except RuntimeError as error:
        what = _lost(error)
        if what is None:
            raise
        going_on = folder is not None and steps_of(folder)
        hint = f"go on with: maskloss train --resume {folder}" if going_on else "no checkpoint yet: begin again"
        raise Cause("a run must keep all of its processes", what, hint) from None


def _lost(error: RuntimeError) -> str | None:
    """Say which process a run has lost; None: it has lost none."""
    text = str(error)
    if isinstance(error, LostReader):
        return text
    # Raised wherever the main process is, when it is told of the death of a child.
    if "DataLoader worker" in text:
        return f"one that reads images has ended: {files.explain(error)}"
    if isinstance(error, getattr(torch.distributed, "DistError", ())) or re.search(_LOST_RANK, text):
        late = "imed out" in text or "timeout" in text
        return f"one has not answered for {PATIENCE} seconds" if late else "another one has ended"
    return None


def _told_by_first(path: Path | None, accelerator: Any) -> Path:
    """Return the first process's path in all of them."""
    told = [path]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(told, src=0, device=accelerator.device)
    assert told[0] is not None
    return told[0]


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _describe(facts: Facts, images: int | None) -> str:
    config = facts.config
    parts = [f"{config.num_steps:,} steps of {config.batch_size} images"]
    if images:
        parts[0] += f" ({config.num_steps * config.batch_size / images:.3g} epochs)"
    if config.accumulate > 1:
        parts.append(f"{config.accumulate} micro-batches")
    if facts.ranks > 1:
        parts.append(f"{facts.ranks} processes")
    if config.precision != "no":
        parts.append(config.precision)
    return ", ".join([*parts, f"learning rate {config.lr:g}", f"seed {config.seed}"])


def _machine(facts: Facts, accelerator: Any) -> dict[str, Any]:
    cuda = accelerator.device.type == "cuda"
    return {
        "processor": torch.cuda.get_device_name() if cuda else platform.machine(),
        "processes": facts.ranks,
        "threads": facts.config.threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
