"""Some hundred of the cases of `make fuzz`, always the same; `make slow` tries five times as many."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fuzz import arguments, cases, definition, files
from support.examples import number

QUIET = tuple(HealthCheck)


@pytest.mark.thorough
def test_calls_are_the_definition(backend: str) -> None:
    record = definition.Record()

    @settings(max_examples=number(250), suppress_health_check=QUIET)
    @given(cases.cases())
    def check(case: cases.Case) -> None:
        definition.check(case, [backend], record)

    check()
    assert record.cases >= number(250)
    assert {f"{backend} float32 {name}" for name in ("total", "gradient of masks")} <= set(record.worst)


@pytest.mark.thorough
def test_arguments_that_do_not_fit() -> None:
    @settings(max_examples=number(1000), suppress_health_check=QUIET)
    @given(arguments.wrong_calls())
    def check(wrong: tuple[str, dict[str, Any]]) -> None:
        arguments.check(wrong)

    check()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "examples"),
    [
        ("segmentations", 500),
        ("data folders", 50),
        ("configurations", 100),
        pytest.param("run folders", 50, marks=pytest.mark.slow),
    ],
)
def test_bytes_that_do_not_fit(kind: str, examples: int, folder: Path) -> None:
    strategy, check_one = files.strategies(folder / kind)[kind]

    @settings(max_examples=number(examples), suppress_health_check=QUIET)
    @given(strategy)
    def check(drawn: Any) -> None:
        check_one(drawn)

    check()


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison fails where a backend is a little off."""
    from maskloss.ops import cpu

    right = cpu.mask_loss_ahead

    def wrong(*args: Any) -> Any:
        ce, *rest = right(*args)
        return (ce * 1.001, *rest)

    monkeypatch.setattr(cpu, "mask_loss_ahead", wrong)

    @settings(max_examples=20, suppress_health_check=QUIET, phases=[Phase.generate])
    @given(cases.cases().filter(lambda case: case.dtype == "float32" and any(case.counts)))
    def check(case: cases.Case) -> None:
        definition.check(case, ["cpu"], definition.Record())

    with pytest.raises(AssertionError):
        check()


def test_the_page_has_the_latest_result() -> None:
    """The table of docs/numerics.md is made by scripts/fuzz_table.py from docs/fuzz.json."""
    path = Path(__file__).parents[2] / "scripts" / "fuzz_table.py"
    spec = importlib.util.spec_from_file_location("fuzz_table", path)
    assert spec is not None and spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    assert table.main(["--check"]) is None


def test_a_wrong_exception_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise KeyError("masks")

    monkeypatch.setitem(arguments.CALLS, "cat", (broken, {"parts": []}))
    with pytest.raises(KeyError):
        arguments.check(("cat", {}))


def test_an_error_of_two_lines_is_found() -> None:
    with pytest.raises(AssertionError):
        arguments.assert_readable(("a rule", "two\nlines", "a hint"))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_damage_changes_something_and_is_the_same_again(seed: int) -> None:
    content = b'{"a": [1, 2, {"b": "c"}], "d": 1.5}'
    once, again = (files.damaged(content, ".json", random.Random(seed)) for _ in range(2))
    assert once == again
