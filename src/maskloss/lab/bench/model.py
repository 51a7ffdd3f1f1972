"""Whole models of Transformers: what a training step costs unpatched, patched, and patched with masks as factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maskloss.errors import require
from maskloss.lab.bench.cases import Case
from maskloss.lab.bench.inputs import make_inputs
from maskloss.lab.bench.table import memory, new_table, range_of, seconds, titled

MODEL_ARMS = ("unpatched", "patched", "factors")


@dataclass(frozen=True)
class ModelCase:
    """A model with random weights, and the batch that it is trained on."""

    worker: ClassVar[str] = "maskloss.lab.bench.model_worker"
    base: ClassVar[str] = MODEL_ARMS[0]

    name: str  # how the command and the tables call it
    title: str  # what it is
    family: tuple[str, str]  # module of Transformers and prefix of its classes
    batch: int = 2  # B, images
    image: int = 512  # height and width of the images and of their targets
    targets: int = 20  # T, targets per image
    classes: int = 80  # C, without "no object"
    # what differs from Transformers' default configuration; "backbone" is that of Swin
    config: dict[str, Any] = field(default_factory=dict)

    def arms(self, asked: tuple[str, ...]) -> tuple[str, ...]:  # noqa: ARG002 (those of a loss)
        """Return the arms of a model, whatever arms of the loss are asked for."""
        return MODEL_ARMS

    def working_set(self, arm: str, item_size: int) -> int:  # noqa: ARG002 (weights and activations, for all alike)
        """Return a third of what the listed models need: one of three processes computes, the others keep weights."""
        return 2_000_000_000

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
    """Copy a batch to a device."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else [each.to(device) for each in value]

    return {name: moved(value) for name, value in batch.items()}


def model_table(report: Mapping[str, Any]) -> Any:
    """Lay out what was measured for a model; rows are arms."""
    table = new_table()
    for name in ("step", "10–90%", "forward", "backward", "peak", "unpatched / arm"):
        table.add_column(name, justify="right", no_wrap=True)
    whole = report["arms"]["unpatched"].get("summary", {}).get("step", {}).get("median")
    for arm, found in report["arms"].items():
        if "summary" not in found:
            table.add_row(arm, "[red]failed[/]")
            continue
        step = found["summary"]["step"]
        table.add_row(
            arm,
            seconds(step["median"]),
            range_of(step),
            *(seconds(found["summary"][part]["median"]) for part in ("forward", "backward")),
            memory(found["memory"]["peak"]),
            "" if whole is None else f"{whole / step['median']:.2f}",
        )
    return titled(report["name"], ModelCase.from_dict(report["sizes"]).describe(), table)


def model_lines(report: Mapping[str, Any]) -> list[str]:
    """Write what the table does not say: how far the arms agree."""
    return [
        f"{check['other']}: loss within {check['loss']:.1e}, gradient within {check['gradient']:.1e} of "
        f"{check['base']}, on the same points; {check['flips']} of {check['attention']} attention logits on the other "
        "side of 0"
        for check in report.get("checks", ())
    ]
