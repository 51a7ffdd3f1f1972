"""`make mutants`: what it changes, and that what survived is explained on the page."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = '''
def half(values: list[int], *, least: int = 1) -> int | None:
    """Not touched: 1 < 2."""
    if not values or len(values) < least:
        raise ValueError("not touched" + "either")
    note(values, level=2)
    return values[-1] // 2
'''


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "mutants.py"
    spec = importlib.util.spec_from_file_location("mutants", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_changed(script):
    found = script.mutants("half.py", SOURCE)
    assert [(each.before, each.after) for each in found] == [
        ("1", "(2)"),
        ("not values", "(values)"),
        ("not values or len(values) < least", "(not values and len(values) < least)"),
        ("len(values) < least", "(len(values) <= least)"),
        ("note(values, level=2)", "(note(values))"),
        ("note(values, level=2)", "pass"),
        ("2", "(3)"),
        ("return values[-1] // 2", "return None"),
        ("values[-1] // 2", "(values[-1] * 2)"),
        ("-1", "(1)"),
        ("1", "(2)"),
        ("2", "(3)"),
    ]
    assert found[0].line == "def half(values: list[int], *, least: int = 1) -> int | None:"
    for each in found:
        compile(SOURCE[: each.start] + each.after + SOURCE[each.end :], "half.py", "exec")


def test_the_page_has_the_latest_result(script):
    result, page = json.loads(script.RESULT.read_text()), script.PAGE.read_text(encoding="utf-8")
    assert script.page_with(page, result) == page
    assert set(result["groups"]) <= set(script.GROUPS)
    for group in result["groups"].values():
        assert all(each["why"] for each in group["survived"])


def test_tests_that_are_named_exist(script):
    for sources, first, later in script.GROUPS.values():
        assert all(list((script.ROOT / "src" / "maskloss").glob(pattern)) for pattern in sources)
        assert all((script.ROOT / "tests" / name).is_file() for name in first + later)
