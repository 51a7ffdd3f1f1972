"""The Hungarian assignment of all layers and images: one trip to the host, whatever their number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from maskloss._abi import IMAGE, INDEX_COLUMNS, LARGEST_COST, LAYER, QUERY, TARGET, price_of_broken
from maskloss._numbers import label_cause

if TYPE_CHECKING:
    from numpy.typing import NDArray


def assign(
    cost: Tensor,
    labels: Tensor,
    num_targets: Sequence[int],
    num_classes: int,
    groups: int,
    solve: Callable[..., NDArray[np.int64]],
) -> Tensor:
    """Match queries to targets on the host; see `ops.assign`.

    Args:
        cost: `[L, B, Q, T_max]`.
        labels: int64 `[T_all]`, or `[0]`. They travel to the host with the costs, so that checking them costs no trip
            of its own.
        num_targets: targets of each image.
        num_classes: labels must lie in [0, num_classes).
        groups: of queries.
        solve: makes the rows `[N, 4]` below from the costs, on the host, and `num_targets`.

    Returns:
        int64 1-D on the device of `cost`, two tables in one, so that they make one trip. First `[N, 4]`, rows (layer,
        image, query, target), sorted by layer, image, query; then `[L, B, Q]`, the class of each query's target,
        `num_classes` for a query without one.

    Raises:
        Cause: a label outside the classes.
    """
    host, classes = _to_host(cost, labels)
    check_labels(classes, num_classes)
    index = _grouped(host, num_targets, groups, solve)
    wanted = np.full(host.shape[:3], num_classes, dtype=np.int64)
    if classes.size:
        image, first = index[:, IMAGE], np.cumsum([0, *num_targets])
        wanted[index[:, LAYER], image, index[:, QUERY]] = classes[first[image] + index[:, TARGET]]
    answer = torch.from_numpy(np.concatenate([index.reshape(-1), wanted.reshape(-1)]))
    if cost.device.type == "cpu":
        return answer
    if cost.device.type == "cuda":
        answer = answer.pin_memory()
    return answer.to(cost.device, non_blocking=answer.is_pinned())


def _grouped(
    cost: NDArray[Any], num_targets: Sequence[int], groups: int, solve: Callable[..., NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Solve a group of queries as if it were an image of its own."""
    if groups == 1:
        return solve(cost, num_targets)
    layers, batch, queries, widest = cost.shape
    each = queries // groups
    index = solve(cost.reshape(layers, batch * groups, each, widest), np.repeat(num_targets, groups).tolist())
    index[:, IMAGE], group = np.divmod(index[:, IMAGE], groups)
    index[:, QUERY] += group * each
    return index


def check_labels(labels: NDArray[Any], num_classes: int) -> None:
    """Raise if labels are outside [0, num_classes)."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.size:
        first = int(wrong[0])
        raise label_cause(num_classes, f"{wrong.size} of {labels.size} labels do not, the first is {first}", first)


def _to_host(cost: Tensor, labels: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    if cost.device.type == "cpu":
        return cost.numpy(), labels.cpu().numpy()
    together = torch.cat([cost.flatten(), labels.to(cost.dtype)]).cpu().numpy()
    return together[: cost.numel()].reshape(cost.shape), together[cost.numel() :]


def solve_with_scipy(cost: NDArray[Any], num_targets: Sequence[int]) -> NDArray[np.int64]:
    """Solve all images and layers, one after another, where there are no kernels for it: int64 `[N, 4]`."""
    from scipy.optimize import linear_sum_assignment  # a tenth of a second that `import maskloss` need not take

    index = [np.empty((0, INDEX_COLUMNS), dtype=np.int64)]
    for layer, image in np.ndindex(*cost.shape[:2]):
        table = np.asarray(cost[layer, image, :, : num_targets[image]], dtype=np.float64)
        usable = np.abs(table) <= LARGEST_COST
        if not usable.all():
            largest = float(np.abs(table[usable]).max(initial=0.0))
            table = np.where(usable, table, price_of_broken(min(table.shape), largest))
        queries, targets = linear_sum_assignment(table)
        rows = np.empty((len(queries), INDEX_COLUMNS), dtype=np.int64)
        rows[:, LAYER], rows[:, IMAGE], rows[:, QUERY], rows[:, TARGET] = layer, image, queries, targets
        index.append(rows)
    return np.concatenate(index)
