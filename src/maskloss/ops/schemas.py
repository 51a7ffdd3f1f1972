"""The schemas of the operations: the groups of `abi`, flat, as the dispatcher needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskloss._abi import accumulation_dtype, widest

# The groups, flat: their order is that of the fields.
INSTANCES = "Tensor[] logits, Tensor rows, SymInt[] layer_sizes"
TARGETS = "str encoding, Tensor data, Tensor table, Tensor images, Tensor windows, Tensor ignore"
DRAW = "Tensor image_ids, Tensor seed, SymInt num_points, SymInt num_candidates, SymInt num_uncertain, str layout"
TERM = "str padding, str target_mode, float focal_alpha, float focal_gamma, str dice"
JOB = f"{TARGETS}, {DRAW}, {TERM}, Tensor? points"
GRADIENTS = "Tensor grad_ce, Tensor grad_dice"
LOSSES = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
SAVED = "Tensor chosen, Tensor soft, Tensor kept_logits"
MATCHED = "Tensor index, SymInt[] counts"
FACTORS = "Tensor[] embeddings, Tensor[] biases, Tensor[] features, int[] features_of, int scratch_bytes"
SAMPLE = "Tensor maps, Tensor index, Tensor points, str mode, str padding"

# The compiler's own CUDA graphs must leave out what waits for the device or reads a seed on the host: a graph would
# read it once and draw the same points ever after. Older releases of PyTorch cannot leave an operation out.
NOT_CAPTURED: Any = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


def operation(name: str, arguments: str, result: str, **options: Any) -> Any:
    """Register the decorated function as an operation of the library."""
    schema = f"({arguments}) -> {result}"
    return torch.library.custom_op(f"maskloss::{name}", mutates_args=(), schema=schema, **options)


def new_costs(like: Tensor, layers: int, shape: Sequence[int], num_targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Allocate both mask terms of a matching cost, `[L, B, Q, T_max]`; `shape` is B and Q."""
    size, dtype = (layers, *shape, widest(num_targets)), accumulation_dtype(like.dtype)
    return like.new_empty(size, dtype=dtype), like.new_empty(size, dtype=dtype)
