# mypy: allow-untyped-defs
"""The CPU kernels of plain point sampling."""

from __future__ import annotations

from .compile import kernel
from .planes import BORDER, HEIGHT, WIDTH, read_plane, write_plane
from .positions import given_points, locate, round_nearest
from .sampling import BLOCK, gather, gather_nearest, scatter, scatter_nearest
from .threads import take


@kernel
def point_sample(
    counter, items, values, coordinates, integers, sources, index, order, starts, given, nearest, border, result
):
    """Values `[N, P]` of maps at points. A work item is a map, so each is copied once."""
    num_points = result.shape[1]
    x, y = coordinates[:BLOCK], coordinates[BLOCK : 2 * BLOCK]
    fx, fy = values[:BLOCK], values[BLOCK : 2 * BLOCK]
    buffer = values[2 * BLOCK :]
    places = integers[:BLOCK]
    source = sources[0]
    height, width = source[HEIGHT], source[WIDTH]
    while True:
        item = take(counter)
        if item >= items:
            break
        read_plane(source, index[order[starts[item]]], 0, buffer)
        for place in range(starts[item], starts[item + 1]):
            row = order[place]
            for first in range(0, num_points, BLOCK):
                n = min(BLOCK, num_points - first)
                given_points(given, row, first, n, x, y)
                locate(x, y, n, height, width, border, places, fx, fy)
                out = result[row, first : first + n]
                if nearest:
                    round_nearest(places, fx, fy, n, height, width, border)
                    gather_nearest(buffer, places, n, out)
                else:
                    gather(buffer, width + 2 * BORDER, places, fx, fy, n, out)


@kernel
def point_sample_backward(
    counter, items, values, coordinates, integers, index, order, starts, given, nearest, border, by_value, grads
):
    """The adjoint of `point_sample`. A work item is a map: one thread adds up all that was read from it."""
    num_points = by_value.shape[1]
    x, y = coordinates[:BLOCK], coordinates[BLOCK : 2 * BLOCK]
    fx, fy = values[:BLOCK], values[BLOCK : 2 * BLOCK]
    places = integers[:BLOCK]
    height, width = grads[0, HEIGHT], grads[0, WIDTH]
    buffer = values[2 * BLOCK : 2 * BLOCK + (height + 2 * BORDER) * (width + 2 * BORDER)]
    while True:
        item = take(counter)
        if item >= items:
            break
        buffer[:] = 0
        for place in range(starts[item], starts[item + 1]):
            row = order[place]
            for first in range(0, num_points, BLOCK):
                n = min(BLOCK, num_points - first)
                given_points(given, row, first, n, x, y)
                locate(x, y, n, height, width, border, places, fx, fy)
                grad = by_value[row, first : first + n]
                if nearest:
                    round_nearest(places, fx, fy, n, height, width, border)
                    scatter_nearest(buffer, places, grad, n)
                else:
                    scatter(buffer, width + 2 * BORDER, places, fx, fy, grad, n)
        write_plane(buffer, grads[0], index[order[starts[item]]], 0)
