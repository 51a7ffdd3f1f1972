"""Whole models of Transformers: what a training step costs unpatched, patched, and patched with masks as factors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskloss.errors import require
from maskloss.lab.bench.cases import Case
from maskloss.lab.bench.inputs import make_inputs
from maskloss.lab.bench.runner import Process, Say, Settings, WorkerError

ARMS = ("unpatched", "patched", "factors")

# Threads that spin after a step have gone to sleep by then, and leave the cores to the next arm.
_PAUSE = 0.03


@dataclass(frozen=True)
class ModelCase:
    """A model with random weights, and the batch that it is trained on.

    Attributes:
        name: how the command and the tables call it.
        title: what it is.
        family: module of Transformers and prefix of its classes.
        batch: B, images.
        image: height and width of the images and of their targets.
        targets: T, targets per image.
        classes: C, without "no object".
        config: what differs from Transformers' default configuration; "backbone" is that of Swin.
    """

    name: str
    title: str
    family: tuple[str, str]
    batch: int = 2
    image: int = 512
    targets: int = 20
    classes: int = 80
    config: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """Write the sizes in one line."""
        return f"{self.title}, {self.batch} images of {self.image} px, {self.targets} targets each, random weights"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ModelCase:
        """Invert `as_dict`, also after JSON has made a list of the pair."""
        module, prefix = values["family"]
        return ModelCase(**{**values, "family": (module, prefix)})


# Without stochastic depth and dropout, so that all arms compute the same.
MODELS = {
    case.name: case
    for case in (
        ModelCase(
            "mask2former",
            "Mask2Former with Swin-T",
            ("mask2former", "Mask2Former"),
            config={"backbone": {"depths": [2, 2, 6, 2], "drop_path_rate": 0.0}},
        ),
        ModelCase(
            "eomt",
            "EoMT with ViT-S",
            ("eomt", "Eomt"),
            config={"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
        ),
    )
}


def build(case: ModelCase, seed: int) -> nn.Module:
    """Make the model, in training; the same seed gives the same weights."""
    package = require("transformers", "transformers")
    module, prefix = case.family
    options = {name: value for name, value in case.config.items() if name != "backbone"}
    if "backbone" in case.config:
        stages = [f"stage{i}" for i in range(1, 5)]
        options["backbone_config"] = package.SwinConfig(out_features=stages, **case.config["backbone"])
    else:
        options["image_size"] = case.image
    config = getattr(package, f"{prefix}Config")(num_labels=case.classes, **options)
    modeling = require(f"transformers.models.{module}.modeling_{module}", "transformers")
    torch.manual_seed(seed)
    model: nn.Module = getattr(modeling, f"{prefix}ForUniversalSegmentation")(config)
    # The masks of new models are nearly 0 everywhere: whatever rounds then decides matches and attention masks.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mask" in name and parameter.ndim > 1:
                parameter.mul_(2)
    return model.train()


def make_batch(case: ModelCase, seed: int) -> dict[str, Any]:
    """Draw images, and targets as the image processors make them: float masks."""
    size = (case.image, case.image)
    drawn = Case("model", case.batch, case.targets, case.targets, 1, case.classes, (8, 8), size)
    inputs = make_inputs(drawn, seed=seed, dtype=torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(case.batch, 3, *size, generator=generator),
        "mask_labels": [masks.float() for masks in inputs.masks],
        "class_labels": inputs.labels,
    }


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Bring a batch to a device."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else [each.to(device) for each in value]

    return {name: moved(value) for name, value in batch.items()}


class ModelProcess(Process):
    """A worker that trains a model."""

    module = "maskloss.lab.bench.model_worker"


def run_model(case: ModelCase, settings: Settings, say: Say) -> dict[str, Any]:
    """Check and measure a model.

    Args:
        case: the model.
        settings: steps, threads, device and seed; float32.
        say: is told what is going on.

    Returns:
        What JSON keeps: "checks", and for each arm "samples", "summary" and "memory", or "failed". If the check
        failed there is a "failed" for the whole model and no arm.
    """
    report: dict[str, Any] = {"name": case.name, "sizes": case.as_dict(), "arms": {}}
    given = {"case": case.as_dict(), "device": settings.device, "seed": settings.seed}
    say(f"{case.name}: checking that all arms compute the same")
    try:
        with ModelProcess(settings) as process:
            report["checks"] = process.ask("check", **given)
    except WorkerError as error:
        return report | error.as_dict()
    wrong = [check["arm"] for check in report["checks"] if not check["passed"]]
    if wrong:
        return report | {"failed": f"{' and '.join(wrong)} and the unpatched model do not agree; nothing was timed"}
    with ExitStack() as stack:
        processes = {arm: stack.enter_context(ModelProcess(settings)) for arm in ARMS}
        for arm, process in processes.items():
            say(f"{case.name}: first steps, {arm}")
            report["arms"][arm] = _attempt(process, "setup", arm=arm, **given) | {"samples": []}
        for turn in range(settings.steps):
            first = turn % len(ARMS)
            for arm in (*ARMS[first:], *ARMS[:first]):
                found = report["arms"][arm]
                if "failed" not in found:
                    say(f"{case.name}: step {turn + 1} of {settings.steps}, {arm}")
                    time.sleep(_PAUSE)
                    sample = _attempt(processes[arm], "step", seed=settings.seed + 1 + turn)
                    if "failed" in sample:
                        found.update(sample)
                    else:
                        found["samples"].append({"round": turn, **sample})
    for found in report["arms"].values():
        if found["samples"]:
            found["summary"] = _summary(found["samples"])
    return report


def _attempt(process: Process, do: str, **arguments: Any) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = process.ask(do, **arguments)
    except WorkerError as error:
        return error.as_dict()
    return answer


def _summary(samples: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Reduce samples to median, 10 % and 90 % quantile of forward, backward and both, in seconds."""
    parts = {name: np.array([sample[name] for sample in samples]) for name in ("forward", "backward")}
    parts["step"] = parts["forward"] + parts["backward"]
    names = ("low", "median", "high")
    return {
        part: dict(zip(names, np.quantile(values, [0.1, 0.5, 0.9]).tolist(), strict=True))
        for part, values in parts.items()
    }


def model_table(report: Mapping[str, Any]) -> Any:
    """Draw the table of a model that was measured."""
    table = require("rich.table", "bench").Table(
        title=ModelCase.from_dict(report["sizes"]).describe(), title_justify="left"
    )
    for name in ("arm", "forward", "backward", "step", "10-90 %", "unpatched / arm", "peak memory"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    whole = report["arms"]["unpatched"].get("summary", {}).get("step", {}).get("median")
    for arm, found in report["arms"].items():
        if "summary" not in found:
            table.add_row(arm, *["-"] * 6)
            continue
        forward, backward, step = (found["summary"][part] for part in ("forward", "backward", "step"))
        peak = found["memory"]["peak"]
        table.add_row(
            arm,
            *(f"{part['median']:.2f} s" for part in (forward, backward, step)),
            f"{step['low']:.2f}-{step['high']:.2f} s",
            "-" if whole is None else f"{whole / step['median']:.2f}",
            "-" if peak is None else f"{peak / 1e6:.0f} MB",
        )
    return table


def model_lines(report: Mapping[str, Any]) -> list[str]:
    """Write what the table does not say: how far the arms agree, and what failed."""
    lines = [
        f"{check['arm']}: loss within {check['loss']:.1e}, gradient within {check['gradient']:.1e} of the unpatched "
        f"model, on the same points; {check['flips']} of {check['attention']} attention logits on the other side of 0"
        for check in report.get("checks", ())
    ]
    failures = {"": report, **report["arms"]}
    return lines + [f"{arm}  {found['failed']}".strip() for arm, found in failures.items() if "failed" in found]
