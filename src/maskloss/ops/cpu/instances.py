# mypy: allow-untyped-defs
"""The CPU kernels of matched instances: uncertain points, the loss, and its gradient."""

from __future__ import annotations

import numpy as np

from maskloss._abi import F32, FIRST, IGNORED, IMAGE, LAYER, QUERY, TARGET, VALUES, X, Y

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
from .generator import instance_key
from .losses import add_focal_gradients, loss_gradients, sum_areas, sum_focal, sum_losses
from .memory import at, bare
from .planes import ADDRESS, BORDER, DTYPE, HEIGHT, STRIDE_B, STRIDE_Q, WIDTH, read_plane, write_plane
from .sampling import BLOCK, gather, scatter, scatter_apart
from .targets import mark_ignored, read_targets, values_of_codes
from .threads import take


@helper()
def _weights(codes, n, w):
    for i in range(n):
        w[i] = 0 if codes[i] & IGNORED else 1


@helper()
def _keep_codes(codes, n, kept):
    for i in range(n):
        kept[i] = np.uint8(codes[i])


@helper()
def _kept_codes(kept, n, codes):
    for i in range(n):
        codes[i] = kept[i]


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
def _add_gradient(points, places, apart, sums, pitch, by_ce, by_dice, totals, alpha, gamma):
    """Add the gradient of one instance to the buffer of its plane; z and the last row of `points` are overwritten.

    `totals` are the sums of w, w s, w t and w s t over its points, which `points` and `places` describe.
    """
    fx, fy, z, t, w, s, grad = points[0], points[1], points[2], points[3], points[4], points[5], points[6]
    num_points = z.shape[0]
    weight, area, marked, both = totals
    ce = by_ce / max(weight, 1.0)
    if gamma >= 0:
        grad[:] = 0
        add_focal_gradients(z, t, w, num_points, ce, alpha, gamma, grad)
        ce = 0.0
    loss_gradients(z, t, w, s, num_points, ce, by_dice, area, both, marked)
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
    border, nearest, alpha, gamma, ce, dice, chosen_bits, corner_codes, corner_values, kept,
    order, starts, by_ce, by_dice, grads,
):  # fmt: skip
    """Cross-entropy and Dice of instances, the chosen candidates as bits, and the targets at their points.

    ce = sum w f(z, t) / max(sum w, 1);  dice = 1 - (2 sum w s t + 1) / (sum w s + sum w t + 1)

    A work item is a plane and its instances. `kept` gets the logits at the points, if it has rows. `grads`, if it has
    rows, gets the gradient of `sum(by_ce ce + by_dice dice)`, for the layers whose row there has an address.
    """
    values, coordinates, integers = bare(values), bare(coordinates), bare(integers)
    sources, windows, table, images, ignore = bare(sources), bare(windows), bare(table), bare(images), bare(ignore)
    chosen_bits, grads, order, starts = bare(chosen_bits), bare(grads), bare(order), bare(starts)
    corner_codes, corner_values, kept, index = bare(corner_codes), bare(corner_values), bare(kept), bare(index)
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
        read_plane(source, image, query, buffer)
        ahead = grads.shape[0] > 0 and grads[layer, ADDRESS] != 0
        if ahead:
            sums[:] = 0
        for place in range(starts[item], starts[item + 1]):
            instance = order[place]
            target = index[instance, TARGET]
            row = table[images[image, FIRST] + target]
            key = instance_key(seed, image_ids[image], target)
            if num_uncertain > 0:
                marks = chosen_bits[instance]
                choose_candidates(buffer, source, key, layer, window, numbers, border, candidates, blocks, rest, marks)
                list_marked(marks, chosen)
            weight, loss, area, marked, both = 0.0, 0.0, 0.0, 0.0, 0.0
            first = 0
            while first < num_points:
                n = block_length(first, num_points, num_uncertain)
                where = slice(first, first + n) if ahead else slice(0, n)
                fx, fy, z, t = points[0][where], points[1][where], points[2][where], points[3][where]
                w, s, at_points = points[4][where], points[5][where], places[where]
                points_of_block(first, n, numbers, given, instance, key, layer, window, chosen, x, y, ints)
                if ahead or first >= num_uncertain:
                    locate_block(given, ints, x, y, n, source, window, border, at_points, fx, fy)
                if first < num_uncertain:
                    pick(candidates, chosen[first : first + n], n, z)
                else:
                    gather(buffer, pitch, at_points, fx, fy, n, z)
                if kept.shape[0] > 0:
                    kept[instance, first : first + n] = z
                read_targets(
                    x, y, n, row, data, encoding, border, nearest, xs, ys, ints, t, value_blocks[0], value_blocks[1]
                )
                mark_ignored(x, y, n, images[image], ignore, given.double, ints[0])
                _weights(ints[0], n, w)
                if encoding < VALUES:
                    _keep_codes(ints[0], n, corner_codes[instance, first : first + n])
                else:
                    for i in range(n):
                        corner_values[instance, first + i] = t[i] if ints[0, i] & IGNORED == 0 else -1
                sums_of_block = sum_losses(z, t, w, n, s)
                weight += sums_of_block[0]
                area += sums_of_block[2]
                marked += sums_of_block[3]
                both += sums_of_block[4]
                loss += sums_of_block[1] if gamma < 0 else sum_focal(z, t, w, n, alpha, gamma)
                first += n
            ce[instance] = loss / max(weight, 1.0)
            dice[instance] = 1.0 - (2.0 * both + 1.0) / (area + marked + 1.0)
            if ahead and (by_ce[instance] != 0.0 or by_dice[instance] != 0.0):
                totals = (weight, area, marked, both)
                apart = numbers.random_cells.rows > 0
                _add_gradient(
                    points, places, apart, sums, pitch, by_ce[instance], by_dice[instance], totals, alpha, gamma
                )
        if ahead:
            write_plane(sums, grads[layer], image, query)


@kernel
def mask_loss_backward(
    counter, items, values, coordinates, integers,
    sources, table, index, encoding, images, windows, image_ids, seed, given, numbers,
    border, nearest, alpha, gamma, by_ce, by_dice, chosen_bits, corner_codes, corner_values,
    kept, order, starts, grads,
):  # fmt: skip
    """The gradient of `mask_loss`. A work item is a plane: its instances are added in their order, by one thread.

    The logits at the points are those in `kept`, or, if that has no rows, are read from the planes again.
    """
    values, coordinates, integers = bare(values), bare(coordinates), bare(integers)
    sources, windows, table, images = bare(sources), bare(windows), bare(table), bare(images)
    chosen_bits, grads = bare(chosen_bits), bare(grads)
    corner_codes, corner_values, kept = bare(corner_codes), bare(corner_values), bare(kept)
    num_points, num_uncertain = numbers.points, numbers.uncertain
    point_blocks = coordinates[: POINT_ROWS * BLOCK].reshape(POINT_ROWS, BLOCK)
    ints = integers[: INTEGER_ROWS * ROW].reshape(INTEGER_ROWS, ROW)
    places = integers[INTEGER_ROWS * ROW : INTEGER_ROWS * ROW + num_points]
    chosen = integers[INTEGER_ROWS * ROW + num_points :]
    space = values[: 2 * BLOCK].reshape(2, BLOCK)
    points = values[2 * BLOCK : 2 * BLOCK + GRADIENT_ROWS * num_points].reshape(GRADIENT_ROWS, num_points)
    fx, fy, z, t, w, s = points[0], points[1], points[2], points[3], points[4], points[5]
    planes = values[2 * BLOCK + GRADIENT_ROWS * num_points :]
    x, y, xs, ys = point_blocks[0], point_blocks[1], point_blocks[2], point_blocks[3]
    while True:
        item = take(counter)
        if item >= items:
            break
        one = order[starts[item]]
        layer, image, query = index[one, LAYER], index[one, IMAGE], index[one, QUERY]
        source, window = sources[layer], windows[image]
        height, width = source[HEIGHT], source[WIDTH]
        pitch = width + 2 * BORDER
        size = (height + 2 * BORDER) * pitch
        sums, logits = planes[:size], planes[size:]
        if kept.shape[0] == 0:
            read_plane(source, image, query, logits)
        sums[:] = 0
        for place in range(starts[item], starts[item + 1]):
            instance = order[place]
            if by_ce[instance] == 0.0 and by_dice[instance] == 0.0:
                continue  # an instance of weight 0 must not bring in the NaN of its logits
            target = index[instance, TARGET]
            row = table[images[image, FIRST] + target]
            key = instance_key(seed, image_ids[image], target)
            if num_uncertain > 0:
                list_marked(chosen_bits[instance], chosen)
            weight, area, marked, both = 0.0, 0.0, 0.0, 0.0
            first = 0
            while first < num_points:
                n = block_length(first, num_points, num_uncertain)
                last = first + n
                points_of_block(first, n, numbers, given, instance, key, layer, window, chosen, x, y, ints)
                locate_block(
                    given, ints, x, y, n, source, window, border, places[first:last], fx[first:last], fy[first:last]
                )
                if kept.shape[0] > 0:
                    z[first:last] = kept[instance, first:last]
                else:
                    gather(logits, pitch, places[first:last], fx[first:last], fy[first:last], n, z[first:last])
                if encoding < VALUES:
                    _kept_codes(corner_codes[instance, first:last], n, ints[0])
                    values_of_codes(x, y, n, row, border, nearest, xs, ys, ints, t[first:last], space[0], space[1])
                else:
                    for i in range(n):
                        saved = corner_values[instance, first + i]
                        ints[0, i] = IGNORED if saved < 0 else 0
                        t[first + i] = max(saved, 0)
                _weights(ints[0], n, w[first:last])
                part = sum_areas(z[first:last], t[first:last], w[first:last], n, s[first:last])
                weight += part[0]
                area += part[1]
                marked += part[2]
                both += part[3]
                first += n
            totals = (weight, area, marked, both)
            apart = numbers.random_cells.rows > 0
            _add_gradient(points, places, apart, sums, pitch, by_ce[instance], by_dice[instance], totals, alpha, gamma)
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
