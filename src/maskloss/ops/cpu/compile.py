# mypy: allow-untyped-defs
"""Compiling the kernels, and keeping what was compiled on disk."""

from __future__ import annotations

import _thread
import atexit
import inspect
import os
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import llvmlite  # type: ignore[import-untyped]
import numba
import numpy as np
from numba import njit
from numba.core import caching, compiler, config, event, serialize
from numba.misc.appdirs import AppDirs

from maskloss import _abi, points

from .scratch import Dtypes, Sizes, scratch

# Options of Numba that change machine code.
_OPTIONS = ("BOUNDSCHECK", "DEBUGINFO_DEFAULT", "ENABLE_AVX", "LOOP_VECTORIZE", "OPT", "SLP_VECTORIZE")
# Code of this many versions of the sources is kept: each upgrade and each edit leaves an old one behind.
_KEPT_VERSIONS = 16
# How many seconds to wait for another process that compiles the same kernel: it may have been stopped.
_PATIENCE = 120.0

_lock = threading.RLock()
# Kernels themselves, not their ids: the id of one that is gone would soon be another's.
_compiled: set[tuple[Any, ...]] = set()
_said: set[str] = set()

# The end of a program waits for a kernel that is being compiled. So does a fork, whose child would inherit a compiler
# that stays locked.
atexit.register(_lock.acquire)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile an entry point: no GIL, NumPy's division (no exceptions in loops), kept on disk (see `KernelCache`)."""
    compiled = njit(nogil=True, error_model="numpy")(function)
    compiled._cache = KernelCache(function)
    return compiled


def helper(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function that only kernels call."""

    def compile_later(function: Callable[..., Any]) -> Any:
        return njit(error_model="numpy", **options)(function)

    return compile_later


def prepare(function: Any, dtypes: Dtypes, sizes: Sizes, args: tuple[Any, ...]) -> None:
    """Compile `function`, or load it from the cache, by a call without work.

    A thread of its own does it. Inside Numba or LLVM, the exception of a signal (a Ctrl-C, a timeout) would get lost or
    leave a compiler that works no more; here it ends the wait, and the kernel is finished all the same.
    """
    key = (function, *(np.dtype(dtype).char for dtype in dtypes))
    if key in _compiled:
        return
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with _lock, event.install_listener("numba:compile", _Hint()), scratch(dtypes, sizes) as arrays:
                with _turn(function):
                    function(np.zeros(1, np.int64), 0, *arrays, *args)
                _compiled.add(key)
        except BaseException as error:  # noqa: BLE001 (raised by the thread that waits)
            errors.append(error)
        finally:
            done.release()

    # Not by `threading`, whose own locks an exception can leave in disorder.
    done = threading.Lock()
    done.acquire()
    _thread.start_new_thread(work, ())
    done.acquire()
    if errors:
        raise errors[0]


class _Hint(event.Listener):  # type: ignore[misc]
    """Says once per process that a compilation (not a load from the cache) has begun."""

    def on_start(self, event: Any) -> None:  # noqa: ARG002
        _say_once("compiling CPU kernels, once per machine (about 20 s)")

    def on_end(self, event: Any) -> None:
        pass


def _say_once(sentence: str, detail: object = "") -> None:
    if sentence not in _said:
        _said.add(sentence)
        sys.stderr.write(f"maskloss: {sentence}{detail}\n")
        sys.stderr.flush()


# ----------------------------------------------------------------------------------------------------------- cache


class KernelCache(caching.NullCache):  # type: ignore[misc]
    """Machine code on disk: one file for each kernel and signature, in the user's cache directory.

    A file is named by a digest of all that its content depends on. Installations, versions and source trees can share
    a directory, none reads code of another, and processes may write at the same time. (Numba's own cache has an index
    for each kernel, which two processes can leave pointing to the wrong code, and it notices changes in the file of
    the kernel only.) A file begins with a digest of the rest: one that is damaged is written anew. Where nothing can
    be written, each process compiles its own.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        code = function.__code__
        self._name = code.co_name
        self._identity: tuple[object, ...] | None
        try:
            # Read when the code is imported: later the files could be those of another version.
            own = sha256(Path(inspect.getfile(function)).read_bytes()).digest()
            self._identity = (_version(), own, function.__module__, function.__qualname__, code.co_firstlineno)
        except OSError:  # code without source files, in a frozen program
            self._identity = None

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Read what is kept for one signature; None where there is nothing to be used."""
        target_context.refresh()
        try:
            path = self._path(sig, target_context.codegen())
            content = path.read_bytes()
        except OSError:
            return None
        try:
            if not _is_whole(content):
                raise ValueError("its digest differs")
            return compiler.CompileResult._rebuild(target_context, *pickle.loads(content[32:]))
        except Exception as error:  # noqa: BLE001 (whatever becomes of a damaged file)
            _say_once("a compiled kernel is damaged and is compiled anew: ", f"{path} ({error})")
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled for one signature."""
        assert not data.library.has_dynamic_globals, "addresses that are valid in this process only"
        try:
            content = serialize.dumps(data._reduce())
            _write(self._path(sig, data.library.codegen), sha256(content).digest() + content)
        except Exception as error:  # noqa: BLE001 (the kernel is there; that it cannot be kept must stop nobody)
            _say_once(
                "compiled kernels cannot be kept, so each process compiles its own; "
                "set NUMBA_CACHE_DIR to a directory with room: ",
                error,
            )

    def _path(self, sig: Any, codegen: Any) -> Path:
        if self._identity is None:
            raise FileNotFoundError("maskloss is installed without its source files")
        options = [getattr(config, name, None) for name in _OPTIONS]
        digest = sha256(repr((self._identity, sig, codegen.magic_tuple(), options)).encode()).hexdigest()
        return _folder() / f"{self._name}-{digest[:32]}.kernel"


def directory() -> Path:
    """Where compiled kernels are kept: `maskloss` in NUMBA_CACHE_DIR, or else in the user's cache directory."""
    if config.CACHE_DIR:
        return Path(config.CACHE_DIR) / "maskloss"
    path = Path(AppDirs("maskloss", appauthor=False).user_cache_dir)
    if not path.is_absolute():
        raise FileNotFoundError(f"the user's cache directory, {path}, is not an absolute path")
    return path


def survey() -> tuple[list[Path], list[Path]]:
    """List the kernels on disk that this version can use, and those of them that are damaged."""
    kept = sorted(_folder().glob("*.kernel"))
    return kept, [path for path in kept if not _is_whole(path.read_bytes())]


def check_writable() -> None:
    """Raise an OSError where compiled kernels cannot be kept."""
    with NamedTemporaryFile(dir=_open_folder(), prefix=".") as file:
        file.write(bytes(100_000))
        file.flush()


def _is_whole(content: bytes) -> bool:
    return sha256(content[32:]).digest() == content[:32]


def _folder() -> Path:
    return directory() / _version()


@cache
def _version() -> str:
    """A digest of the compilers, and of all files whose functions and numbers are compiled in."""
    python = sys.implementation.cache_tag, sys.flags.optimize
    digest = sha256(repr((python, numba.__version__, llvmlite.__version__)).encode())
    for path in (Path(points.__file__), Path(_abi.__file__), *sorted(Path(__file__).parent.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _open_folder() -> Path:
    """Create the folder of this version where it is missing, mark it as in use, and forget the oldest of the others."""
    folder = _folder()
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # another process may be doing the same
            versions = [path for path in folder.parent.iterdir() if re.fullmatch("[0-9a-f]{16}", path.name)]
            for old in sorted(versions, key=lambda path: path.stat().st_mtime)[:-_KEPT_VERSIONS]:
                for path in old.iterdir():
                    path.unlink()
                old.rmdir()
    os.utime(folder)
    return folder


def _write(path: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    with NamedTemporaryFile(dir=_open_folder(), prefix=".", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@contextmanager
def _turn(function: Any) -> Iterator[None]:
    """Let one process at a time compile `function`; the others find it in the cache afterwards."""
    try:
        import fcntl

        lock = open(_open_folder() / f".{function.__name__}.lock", "wb")  # noqa: SIM115 (closed below)
    except (ImportError, OSError):  # Windows, or no place for a cache
        yield
        return
    with lock:
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
