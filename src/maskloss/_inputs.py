"""What the public calls share: the options of a mask term, checks of logits and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskloss import _abi
from maskloss._numbers import check_number
from maskloss._tracing import active, on_host
from maskloss.errors import Cause, check_device, check_layout, describe
from maskloss.factors import MaskFactors
from maskloss.layers import Layer
from maskloss.ops import check_backend
from maskloss.points import PointSampling
from maskloss.targets import MaskTargets

# Mask2Former's weights, for the loss and for the matching alike.
CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0
# The focal loss of classes by sigmoids, for the loss and for the matching alike (Lin et al., 2017).
CLASS_FOCAL_ALPHA, CLASS_FOCAL_GAMMA = 0.25, 2.0

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PADDING_MODES, TARGET_MODES = _abi.PADDING_MODES, _abi.TARGET_MODES


@dataclass(frozen=True)
class MaskOptions:
    """How a mask term reads its points, and which cross-entropy it takes."""

    padding_mode: str = "zeros"
    target_mode: str = "bilinear"
    focal_alpha: float | None = None
    focal_gamma: float | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        check_choice("padding_mode", self.padding_mode, PADDING_MODES)
        check_choice("target_mode", self.target_mode, TARGET_MODES)
        if self.backend is not None:
            check_backend(self.backend)
        if self.focal_alpha is not None and self.focal_gamma is None:
            raise Cause(
                "focal_alpha goes with focal_gamma",
                "focal_gamma is None",
                "focal_gamma=2.0 is usual; 0.0 only weighs",
            )
        if self.focal_alpha is not None:
            check_number("focal_alpha", self.focal_alpha, 0, 1, hint="0.25 is usual")
        if self.focal_gamma is not None:
            check_number("focal_gamma", self.focal_gamma, 0, hint="2.0 is usual")

    @property
    def focal(self) -> tuple[float, float]:
        """Alpha and gamma as the operations take them: -1 switches off."""
        return (
            -1.0 if self.focal_alpha is None else float(self.focal_alpha),
            -1.0 if self.focal_gamma is None else float(self.focal_gamma),
        )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise Cause(
            f"{name} must be one of {', '.join(choices)}",
            f"{name}={value!r}",
            f"{choices[0]!r} is the default",
        )


def check_weight(name: str, value: object) -> None:
    """Refuse a weight that is negative or not finite."""
    check_number(name, value, 0, hint="0 switches the term off")


def check_count(name: str, value: object) -> None:
    """Refuse a number of instances or queries that is negative or not finite, as far as a device need not be asked."""
    hint = "step_totals counts them"
    if not isinstance(value, Tensor):
        check_number(name, value, 0, hint=hint)
        return
    if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
        raise Cause(f"{name} must be a number, or a tensor of one element", f"{name} is {describe(value)}", hint)
    if on_host(value):
        check_number(name, value.item(), 0, hint=hint)


def check_sampling(sampling: PointSampling | None) -> PointSampling:
    """Take the default for None, and refuse anything else that is no `PointSampling`."""
    if sampling is None:
        return PointSampling()
    if not isinstance(sampling, PointSampling):
        raise Cause(
            "sampling must be a PointSampling",
            f"got {describe(sampling)}",
            "PointSampling(num_points=12544, oversample_ratio=3.0, importance_ratio=0.75) is the default",
        )
    return sampling


def check_maps(name: str, maps: Tensor, shape: str, *, min_size: int = 1) -> None:
    """Refuse maps of another rank than `shape` says, of a dtype without kernels, or without pixels."""
    rank = shape.count(",") + 1
    if not isinstance(maps, Tensor):
        raise Cause(f"{name} must be a tensor {shape}", f"got {describe(maps)}", "torch.as_tensor converts arrays")
    check_layout(name, maps)
    leading = "..." in shape
    if maps.ndim < rank - 1 or (maps.ndim != rank and not leading):
        wanted = f"at least {rank - 1}" if leading else str(rank)
        raise Cause(
            f"{name} must be {shape}",
            f"got {maps.ndim} dimensions",
            f"add or drop dimensions until {name} has {wanted}",
        )
    if maps.dtype not in _DTYPES:
        raise Cause(
            f"{name} must be float16, bfloat16, float32 or float64",
            f"got {maps.dtype}",
            f"{name}.float() converts",
        )
    if min(maps.shape[-2:]) < min_size:
        raise Cause(f"{name} must have at least one pixel", f"got {list(maps.shape)}", "check the sizes upstream")


def check_layers(name: str, layers: Layer | Sequence[Layer], shape: str) -> list[Layer]:
    """Bring logits of one layer, or of a sequence of decoder layers, dense or as factors, into a checked list."""
    listed = list(layers) if isinstance(layers, Sequence) else [layers]
    if not listed:
        raise Cause(f"{name} must have at least one decoder layer", "the sequence is empty", "give the final layer's")
    for layer in listed:
        if not isinstance(layer, MaskFactors):
            check_maps(name, layer, shape)
    first = listed[0]
    for number, layer in enumerate(listed):
        same = (layer.shape[:2], layer.dtype, layer.device) == (first.shape[:2], first.dtype, first.device)
        if not same:
            raise Cause(
                f"{name} of all decoder layers must agree in batch size, queries, dtype and device",
                f"layer 0 is {list(first.shape[:2])} {first.dtype} on {first.device}, "
                f"layer {number} is {list(layer.shape[:2])} {layer.dtype} on {layer.device}",
                "bring them to one dtype and device",
            )
    return listed


class _Stack(torch.autograd.Function):
    """`torch.stack`, whose own derivative cuts the layers out one by one."""

    @staticmethod
    def forward(ctx: Any, *layers: Tensor) -> Tensor:
        return torch.stack(layers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.unbind()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return torch.stack(tangents)


def stack(layers: Sequence[Tensor]) -> Tensor:
    """Stack the layers along a new first dimension; one operation forward, one backward, whatever their number."""
    if torch.compiler.is_compiling() or active():
        # The compiler warns of functions of our own, and transforms want them in another form, which takes longer.
        return torch.stack(list(layers))
    stacked: Tensor = _Stack.apply(*layers)  # type: ignore[no-untyped-call]
    return stacked


def check_targets(targets: MaskTargets, logits: Layer) -> None:
    """Refuse targets of another batch size or device than logits `[B, Q, h, w]`."""
    if len(targets) != logits.shape[0]:
        raise Cause(
            "mask_logits and targets must have the same number of images",
            f"{logits.shape[0]} images of logits but {len(targets)} of targets",
            "give an entry for every image; an image without instances has masks [0, H, W]",
        )
    check_device("targets", targets.device, logits.device)
