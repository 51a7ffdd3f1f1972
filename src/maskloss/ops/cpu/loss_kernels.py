# mypy: allow-untyped-defs
"""The CPU kernels of matched instances: uncertain points, the loss, and its gradient."""

from __future__ import annotations

import numpy as np

from maskloss._abi import F32, FIRST, IGNORE_OFFSET, IMAGE, LAYER, QUERY, STANDARD, TARGET, X, Y

from .blocks import (
    GRADIENT_ROWS,
    INTEGER_ROWS,
    NOT_GIVEN,
    POINT_ROWS,
    ROW,
    SPARE,
    VALUE_ROWS,
    block_length,
    choose_candidates,
    locate_block,
    points_of_block,
)
from .choose import list_marked, pick
from .compile import helper, kernel
from .formulas import add_focal_gradients, loss_gradients, sum_areas, sum_focal, sum_losses, sum_other_areas
from .generator import instance_key
from .memory import at, bare
from .planes import ADDRESS, BORDER, DTYPE, HEIGHT, STRIDE_B, STRIDE_Q, WIDTH, read_plane, write_plane
from .sampling import BLOCK, gather, scatter, scatter_apart
from .targets import read_targets, read_weights
from .threads import take


@helper()
def keep_soft(t, w, n, kept):
    """Keep t at points, -1 where the weight is 0."""
    for i in range(n):
        kept[i] = t[i] if w[i] != 0 else -1


@helper()
def _kept_soft(kept, n, t, w):
    for i in range(n):
        w[i] = 0 if kept[i] < 0 else 1
        t[i] = max(kept[i], 0)


@kernel
def uncertain_points(
    counter, items, values, coordinates, integers, sources, index, windows, image_ids, seed, numbers, border, points
):
    """Points `[N, P, 2]` of instances, chosen candidates first."""
    values, coordinates, integers = bare(values), bare(coordinates), bare(integers)
    sources, windows = bare(sources), bare(windows)
    num_points, num_candidates, num_uncertain = numbers.points, numbers.candidates, numbers.uncertain
    value_blocks = values[: VALUE_ROWS * BLOCK].reshape(VALUE_ROWS, BLOCK)
    point_blocks = coordinates[: POINT_ROWS * BLOCK].reshape(POINT_ROWS, BLOCK)
    ints = integers[: INTEGER_ROWS * ROW].reshape(INTEGER_ROWS, ROW)
    rest = integers[INTEGER_ROWS * ROW :]
    chosen = rest[2 * num_candidates + SPARE :]
    z = values[VALUE_ROWS * BLOCK : VALUE_ROWS * BLOCK + num_candidates]
    buffer = values[VALUE_ROWS * BLOCK + num_candidates :]
    bits = np.empty((num_candidates + 7) // 8, np.uint8)
    x, y = point_blocks[0], point_blocks[1]
    while True:
        item = take(counter)
        if item >= items:
            break
        layer, image, query, target = index[item, LAYER], index[item, IMAGE], index[item, QUERY], index[item, TARGET]
        key = instance_key(seed, image_ids[image], target)
        window = windows[image]
        if num_uncertain > 0:
            source = sources[layer]
            read_plane(source, image, query, buffer)
            blocks = (point_blocks, value_blocks, ints)
            choose_candidates(buffer, source, key, layer, window, numbers, border, z, blocks, rest, bits)
            list_marked(bits, chosen)
        first = 0
        while first < num_points:
            n = block_length(first, num_points, num_uncertain)
            points_of_block(first, n, numbers, NOT_GIVEN, item, key, layer, window, chosen, x, y, ints)
            for i in range(n):
                points[item, first + i, X] = x[i]
                points[item, first + i, Y] = y[i]
            first += n


@helper()
def _add_gradient(points, places, apart, sums, pitch, slopes, totals, alpha, gamma, kind):
    """Add the gradient of one instance to the buffer of its plane; z and the last row of `points` are overwritten.

    `slopes` are the gradients of its cross-entropy and Dice; `totals` are the sums of w, w s, w t and w s t (or what
    the kind of Dice has instead) over its points, which `points` and `places` describe.
    """
    fx, fy, z, t, w, s, grad = points[0], points[1], points[2], points[3], points[4], points[5], points[6]
    num_points = z.shape[0]
    weight, area, marked, both = totals
    ce = slopes[0] / max(weight, 1.0)
    if gamma >= 0:
        grad[:] = 0
        add_focal_gradients(z, t, w, num_points, ce, alpha, gamma, grad)
        ce = 0.0
    loss_gradients(z, t, w, s, num_points, ce, slopes[1], area, both, marked, kind)
    if gamma >= 0:
        for i in range(num_points):
            z[i] += grad[i]
    if apart:
        scatter_apart(sums, pitch, places, fx, fy, z, num_points)
    else:
        scatter(sums, pitch, places, fx, fy, z, num_points)


@kernel
def mask_loss(
    counter, items, values, coordinates, integers,
    sources, data, table, ignore, index, encoding, images, windows, image_ids, seed, given, numbers,
    border, nearest, alpha, gamma, kind,
    again, ce, dice, chosen_bits, soft, logits, order, starts, by_ce, by_dice, grads,
):  # fmt: skip
    """Cross-entropy and Dice of instances, and their gradient.

    ce = sum w f(z, t) / max(sum w, 1);  dice = 1 - (2 sum w s t + 1) / (sum w s + sum w t + 1)

    The last three sums are others for another `kind` of Dice (see `sum_other_areas`).

    A work item is a plane and its instances. `chosen_bits` gets the chosen candidates, a bit each. `soft` and `logits`
    get t (-1 where w = 0) and z at the points, if they have columns. `grads`, if it has rows, gets the gradient of
    `sum(by_ce ce + by_dice dice)`, for the layers whose row there has an address.

    The backward pass runs the same kernel `again`. It takes the choice, and what `soft` and `logits` hold, from the
    forward pass, reads the rest a second time, and writes gradients only.
    """
    values, coordinates, integers = bare(values), bare(coordinates), bare(integers)
    sources, windows, table, images, ignore = bare(sources), bare(windows), bare(table), bare(images), bare(ignore)
    chosen_bits, grads, order, starts = bare(chosen_bits), bare(grads), bare(order), bare(starts)
    soft, logits, index = bare(soft), bare(logits), bare(index)
    num_points, num_candidates, num_uncertain = numbers.points, numbers.candidates, numbers.uncertain
    value_blocks = values[: VALUE_ROWS * BLOCK].reshape(VALUE_ROWS, BLOCK)
    point_blocks = coordinates[: POINT_ROWS * BLOCK].reshape(POINT_ROWS, BLOCK)
    ints = integers[: INTEGER_ROWS * ROW].reshape(INTEGER_ROWS, ROW)
    # The points of one block, or of a whole instance where its gradient follows.
    width = num_points if grads.shape[0] > 0 else BLOCK
    stop = VALUE_ROWS * BLOCK + GRADIENT_ROWS * width
    points = values[VALUE_ROWS * BLOCK : stop].reshape(GRADIENT_ROWS, width)
    candidates, planes = values[stop : stop + num_candidates], values[stop + num_candidates :]
    places, rest = integers[INTEGER_ROWS * ROW : INTEGER_ROWS * ROW + width], integers[INTEGER_ROWS * ROW + width :]
    chosen = rest[2 * num_candidates + SPARE :]
    x, y, xs, ys = point_blocks[0], point_blocks[1], point_blocks[2], point_blocks[3]
    blocks = (point_blocks, value_blocks, ints)
    keeps_soft, keeps_logits = soft.shape[1] > 0, logits.shape[1] > 0
    while True:
        item = take(counter)
        if item >= items:
            break
        one = order[starts[item]]
        layer, image, query = index[one, LAYER], index[one, IMAGE], index[one, QUERY]
        source, window = sources[layer], windows[image]
        pitch = source[WIDTH] + 2 * BORDER
        size = (source[HEIGHT] + 2 * BORDER) * pitch
        buffer, sums = planes[:size], planes[size : 2 * size]
        if not (again and keeps_logits):
            read_plane(source, image, query, buffer)
        wanted = grads.shape[0] > 0 and grads[layer, ADDRESS] != 0
        if wanted:
            sums[:] = 0
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
            if num_uncertain > 0:
                marks = chosen_bits[instance]
                if not again:
                    choose_candidates(
                        buffer, source, key, layer, window, numbers, border, candidates, blocks, rest, marks
                    )
                list_marked(marks, chosen)
            loss, weight, area, marked, both = 0.0, 0.0, 0.0, 0.0, 0.0
            first = 0
            while first < num_points:
                n = block_length(first, num_points, num_uncertain)
                where = slice(first, first + n) if wanted else slice(0, n)
                fx, fy, z, t = points[0][where], points[1][where], points[2][where], points[3][where]
                w, s, at_points = points[4][where], points[5][where], places[where]
                points_of_block(first, n, numbers, given, instance, key, layer, window, chosen, x, y, ints)
                if wanted or first >= num_uncertain:
                    locate_block(given, ints, x, y, n, source, window, border, at_points, fx, fy)
                if again and keeps_logits:
                    z[:] = logits[instance, first : first + n]
                elif first < num_uncertain and not again:
                    pick(candidates, chosen[first : first + n], n, z)
                else:
                    gather(buffer, pitch, at_points, fx, fy, n, z)
                if again and keeps_soft:
                    _kept_soft(soft[instance, first : first + n], n, t, w)
                else:
                    read_targets(
                        x, y, n, row, data, encoding, border, nearest, xs, ys, ints, t, value_blocks[0], value_blocks[1]
                    )
                    read_weights(x, y, n, images[image], row[IGNORE_OFFSET], ignore, given.double, w)
                if again:
                    part = sum_areas(z, t, w, n, s)
                else:
                    by_entropy, part = sum_losses(z, t, w, n, s)
                    loss += by_entropy if gamma < 0 else sum_focal(z, t, w, n, alpha, gamma)
                    if keeps_soft:
                        keep_soft(t, w, n, soft[instance, first : first + n])
                    if keeps_logits:
                        logits[instance, first : first + n] = z
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
                apart = numbers.random_cells.rows > 0
                _add_gradient(points, places, apart, sums, pitch, slopes, totals, alpha, gamma, kind)
        if wanted:
            write_plane(sums, grads[layer], image, query)


@kernel
def scale_planes(counter, items, _values, _coordinates, _integers, index, order, starts, grads, factor):
    """Multiply the planes of instances, float32 or float64, by a number. A work item is a plane."""
    while True:
        item = take(counter)
        if item >= items:
            break
        one = order[starts[item]]
        grad = grads[index[one, LAYER]]
        first = index[one, IMAGE] * grad[STRIDE_B] + index[one, QUERY] * grad[STRIDE_Q]
        size = grad[HEIGHT] * grad[WIDTH]
        if grad[DTYPE] == F32:
            f32 = at(grad[ADDRESS] + first * 4, size, np.float32)
            for i in range(size):
                f32[i] *= np.float32(factor)
        else:
            f64 = at(grad[ADDRESS] + first * 8, size, np.float64)
            for i in range(size):
                f64[i] *= factor
