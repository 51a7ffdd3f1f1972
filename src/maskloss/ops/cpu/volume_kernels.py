# mypy: allow-untyped-defs
"""The CPU kernels of volumes: the loss of matched instances and its gradient, and the matching cost."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskloss._abi import (
    ALL_TARGETS,
    CANDIDATES,
    FIRST,
    IMAGE,
    LAYER,
    MATCHER,
    QUERY,
    RANDOM,
    SOFT,
    STANDARD,
    TARGET,
    VALUES,
    Y,
    Z,
)
from maskloss.points import Boxes

from .blocks import NOT_GIVEN, SPARE, block_length
from .choose import GROUP, LARGEST_KEY, list_marked, make_keys, mark_chosen, pick, threshold
from .compile import helper, kernel
from .cost_kernels import VECTOR, pair_costs, sort_pass
from .formulas import add_focal_gradients, loss_gradients, sum_areas, sum_focal, sum_losses, sum_other_areas
from .generator import instance_key
from .loss_kernels import keep_soft
from .memory import LINE, at, bare, fetch
from .planes import item_bytes
from .sampling import BLOCK
from .threads import take
from .volume_points import draw_volume, find_cells, find_places, given_cells, weigh_points
from .volume_sampling import (
    ADDRESS,
    DTYPE,
    PLAIN,
    STRIDE_B,
    STRIDE_Q,
    copy_volume,
    dense_grid,
    read_target,
    read_volume,
    scatter_volume,
    settle_edges,
    target_grid,
    view_volume,
)

_I32 = np.int32
# Sorted by z, this many of the matcher's points lie in slices that are fetched before they are read.
_AHEAD = 4 * BLOCK
# Rows of work spaces that hold a value, a coordinate or an integer for each point of a block.
VALUE_ROWS, POINT_ROWS, INTEGER_ROWS = 4, 3, 14
# Rows that hold the points of an instance: fractions, logits, targets, weights, sigmoids, a work space, and the shares
# of points at the edge of the volume; and, of integers, their places, and which of them lie at the edge.
GRADIENT_ROWS, PLACE_ROWS = 9, 2


class Numbers(NamedTuple):
    """How many points an instance has, and their boxes, without cells where points are independent."""

    points: int
    candidates: int
    uncertain: int
    candidate_boxes: Boxes
    random_boxes: Boxes


class Reading(NamedTuple):
    """How volumes and targets are read (see `Stack` and `Term`)."""

    frames: int
    linear: bool
    border: bool
    nearest: bool


@helper()
def _count_up(counters, first, n):
    for i in range(n):
        counters[i] = first + i


@helper()
def _choose(volume, grid, key, layer, window, numbers, border, z, coordinates, fractions, ints, integers, marks):
    """Draw candidates, read the logits there, and mark the chosen ones: z `[K]`, marks `[ceil(K / 8)]`."""
    candidates, uncertain = numbers.candidates, numbers.uncertain
    fx, fy, fz = fractions[0], fractions[1], fractions[2]
    counters, bits, cells, places, flags, edges = ints[0], ints[1:5], ints[5:8], ints[8], ints[9], ints[10]
    keys, space = integers[: candidates + GROUP], integers[candidates + GROUP :]
    for first in range(0, candidates, BLOCK):
        n = min(BLOCK, candidates - first)
        _count_up(counters, first, n)
        draw_volume(key, layer, CANDIDATES, counters, n, numbers.candidate_boxes, bits)
        find_cells(bits, n, window, grid, border, coordinates, cells, fx, fy, fz)
        count = find_places(cells, n, grid, places, flags, edges)
        part = z[first : first + n]
        read_volume(volume, grid, cells, places, fx, fy, fz, n, edges, count, part)
        make_keys(part, n, keys[first : first + n])
    keys[candidates:] = LARGEST_KEY
    limit, below, equal = threshold(keys, candidates, uncertain, space, marks)
    mark_chosen(keys, candidates, _I32(limit), uncertain - below, equal, marks)


@helper()
def _draw_block(first, n, numbers, key, layer, chosen, counters, bits):
    """Points `first:first + n` of an instance: chosen candidates, and then random ones."""
    if first < numbers.uncertain:
        draw_volume(key, layer, CANDIDATES, chosen[first : first + n], n, numbers.candidate_boxes, bits)
    else:
        _count_up(counters, first - numbers.uncertain, n)
        draw_volume(key, layer, RANDOM, counters, n, numbers.random_boxes, bits)


@helper()
def _locate(given, instance, first, bits, n, window, grid, border, xyz, cells, fx, fy, fz):
    if given.address != 0:
        given_cells(given, instance, first, n, grid, border, xyz, cells, fx, fy, fz)
    else:
        find_cells(bits, n, window, grid, border, xyz, cells, fx, fy, fz)


@helper()
def _add_gradient(grad, image, query, dense, points, places, edges, count, slopes, totals, alpha, gamma, kind):
    """Add the gradient of an instance to its volume, whose grid is `dense`; z and the work space are overwritten."""
    fx, fy, fz, z, t, w, s, extra = (
        points[0], points[1], points[2], points[3], points[4], points[5], points[6], points[7]
    )  # fmt: skip
    num_points = z.shape[0]
    weight, area, marked, both = totals
    ce = slopes[0] / max(weight, 1.0)
    if gamma >= 0:
        extra[:] = 0
        add_focal_gradients(z, t, w, num_points, ce, alpha, gamma, extra)
        ce = ce * 0
    loss_gradients(z, t, w, s, num_points, ce, slopes[1], area, both, marked, kind)
    if gamma >= 0:
        for i in range(num_points):
            z[i] += extra[i]
    for e in range(count):
        z[edges[e]] *= points[8, e]
    start = grad[ADDRESS] + (image * grad[STRIDE_B] + query * grad[STRIDE_Q]) * item_bytes(grad[DTYPE])
    written = at(start, dense.depth * dense.height * dense.width, z.dtype)
    scatter_volume(written, dense, places, fx, fy, fz, z, num_points)


@kernel
def volume_loss(
    counter, items, values, coordinates, integers,
    sources, data, table, ignore, index, encoding, images, windows, image_ids, seed, given, numbers, reading, alpha,
    gamma, kind, again, ce, dice, chosen_bits, soft, order, starts, by_ce, by_dice, grads,
):  # fmt: skip
    """Cross-entropy and Dice of instances, and their gradient: see `loss_kernels.mask_loss`.

    A work item is a volume and its instances. Gradients are added to those of the layers, which `grads` describes and
    which are in the type of sums, for the layers whose row there has an address.
    """
    values, coordinates, integers = bare(values), bare(coordinates), bare(integers)
    sources, windows, table, images, index = bare(sources), bare(windows), bare(table), bare(images), bare(index)
    chosen_bits, soft, grads, order, starts = bare(chosen_bits), bare(soft), bare(grads), bare(order), bare(starts)
    ignore = bare(ignore)
    num_points, num_candidates, num_uncertain = numbers.points, numbers.candidates, numbers.uncertain
    xyz = coordinates[: POINT_ROWS * BLOCK].reshape(POINT_ROWS, BLOCK)
    blocks = values[: VALUE_ROWS * BLOCK].reshape(VALUE_ROWS, BLOCK)
    ints = integers[: INTEGER_ROWS * BLOCK].reshape(INTEGER_ROWS, BLOCK)
    counters, bits, cells, flags, edges, codes = ints[0], ints[1:5], ints[5:8], ints[9], ints[10], ints[11:14]
    # The points of one block, or of a whole instance where its gradient follows.
    width = num_points if grads.shape[0] > 0 else BLOCK
    stop = VALUE_ROWS * BLOCK + GRADIENT_ROWS * width
    points = values[VALUE_ROWS * BLOCK : stop].reshape(GRADIENT_ROWS, width)
    candidates, buffer = values[stop : stop + num_candidates], values[stop + num_candidates :]
    stop = INTEGER_ROWS * BLOCK + PLACE_ROWS * width
    places, moved = integers[INTEGER_ROWS * BLOCK : stop].reshape(PLACE_ROWS, width)
    rest = integers[stop:]
    chosen = rest[2 * num_candidates + SPARE :]
    while True:
        item = take(counter)
        if item >= items:
            break
        one = order[starts[item]]
        layer, image, query = index[one, LAYER], index[one, IMAGE], index[one, QUERY]
        window = windows[image]
        copy_volume(sources[layer], image, query, buffer)
        volume, grid = view_volume(sources[layer], image, query, reading.linear, buffer)
        # A candidate reads four lines: most of a volume of no more lines than there are candidates.
        if sources[layer, PLAIN] and not again and volume.size * volume.itemsize <= LINE * num_candidates:
            fetch(volume, 0, volume.size)
        dense = dense_grid(grid)
        gaps = dense.by_slice != grid.by_slice or dense.by_row != grid.by_row
        wanted = grads.shape[0] > 0 and grads[layer, ADDRESS] != 0
        for place in range(starts[item], starts[item + 1]):
            instance = order[place]
            slopes = (by_ce[instance], by_dice[instance]) if wanted else (0.0, 0.0)
            # An instance of weight 0 must not bring in the NaN of its logits.
            live = slopes[0] != 0 or slopes[1] != 0
            if again and not live:
                continue
            target = index[instance, TARGET]
            row = table[images[image, FIRST] + target]
            key = instance_key(seed, image_ids[image], target)
            lattice = target_grid(row, reading.frames, reading.linear)
            alike = lattice.depth == grid.depth and lattice.height == grid.height and lattice.width == grid.width
            if num_uncertain > 0:
                marks = chosen_bits[instance]
                if not again:
                    _choose(
                        volume, grid, key, layer, window, numbers, reading.border, candidates, xyz, blocks, ints, rest,
                        marks,
                    )  # fmt: skip
                list_marked(marks, chosen)
            loss, weight, area, marked, both, total, first = 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0
            while first < num_points:
                n = block_length(first, num_points, num_uncertain)
                where = slice(first, first + n) if wanted else slice(0, n)
                fx, fy, fz, z = points[0][where], points[1][where], points[2][where], points[3][where]
                t, w, s, at_points = points[4][where], points[5][where], points[6][where], places[where]
                uncertain = first < num_uncertain
                if given.address == 0:
                    _draw_block(first, n, numbers, key, layer, chosen, counters, bits)
                tx, ty, tz = (fx, fy, fz) if alike else (blocks[0][:n], blocks[1][:n], blocks[2][:n])
                _locate(given, instance, first, bits, n, window, lattice, reading.border, xyz, cells, tx, ty, tz)
                read_target(
                    cells, tx, ty, tz, n, row, lattice, data, encoding, reading.border, reading.nearest, codes, t, s
                )
                if not alike:
                    _locate(given, instance, first, bits, n, window, grid, reading.border, xyz, cells, fx, fy, fz)
                count = 0
                if wanted or again or not uncertain:
                    count = find_places(cells, n, grid, at_points, flags, edges)
                if uncertain and not again:
                    pick(candidates, chosen[first : first + n], n, z)
                else:
                    read_volume(volume, grid, cells, at_points, fx, fy, fz, n, edges, count, z)
                if wanted:
                    total = settle_edges(cells, grid, edges, count, fx, fy, fz, first, moved, points[8], total)
                    if gaps:  # the gradient has none
                        find_places(cells, n, dense, at_points, flags, edges)
                weigh_points(
                    given, instance, first, bits, n, window, images[image], reading.frames, ignore, xyz, w
                )  # fmt: skip
                if again:
                    part = sum_areas(z, t, w, n, s)
                else:
                    by_entropy, part = sum_losses(z, t, w, n, s)
                    loss += by_entropy if gamma < 0 else sum_focal(z, t, w, n, alpha, gamma)
                    if encoding >= VALUES:
                        keep_soft(t, w, n, soft[instance, first : first + n])
                areas = part[1:] if kind == STANDARD else sum_other_areas(t, w, n, s, kind)
                weight += part[0]
                area += areas[0]
                marked += areas[1]
                both += areas[2]
                first += n
            if not again:
                ce[instance] = loss / max(weight, 1.0)
                dice[instance] = 1.0 - (2.0 * both + 1.0) / (area + marked + 1.0)
            if live:
                totals = (weight, area, marked, both)
                _add_gradient(
                    grads[layer], image, query, dense, points, places, moved, total, slopes, totals, alpha, gamma, kind
                )


# --------------------------------------------------------------------------------------------------- the matching cost


@kernel
def matching_points(
    counter, items, _values, coordinates, integers,
    image_ids, seed, boxes, num_points, slabs, windows, images, frames, ignore, points, weights,
):  # fmt: skip
    """The matcher's points of each volume as bits, `[B, 3, P]`, sorted into slabs of z and there by y, for the caches.

    And their weights. A work item is a volume.
    """
    xyz = coordinates.reshape(POINT_ROWS, num_points)
    order, space, rows = integers[: 3 * num_points].reshape(3, num_points)
    bits = integers[3 * num_points : 7 * num_points].reshape(4, num_points)
    counts = np.empty(4097, np.int64)
    while True:
        image = take(counter)
        if image >= items:
            break
        key = instance_key(seed, image_ids[image], ALL_TARGETS)
        _count_up(order, 0, num_points)
        draw_volume(key, 0, MATCHER, order, num_points, boxes, bits)
        for i in range(num_points):
            rows[i] = _I32((np.int64(bits[Z, i]) * slabs) >> 24)
        sort_pass(bits[Y], 12, 4096, num_points, order, space, counts)
        sort_pass(rows, 0, slabs, num_points, space, order, counts)
        for axis in range(3):
            for i in range(num_points):
                points[image, axis, i] = bits[axis, order[i]]
        weigh_points(
            NOT_GIVEN, 0, 0, points[image], num_points, windows[image], images[image], frames, ignore, xyz,
            weights[image],
        )  # fmt: skip


@helper()
def _take_bits(points, first, n, bits):
    for axis in range(3):
        bits[axis, :n] = points[axis, first : first + n]


@kernel
def matching_targets(
    counter, items, values, coordinates, integers,
    points, windows, owner, table, data, encoding, reading, weights, kind, shares, sums, active,
):  # fmt: skip
    """The values w t at the points of their volumes, the first P columns of `shares` `[T_all, _]`.

    And which vectors of them are not all 0, and the sums of w t, or w t^2. A work item is a target.
    """
    xyz = coordinates[: POINT_ROWS * BLOCK].reshape(POINT_ROWS, BLOCK)
    blocks = values[: VALUE_ROWS * BLOCK].reshape(VALUE_ROWS, BLOCK)
    ints = integers[: INTEGER_ROWS * BLOCK].reshape(INTEGER_ROWS, BLOCK)
    bits, cells, num_points = ints[1:5], ints[5:8], points.shape[2]
    while True:
        item = take(counter)
        if item >= items:
            break
        image, row, total = owner[item], table[item], 0.0
        grid = target_grid(row, reading.frames, reading.linear)
        for first in range(0, num_points, BLOCK):
            n = min(BLOCK, num_points - first)
            fx, fy, fz, t = blocks[0][:n], blocks[1][:n], blocks[2][:n], shares[item, first : first + n]
            _take_bits(points[image], first, n, bits)
            find_cells(bits, n, windows[image], grid, reading.border, xyz, cells, fx, fy, fz)
            read_target(
                cells, fx, fy, fz, n, row, grid, data, encoding, reading.border, reading.nearest, ints[11:14],
                t, blocks[3],
            )  # fmt: skip
            for i in range(n):
                t[i] *= weights[image, first + i]
                total += t[i] * (t[i] if kind == SOFT else 1)
                if t[i] != 0:
                    active[item, (first + i) // VECTOR] = True
        sums[item] = total


@kernel
def match_volumes(
    counter, items, values, coordinates, integers,
    points, sources, windows, reading, together, weights, counts, images, starts, first_points, length, offset,
    shares, sums, alpha, gamma, kind, ce, dice,
):  # fmt: skip
    """Both mask terms of all pairs (see `cost_kernels.match_cost`).

    A work item are some queries of a volume and layer, `together`: they share what depends on the points alone.
    """
    values, coordinates, integers, points, sources = (
        bare(values), bare(coordinates), bare(integers), bare(points), bare(sources)
    )  # fmt: skip
    windows, weights, images, shares, sums = bare(windows), bare(weights), bare(images), bare(shares), bare(sums)
    starts, first_points, length, offset = bare(starts), bare(first_points), bare(length), bare(offset)
    ce, dice = bare(ce), bare(dice)
    xyz = coordinates[: POINT_ROWS * BLOCK].reshape(POINT_ROWS, BLOCK)
    blocks = values[: VALUE_ROWS * BLOCK].reshape(VALUE_ROWS, BLOCK)
    ints = integers[: INTEGER_ROWS * BLOCK].reshape(INTEGER_ROWS, BLOCK)
    fx, fy, fz, bits, cells, places, flags, edges = (
        blocks[0], blocks[1], blocks[2], ints[1:5], ints[5:8], ints[8], ints[9], ints[10]
    )  # fmt: skip
    num_points, batch, queries = points.shape[2], ce.shape[1], ce.shape[2]
    padded, parts = num_points + VECTOR, -(-queries // together)
    stop = VALUE_ROWS * BLOCK + (together + 1) * padded
    z = values[VALUE_ROWS * BLOCK : stop].reshape(together + 1, padded)
    s, buffer = z[together], values[stop:]
    z[:, num_points:] = 0
    while True:
        item = take(counter)
        if item >= items:
            break
        layer, image, start = item // (batch * parts), item // parts % batch, item % parts * together
        source, count = sources[layer], min(together, queries - start)
        # Only a volume that is alone is ever copied.
        copy_volume(source, image, start, buffer)
        fetched = 0
        for first in range(0, num_points, BLOCK):
            n = min(BLOCK, num_points - first)
            _, grid = view_volume(source, image, start, reading.linear, buffer)
            _take_bits(points[image], first, n, bits)
            find_cells(bits, n, windows[image], grid, reading.border, xyz, cells, fx, fy, fz)
            moved = find_places(cells, n, grid, places, flags, edges)
            done = fetched
            for row in range(count):
                volume, _ = view_volume(source, image, start + row, reading.linear, buffer)
                part = z[row, first : first + n]
                if source[PLAIN] and volume.size * volume.itemsize <= 2 * LINE * num_points:
                    fetched = min(volume.size * (first + _AHEAD) // num_points, volume.size)
                    fetch(volume, done, fetched)
                read_volume(volume, grid, cells, places, fx, fy, fz, n, edges, moved, part)
        for row in range(count):
            query = start + row
            pair_costs(
                z[row], s, weights[image], counts[image], images[image], starts, first_points, length, offset, shares,
                sums, alpha, gamma, kind, ce[layer, image, query], dice[layer, image, query], (0, 0),
            )  # fmt: skip
