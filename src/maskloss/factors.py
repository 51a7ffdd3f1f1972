"""Mask logits as a product of query embeddings and pixel features that is never formed whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from maskloss._abi import Factors
from maskloss._numbers import is_float, is_number
from maskloss.errors import Cause, check_layout, describe, reported


@dataclass(frozen=True, eq=False, repr=False)
class MaskFactors:
    """The mask logits of one decoder layer, as the product that makes them.

        logits[b, q, y, x] = sum_d embeddings[b, q, d] * features[b, d, y, x] + bias[b, q]

    Pass it wherever `mask_logits` are accepted. The loss then samples the *features* at the matcher's points (bilinear
    sampling and the product commute), forms the planes of matched queries only, a few at a time, and drops each when
    its loss is known. Values and gradients are those of `dense()`, up to the rounding of a matrix product; no tensor of
    B * Q * h * w elements is made, forward or backward. Two cases form it with `dense()`: the backend "reference", and
    a call in which other layers are dense.

    Decoder layers that pass the *same* features object share its sampling and its gradient.

    Args:
        embeddings: `[B, Q, D]`, float: one vector for each query.
        features: `[B, D, h, w]`, float: one vector for each pixel. Those of clips are `[B, D, T, h, w]`: a query has
            one vector for all T frames.
        bias: what is added to the logits: a number, a tensor `[]`, `[Q]` or `[B, Q]`. Default None: nothing. It is
            rounded to the dtype of the product.
        scratch_mb: bound on the memory for planes and sampled logits that exist at a time, in MiB, above 0; one plane
            is formed at least. Default 32.

    Raises:
        MaskLossError: wrong rank, dtype or device, or sizes that do not pair up.

    Source:
        The mask head of MaskFormer (Cheng et al., 2021), section 3.1. Sampling before the product: PointRend (Kirillov
        et al., 2020) samples features as well, for another purpose. RF-DETR (Robinson et al., 2025) trained on factors
        first: its sparse masks form the planes of matched queries.

    Example:
        >>> factors = MaskFactors(torch.ones(1, 3, 8), torch.full((1, 8, 4, 4), 0.25), bias=-1.0)
        >>> factors
        MaskFactors(embeddings [1, 3, 8], features [1, 8, 4, 4], bias -1.0, float32, cpu)
        >>> factors.dense().shape, float(factors.dense().max())
        (torch.Size([1, 3, 4, 4]), 1.0)
    """

    embeddings: Tensor
    features: Tensor
    bias: Tensor | float | None = None
    scratch_mb: float = 32.0

    def __post_init__(self) -> None:
        self._check()

    @reported("MaskFactors")
    def _check(self) -> None:
        for name, value, ranks, shape in (
            ("embeddings", self.embeddings, (3,), "[B, Q, D]"),
            ("features", self.features, (4, 5), "[B, D, h, w] or [B, D, T, h, w]"),
        ):
            check_layout(name, value)
            if not is_float(value) or value.ndim not in ranks:
                raise Cause(f"{name} must be float {shape}", f"got {describe(value)}", "see the formula of MaskFactors")
        embeddings, features = self.embeddings, self.features
        if (embeddings.shape[0], embeddings.shape[2]) != tuple(features.shape[:2]):
            raise Cause(
                "embeddings [B, Q, D] and features [B, D, h, w] must agree in B and D",
                f"got {list(embeddings.shape)} and {list(features.shape)}",
                "the features come after the projection to D channels",
            )
        if min(features.shape[2:]) < 1 or features.shape[1] < 1:
            raise Cause("features must have channels and pixels", f"got {list(features.shape)}", "check them upstream")
        if embeddings.device != features.device:
            raise Cause(
                "embeddings and features must be on one device",
                f"embeddings on {embeddings.device}, features on {features.device}",
                "move one of them",
            )
        _check_bias(self.bias, embeddings)
        if not is_number(self.scratch_mb) or not 0 < self.scratch_mb < float("inf"):
            raise Cause(
                "scratch_mb must be a number above 0", f"scratch_mb={describe(self.scratch_mb)}", "32 is the default"
            )

    @staticmethod
    @reported("MaskFactors.from_dict")
    def from_dict(factors: Mapping[str, Any]) -> MaskFactors:
        """Take the dict that RF-DETR's own segmentation head returns while training.

        Args:
            factors: "spatial_features" `[B, D, h, w]`, "query_features" `[B, Q, D]`, "bias" (optional).

        Returns:
            The factors; nothing is copied.

        Raises:
            MaskLossError: a missing entry, or as in `MaskFactors`.
        """
        names = ("spatial_features", "query_features")
        if not isinstance(factors, Mapping) or any(name not in factors for name in names):
            raise Cause(
                'factors must be a dict with "spatial_features" and "query_features"',
                f"got {describe(factors)}",
                "MaskFactors(embeddings, features, bias) takes them under any name",
            )
        return MaskFactors(factors["query_features"], factors["spatial_features"], factors.get("bias"))

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits, `[B, Q, h, w]` or `[B, Q, T, h, w]`."""
        return torch.Size((*self.embeddings.shape[:2], *self.features.shape[2:]))

    @property
    def ndim(self) -> int:
        """The rank of the logits: 4, or 5 for clips."""
        return self.features.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits: the factors' own, or what autocast makes of them where it is on."""
        if _autocasts(self.device) and torch.float64 not in (self.embeddings.dtype, self.features.dtype):
            return torch.get_autocast_dtype(self.device.type)
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.features.device

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows to one of the factors."""
        tensors = (self.embeddings, self.features, self.bias)
        return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)

    def dense(self) -> Tensor:
        """Form the logits (`[B, Q, h, w]`): the definition of what the factors stand for; differentiable."""
        embeddings, features, bias = self.operands()
        logits = torch.einsum("bqd,bd...->bq...", embeddings, features)
        return logits if bias is None else logits + bias.view(*bias.shape, *[1] * (logits.ndim - 2))

    def detach(self) -> MaskFactors:
        """Cut the factors off the graph."""
        bias = self.bias.detach() if isinstance(self.bias, Tensor) else self.bias
        return replace(self, embeddings=self.embeddings.detach(), features=self.features.detach(), bias=bias)

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what is multiplied, in the dtype of the product: `[B, Q, D]`, `[B, D, h, w]`, and the bias `[B, Q]`.

        Raises:
            Cause: embeddings and features of different dtypes, where autocast is off.
        """
        dtype = self.dtype
        if self.embeddings.dtype != self.features.dtype and not _autocasts(self.device):
            raise Cause(
                "embeddings and features must have one dtype",
                f"got {self.embeddings.dtype} and {self.features.dtype}",
                "convert one of them, or run the loss under autocast as the product would",
            )
        embeddings, features = self.embeddings.to(dtype), self.features.to(dtype)
        if self.bias is None:
            return embeddings, features, None
        # A number is filled in on the device, where `as_tensor` would copy it there.
        if isinstance(self.bias, Tensor):
            bias = self.bias.to(dtype)
        else:
            bias = torch.full((), self.bias, dtype=dtype, device=self.device)
        return embeddings, features, bias.expand(embeddings.shape[:2])

    def __repr__(self) -> str:
        parts = [f"embeddings {list(self.embeddings.shape)}", f"features {list(self.features.shape)}"]
        if self.bias is not None:
            parts.append(f"bias {list(self.bias.shape) if isinstance(self.bias, Tensor) else self.bias}")
        return f"MaskFactors({', '.join(parts)}, {str(self.dtype).removeprefix('torch.')}, {self.device})"


def _autocasts(device: torch.device) -> bool:
    """Whether autocast is on. PyTorch raises if asked about tensors without data."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _check_bias(bias: object, embeddings: Tensor) -> None:
    batch, queries = embeddings.shape[:2]
    if bias is None or is_number(bias):
        return
    if not is_float(bias) or tuple(bias.shape) not in ((), (1,), (queries,), (batch, queries)):
        raise Cause(
            "bias must be a number or a float tensor [], [Q] or [B, Q]",
            f"got {describe(bias)} for B = {batch}, Q = {queries}",
            "it is added to all pixels of a query's plane",
        )
    if bias.device != embeddings.device:
        raise Cause(
            "bias must be on the device of the factors",
            f"it is on {bias.device}, the factors on {embeddings.device}",
            "move it there",
        )


def joined(layers: Sequence[MaskFactors]) -> Factors:
    """Convert the factors of all layers to what the operations take; layers with the same features object share them.

    Layers may differ in D: the operations take one D for all, so narrower ones get channels of zeros.
    """
    parts = [layer.operands() for layer in layers]
    width = max(embeddings.shape[2] for embeddings, _, _ in parts)
    embeddings, biases = [], []
    features: list[Tensor] = []
    features_of: list[int] = []
    seen: dict[int, int] = {}
    for layer, (queries, pixels, bias) in zip(layers, parts, strict=True):
        missing = width - queries.shape[2]
        # By the object that was given: what autocast makes of it is another one each time.
        number = seen.setdefault(id(layer.features), len(features))
        if number == len(features):
            features.append(pad(pixels, (0, 0) * (pixels.ndim - 2) + (0, missing)) if missing else pixels)
        embeddings.append(pad(queries, (0, missing)) if missing else queries)
        biases.append(bias)
        features_of.append(number)
    given = []
    if any(bias is not None for bias in biases):
        given = [
            each.new_zeros(each.shape[:2]) if bias is None else bias
            for bias, each in zip(biases, embeddings, strict=True)
        ]
    scratch_bytes = int(min(layer.scratch_mb for layer in layers) * 2**20)
    return Factors(embeddings, given, features, features_of, scratch_bytes)
