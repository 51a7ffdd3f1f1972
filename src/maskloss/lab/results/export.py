"""The model of a run as a file for other programs, checked against the model before it is put in place."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate

from maskloss import __version__
from maskloss.errors import Cause, reported, require
from maskloss.lab.data.images import BLACK, WHITE
from maskloss.lab.files import explain, write_whole
from maskloss.lab.models.learners import Learner, count_weights
from maskloss.lab.results.trained import TrainedRun, load_run
from maskloss.lab.runfolder import Facts

INPUT, OUTPUTS = "images", ("class_logits", "mask_logits")
# Images of the checks; the exporter has seen one of the batch sizes.
_TRACED, _CHECKED = 2, (1, 2, 3)
# What logits may differ by, compared with the largest of them: sums of other order, in single precision.
TOLERANCE = 1e-3
# EoMT asks in Python for the share of queries that look under their masks only, which a graph could not follow.
_SHARES = "attn_mask_probs"
# What speaks while a model is exported.
_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")
# A file of ONNX holds 2 GiB at most.
_MOST_WEIGHTS = 500_000_000


class Exported(NamedTuple):
    """What was written."""

    path: Path  # of the file
    size: int  # side of the square images that the model takes
    channels: int  # of these images
    largest: float  # the largest difference of logits from those of the model, compared with the largest logit
    images: int  # that were compared


class Whole(nn.Module):
    """A model as it is exported: images in [0, 1] in, the logits of the final layer out."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner
        for module in learner.modules():
            shares = module._buffers.get(_SHARES)
            if shares is not None:
                del module._buffers[_SHARES]
                setattr(module, _SHARES, shares.tolist())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predict `[B, C, S, S]`: class logits `[B, Q, C + 1]` and mask logits `[B, Q, h, w]`."""
        output = self.learner.predict(images, images.new_tensor([[0.0, 0.0, 1.0, 1.0]]).expand(images.shape[0], 4))
        return output.class_logits, output.mask_logits


@reported("export_run")
def export_run(folder: Path, out: Path, *, note: Callable[[str], None] = lambda _: None) -> Exported:
    """Write the model of a run as ONNX, and compare it with the model in ONNX Runtime.

    The file holds one input, `images` `[B, C, S, S]` float32 in [0, 1], and two outputs, `class_logits`
    `[B, Q, C + 1]` (`[B, Q, C]` of RF-DETR) and `mask_logits` `[B, Q, h, w]`, as `find_instances` takes them. B is
    free. Its metadata say what the classes are, which classification it is, and how images are brought to [0, 1].

    Args:
        folder: that `maskloss train` wrote.
        out: the file; written only if the logits are those of the model.
        note: is told what is being done.

    Returns:
        What was written, and how far the logits were from those of the model.

    Raises:
        MaskLossError: no run, a model with operations that ONNX lacks, or one that computes something else there.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed (extra `export`).
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "export")
    trained = load_run(folder, device="cpu")
    facts, learner = trained.facts, trained.predictor.learner.eval()
    if count_weights(learner) > _MOST_WEIGHTS:
        cause = f"the model has {count_weights(learner):,} weights, {_MOST_WEIGHTS:,} are possible"
        raise Cause("a model must fit into one file of ONNX", cause, "use it from Python, with maskloss.lab.load_run")
    whole, shape = Whole(learner), (facts.channels, trained.predictor.size, trained.predictor.size)
    note("Exporting the model")
    program = _exported(whole, torch.rand(_TRACED, *shape, generator=torch.Generator().manual_seed(0)))
    program.model.metadata_props.update(_metadata(trained))
    found: list[Exported] = []

    def write(partial: Path) -> None:
        program.save(str(partial))
        note("Comparing with the model in ONNX Runtime")
        largest = _compared(partial, whole, shape)
        found.append(Exported(out, shape[1], shape[0], largest, sum(_CHECKED) * 2))

    write_whole(out, write)
    return found[0]


@torch.no_grad()
def _exported(whole: Whole, example: Tensor) -> Any:
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet():
            return torch.onnx.export(
                whole,
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes={INPUT: {0: batch}},
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        first = explain(error.__cause__ or error)
        raise Cause(
            "the model must have a form in ONNX", first, "use it from Python, with maskloss.lab.load_run"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter has to say of its own affairs from the terminal."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in _LOGGERS}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _metadata(trained: TrainedRun) -> dict[str, str]:
    """Describe the model in the file itself."""
    facts = trained.facts
    return {
        "maskloss": __version__,
        "classes": json.dumps(facts.classes, ensure_ascii=False),
        "category_ids": json.dumps(facts.category_ids),
        "images": _reading(facts),
        "classification": trained.predictor.learner.classification,
        "outputs": "class_logits [B, Q, C + 1], 'no object' last, or [B, Q, C] where the classification is 'focal'; "
        "mask_logits [B, Q, h, w], inside above 0",
    }


def _reading(facts: Facts) -> str:
    """Say how images are brought to [0, 1]."""
    stretched = f"stretched between the percentiles {BLACK} and {WHITE} of each channel, and clipped"
    how = stretched if facts.percentile else f"divided by 255; of more than 8 bits, {stretched}"
    return f"{how}; resized to fit the upper left corner of the square, which is filled with the mean color"


@torch.no_grad()
def _compared(path: Path, whole: Whole, shape: tuple[int, int, int]) -> float:
    """Run a file on images, and return the largest difference from the model, compared with its largest logit."""
    runtime = require("onnxruntime", "export")
    rule = "the exported model must compute what the model computes"

    def computed(images: Tensor) -> list[NDArray[Any]]:
        try:
            return list(session.run(list(OUTPUTS), {INPUT: images.numpy()}))
        except Exception as error:  # noqa: BLE001 (its errors have no common class but this)
            raise Cause(rule, f"ONNX Runtime: {explain(error)}", "nothing was written") from None

    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001
        raise Cause(rule, f"ONNX Runtime: {explain(error)}", "nothing was written") from None
    generator = torch.Generator().manual_seed(1)
    largest = 0.0
    for count in _CHECKED:
        noise = torch.rand(count, *shape, generator=generator)
        # Noise, and blobs: what attends to a region is to be asked for regions.
        coarse = torch.rand(count, shape[0], 5, 5, generator=generator)
        for images in (noise, interpolate(coarse, shape[1:], mode="bicubic").clamp(0, 1)):
            for name, wanted, got in zip(OUTPUTS, whole(images), computed(images), strict=True):
                difference = float(np.abs(wanted.numpy() - got).max() / max(1.0, float(wanted.abs().max())))
                if not difference <= TOLERANCE:
                    cause = f"{name} of {count} images differ by {difference:.2g} of the largest"
                    raise Cause(rule, cause, "nothing was written; use it from Python, with maskloss.lab.load_run")
                largest = max(largest, difference)
    return largest
