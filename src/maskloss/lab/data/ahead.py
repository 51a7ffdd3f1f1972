"""Work that is done ahead of whoever asks for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


@contextmanager
def in_order(work: Callable[[A], B], items: Iterable[A], ahead: int) -> Iterator[Iterator[B]]:
    """Return the results in order, a bounded number of them ahead: what is read must fit into memory.

    Decoding images leaves the interpreter to other threads.
    """
    waiting = iter(items)
    with ThreadPoolExecutor() as pool:
        futures: deque[Future[B]] = deque(pool.submit(work, item) for item in islice(waiting, ahead))

        def results() -> Iterator[B]:
            while futures:
                yield futures.popleft().result()
                futures.extend(pool.submit(work, item) for item in islice(waiting, 1))

        try:
            yield results()
        finally:
            # Whoever stops early does not wait for the rest.
            for future in futures:
                future.cancel()
