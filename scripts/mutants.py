"""Mutation testing: change the code in one place, and see whether a test fails; then in another place.

python scripts/mutants.py --sample 20                 # 20 mutants of each group, drawn by the seed
python scripts/mutants.py --only points --again       # its survivors once more, after tests were written

All mutants would take days, so a sample is drawn. Each is tried in a copy of the tree, in a process forked from one
that has PyTorch loaded, with the tests of its group in the order below. Results are in docs/mutants.json, and as a
table in docs/promises.md. A survivor is killed by a new test, or its "why" says there why no test can, or need.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULT, PAGE = ROOT / "docs" / "mutants.json", ROOT / "docs" / "promises.md"
BEGIN, END = "<!-- begin: scripts/mutants.py -->", "<!-- end: scripts/mutants.py -->"
# Sources below src/maskloss, tests of them, and slower ones for what survives those.
GROUPS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "functional": (["functional.py"], ["test_functional.py"], ["test_maths.py"]),
    "points": (["points.py"], ["test_points.py", "test_volumes.py"], ["test_stratified.py", "test_functional.py"]),
    "matcher": (["matcher.py"], ["test_matcher.py", "test_matcher_options.py"], ["test_groups.py", "test_calls.py"]),
    "loss": (["loss.py"], ["test_dice.py", "test_partial.py"], ["test_clips.py", "test_maths.py", "test_calls.py"]),
    "criterion": (
        ["criterion.py", "step.py"],
        ["test_criterion.py", "test_step.py"],
        ["test_criterion_options.py", "test_groups.py", "test_partial.py"],
    ),
    "targets": (
        ["targets/*.py"],
        ["test_targets.py", "test_target_batches.py"],
        ["test_target_reading.py", "test_clips.py", "test_calls.py"],
    ),
    "reference": (
        ["ops/reference/*.py"],
        ["test_points.py", "test_functional.py"],
        ["test_volumes.py", "test_maths.py", "test_target_reading.py"],
    ),
    "assignment": (["ops/assignment.py", "ops/cpu/hungarian.py"], ["ops/test_assignment.py"], ["test_groups.py"]),
}
# The exit status of a process that could not begin; none of pytest's.
FAILED = 70
# That of pytest for files without tests, such as a module without doctests.
NO_TESTS = 5
PAIRS: list[tuple[type[ast.AST], type[ast.AST]]] = [
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn)),
    *((ast.And, ast.Or), (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr), (ast.LShift, ast.RShift)),
]
SWAPS = dict(PAIRS) | {right: left for left, right in PAIRS} | {ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv}


class Mutant(NamedTuple):
    """A change of one place of a file: characters from `start` to `end` become `after`."""

    path: str
    line: str
    start: int
    end: int
    before: str
    after: str

    @property
    def name(self) -> dict[str, str]:
        """What stays when lines above are added."""
        return {"path": self.path, "line": self.line, "code": self.before, "mutant": self.after}


def mutants(path: str, text: str) -> list[Mutant]:
    """Return every mutant of a file."""
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, changed in _changes(ast.parse(text)):
        first, last = (
            len(text.encode()[: starts[line - 1] + column].decode())
            for line, column in ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        )
        after = ast.unparse(changed)
        after = f"({after})" if isinstance(changed, ast.expr) else after
        before = " ".join(text[first:last].split())
        found.append(Mutant(path, text.splitlines()[node.lineno - 1].strip(), first, last, before, after))
    return sorted(found, key=lambda each: (each.start, each.end, each.after))


def _changes(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what is changed and what it becomes; texts of errors, annotations and decorators are left alone."""
    yield from _of_node(node)
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "decorator_list"}:
            continue
        for child in value if isinstance(value, list) else [value]:
            documents = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not documents and not isinstance(child, (ast.Raise, ast.JoinedStr)):
                yield from _changes(child)


def _of_node(node: Any) -> Iterator[tuple[Any, Any]]:
    def changed(**fields: Any) -> tuple[Any, Any]:
        other = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return node, other

    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield changed(ops=[SWAPS[type(op)]()])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in SWAPS:
            yield changed(op=SWAPS[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=inner):
            yield node, inner
        case ast.IfExp(body=body, orelse=other):
            yield changed(body=other, orelse=body)
        case ast.Constant(value=bool() as value):
            yield changed(value=not value)
        case ast.Constant(value=int() | float() as value):
            yield changed(value=value + 1)
        case ast.Return(value=ast.expr()):
            yield changed(value=ast.Constant(None))
        case ast.Expr(value=ast.Call()):
            yield node, ast.Pass()
        case ast.Call(keywords=keywords):
            for number in range(len(keywords)):
                yield changed(keywords=[*keywords[:number], *keywords[number + 1 :]])


class Tree:
    """A copy of the tree, in which one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.root, self._known, self._limit = folder / "tree", set[str](), 300.0
        unwanted = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "runs", "_build", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, self.root, ignore=unwanted)

    def tested(self, tests: list[str], seconds: float) -> int | None:
        """Run tests until one fails; return pytest's exit status, or None where it took too long or crashed."""
        child = os.fork()
        if child == 0:
            try:
                os._exit(self._pytest(tests, seconds))
            except BaseException:  # noqa: BLE001 (this process is a copy, and ends here)
                traceback.print_exc()
                os._exit(FAILED)
        _, status = os.waitpid(child, 0)
        if status == FAILED << 8:
            raise RuntimeError((self.root.parent / "log").read_text(encoding="utf-8"))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what its tests may have left
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None

    def _pytest(self, tests: list[str], seconds: float) -> int:
        os.setsid()
        signal.alarm(int(seconds))
        log = os.open(self.root.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(self.root)
        folders = [str(self.root / "src"), str(self.root / "tests")]
        os.environ["PYTHONPATH"] = ":".join(folders)
        sys.path[:0] = folders
        import pytest

        words = f"-x -q --durations=5 -p no:cacheprovider -p no:xdist -m {'not (slow or long or gpu or thorough)'!r}"
        return int(pytest.main([*shlex.split(words), *tests]))

    def survives(self, mutant: Mutant, tests: list[str]) -> bool:
        """Whether all tests pass with a mutant, as they must without one."""
        names = [mutant.path, *tests]  # with the doctests of the file, if it has some
        if new := [name for name in names if name not in self._known]:
            began = time.monotonic()
            passed = self.tested(new, 3600) in (0, NO_TESTS)
            assert passed, (self.root.parent / "log").read_text(encoding="utf-8")[-3000:]
            self._known.update(new)
            # A mutant that hangs is killed; on a busy machine a test is no mutant's victim.
            self._limit += 10 * (time.monotonic() - began)
        path = self.root / mutant.path
        text = path.read_text(encoding="utf-8")
        self._write(path, text[: mutant.start] + mutant.after + text[mutant.end :])
        try:
            return self.tested(names, self._limit) == 0
        finally:
            self._write(path, text)

    def failed(self) -> str:
        """Return the file of the test that failed last; nothing where none was told."""
        log = (self.root.parent / "log").read_text(encoding="utf-8")
        told = re.search(r"^(?:FAILED|ERROR) ([^: ]+)", log, re.MULTILINE)
        return told[1] if told else ""

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        # Python takes a file of the same second and size for the one that it compiled.
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()


def run(group: str, before: dict[str, Any], sample: int, seed: int, again: bool) -> dict[str, Any]:
    """Try a sample of the mutants of a group, or only those that survived before."""
    sources, first, later = ([*each] for each in GROUPS[group])
    paths = [path for pattern in sources for path in sorted((ROOT / "src" / "maskloss").glob(pattern))]
    names = [str(path.relative_to(ROOT)) for path in paths]
    every = [each for name in names for each in mutants(name, (ROOT / name).read_text(encoding="utf-8"))]
    known = [{key: each[key] for key in ("path", "line", "code", "mutant")} for each in before["survived"]]
    whys = {str(name): each["why"] for name, each in zip(known, before["survived"], strict=True)}
    drawn = random.Random(f"{seed} {group}").sample(every, min(sample, len(every)))
    tried = len(drawn)
    if again:
        drawn, tried = [each for each in every if each.name in known], before["tried"]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(folder))
        quick, slow = ([f"tests/{name}" for name in tests] for tests in (first, later))
        for number, mutant in enumerate(drawn):
            began = time.monotonic()
            survived = tree.survives(mutant, quick) and tree.survives(mutant, slow)
            if not survived and (killer := tree.failed()) in quick:  # may well kill the next one too
                quick = [killer, *(name for name in quick if name != killer)]
            outcome = "SURVIVED" if survived else "killed"
            told = f"{group} {number + 1}/{len(drawn)} {time.monotonic() - began:.0f} s {outcome}"
            print(f"{told}: {mutant.path}: {mutant.line}: {mutant.before} -> {mutant.after}", flush=True)  # noqa: T201
            if survived:
                survivors.append({**mutant.name, "why": whys.get(str(mutant.name), "")})
    return {"mutants": len(every), "tried": tried, "survived": survivors}


def table(result: dict[str, Any]) -> str:
    """Describe the results in Markdown."""
    groups = result["groups"]
    tried = sum(group["tried"] for group in groups.values())
    left = [each for group in groups.values() for each in group["survived"]]
    lines = [
        f"{tried - len(left)} of {tried} mutants were killed, with PyTorch {result['torch']}.",
        "",
        "| code | mutants | tried | killed | drawn with the seed | from the commit | on |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, group in groups.items():
        killed = group["tried"] - len(group["survived"])
        run_of = " | ".join(str(group[key]) for key in ("seed", "commit", "date"))
        lines.append(f"| {name} | {group['mutants']:,} | {group['tried']} | {killed} | {run_of} |")
    if left:
        lines += [
            "",
            "The others, and why they live:",
            "",
            "| in | the line | mutant | why |",
            "| --- | --- | --- | --- |",
        ]
    for each in left:
        path, line, code, mutant, why = (
            each[name].replace("|", "\\|") for name in ("path", "line", "code", "mutant", "why")
        )
        lines.append(f"| `{path.removeprefix('src/maskloss/')}` | `{line}` | `{code}` → `{mutant}` | {why} |")
    return "\n".join(lines)


def page_with(page: str, result: dict[str, Any]) -> str:
    """Return the page with the table between its marks."""
    return re.sub(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}",
        lambda _: f"{BEGIN}\n\n{table(result)}\n\n{END}",
        page,
        flags=re.DOTALL,
    )


def main() -> None:
    """Try mutants, and write what became of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--sample", type=int, default=20, help="mutants of each group; default: 20")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=[*GROUPS], help="groups to try; the others stay")
    parser.add_argument("--again", action="store_true", help="try those that survived before, and no others")
    parser.add_argument("--page", action="store_true", help="try nothing, write the page from docs/mutants.json")
    options = parser.parse_args()
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"groups": {}}
    if not options.page:
        import numba  # noqa: F401 (loaded once for all)
        import scipy.optimize  # noqa: F401
        import torch

        head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
        drawn = {"seed": options.seed, "date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "commit": head}
        result["torch"] = torch.__version__
        for group in options.only:
            before = result["groups"].get(group, {"survived": []})
            found = run(group, before, options.sample, options.seed, options.again)
            result["groups"][group] = before | found | ({} if options.again else drawn)
            RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
