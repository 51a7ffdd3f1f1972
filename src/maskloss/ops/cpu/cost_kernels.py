# mypy: allow-untyped-defs
"""The CPU kernels of the matching cost.

The points of an image are the same for all its queries and layers, so what depends on them alone is computed once. They
are sorted into bands of y and within a band by x. A plane is then read a band of rows at a time, from the first-level
cache, unless it is small. The points in the box of a target are one run per band, over which its values are stored
densely. Both cost terms are linear in t, so a plane needs one gather, one pass for softplus and sigmoid, and one sum of
products per run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maskloss._abi import ALL_TARGETS, COUNT, FIRST, MATCHER, SEMIMETRIC, SOFT, X, Y

from .compile import helper, kernel
from .formulas import power, sigmoid_softplus
from .generator import counter_of, draw_bits, instance_key, points_of_bits
from .memory import bare, prefetch
from .plane_points import band_memory, plane_memory, sample_in_place, sample_plane
from .planes import BORDER, WIDTH
from .targets import list_inside, read_targets, read_weights
from .threads import take, take_early

_I32 = np.int32
# Rows of a plane that are read together should fit into the first-level cache.
BAND_BYTES = 16384
MOST_BANDS = 256
# Runs are filled up with zeros to whole vectors.
VECTOR = 16
# Points whose terms are computed before more memory is asked for.
_SOME = 256


def bands_for(sizes: NDArray[np.int64], item_bytes: int) -> int:
    """Into how many bands to sort the points, for planes of the given sizes `[n, 2]`."""
    plane_bytes = int(((sizes[:, 0]) * (sizes[:, 1] + 2 * BORDER)).max()) * item_bytes
    return min(MOST_BANDS, -(-plane_bytes // BAND_BYTES))


@helper()
def sort_pass(digits, shift, bins, n, source, target, counts):
    """One stable counting pass: point numbers from `source` to `target`, by `digits >> shift`."""
    counts[: bins + 1] = 0
    for i in range(n):
        counts[(digits[i] >> shift) + 1] += 1
    for digit in range(bins):
        counts[digit + 1] += counts[digit]
    for i in range(n):
        digit = digits[source[i]] >> shift
        target[counts[digit]] = source[i]
        counts[digit] += 1


@kernel
def draw(
    counter, items, _values, _coordinates, integers,
    image_ids, seed, windows, images, ignore, strata, num_points, num_bands, points, weights, bands,
):  # fmt: skip
    """The matcher's points of each image, sorted: `[B, 2, P]`, weights `[B, P]`, and where each band begins."""
    order, space = integers[:num_points], integers[num_points : 2 * num_points]
    bits = integers[2 * num_points : 4 * num_points].reshape(2, num_points)
    rows = integers[4 * num_points : 5 * num_points]
    counts = np.empty(4097, np.int64)
    while True:
        image = take(counter)
        if image >= items:
            break
        key = instance_key(seed, image_ids[image], ALL_TARGETS)
        stream = counter_of(0, MATCHER)
        for i in range(num_points):
            order[i] = i
        draw_bits(key, stream, order, num_points, strata, bits)
        for i in range(num_points):
            rows[i] = _I32((np.int64(bits[Y, i]) * num_bands) >> 24)
        sort_pass(bits[X], 12, 4096, num_points, order, space, counts)
        sort_pass(rows, 0, num_bands, num_points, space, order, counts)
        bands[image, 0] = 0
        for band in range(num_bands):
            bands[image, band + 1] = counts[band]
        x, y = points[image, X], points[image, Y]
        for axis in (X, Y):
            for i in range(num_points):
                space[i] = bits[axis, order[i]]
            bits[axis] = space
        points_of_bits(bits, num_points, windows[image], x, y)
        read_weights(x, y, num_points, images[image], 0, ignore, False, weights[image])


@kernel
def find_runs(counter, items, _values, _coordinates, integers, points, bands, table, border, owner, first, length):
    """For each target and band the run of points that may touch its crop: first point, padded length `[T, bands]`."""
    integers, points, table = bare(integers), bare(points), bare(table)
    size = integers.shape[0] // 2
    inside, space = integers[:size], integers[size:]
    while True:
        item = take(counter)
        if item >= items:
            break
        image = owner[item]
        for band in range(bands.shape[1] - 1):
            start, stop = bands[image, band], bands[image, band + 1]
            x, y = points[image, X, start:stop], points[image, Y, start:stop]
            count = list_inside(x, y, stop - start, table[item], border, inside, space)
            first[item, band] = start + inside[0] if count else 0
            length[item, band] = (inside[count - 1] - inside[0] + VECTOR) // VECTOR * VECTOR if count else 0


@kernel
def fill_runs(
    counter, items, values, coordinates, integers,
    points, weights, table, data, encoding, border, nearest, kind, bands, owner, first, length, offset, shares, sums,
):  # fmt: skip
    """The values w t over the runs of each target, 0 in the padding behind a band, and the sums of w t or w t^2."""
    values, coordinates, integers = bare(values), bare(coordinates), bare(integers)
    points, table, shares = bare(points), bare(table), bare(shares)
    size = integers.shape[0] // 3
    ints = integers[: 3 * size].reshape(3, size)
    t, fx, fy = values[:size], values[size : 2 * size], values[2 * size : 3 * size]
    xs, ys = coordinates[:size], coordinates[size : 2 * size]
    while True:
        item = take(counter)
        if item >= items:
            break
        image, total = owner[item], 0.0
        for band in range(first.shape[1]):
            padded, start, place = length[item, band], first[item, band], offset[item, band]
            if padded == 0:
                continue
            n = min(padded, bands[image, band + 1] - start)
            x, y = points[image, X, start : start + n], points[image, Y, start : start + n]
            read_targets(x, y, n, table[item], data, encoding, border, nearest, xs, ys, ints, t, fx, fy)
            for i in range(n):
                shares[place + i] = t[i] * weights[image, start + i]
            shares[place + n : place + padded] = 0
            for i in range(n):
                total += shares[place + i] * (shares[place + i] if kind == SOFT else 1)
        sums[item] = total


@helper(fastmath={"contract", "reassoc", "nsz"})
def _terms(z, w, n, s):
    """s(z) at each point; returns the sums of w softplus(z) and w s(z).

    0 z lets a non-finite logit show in every pair, as in a dense product with t.
    """
    zero = z.dtype.type(0)
    negative, area = zero, zero
    for i in range(n):
        s[i], softplus = sigmoid_softplus(z[i])
        negative += w[i] * softplus + zero * z[i]
        area += w[i] * s[i]
    return negative, area


@helper(fastmath={"contract"})
def _focal_terms(z, w, n, alpha, gamma, s):
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
def _products(z, s, shares, n):
    """Sums of z t and s t over a run."""
    by_z, by_s = z.dtype.type(0), z.dtype.type(0)
    for k in range(n):
        by_z += z[k] * shares[k]
        by_s += s[k] * shares[k]
    return by_z, by_s


@helper(fastmath={"contract", "reassoc", "nsz"})
def _sum_smaller(s, shares, n):
    total = s.dtype.type(0)
    for k in range(n):
        total += min(s[k], shares[k])
    return total


@helper(fastmath={"contract", "reassoc", "nsz"})
def _sum_squares(s, w, n):
    total = s.dtype.type(0)
    for i in range(n):
        total += w[i] * s[i] * s[i]
    return total


@helper(forceinline=True)
def _ask(address, stop):
    """Bring memory into the cache."""
    while address < stop:
        prefetch(address)
        address += 64
    return address


@helper()
def pair_costs(
    z, s, w, count, image, starts, first, length, offset, shares, sums, alpha, gamma, kind, ce, dice, memory
):  # fmt: skip
    """Both terms of a query with all targets `[T_max]`, from its logits at the sorted points; s is work space.

    Meanwhile `memory`, an address and a size, is brought into the cache.
    """
    num_points = w.shape[0]
    address, end = memory[0], memory[0] + memory[1]
    part = memory[1] // 2 * _SOME // num_points
    negative, area = z.dtype.type(0), z.dtype.type(0)
    for i in range(0, num_points, _SOME):
        address = _ask(address, min(address + part, end))
        some = slice(i, min(i + _SOME, num_points))
        if gamma < 0:
            one = _terms(z[some], w[some], some.stop - i, s[some])
        else:
            one = _focal_terms(z[some], w[some], some.stop - i, alpha, gamma, s[some])
        negative += one[0]
        area += one[1]
    part = (end - address) // (image[COUNT] + 1) + 64
    if kind == SOFT:
        area = _sum_squares(s, w, num_points)
    for target in range(image[COUNT]):
        address = _ask(address, min(address + part, end))
        row = image[FIRST] + target
        by_z, by_s = 0.0, 0.0
        for run in range(starts[row], starts[row + 1]):
            n = length[run]
            one = _products(z[first[run] : first[run] + n], s[first[run] : first[run] + n], shares[offset[run] :], n)
            by_z += one[0]
            if kind == SEMIMETRIC:
                by_s += _sum_smaller(s[first[run] : first[run] + n], shares[offset[run] :], n)
            else:
                by_s += one[1]
        ce[target] = (negative - by_z) / count
        dice[target] = 1.0 - (2.0 * by_s + 1.0) / (area + sums[row] + 1.0)
    ce[image[COUNT] :] = 0
    dice[image[COUNT] :] = 0


@kernel
def sample_features(
    counter, items, values, _coordinates, _integers, sources, rows, index, fx, fy, bands, result
):  # fmt: skip
    """Features `[B, D, P]` at the sorted points. A work item is a channel of an image."""
    values, sources, rows, index, fx, fy = bare(values), bare(sources), bare(rows), bare(index), bare(fx), bare(fy)
    bands, result = bare(bands), bare(result)
    channels = result.shape[1]
    values[:] = 0
    while True:
        item = take(counter)
        if item >= items:
            break
        image, channel = item // channels, item % channels
        sample_plane(
            sources[0], image, channel, rows[image], index[image], fx[image], fy[image], bands[image], values,
            result[image, channel], (0, 0),
        )  # fmt: skip


@kernel
def row_costs(
    counter, items, values, _coordinates, _integers,
    logits, weights, counts, images, starts, first, length, offset, shares, sums, alpha, gamma, kind, ce,
    dice,
):  # fmt: skip
    """As `match_cost`, from logits `[B, R, P]` at the sorted points: `[B, R, T_max]`. A work item is a row."""
    values, logits, weights, images, shares = bare(values), bare(logits), bare(weights), bare(images), bare(shares)
    starts, first, length, offset, sums = bare(starts), bare(first), bare(length), bare(offset), bare(sums)
    ce, dice = bare(ce), bare(dice)
    rows, num_points = ce.shape[1], weights.shape[1]
    padded = num_points + VECTOR
    z, s = values[:padded], values[padded : 2 * padded]
    z[num_points:] = 0
    s[num_points:] = 0
    while True:
        item = take(counter)
        if item >= items:
            break
        image, row = item // rows, item % rows
        z[:num_points] = logits[image, row]
        pair_costs(
            z, s, weights[image], counts[image], images[image], starts, first, length, offset, shares, sums,
            alpha, gamma, kind, ce[image, row], dice[image, row], (0, 0),
        )  # fmt: skip


@kernel
def match_cost(
    counter, items, values, _coordinates, _integers,
    sources, size_of, small, rows, index, fx, fy, inside, edges, num_edges, bands,
    weights, counts, images, starts, first, length, offset, shares, sums, alpha, gamma, kind, ce, dice,
):  # fmt: skip
    """Both mask terms of all pairs. A work item is a query: a plane, or one in each frame of a clip.

    ce = sum w (softplus(z) - z t) / max(sum w, 1);  dice = 1 - (2 sum w s t + 1) / (sum w s + sum w t + 1)

    The frames of a clip are images in `sources`, with the same points and places; weights and runs are those of all.
    """
    values, sources, rows, index, fx, fy = bare(values), bare(sources), bare(rows), bare(index), bare(fx), bare(fy)
    bands, weights, images, shares, sums = bare(bands), bare(weights), bare(images), bare(shares), bare(sums)
    starts, first, length, offset = bare(starts), bare(first), bare(length), bare(offset)
    ce, dice = bare(ce), bare(dice)
    batch, queries = ce.shape[1], ce.shape[2]
    num_points, each = weights.shape[1], fx.shape[2]
    frames = num_points // each
    padded = num_points + VECTOR
    z, s = values[:padded], values[padded : 2 * padded]
    z[num_points:] = 0
    s[num_points:] = 0
    buffer = values[2 * padded :]
    width = -1
    item = take(counter)
    while item < items:
        layer, image, query = item // (batch * queries), item // queries % batch, item % queries
        size, source = size_of[layer], sources[layer]
        item, later, other, plane = take_early(counter, items), -1, 0, 0
        if item >= 0:
            later, other, plane = item // (batch * queries), item // queries % batch, item % queries
        memory = (0, 0)
        for frame in range(frames):
            number, found = image * frames + frame, z[frame * each : (frame + 1) * each]
            memory, last = (0, 0), frame == frames - 1
            # The plane whose memory is asked for meanwhile.
            after = (later, other, other * frames, plane) if last else (layer, image, number + 1, query)
            if after[0] >= 0:
                following, near = sources[after[0]], rows[after[1], size_of[after[0]]]
                if small[after[0]]:
                    memory = plane_memory(following, after[2], after[3])
                else:
                    memory = band_memory(following, after[2], after[3], near, 0, 0)
            if small[layer]:
                # The rest of the next query's plane comes while the costs are computed.
                now = memory[1] * 2 // 5 if last else memory[1]
                sample_in_place(
                    source, number, query, inside[image, size], edges[image, size], num_edges[image, size],
                    fx[image, size], fy[image, size], found, (memory[0], now),
                )  # fmt: skip
                memory = (memory[0] + now, memory[1] - now)
            else:
                if width != source[WIDTH]:
                    # The columns of the border are zeroed once for each width; rows are overwritten.
                    buffer[:] = 0
                    width = source[WIDTH]
                sample_plane(
                    source, number, query, rows[image, size], index[image, size], fx[image, size], fy[image, size],
                    bands[image], buffer, found, memory,
                )  # fmt: skip
                memory = (0, 0)
        pair_costs(
            z, s, weights[image], counts[image], images[image], starts, first, length, offset, shares, sums,
            alpha, gamma, kind, ce[layer, image, query], dice[layer, image, query], memory,
        )  # fmt: skip
        if item < 0:
            item = take(counter)
