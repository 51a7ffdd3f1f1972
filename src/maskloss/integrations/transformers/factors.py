"""The masks of a model of Transformers as factors: what its mask head hands to the criterion while it trains.

The models multiply embeddings and features themselves, inside Transformers. So the head's last module
returns embeddings that know PyTorch's protocol for overriding functions: their product with features is not computed,
but becomes a `LayerFactors`; resized, as the attention masks need it, this becomes a product of resized features,
because resizing and the product are both linear. Any other use of the embeddings sees a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from maskloss.errors import Cause
from maskloss.factors import MaskFactors

_PRODUCT = "bqc,bchw->bqhw"


@dataclass(eq=False)
class Derived:
    """Tensors made of one source, by how they were made; another source starts anew."""

    source: Tensor | None = None
    made: dict[Any, Tensor] = field(default_factory=dict)

    def get(self, source: Tensor, how: Any, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Make a tensor, or return it if it has been made before."""
        if source is not self.source:
            self.source, self.made = source, {}
        if how not in self.made:
            self.made[how] = make(source)
        return self.made[how]


@dataclass(eq=False)
class SharedWork:
    """What the layers of one forward pass share."""

    handed: int = 0  # how many embeddings the mask head has handed over
    layers: int = 0  # how many of their products there have been
    rounded: Derived = field(default_factory=Derived)  # the features in the dtype of autocast; with a graph
    # the features at the sizes of the attention masks; without a graph
    resized: Derived = field(default_factory=Derived)

    def clear(self) -> None:
        """Let go of all tensors; what the model returned may refer to its pass for longer."""
        self.rounded, self.resized = Derived(), Derived()


class Embeddings(Tensor):
    """Query embeddings `[B, Q, D]` whose product with features is a `LayerFactors`."""

    plain: Tensor  # the same as a plain tensor
    shared: SharedWork  # the work of their forward pass

    @staticmethod
    def wait(plain: Tensor, shared: SharedWork) -> Embeddings:
        """Make embeddings that wait for their features."""
        waiting = plain.as_subclass(Embeddings)
        waiting.plain, waiting.shared = plain, shared
        shared.handed += 1
        return waiting

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Keep the two products that the models compute as factors; compute everything else."""
        if func is torch.einsum and len(args) == 3 and isinstance(args[1], cls):
            if "".join(str(args[0]).split()) == _PRODUCT:
                return LayerFactors.of(args[1], args[2])
        elif func is torch.matmul and isinstance(args[0], cls) and args[1].ndim == 3:
            return FlatProduct(args[0], args[1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@dataclass(frozen=True, eq=False)
class FlatProduct:
    """A product with features `[B, D, h * w]`; the model gives h and w afterwards."""

    embeddings: Embeddings
    features: Tensor

    def view(self, *shape: int) -> LayerFactors:
        """Give h and w: `[B, Q, h, w]`."""
        return LayerFactors.of(self.embeddings, self.features.unflatten(2, shape[2:]))


@dataclass(frozen=True, eq=False, repr=False)
class LayerFactors(MaskFactors):
    """The mask logits of one layer of a model."""

    shared: SharedWork = field(default_factory=SharedWork)  # the work of its forward pass
    layer: int = 0  # the number of the product in that pass, from 1
    promised: torch.dtype = torch.float32  # the dtype in which the model would return these logits

    @staticmethod
    def of(embeddings: Embeddings, features: Tensor) -> LayerFactors:
        """Note a product of the mask head; under autocast its factors are rounded as the product would round them."""
        plain, shared, kind = embeddings.plain, embeddings.shared, features.device.type
        if torch.is_autocast_enabled(kind) and torch.float64 not in (plain.dtype, features.dtype):
            dtype = torch.get_autocast_dtype(kind)
            plain = plain.to(dtype)
            features = shared.rounded.get(features, dtype, lambda given: given.to(dtype))
        shared.layers += 1
        return LayerFactors(plain, features, shared=shared, layer=shared.layers, promised=features.dtype)

    def __add__(self, bias: Tensor) -> LayerFactors:
        """Add a bias `[1]`; there is one in a layer at most."""
        if self.bias is not None:
            return NotImplemented
        return replace(self, bias=bias, promised=torch.promote_types(self.promised, bias.dtype))

    def float(self) -> LayerFactors:
        """Promise float32: Accelerate asks for it of everything in half precision that a model returns."""
        return replace(self, promised=torch.float32)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Resize; what else there is to do with logits needs them, and they do not exist."""
        if func is interpolate and isinstance(args[0], cls):
            return args[0].resize(**(kwargs or {}))
        raise Cause(
            "masks that stay factors can be resized and given to the criterion, and nothing else",
            f"the model calls {getattr(func, '__name__', func)} with them",
            "train with patch(model) without factors, or call dense() on them",
        )

    @torch.no_grad()
    def resize(self, **options: Any) -> Tensor:
        """Compute the logits at another resolution, `[B, Q, h', w']`, for attention masks: without a graph.

        Args:
            options: those of `torch.nn.functional.interpolate`.
        """
        how = tuple((name, tuple(v) if isinstance(v, Sequence) else v) for name, v in sorted(options.items()))
        features = self.shared.resized.get(self.features, how, lambda given: interpolate(given, **options))
        logits = torch.einsum("bqd,bdhw->bqhw", self.embeddings, features)
        return logits if self.bias is None else logits + self.bias


def with_final_masks(output: Any, shared: SharedWork) -> Any:
    """Form the logits of the final layer in what a model returns: as before, a tensor with a graph.

    Those of the other layers stay `MaskFactors` there.
    """
    formed: dict[torch.dtype, Tensor] = {}

    def dense(value: Any) -> Any:
        if not isinstance(value, LayerFactors) or value.layer != shared.layers or value.shared is not shared:
            return value
        if value.promised not in formed:
            formed[value.promised] = value.dense().to(value.promised)
        return formed[value.promised]

    if isinstance(output, dict):
        for name, value in list(output.items()):
            output[name] = dense(value)
        return output
    return tuple(map(dense, output)) if isinstance(output, tuple) else output
