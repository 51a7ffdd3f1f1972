"""Surroundings in which a kernel may not go wrong: programs in any order, launches twice, memory that is fenced in."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# Not a number as a float of any width, -1 as an integer.
POISON, MARGIN = 0xFF, 4096
PAGE = mmap.PAGESIZE


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Let the interpreter run the programs of every launch in a random order."""
    from triton.runtime.interpreter import interpreter_builder as builder

    draw = random.Random(seed)
    place, size = type(builder).set_grid_idx, type(builder).set_grid_dim
    order: dict[tuple[int, ...], tuple[int, ...]] = {}

    def set_size(*sizes: int) -> None:
        size(builder, *sizes)
        programs = list(product(*map(range, sizes)))
        order.clear()
        order.update(zip(programs, draw.sample(programs, len(programs)), strict=True))

    builder.set_grid_dim = set_size
    builder.set_grid_idx = lambda *at: place(builder, *order[at])
    try:
        yield
    finally:
        del builder.set_grid_dim, builder.set_grid_idx


@contextmanager
def fenced() -> Iterator[list[str]]:
    """Move what a kernel is given between poisoned margins, and note the kernels that write there."""
    from triton.runtime.jit import KernelInterface

    inner, found = KernelInterface.__getitem__, []

    def item(self: Any, grid: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            moved: dict[int, tuple[Tensor, Tensor]] = {}

            def move(value: Any) -> Any:
                if not isinstance(value, Tensor) or not value.untyped_storage():
                    return value
                storage = value.untyped_storage()
                if storage.data_ptr() not in moved:
                    before = torch.empty(0, dtype=torch.uint8).set_(storage)
                    around = torch.full((len(before) + 2 * MARGIN,), POISON, dtype=torch.uint8)
                    around[MARGIN:-MARGIN] = before
                    moved[storage.data_ptr()] = (before, around)
                around = moved[storage.data_ptr()][1]
                first = MARGIN // value.element_size() + value.storage_offset()
                return torch.empty(0, dtype=value.dtype).set_(
                    around.untyped_storage(), first, value.size(), value.stride()
                )

            inner(self, grid)(*tree_map(move, arguments), **tree_map(move, options))
            for before, around in moved.values():
                margins = torch.cat([around[:MARGIN], around[-MARGIN:]])
                if bool((margins != POISON).any()):
                    found.append(self.__name__)
                before.copy_(around[MARGIN:-MARGIN])

        return call

    KernelInterface.__getitem__ = item
    try:
        yield found
    finally:
        KernelInterface.__getitem__ = inner


def guarded(tensor: Tensor, *, at_end: bool) -> Tensor:
    """Copy a contiguous tensor to memory that borders on a page which cannot be read: whoever reads on is killed."""
    size = tensor.numel() * tensor.element_size()
    pages = max(-(-size // PAGE), 1)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    library = ctypes.CDLL(None, use_errno=True)
    for page in (0, pages + 1):
        if library.mprotect(ctypes.c_void_p(address + page * PAGE), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = (pages + 1) * PAGE - size if at_end else PAGE
    place = np.frombuffer(memory, np.uint8, size, start)
    found = torch.from_numpy(place).view(tensor.dtype).view(tensor.shape)
    return found.copy_(tensor)
