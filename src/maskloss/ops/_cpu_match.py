"""The CPU kernels of the matching cost.

The points of an image are the same for all its queries and layers, so what depends on them alone is computed once: they
are sorted by y, which makes a pass over a plane sequential, and the targets there are kept as lists of the points that
lie in each, because most points lie in few targets. Both cost terms are linear in t, so a plane then needs one gather,
one pass for softplus and sigmoid, and one sparse sum per target.
"""

from __future__ import annotations

import numpy as np

from ._cpu_choose import GROUP
from ._cpu_loss import power, sigmoid_softplus
from ._cpu_random import U32, draw_bits, instance_key, points_of_bits, threefry
from ._cpu_sampling import BLOCK, BORDER, HEIGHT, WIDTH, gather, locate, read_rows
from ._cpu_targets import COUNT, FIRST, IGNORED, list_inside, mark_ignored, read_targets
from ._cpu_threads import helper, kernel, take

_MATCHER = 2
_ALL_TARGETS = 0xFFFFFFFF
# Rows of a plane that are copied together: with a border they fit into the first-level cache.
BAND_BYTES = 16384


@helper()
def _order_by_y(key, num_points, order, space):  # type: ignore[no-untyped-def]
    """Sort point numbers by the 24 bits of y: two stable counting passes of 12 bits."""
    k0, k1 = key
    counts = np.empty(4097, np.int64)
    high = np.empty(num_points, np.uint32)
    for i in range(num_points):
        _, r1 = threefry(k0, k1, U32(i), U32(_MATCHER << 16))
        high[i] = U32(r1 >> U32(8))
        space[i] = i
    for shift in (0, 12):
        source, target = (space, order) if shift == 0 else (order, space)
        counts[:] = 0
        for i in range(num_points):
            counts[((high[i] >> U32(shift)) & 4095) + 1] += 1
        for digit in range(4096):
            counts[digit + 1] += counts[digit]
        for i in range(num_points):
            point = source[i]
            digit = (high[point] >> U32(shift)) & 4095
            target[counts[digit]] = point
            counts[digit] += 1
    order[:num_points] = space[:num_points]


@kernel
def draw(
    counter, items, values, coordinates, integers, image_ids, seed, windows, images, ignore, num_points, points, weights
):  # type: ignore[no-untyped-def]
    """The matcher's points of each image, sorted by y: x and y `[B, 2, P]` and their weights `[B, P]`."""
    order, codes = integers[:num_points], integers[num_points : 2 * num_points]
    bits = integers[2 * num_points : 4 * num_points].reshape(2, num_points)
    while True:
        image = take(counter)
        if image >= items:
            break
        key = instance_key(seed, image_ids[image], _ALL_TARGETS)
        _order_by_y(key, num_points, order, codes)
        x, y = points[image, 0], points[image, 1]
        draw_bits(key, U32(_MATCHER << 16), order, num_points, bits)
        points_of_bits(bits, num_points, windows[image], x, y)
        codes[:num_points] = 0
        mark_ignored(x, y, num_points, images[image], ignore, False, codes)
        for i in range(num_points):
            weights[image, i] = 0 if codes[i] & IGNORED else 1


@kernel
def count_inside(counter, items, values, coordinates, integers, points, images, table, border, owner, counts):  # type: ignore[no-untyped-def]
    """How many points may lie in each target: room for the lists of `list_targets`."""
    num_points = points.shape[2]
    while True:
        item = take(counter)
        if item >= items:
            break
        x, y = points[owner[item], 0], points[owner[item], 1]
        counts[item] = list_inside(
            x, y, num_points, table[item], border, integers[: num_points + GROUP], integers[num_points + GROUP :]
        )


@kernel
def list_targets(
    counter, items, values, coordinates, integers,
    points, weights, table, data, encoding, border, nearest, owner, starts, ends, members, shares, sums,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """For each target the points with w t > 0, in lists: point numbers, w t, and their sum."""
    num_points = points.shape[2]
    ints = integers[: 3 * (BLOCK + GROUP)].reshape(3, BLOCK + GROUP)
    t, fx, fy = values[:BLOCK], values[BLOCK : 2 * BLOCK], values[2 * BLOCK : 3 * BLOCK]
    xs, ys = coordinates[:BLOCK], coordinates[BLOCK : 2 * BLOCK]
    while True:
        item = take(counter)
        if item >= items:
            break
        image = owner[item]
        count = starts[item]
        total = 0.0
        for first in range(0, num_points, BLOCK):
            n = min(BLOCK, num_points - first)
            x, y = points[image, 0, first : first + n], points[image, 1, first : first + n]
            read_targets(x, y, n, table[item], data, encoding, border, nearest, xs, ys, ints, t, fx, fy)
            for i in range(n):
                share = t[i] * weights[image, first + i]
                if share != 0:
                    members[count] = first + i
                    shares[count] = share
                    total += share
                    count += 1
        ends[item] = count
        sums[item] = total


@kernel
def place_points(counter, items, values, coordinates, integers, points, sizes, border, rows_per_band, index, fx, fy, bands):  # type: ignore[no-untyped-def]
    """For each image and plane size: places in a band's buffer, fractions, and where the points of each band begin."""
    num_points = points.shape[2]
    while True:
        item = take(counter)
        if item >= items:
            break
        image, size = item // sizes.shape[0], item % sizes.shape[0]
        height, width, rows = sizes[size, 0], sizes[size, 1], rows_per_band[size]
        pitch = width + 2 * BORDER
        places = index[image, size]
        locate(
            points[image, 0], points[image, 1], num_points, height, width, border, places,
            fx[image, size], fy[image, size],
        )  # fmt: skip
        band = 0
        bands[image, size, :] = num_points
        bands[image, size, 0] = 0
        for i in range(num_points):
            mine = places[i] // pitch // rows
            while band < mine:
                band += 1
                bands[image, size, band] = i
            places[i] -= mine * rows * pitch


@helper()
def _sample_plane(source, b, q, rows, index, fx, fy, bands, buffer, z):  # type: ignore[no-untyped-def]
    """Logits at sorted points: a band of rows at a time is copied to a small buffer and read there."""
    pitch = source[WIDTH] + 2 * BORDER
    for band in range(bands.shape[0] - 1):
        first, last = bands[band], bands[band + 1]
        if first < last:
            top = band * rows - BORDER
            read_rows(source, b, q, top, top + rows + 1, buffer)
            gather(buffer, pitch, index[first:last], fx[first:last], fy[first:last], last - first, z[first:last])


@helper(fastmath={"contract", "reassoc", "nsz"})
def _terms(z, w, n, s):  # type: ignore[no-untyped-def]
    """s(z) at each point; returns the sums of w softplus(z) and w s(z). 0 z lets non-finite logits show in every pair."""
    zero = z.dtype.type(0)
    negative, area = zero, zero
    for i in range(n):
        s[i], softplus = sigmoid_softplus(z[i])
        negative += w[i] * softplus + zero * z[i]
        area += w[i] * s[i]
    return negative, area


@helper(fastmath={"contract"})
def _focal_terms(z, w, n, alpha, gamma, s):  # type: ignore[no-untyped-def]
    """As `_terms` for the focal cost neg + (pos - neg) t; z becomes neg - pos, what t is multiplied with."""
    one = z.dtype.type(1)
    on, off = (one, one) if alpha < 0 else (z.dtype.type(alpha), z.dtype.type(1.0 - alpha))
    g = z.dtype.type(gamma)
    negative, area = z.dtype.type(0), z.dtype.type(0)
    for i in range(n):
        s[i], softplus = sigmoid_softplus(z[i])
        outside = off * power(s[i], g) * softplus
        z[i] = outside - on * power(one - s[i], g) * (softplus - z[i])
        negative += w[i] * outside
        area += w[i] * s[i]
    return negative, area


@helper(fastmath={"contract", "reassoc", "nsz"})
def _products(z, s, members, shares, first, last):  # type: ignore[no-untyped-def]
    """Sums of z t and s t over the points of one target."""
    by_z, by_s = z.dtype.type(0), z.dtype.type(0)
    for k in range(first, last):
        point = np.uintp(np.uint32(members[k]))
        by_z += z[point] * shares[k]
        by_s += s[point] * shares[k]
    return by_z, by_s


@kernel
def match_cost(
    counter, items, values, coordinates, integers,
    sources, size_of, rows_per_band, index, fx, fy, bands, weights, images, starts, ends, members, shares, sums,
    alpha, gamma, ce, dice,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Both mask terms of all pairs. A work item is a plane.

    ce = sum w (softplus(z) - z t) / max(sum w, 1);  dice = 1 - (2 sum w s t + 1) / (sum w s + sum w t + 1)
    """
    batch, queries, widest = ce.shape[1], ce.shape[2], ce.shape[3]
    num_points = weights.shape[1]
    z, s = values[:num_points], values[num_points : 2 * num_points]
    buffer = values[2 * num_points :]
    used = -1
    while True:
        item = take(counter)
        if item >= items:
            break
        layer, image, query = item // (batch * queries), item // queries % batch, item % queries
        size, source = size_of[layer], sources[layer]
        if used != size:
            # The columns of the border are zeroed once for each plane size; rows are overwritten.
            buffer[: (rows_per_band[size] + 1) * (source[WIDTH] + 2 * BORDER)] = 0
            used = size
        _sample_plane(
            source, image, query, rows_per_band[size], index[image, size], fx[image, size], fy[image, size],
            bands[image, size], buffer, z,
        )  # fmt: skip
        w = weights[image]
        if gamma < 0:
            negative, area = _terms(z, w, num_points, s)
        else:
            negative, area = _focal_terms(z, w, num_points, alpha, gamma, s)
        count = 0.0
        for i in range(num_points):
            count += w[i]
        count = max(count, 1.0)
        first = images[image, FIRST]
        for target in range(widest):
            if target < images[image, COUNT]:
                row = first + target
                by_z, by_s = _products(z, s, members, shares, starts[row], ends[row])
                ce[layer, image, query, target] = (negative - by_z) / count
                dice[layer, image, query, target] = 1.0 - (2.0 * by_s + 1.0) / (area + sums[row] + 1.0)
            else:
                ce[layer, image, query, target] = 0
                dice[layer, image, query, target] = 0
