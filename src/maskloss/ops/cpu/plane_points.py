# mypy: allow-untyped-defs
"""Reading planes at the points of an image, which are sorted (see `cost_kernels`), while the next plane is fetched."""

from __future__ import annotations

from maskloss._abi import X, Y

from .compile import helper, kernel
from .memory import at
from .planes import ADDRESS, BORDER, DTYPE, HEIGHT, STRIDE_B, STRIDE_Q, STRIDE_X, STRIDE_Y, WIDTH, item_bytes, read_rows
from .positions import locate
from .sampling import gather_ahead
from .threads import take

# For each image, plane size and band: the first row of the plane, and how many.
TOP_ROW, ROWS = range(2)
ROW_COLUMNS = 2
# Planes up to this size are read where they are: the next one fits into the second-level cache meanwhile.
SMALL_BYTES = 192 * 1024


@kernel
def place_points(
    counter, items, _values, _coordinates, _integers,
    points, bands, sizes, border, index, fx, fy, rows, inside, edges, num_edges,
):  # fmt: skip
    """For each image, plane size and band: its first row, its number of rows, and the points' places in a buffer.

    For planes that are read where they are: the pixels of points inside them, and which points lie at their edge.
    """
    num_points = points.shape[2]
    while True:
        item = take(counter)
        if item >= items:
            break
        image, size = item // sizes.shape[0], item % sizes.shape[0]
        height, width = sizes[size, 0], sizes[size, 1]
        pitch = width + 2 * BORDER
        places = index[image, size]
        locate(
            points[image, X], points[image, Y], num_points, height, width, border, places,
            fx[image, size], fy[image, size],
        )  # fmt: skip
        count = 0
        for i in range(num_points):
            row, column = places[i] // pitch - BORDER, places[i] % pitch - BORDER
            within = 0 <= row < height - 1 and 0 <= column < width - 1
            inside[image, size, i] = row * width + column if within else 0
            if not within:
                edge = edges[image, size, :, count]
                edge[0], edge[1], edge[2] = i, row, column
                count += 1
        num_edges[image, size] = count
        for band in range(bands.shape[1] - 1):
            low, high = height + 2 * BORDER, 0
            for i in range(bands[image, band], bands[image, band + 1]):
                low, high = min(low, places[i] // pitch), max(high, places[i] // pitch)
            for i in range(bands[image, band], bands[image, band + 1]):
                places[i] -= low * pitch
            rows[image, size, band, TOP_ROW] = low - BORDER
            rows[image, size, band, ROWS] = high - low + 1


@helper()
def band_memory(source, b, q, rows, band, done):
    """Address and size of the rows of a band from row `done` on; 0 bytes where rows do not follow one another."""
    if source[STRIDE_X] != 1 or source[STRIDE_Y] != source[WIDTH]:
        return source[ADDRESS], 0
    item = item_bytes(source[DTYPE])
    top = max(rows[band, TOP_ROW], done, 0)
    below = min(rows[band, TOP_ROW] + rows[band, ROWS] + 1, source[HEIGHT])
    start = b * source[STRIDE_B] + q * source[STRIDE_Q] + top * source[WIDTH]
    return source[ADDRESS] + start * item, max(below - top, 0) * source[WIDTH] * item


@helper()
def plane_memory(source, b, q):
    """Address and size of a plane whose rows follow one another."""
    item = item_bytes(source[DTYPE])
    start = b * source[STRIDE_B] + q * source[STRIDE_Q]
    return source[ADDRESS] + start * item, source[HEIGHT] * source[WIDTH] * item


@helper()
def sample_plane(source, b, q, rows, index, fx, fy, bands, buffer, z, following):
    """Logits at sorted points: a band of rows at a time is copied to a small buffer and read there.

    Memory is the bound: the rows of the next band are on their way while this one is computed, and with the last band
    the memory `following`, an address and a size.
    """
    pitch = source[WIDTH] + 2 * BORDER
    last_band = bands.shape[0] - 2
    for band in range(bands.shape[0] - 1):
        first, last = bands[band], bands[band + 1]
        if first < last:
            top, count = rows[band, TOP_ROW], rows[band, ROWS]
            read_rows(source, b, q, top, top + count + 1, buffer)
            memory = following
            if band < last_band:
                memory = band_memory(source, b, q, rows, band + 1, top + count + 1)
            gather_ahead(
                buffer, pitch, index[first:last], fx[first:last], fy[first:last], last - first, z[first:last],
                memory[0], memory[1],
            )  # fmt: skip


@helper(forceinline=True)
def _pixel(plane, height, width, row, column):
    return plane[row * width + column] if 0 <= row < height and 0 <= column < width else plane.dtype.type(0)


@helper()
def sample_in_place(source, image, query, inside, edges, num_edges, fx, fy, z, memory):
    """Logits at the points of a small plane whose rows follow one another: nothing is copied."""
    height, width = source[HEIGHT], source[WIDTH]
    start = image * source[STRIDE_B] + query * source[STRIDE_Q]
    plane = at(source[ADDRESS] + start * z.itemsize, height * width, z.dtype)
    gather_ahead(plane, width, inside, fx, fy, inside.shape[0], z, memory[0], memory[1])
    for k in range(num_edges):
        i, row, column = edges[0, k], edges[1, k], edges[2, k]
        a, b = _pixel(plane, height, width, row, column), _pixel(plane, height, width, row, column + 1)
        c, d = _pixel(plane, height, width, row + 1, column), _pixel(plane, height, width, row + 1, column + 1)
        top, bottom = a + fx[i] * (b - a), c + fx[i] * (d - c)
        z[i] = top + fy[i] * (bottom - top)
