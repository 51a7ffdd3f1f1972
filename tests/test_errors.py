"""Bad input: what is refused, and that the message says where, why and what to do."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from maskloss import (
    HungarianMatcher,
    MaskCriterion,
    MaskLoss,
    MaskLossError,
    MaskTargets,
    MissingExtraError,
    PointSampling,
)
from maskloss.errors import Cause, describe, reported, require
from maskloss.integrations import detr
from support.bad_input import MASKS, PAIRS, TABLES, Bad


@pytest.mark.parametrize(
    "bad", [pytest.param(bad, id=f"{name}: {case}") for name, table in TABLES.items() for case, bad in table.items()]
)
def test_bad_input(bad: Bad) -> None:
    with pytest.raises(MaskLossError) as caught:
        bad.call()
    error = caught.value
    assert isinstance(error, ValueError)
    assert not isinstance(error, Cause), "a public call must say its name"
    assert error.__cause__ is None
    assert error.__suppress_context__, "the traceback must not show the inner error"
    first, *inner, cause, hint = str(error).split("\n")
    assert first.startswith(f"{bad.operation}: ")
    assert bad.rule in first
    assert cause.startswith("  cause: ")
    assert bad.found in cause
    assert hint.startswith("  hint: ")
    assert len(hint) > len("  hint: ") + 5
    assert len(inner) <= 1, "the inputs take one line"
    assert all(len(line) < 400 for line in (first, *inner, cause, hint))


def test_the_whole_message() -> None:
    with pytest.raises(MaskLossError) as caught:
        MaskLoss()(torch.zeros(12, 64, 64), torch.zeros(11, 256, 256, dtype=torch.bool))
    assert str(caught.value) == (
        "MaskLoss: mask_logits and masks must pair up\n"
        "  mask_logits [12, 64, 64] float32, masks [11, 256, 256] bool\n"
        "  cause: 12 predictions but 11 targets in 1 image(s)\n"
        "  hint: give one target mask for each prediction, or matches along with [B, Q, h, w] logits"
    )


@pytest.mark.parametrize(
    ("call", "found", "hint"),
    [
        (lambda: MaskLoss(num_points=1024), "'num_points'", "use sampling=PointSampling(num_points=...)"),
        (lambda: MaskCriterion(3, num_points=1024), "'num_points'", "use sampling=PointSampling(num_points=...)"),
        (lambda: HungarianMatcher(cost_mask=5.0), "'cost_mask'", "use mask_weight="),
        (lambda: MaskLoss(mask_weight=5.0), "'mask_weight'", "use ce_weight="),
        (lambda: MaskCriterion(3, eos_coef=0.1), "'eos_coef'", "use no_object_weight="),
        (lambda: MaskCriterion(num_labels=3), "'num_classes'", "use num_classes="),
        (lambda: MaskCriterion(3)(class_queries_logits=PAIRS), "'class_logits'", "use class_logits="),
        (lambda: MaskLoss(no_object_label="allow"), "'no_object_label'", "it takes ce_weight"),
        (lambda: HungarianMatcher(rules=("foo",)), "'rules'", "it takes class_weight"),
        (lambda: detr.HungarianMatcher(groups=2), "'groups'", "it takes cost_class"),
        (lambda: MaskLoss(pading_mode="border"), "'pading_mode'", "use padding_mode="),
        (lambda: detr.SetCriterion(3, len, {}, 0.1, [], importance_ratio=1), "importance", "importance_sample_ratio="),
        (lambda: PointSampling(importance_sample_ratio=0.5), "'importance_sample_ratio'", "use importance_ratio="),
        (lambda: HungarianMatcher(sampling=PointSampling()), "'sampling'", "use num_points="),
        (lambda: MaskLoss(5.0), "too many positional", "it takes ce_weight, dice_weight, sampling, clips, options"),
        (lambda: MaskLoss(class_queries_logits=PAIRS), "'class_queries_logits'", "it takes ce_weight,"),
    ],
)
def test_arguments_that_people_guess(call: Callable[[], object], found: str, hint: str) -> None:
    """The error is a TypeError, as Python's own, and names the argument that is meant."""
    with pytest.raises(TypeError) as caught:
        call()
    assert isinstance(caught.value, MaskLossError)
    text = str(caught.value)
    assert "the arguments must be those of this call" in text
    assert found in text.split("cause: ")[1]
    assert hint in text.split("hint: ")[1]


def test_a_type_error_from_inside_stays_what_it_is() -> None:
    @reported("call")
    def call(function: Callable[[], object]) -> object:
        return function()

    with pytest.raises(TypeError, match=r"^no number$") as caught:
        call(lambda: (_ for _ in ()).throw(TypeError("no number")))
    assert not isinstance(caught.value, MaskLossError)


def test_the_environment_names_an_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKLOSS_BACKEND", "fast")
    with pytest.raises(MaskLossError, match=r"backend='fast'\n  hint: .*MASKLOSS_BACKEND"):
        MaskLoss()(PAIRS, MASKS)


def test_errors_can_be_pickled() -> None:
    with pytest.raises(MaskLossError) as caught:
        MaskLoss()(PAIRS[0], MASKS)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (MaskLossError, str(caught.value))


def nested_in_itself() -> dict[str, Any]:
    nested: dict[str, Any] = {}
    nested["a"] = nested
    return nested


def test_a_list_that_holds_the_same_list_many_times_is_described_at_once() -> None:
    nested: list[Any] = [1]
    for _ in range(60):
        nested = [1, nested, nested, nested]
    assert describe(nested).startswith("[1, [1, [1, [...], [...]") and len(describe(nested)) == 80


def test_an_integer_that_python_does_not_write_is_described() -> None:
    assert describe(10**5_000) == "int of many digits"
    assert describe({10**5_000: 1}) == "{int of many digits: 1}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(2, 3, dtype=torch.bfloat16), "[2, 3] bfloat16"),
        (torch.zeros((), device="meta"), "[] float32 on meta"),
        (np.zeros((2, 3), np.uint8), "numpy [2, 3] uint8"),
        ([torch.zeros(2), torch.zeros(3)], "2 x [2] float32"),
        ([(torch.zeros(2), torch.zeros(2))], "1 x 2 x [2] float32"),
        ({"masks": torch.zeros(1, 2, 2), "labels": []}, "{'masks': [1, 2, 2] float32, 'labels': empty}"),
        ((480, 640), "(480, 640)"),
        ([1.5] * 100, "[" + "1.5, " * 15 + "1..."),
        ("zeros", "'zeros'"),
        ("x" * 100_000, "'" + "x" * 76 + "..."),
        (nested_in_itself(), "{'a': {'a': {'a': {}}}}"),
        ([[[[[1]]]]], "1 x 1 x 1 x 1 x ..."),
        (None, "None"),
    ],
)
def test_describe(value: object, expected: str) -> None:
    assert describe(value) == expected


def test_inner_calls_are_told_as_the_outer_one() -> None:
    @reported("inner")
    def inner(number: int) -> None:
        raise Cause("a rule", "a cause", "a hint")

    @reported("outer")
    def outer(text: str) -> None:
        inner(3)

    with pytest.raises(MaskLossError) as caught:
        outer("given")
    assert str(caught.value) == "outer: a rule\n  text 'given'\n  cause: a cause\n  hint: a hint"


def test_other_errors_pass_through() -> None:
    @reported("operation")
    def fail() -> None:
        raise MaskLossError("of its own")

    with pytest.raises(MaskLossError, match=r"^of its own$"):
        fail()
    with pytest.raises(TypeError, match="unexpected keyword"):
        MaskLoss(weight=3)  # type: ignore[call-arg]


class TestMissingPackages:
    def test_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "pycocotools"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "pycocotools", None)
        with pytest.raises(MissingExtraError, match=r"'pycocotools'.*\n  hint: pip install 'maskloss\[coco\]'"):
            MaskTargets.from_coco([{"size": [4, 4], "counts": [16]}], 4, 4)

    def test_an_import_error_inside_a_package_is_not_hidden(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "half_installed.py").write_text("import a_package_that_is_not_there")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
            require("half_installed", "coco")

    def test_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from maskloss.ops import dispatch

        monkeypatch.setitem(sys.modules, "numba", None)
        monkeypatch.delenv("MASKLOSS_BACKEND", raising=False)
        sampling = PointSampling(8)
        for cached in (dispatch._obstacle, dispatch._default):
            cached.cache_clear()
        try:
            with pytest.raises(MaskLossError, match=r"needs the package numba\n(.*\n)*  hint: pip install numba"):
                MaskLoss(backend="cpu")(PAIRS, MASKS)
            with pytest.warns(RuntimeWarning, match="numba cannot be imported.*slower reference"):
                fallback = MaskLoss(sampling=sampling)(PAIRS, MASKS, seed=0)
        finally:
            for cached in (dispatch._obstacle, dispatch._default):
                cached.cache_clear()
        expected = MaskLoss(sampling=sampling, backend="reference")(PAIRS, MASKS, seed=0)
        assert torch.equal(fallback.total, expected.total)

    def test_packing_without_numba_needs_no_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from maskloss.ops import dispatch

        expected = MaskTargets.from_masks(MASKS)
        monkeypatch.setitem(sys.modules, "numba", None)
        dispatch._obstacle.cache_clear()
        try:
            assert not dispatch.has_host_kernels()
            found = MaskTargets.from_masks(MASKS)
        finally:
            dispatch._obstacle.cache_clear()
        assert torch.equal(found.data, expected.data)

    def test_an_old_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from maskloss.ops import dispatch

        old = ModuleType("triton")
        old.__version__ = "3.2.0"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "triton", old)
        monkeypatch.delenv("MASKLOSS_BACKEND", raising=False)
        caches = (dispatch._obstacle, dispatch._default)
        for cached in caches:
            cached.cache_clear()
        try:
            with pytest.raises(Cause, match="needs the package triton"):
                dispatch.choose_backend(torch.device("cuda"), "gpu")
            with pytest.warns(RuntimeWarning, match=r"Triton 3\.2\.0 is too old.*slower reference"):
                assert dispatch.choose_backend(torch.device("cuda")) == "reference"
        finally:
            for cached in caches:
                cached.cache_clear()
