"""Checks of logits, targets and numbers that the public calls share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maskloss._numbers import FLOATS, check_number, is_float
from maskloss._tracing import active, as_tensor, on_host
from maskloss.errors import Cause, check_device, check_layout, describe
from maskloss.factors import MaskFactors
from maskloss.layers import Layer
from maskloss.points import PointSampling
from maskloss.targets import MaskTargets


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise if a value is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise Cause(
            f"{name} must be one of {', '.join(choices)}",
            f"{name}={describe(value)}",
            f"{choices[0]!r} is the default",
        )


def class_weights(weights: Tensor | Sequence[float], num_classes: int | None = None) -> Tensor:
    """Convert class weights to float32 `[C]`, a copy of their own."""
    try:
        given = as_tensor(weights).detach()
        found = given.new_empty(()) if given.is_complex() else given.to(torch.float32, copy=True)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = torch.empty((), device="cpu")
    fits = found.layout is torch.strided and found.ndim == 1 and len(found) == (num_classes or len(found))
    if not fits or not bool((found.isfinite() & (found >= 0)).all()):
        raise Cause(
            f"class_weights must be {num_classes or 'one or more'} finite numbers, at least 0",
            f"got {describe(weights)}",
            "give one weight for each class; 'no object' has no_object_weight",
        )
    return found


def check_weights(**weights: Any) -> list[float]:
    """Return the weights of terms; raise if one is negative or not finite."""
    return [check_number(name, weight, 0, hint="0 switches the term off") for name, weight in weights.items()]


def check_count(name: str, value: object) -> None:
    """Raise if a number of instances or queries is negative or not finite; values on a device are not checked."""
    hint = "step_totals counts them"
    if not isinstance(value, Tensor):
        check_number(name, value, 0, hint=hint)
        return
    narrow = value.is_floating_point() and not is_float(value)
    if value.numel() != 1 or value.dtype == torch.bool or value.is_complex() or narrow:
        raise Cause(f"{name} must be a number, or a tensor of one element", f"{name} is {describe(value)}", hint)
    if on_host(value):
        check_number(name, value.item(), 0, hint=hint)


def check_sampling(sampling: PointSampling | None) -> PointSampling:
    """Return the default for None; raise if it is anything else than a `PointSampling`."""
    if sampling is None:
        return PointSampling()
    if not isinstance(sampling, PointSampling):
        raise Cause(
            "sampling must be a PointSampling",
            f"got {describe(sampling)}",
            "PointSampling(num_points=12544, oversample_ratio=3.0, importance_ratio=0.75) is the default",
        )
    return sampling


def check_maps(name: str, maps: Any, shape: str) -> None:
    """Raise if maps have another rank than `shape` says, a dtype without kernels, or no pixels."""
    rank = shape.count(",") + 1
    if not isinstance(maps, Tensor):
        hint = "MaskFactors.from_dict takes it" if isinstance(maps, Mapping) else "torch.as_tensor converts arrays"
        if maps is None:
            hint = "a layer may have no masks if another has some"
        elif isinstance(maps, (list, tuple)):
            hint = "this call takes those of one layer, as one tensor"
        raise Cause(f"{name} must be a tensor {shape}", f"got {describe(maps)}", hint)
    check_layout(name, maps)
    leading = "..." in shape
    if maps.ndim < rank - 1 or (maps.ndim != rank and not leading):
        wanted = f"at least {rank - 1}" if leading else str(rank)
        raise Cause(
            f"{name} must be {shape}",
            f"got {maps.ndim} dimensions",
            f"add or drop dimensions until {name} has {wanted}",
        )
    if maps.dtype not in FLOATS:
        raise Cause(
            f"{name} must be float16, bfloat16, float32 or float64",
            f"got {maps.dtype}",
            f"{name}.float() converts",
        )
    if 0 in maps.shape[-3 if " T," in shape else -2 :]:
        raise Cause(f"{name} must have at least one pixel", f"got {list(maps.shape)}", "check the sizes upstream")


def check_layers(name: str, layers: Layer | Sequence[Layer | None], shape: str) -> list[Layer | None]:
    """List the logits of one layer, or of a sequence of decoder layers, dense or as factors, after checking them.

    Some layers, but not all, may have None.
    """
    listed: list[Layer | None] = list(layers) if isinstance(layers, Sequence) else [layers]
    if not listed:
        raise Cause(f"{name} must have at least one decoder layer", "the sequence is empty", "give the final layer's")
    present = [layer for layer in listed if layer is not None]
    for layer in present or listed:
        if not isinstance(layer, MaskFactors):
            clips = isinstance(layer, Tensor) and layer.ndim == 5
            check_maps(name, layer, "[B, Q, T, h, w]" if clips else shape)
    first = present[0]
    for number, layer in enumerate(listed):
        layer = first if layer is None else layer
        same = (layer.shape[:-2], layer.dtype, layer.device) == (first.shape[:-2], first.dtype, first.device)
        if not same:
            raise Cause(
                f"{name} of all decoder layers must agree in batch size, queries, dtype and device",
                f"the first are {list(first.shape[:-2])} {first.dtype} on {first.device}, "
                f"layer {number} is {list(layer.shape[:-2])} {layer.dtype} on {layer.device}",
                "convert them to one dtype and device",
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


def accumulated(tensor: Tensor) -> Tensor:
    """Upcast half precision: everything is summed in float32, or in float64 where the input is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_targets(targets: MaskTargets, logits: Layer) -> None:
    """Raise if targets have another batch size or device than logits `[B, Q, h, w]`."""
    if len(targets) != logits.shape[0]:
        raise Cause(
            "mask_logits and targets must have the same number of images",
            f"{logits.shape[0]} images of logits but {len(targets)} of targets",
            "give an entry for every image; an image without instances has masks [0, H, W]",
        )
    if logits.ndim == 4 and targets.frames != 1:
        raise Cause(
            "mask_logits and targets must have the same frames",
            f"mask_logits {list(logits.shape)}, targets of {targets.frames} frames",
            "those of clips are logits [B, Q, T, h, w] and masks [N, T, H, W]; list(...) takes stacked layers apart",
        )
    check_device("targets", targets.device, logits.device)


def check_classes(class_logits: Tensor, labels: Tensor) -> None:
    """Raise unless these are logits `[..., Q, C]` and labels `[..., T]` that broadcast."""
    for name, value in (("class_logits", class_logits), ("labels", labels)):
        check_layout(name, value)
    if not is_float(class_logits) or class_logits.ndim < 2 or class_logits.shape[-1] < 1:
        raise Cause(
            "class_logits must be float [..., Q, number of classes], of one class at least",
            f"got {describe(class_logits)}",
            "the last dimension holds the classes, and 'no object' where there is one",
        )
    integers = isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
    if not integers or labels.ndim < 1:
        raise Cause("labels must be integers [..., T]", f"got {describe(labels)}", "labels.long()")
    check_device("labels", labels.device, class_logits.device)
    have, want = labels.shape[-2::-1], class_logits.shape[-3::-1]
    if len(have) > len(want) or any(one not in (1, other) for one, other in zip(have, want, strict=False)):
        raise Cause(
            "the leading dimensions of labels [..., T] must broadcast to those of class_logits [..., Q, C]",
            f"got {list(class_logits.shape)} and {list(labels.shape)}",
            "labels [T] serve all of them",
        )


def check_floats(z: Tensor, t: Tensor) -> None:
    """Raise unless logits and targets at points are float, and on one device."""
    for each in (z, t):
        if not is_float(each):
            raise Cause(
                "z and t must be float", f"got {describe(z)} and {describe(t)}", "t.to(z.dtype) converts a bool mask"
            )
    check_device("t", t.device, z.device)


def point_weights(w: Tensor | None, shape: Sequence[int], z: Tensor) -> Tensor:
    """Expand weights of points to a shape, in the dtype of z."""
    if w is None:
        return z.new_ones(shape)
    fits = isinstance(w, Tensor) and w.ndim <= len(shape) and not w.is_complex()
    if not fits or any(have not in (1, want) for have, want in zip(w.shape[::-1], shape[::-1], strict=False)):
        raise Cause(
            "w must broadcast to [..., P]",
            f"got {describe(w)} for {list(shape)}",
            "give one real weight for each point",
        )
    check_device("w", w.device, z.device)
    return w.to(z.dtype).expand(*shape)


def paired_weights(z: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
    """Check that z and t pair up, and return the weights `[..., P]`."""
    check_floats(z, t)
    if z.shape != t.shape or z.ndim < 1:
        raise Cause(
            "z and t must have the same shape [..., P]",
            f"got {list(z.shape)}, {list(t.shape)}",
            "sample them at the same points",
        )
    return point_weights(w, z.shape, z)


def focal_numbers(alpha: float | None, gamma: float) -> tuple[float, float]:
    """Check both numbers of a focal loss; -1 stands for no alpha."""
    balance = -1.0 if alpha is None else check_number("alpha", alpha, 0, 1, hint="0.25 is usual")
    return balance, check_number("gamma", gamma, 0, hint="2.0 is usual")
