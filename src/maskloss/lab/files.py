"""Files that a run writes: whole or not at all, by one process at a time, and never in place of anything precious."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskloss.errors import Cause, require

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

LOCK = ".maskloss.lock"
PARTIAL = ".partial"
# What a file of gzip begins with, and the most that one may unpack to.
_GZIP, _MOST_BYTES = b"\x1f\x8b", 1 << 31
# A file name longer than this is refused by every common file system.
LONGEST_NAME = 255


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk, and put it in place in one move."""
    # Through a link, and never in place of a device.
    path = Path(os.path.realpath(path))
    if path.exists():
        check_file(path, "what is written must be a file")
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        write(partial)
        flush_file(partial)
        os.replace(partial, path)
    except OSError as error:
        # The one that is meant, and also where the system names none, as for a full disk.
        error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def check_writable(path: Path, option: str) -> None:
    """Raise unless a file can be written there; asked before anything is computed.

    Raises:
        Cause: a folder, a device, a folder that is missing, or no permission.
    """
    rule = f"{option} must be a file that can be written"
    try:
        if path.exists():
            check_file(path, rule)
        # Asking for permissions is not enough: a file system may be mounted read-only.
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise Cause(rule, f"{path.parent}: {explain(error)}", "its folder must be there") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole; a number that JSON cannot hold becomes null."""
    write_text(path, json.dumps(plain(content), indent=2, allow_nan=False) + "\n")


def check_file(path: Path, rule: str) -> None:
    """Check that a path is an ordinary file: a named pipe or a device would be waited for, or read, without end.

    Raises:
        Cause: `rule`, with what is there instead.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise Cause(rule, f"{path}: {explain(error)}", "check the path") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a named pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise Cause(rule, f"{path} is {kind}", "name a file")


def read_json(path: Path, rule: str) -> dict[str, Any]:
    """Read a JSON file that holds a dict.

    Raises:
        Cause: `rule`, with what is wrong with the file.
    """
    content = read_any_json(path, rule)
    if not isinstance(content, dict):
        raise Cause(rule, f"{path} holds a {type(content).__name__}", "is it the right file?")
    return content


def read_any_json(path: Path, rule: str) -> Any:
    """Read a JSON file, whatever it holds.

    Raises:
        Cause: `rule`, with what is wrong with the file.
    """
    check_file(path, rule)
    try:
        # As bytes: JSON may be UTF-16, which some systems write.
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = zlib.decompressobj(wbits=31).decompress(content, _MOST_BYTES)
        if path.suffix.lower() in {".jsonl", ".ndjson"}:
            return [json.loads(line) for line in content.splitlines() if line.strip()]
        return json.loads(content)
    except (ValueError, RecursionError, zlib.error) as error:
        usual = "store it as UTF-8" if isinstance(error, UnicodeDecodeError) else "is it the right file?"
        what, hint = in_truth(path) or (explain(error), usual)
        raise Cause(rule, f"{path}: {what}", hint) from None
    except OSError as error:
        raise Cause(rule, f"{path}: {explain(error)}", "check the path") from None


def in_truth(path: Path) -> tuple[str, str] | None:
    """Return what a file that cannot be read is, by its first bytes, and what to do about it; None: not known."""
    try:
        with path.open("rb") as opened:
            head = opened.read(64).lower()
    except OSError:
        return None
    if not head:
        return "it is empty", "copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer to a file in Git LFS", "git lfs pull fetches the file"
    if head.lstrip().startswith((b"<!doctype html", b"<html")):
        return "it is a web page", "download the file itself"
    if head[4:8] == b"ftyp" and head[8:12] in {b"heic", b"heix", b"mif1", b"msf1"}:
        return "it is HEIC, which is not read", "convert it to PNG or JPEG"
    return None


def read_xml(path: Path, rule: str) -> Element:
    """Read an XML file that declares nothing, and return its root.

    Raises:
        Cause: `rule`, with what is wrong with the file.
    """
    from xml.etree import ElementTree as ET

    check_file(path, rule)
    try:
        text = path.read_bytes()
        # Entities can make a small file a large one, and tools write none. UTF-16 has zeros between the letters.
        letters = text.replace(b"\0", b"")
        if b"<!ENTITY" in letters or b"<!DOCTYPE" in letters:
            raise Cause(rule, f"{path} declares entities", "export it again")
        return ET.fromstring(text)
    except Cause:
        raise
    except (OSError, ET.ParseError, LookupError) as error:
        raise Cause(rule, f"{path}: {explain(error)}", "export it again") from None
    except ValueError as error:  # GB 2312 and others that are not read
        raise Cause(rule, f"{path}: {explain(error)}", "store it as UTF-8, and say so in its first line") from None


def read_mapping(path: Path, rule: str, extra: str) -> dict[str, Any]:
    """Read a file of YAML, by its ending, or of JSON, that holds a dict.

    Raises:
        Cause: `rule`, with what is wrong with the file.
        MissingExtraError: a YAML file, and PyYAML is not installed; `extra` is what brings it.
    """
    if path.suffix.lower() not in {".yaml", ".yml"}:
        return read_json(path, rule)
    yaml = require("yaml", extra)
    check_file(path, rule)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise Cause(rule, f"{path}: {line}{error.problem}", "indent with spaces") from None
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise Cause(rule, f"{path}: {explain(error)}", "is it the right file?") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError):
        # PyYAML raises these for values that do not fit their tag, such as `!!int x`.
        raise Cause(rule, f"{path}: a value does not fit its tag", "leave tags out") from None
    if not isinstance(content, dict):
        raise Cause(rule, f"{path} holds a {type(content).__name__}", "a line has the form name: value")
    return content


def plain(value: Any) -> Any:
    """Return what JSON can hold: nan and infinities become None."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flush_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as opened:
        os.fsync(opened.fileno())


def flush_folder(path: Path) -> None:
    """Wait until the entries of a folder are on the disk, where the system can tell."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Locks that this process holds. A forked child shares them, and would keep them after the death of its parent.
_HELD: set[int] = set()


def _let_go() -> None:
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, and for none of its children, until it lets go or ends, however it ends.

    Raises:
        Cause: another process holds it.
    """
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:  # Windows has no such locks; two runs in one folder are not told apart there.
        yield
        return
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have been removed by whoever held it, after it was opened here.
            if os.path.samestat(os.fstat(handle), path.stat()):
                break
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(handle)
            if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
                raise
            raise Cause(
                "a run folder can be used by one run at a time", f"{folder} is in use", "wait for it, or take another"
            ) from None
        os.close(handle)
    _HELD.add(handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        # Not there in a forked child that runs this code to its end.
        if handle in _HELD:
            _HELD.remove(handle)
            os.close(handle)


def make_folder(path: Path, option: str) -> list[Path]:
    """Make a folder that can be written to, with its parents.

    Returns:
        The folders that were made, outermost first, so that `unmake` can take them away again.

    Raises:
        Cause: a file in the way, a name that is too long, or no permission; `option` is where the path came from.
    """
    rule = f"{option} must be a folder that can be written to"
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        raise Cause(rule, f"a name in it has more than {LONGEST_NAME} characters", "take a shorter one")
    made = []
    try:
        for folder in (*reversed(path.parents), path):
            if folder.is_dir():
                continue
            folder.mkdir()
            made.append(folder)
        # Asking for permissions is not enough: a file system may be mounted read-only.
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError) as error:
        unmake(made)
        raise Cause(rule, f"{path}: {explain(error)}", f"name another one with {option}") from None
    return made


def unmake(folders: list[Path]) -> None:
    """Remove folders that are empty, innermost first."""
    try:
        for folder in reversed(folders):
            folder.rmdir()
    except OSError:
        return


def remove(path: Path) -> None:
    """Remove a file or a folder with everything in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def explain(error: BaseException) -> str:
    """Say in a few words what the system or a parser had to say."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
