# mypy: allow-untyped-defs
"""The CPU kernels that pack dense masks, a byte per pixel, into bits: find the box of each mask, then pack its inside.

Boxes begin and end at whole bytes of the result, so pixels are looked at in groups of eight. Outside of its box a mask
is read once to find it, and inside once to pack it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from maskloss._abi import CROP_H, CROP_W, LEFT, STRIDE, TOP

from .compile import helper, kernel
from .memory import at
from .threads import take

# Columns of the table that describes the masks `[T, H, W]` of an image: address, H, W, bytes from one mask and from one
# row to the next (pixels of a row lie side by side), and the number of its first mask.
ADDRESS, HEIGHT, WIDTH, STRIDE_T, STRIDE_Y, FIRST_MASK = range(6)
_GROUP, _WIDE = 8, 32


def _packs(pixels: int) -> Any:
    @intrinsic
    def pack(typingctx: Any, source: Any, destination: Any) -> Any:
        """Write which of the bytes at `source` are not 0, as bits at `destination`. One comparison of a vector."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector, bits = ir.VectorType(ir.IntType(8), pixels), ir.IntType(pixels)
            loaded = builder.load(builder.inttoptr(args[0], vector.as_pointer()), align=1)
            inside = builder.icmp_unsigned("!=", loaded, ir.Constant(vector, [0] * pixels))
            where = builder.inttoptr(args[1], bits.as_pointer())
            builder.store(builder.bitcast(inside, bits), where, align=1)
            return context.get_dummy_value()

        return types.void(source, destination), codegen

    return pack


_pack_group, _pack_wide = _packs(_GROUP), _packs(_WIDE)


@helper(forceinline=True)
def _image_of(images, image, item):
    """The image of a mask, not before `image`: a thread takes masks in ascending order."""
    while image + 1 < images.shape[0] and item >= images[image + 1, FIRST_MASK]:
        image += 1
    return image


@helper()
def _any(address, size):
    """Whether any of the bytes is not 0."""
    found = np.uint64(0)
    if size < 8:
        for byte in at(address, size, np.uint8):
            found |= np.uint64(byte)
    else:
        for word in at(address, size >> 3, np.uint64):
            found |= word
        found |= at(address + size - 8, 1, np.uint64)[0]  # again some, so that the last ones are among them
    return found != 0


@helper()
def _first_group(address, width):
    group = 0
    while not _any(address + _GROUP * group, min(_GROUP, width - _GROUP * group)):
        group += 1
    return group


@helper()
def _last_group(address, width):
    group = (width - 1) // _GROUP
    while not _any(address + _GROUP * group, min(_GROUP, width - _GROUP * group)):
        group -= 1
    return group


@helper()
def _find_box(mask, height, width, stride, row):
    """Write where the pixels of a mask are that are not 0; an empty mask leaves `row` as it is.

    A row of the mask is searched only to the left and to the right of what the rows above it span.
    """
    top, bottom = 0, height
    while top < height and not _any(mask + top * stride, width):
        top += 1
    if top == height:
        return
    while not _any(mask + (bottom - 1) * stride, width):
        bottom -= 1
    left = _first_group(mask + top * stride, width)
    right = _last_group(mask + top * stride, width) + 1
    for y in range(top + 1, bottom):
        pixels = mask + y * stride
        if _any(pixels, _GROUP * left):
            left = _first_group(pixels, width)
        if _any(pixels + _GROUP * right, width - _GROUP * right):
            right = _last_group(pixels, width) + 1
    row[TOP], row[LEFT], row[CROP_H] = top, _GROUP * left, bottom - top
    row[STRIDE], row[CROP_W] = right - left, min(_GROUP * right, width) - _GROUP * left


@kernel
def find_boxes(counter, items, values, coordinates, integers, images, place):
    """Write the columns of `place` `[T_all, 6]`, all but OFFSET, over zeros. A work item is a mask."""
    image = 0
    while True:
        item = take(counter)
        if item >= items:
            break
        image = _image_of(images, image, item)
        about = images[image]
        mask = about[ADDRESS] + (item - about[FIRST_MASK]) * about[STRIDE_T]
        _find_box(mask, about[HEIGHT], about[WIDTH], about[STRIDE_Y], place[item])


@helper()
def _pack_row(pixels, width, out):
    """Pack a row of pixels to the address `out`, and fill its last byte up with 0."""
    x = 0
    while x + _WIDE <= width:
        _pack_wide(pixels + x, out + (x >> 3))
        x += _WIDE
    while x + _GROUP <= width:
        _pack_group(pixels + x, out + (x >> 3))
        x += _GROUP
    if x < width:
        byte = np.uint8(0)
        for pixel in at(pixels + x, width - x, np.uint8)[::-1]:
            byte = np.uint8(byte << 1) | np.uint8(pixel != 0)
        at(out + (x >> 3), 1, np.uint8)[0] = byte


@kernel
def pack_boxes(counter, items, values, coordinates, integers, images, place, begins, data):
    """Pack what is in the box of each mask to the address `data + begins[mask]`. A work item is a mask."""
    image = 0
    while True:
        item = take(counter)
        if item >= items:
            break
        image = _image_of(images, image, item)
        about, row = images[image], place[item]
        mask = about[ADDRESS] + (item - about[FIRST_MASK]) * about[STRIDE_T]
        pixels = mask + row[TOP] * about[STRIDE_Y] + row[LEFT]
        out = data + begins[item]
        for y in range(row[CROP_H]):
            _pack_row(pixels + y * about[STRIDE_Y], row[CROP_W], out + y * row[STRIDE])
