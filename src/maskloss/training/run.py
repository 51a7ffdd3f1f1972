"""The training run: from a configuration to a folder with a trained model, its scores and its pictures."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskloss.criterion import MaskCriterion
from maskloss.errors import Cause, reported, require
from maskloss.matcher import HungarianMatcher
from maskloss.points import PointSampling
from maskloss.training import pictures, report
from maskloss.training.config import TrainConfig
from maskloss.training.data import SceneSource
from maskloss.training.digits import DigitScenes
from maskloss.training.evaluate import Evaluation, Prediction, evaluate, predict
from maskloss.training.folder import FolderScenes
from maskloss.training.model import QueryNet

CONFIG, METRICS, SUMMARY, CHECKPOINT = "config.json", "metrics.jsonl", "summary.json", "model.safetensors"
# Share of the steps in which the learning rate rises.
WARM_UP = 0.05
# Steps that one line of metrics averages, and scenes that an evaluation during training looks at.
LOG_EVERY, GLANCE = 10, 100
# Snapshots of the points, as shares of the run.
SNAPSHOTS = (0.02, 0.1, 0.3, 1.0)


class Progress(NamedTuple):
    """What a step reports: its number from 1, its loss terms, and scenes a second since the last report."""

    step: int
    terms: dict[str, float]
    speed: float


class Listener(NamedTuple):
    """Whom a run tells what happens; each is called with one argument."""

    step: Callable[[Progress], None]
    evaluation: Callable[[tuple[int, Evaluation]], None]
    note: Callable[[str], None]


class Result(NamedTuple):
    """What a run leaves behind."""

    folder: Path
    files: list[Path]
    evaluation: Evaluation
    seconds: float


def open_source(config: TrainConfig) -> SceneSource:
    """Open the scenes that a configuration names."""
    if config.data is None:
        return DigitScenes(config.size, config.held_out)
    return FolderScenes(config.data, config.size)


@reported("train")
def train(config: TrainConfig, folder: Path, listener: Listener) -> Result:
    """Train, evaluate, and write everything into a new folder.

    On one machine, the same configuration writes the same metrics and the same checkpoint, bit for bit.

    Args:
        config: what to do.
        folder: where to write; must not exist, or be empty.
        listener: whom to tell.

    Raises:
        MaskLossError: a folder in use, scenes that cannot be read, or a loss that is not finite.
        MissingExtraError: a package of the extra `train` is not installed.
    """
    started = time.perf_counter()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Cause("out must be a new or an empty folder", f"{folder} is in use", "name another one with --out")
    with _threads(config.threads):
        source = open_source(config)
        session = Session(config, source)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / CONFIG, config.as_dict())
        with (folder / METRICS).open("w", buffering=1, encoding="utf-8") as log:
            history = session.fit(log.write, listener)
        trained = time.perf_counter() - started
        listener.note("Looking at all held-out scenes")
        predictions = predict(session.model, source.held_out, session.device)
        evaluation = evaluate(source.held_out, predictions, source.class_names)
    save(session.model, config, source, folder / CHECKPOINT)
    listener.note("Drawing pictures and the report")
    summary = {
        "evaluation": evaluation.as_dict(),
        "parameters": sum(parameter.numel() for parameter in session.model.parameters()),
        "training_seconds": round(trained, 1),
        "scenes_per_second": round(config.steps * config.batch_size / trained, 1),
        "machine": _machine(config),
    }
    _write_json(folder / SUMMARY, summary)
    drawn = pictures.draw_all(folder, source, predictions, history, session.snapshots, evaluation)
    page = report.write(folder, source, config, summary, evaluation, drawn)
    files = [page, *drawn.values(), *(folder / name for name in (CHECKPOINT, METRICS, SUMMARY, CONFIG))]
    return Result(folder, files, evaluation, time.perf_counter() - started)


class Session:
    """The state of a training run.

    Args:
        config: what to do.
        source: the scenes.

    Raises:
        MaskLossError: scenes with more instances than the model has queries.
    """

    def __init__(self, config: TrainConfig, source: SceneSource) -> None:
        if source.most_instances > config.grid**2:
            raise Cause(
                "the model must have a query for each instance of a scene",
                f"a scene has {source.most_instances} instances, and grid={config.grid} makes {config.grid**2} queries",
                f"take --grid {math.isqrt(source.most_instances - 1) + 2}",
            )
        self.config, self.source, self.device = config, source, torch.device(config.device)
        self.model = build_model(config, len(source.class_names)).to(self.device)
        self.criterion = build_criterion(config, len(source.class_names))
        self.optimiser = torch.optim.AdamW(_groups(self.model, config), lr=config.lr, betas=(0.9, 0.99))
        self.snapshots: list[pictures.Snapshot] = []

    def fit(self, write: Callable[[str], object], listener: Listener) -> list[dict[str, Any]]:
        """Take all steps; write a line of JSON for what happens, and return the same as a list."""
        config, history = self.config, []
        evaluate_at = {round(config.steps * part / config.evaluations) for part in range(1, config.evaluations + 1)}
        snapshot_at = {max(1, round(config.steps * share)) for share in SNAPSHOTS}
        pending: list[Tensor] = []

        def record(entry: dict[str, Any]) -> None:
            history.append(entry)
            write(json.dumps(entry) + "\n")

        record({"step": 0, "held_out": self.glance().as_dict()})
        since = time.perf_counter()
        for step in range(1, config.steps + 1):
            terms = self.step(step)
            pending.append(torch.stack(list(terms.values())))
            if step % LOG_EVERY == 0 or step == config.steps:
                mean = dict(zip(terms, torch.stack(pending).mean(0).tolist(), strict=True))
                if not math.isfinite(mean["total"]):
                    raise Cause("the loss must stay finite", f"it is {mean['total']} at step {step}", "lower --lr")
                record({"step": step, "lr": self.optimiser.param_groups[0]["lr"], **mean})
                now = time.perf_counter()
                listener.step(Progress(step, mean, len(pending) * config.batch_size / (now - since)))
                pending, since = [], now
            if step in snapshot_at:
                self.snapshots.append(pictures.snapshot(self.model, self.criterion, self.source, step, self.device))
            if step in evaluate_at:
                scores = self.glance()
                record({"step": step, "held_out": scores.as_dict()})
                listener.evaluation((step, scores))
                since = time.perf_counter()
        return history

    def step(self, step: int) -> dict[str, Tensor]:
        """Take one step, counted from 1, and return the loss and its terms."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr * schedule(step / self.config.steps)
        batch = self.source.batch(step, self.config.batch_size, self.config.seed).to(self.device)
        output = self.model(batch.images)
        losses = self.criterion(
            output.class_logits, output.mask_logits, batch.targets, seed=(self.config.seed << 32) + step
        )
        self.optimiser.zero_grad()
        losses.total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        return {"total": losses.total.detach()} | {name: each.detach() for name, each in losses.as_dict().items()}

    def glance(self) -> Evaluation:
        """Evaluate the first held-out scenes."""
        scenes = self.source.held_out[:GLANCE]
        return evaluate(scenes, predict(self.model, scenes, self.device), self.source.class_names)


def build_model(config: TrainConfig, num_classes: int) -> QueryNet:
    """Make the model with weights that the seed decides, and leave torch's own generator as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = QueryNet(num_classes, config.grid)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def build_criterion(config: TrainConfig, num_classes: int) -> MaskCriterion:
    """Make the criterion that a configuration asks for."""
    sampling = PointSampling(num_points=config.num_points)
    # Pixels are classified through the masks and get little gradient from it, so the classification counts more
    # in the loss than in the matching, which keeps Mask2Former's weights.
    return MaskCriterion(
        num_classes=num_classes,
        class_weight=config.class_weight,
        no_object_weight=config.no_object_weight,
        sampling=sampling,
        matcher=HungarianMatcher(num_points=sampling.num_points),
    )


class RunCriterion(NamedTuple):
    """The criterion that a run was trained with, and what its targets had beside their masks."""

    criterion: MaskCriterion
    valid_windows: bool
    ignore_regions: bool


@reported("run")
def criterion_of_run(folder: Path) -> RunCriterion:
    """Make the criterion of a run again, from the folder that it wrote.

    Raises:
        MaskLossError: a folder without the configuration and the checkpoint of a run.
    """
    loaded = load(folder / CHECKPOINT)
    # Images of a folder are padded to squares, and its crowds are not learned from; scenes of digits have neither.
    padded = loaded.config.data is not None
    return RunCriterion(build_criterion(loaded.config, len(loaded.class_names)), padded, padded)


def schedule(progress: float) -> float:
    """Return the learning rate as a share of the highest one: a linear rise, then half a cosine to zero."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def save(model: QueryNet, config: TrainConfig, source: SceneSource, path: Path) -> None:
    """Write the weights, and with them what is needed to use them again."""
    facts = {"config": config.as_dict(), "classes": list(source.class_names)}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    # One entry: safetensors writes several in no fixed order.
    require("safetensors.torch", "train").save_file(state, str(path), metadata={"maskloss": json.dumps(facts)})


class Loaded(NamedTuple):
    """A trained model, and how it was trained."""

    model: QueryNet
    config: TrainConfig
    class_names: list[str]


@reported("load")
def load(path: Path) -> Loaded:
    """Read what `save` wrote; the model is on the CPU.

    Raises:
        MaskLossError: no such file, or one that `maskloss train` did not write.
    """
    if not path.is_file():
        raise Cause("the checkpoint must be there", f"there is no file {path}", f"a run writes {CHECKPOINT}")
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(str(path), framework="pt") as opened:
            facts = json.loads((opened.metadata() or {})["maskloss"])
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (KeyError, safetensors.SafetensorError):
        raise Cause(
            "the checkpoint must be one of maskloss train", f"{path} is not", f"a run writes {CHECKPOINT}"
        ) from None
    config = TrainConfig.from_dict({**facts["config"], "device": "cpu"})
    model = build_model(config, len(facts["classes"]))
    model.load_state_dict(state)
    return Loaded(model, config, facts["classes"])


def evaluate_checkpoint(path: Path, data: str | None) -> tuple[SceneSource, list[Prediction], Evaluation]:
    """Evaluate a checkpoint on the held-out scenes of its own data, or of another folder."""
    model, config, names = load(path)
    source = open_source(TrainConfig.from_dict({**config.as_dict(), "data": data or config.data}))
    if list(source.class_names) != names:
        raise Cause(
            "the scenes must have the classes of the checkpoint", f"{path} knows {', '.join(names)}", "see --data"
        )
    predictions = predict(model, source.held_out, torch.device("cpu"))
    return source, predictions, evaluate(source.held_out, predictions, names)


def _groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Leave norms and biases out of weight decay."""
    matrices = [each for each in model.parameters() if each.ndim > 1]
    vectors = [each for each in model.parameters() if each.ndim <= 1]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _machine(config: TrainConfig) -> dict[str, Any]:
    return {
        "processor": torch.cuda.get_device_name() if config.device.startswith("cuda") else platform.machine(),
        "threads": config.threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
