"""The Triton kernels, compiled ahead of time for GPUs that are not there: they assemble, and nothing spills.

Each launch is the one that the operations make (see `scripts/gpu_table.py`).
"""

from __future__ import annotations

import ast
import csv
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_table.py"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    specification = importlib.util.spec_from_file_location("gpu_table", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["gpu_table"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


OPTIONS: list[dict[str, Any]] = [
    {"encoding": "labels", "data": torch.uint8, "padding": "border"},
    {"encoding": "labels", "data": torch.int16, "target_mode": "nearest"},
    {"encoding": "labels", "data": torch.int32, "focal": (0.25, 2.0)},
    {"encoding": "labels", "data": torch.int64, "focal": (-1.0, 1.5)},
    {"encoding": "values", "data": torch.float16, "deterministic": True},
    {"encoding": "values", "data": torch.bfloat16, "given": torch.float32},
    {"encoding": "values", "data": torch.float32, "given": torch.float64},
    {"encoding": "values", "data": torch.float64, "target_mode": "nearest"},
    {"ignore": True, "seed_on_device": True, "widest": 10},
    {"widest": 10, "focal": (-1.0, 0.0)},
    {"widest": 10, "focal": (0.5, 3.0), "dtype": torch.bfloat16},
    {"widest": 20, "focal": (-1.0, 1.5), "dtype": torch.bfloat16},
    {"widest": 50, "focal": (0.25, 0.5)},
    {"widest": 50, "dtype": torch.bfloat16},
    {"widest": 200},
    {"widest": 200, "focal": (0.25, 2.0)},
    {"dice": "soft", "encoding": "values", "data": torch.float32},
    {"dice": "semimetric", "encoding": "values", "data": torch.float32, "focal": (0.25, 1.5)},
    {"dice": "semimetric", "widest": 200, "dtype": torch.bfloat16},
    {"layout": "stratified"},
    {"layout": "stratified", "dtype": torch.bfloat16, "seed_on_device": True},
    {"unit": "clip"},
    {"unit": "clip", "encoding": "values", "data": torch.float16, "dtype": torch.bfloat16, "deterministic": True},
    {"unit": "volume", "layout": "stratified"},
    {"unit": "volume", "encoding": "labels", "data": torch.int64, "focal": (-1.0, 1.5)},
    {"unit": "volume", "widest": 200, "dtype": torch.bfloat16, "padding": "border", "given": torch.float32},
]


# Kernels whose results must be those of the reference bit by bit: no operation may be fused with the next one, but
# for the six multiply-adds that find the pixel of a point, here of four points in each thread; in a stack there are
# two more for its frame, or three for its slice.
EXACT = {"write_points": 0, "match_points": 0, "choose": 0, "sample_candidates": 24, "sample_points": 24}
EXACT_IN_STACKS = {"clip": {**EXACT, "sample_candidates": 32}, "volume": {**EXACT, "sample_candidates": 36}}
# Newer targets fuse two operations of a pair of numbers in one instruction.
FUSED = re.compile(r"\bfma\.rn\S*\.f(?:64|32)(x2)?")


def compile_all(table: ModuleType, case: Any, targets: list[str]) -> None:
    launches = table.launches_of(case)
    needed = {"loss_terms", "slope_terms", "scatter", "match_terms", *(() if case.unit else ("sample_channels",))}
    assert {launch.name for launch in launches} >= needed
    exact = EXACT_IN_STACKS.get(case.unit, EXACT)
    for launch in launches:
        for target in targets:
            usage = table.compiled(launch, table.TARGETS[target])
            assert usage.spilled == 0, f"{launch.name} spills {usage.spilled} bytes on {target}: {case}"
            if target.startswith("sm") and torch.float64 not in (case.dtype, case.given):
                fused = sum(2 if pair else 1 for pair in FUSED.findall(usage.assembly))
                assert fused == exact.get(launch.name, fused), f"{launch.name} on {target}: {case}"


@pytest.mark.slow
def test_default_options_compile(table: ModuleType) -> None:
    compile_all(table, table.Case(), ["sm_90"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_dtype_compiles_without_spills(table: ModuleType, dtype: str) -> None:
    compile_all(table, table.Case(dtype=table.DTYPES[dtype]), list(table.TARGETS))


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_compiles_without_spills(table: ModuleType, options: dict[str, Any]) -> None:
    compile_all(table, table.Case(**options), list(table.TARGETS))


@pytest.mark.slow
def test_half_precision_gradients_compile_in_deterministic_mode(table: ModuleType) -> None:
    compile_all(table, table.Case(dtype=torch.bfloat16, deterministic=True), list(table.TARGETS))


def test_the_committed_table_is_complete_and_shows_no_spill(table: ModuleType) -> None:
    with table.TABLE.open() as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == table.HEADER
    assert {dtype for row in rows for dtype in row[1].split()} == set(table.DTYPES)
    # The spilled bytes are scalar registers that move to vector registers.
    known = {("match_terms, volumes", "float64"): "12"}
    assert {tuple(row[:2]): row[-2] for row in rows if row[-2] != "0"} == known
    assert {row[0] for row in rows} >= {launch.name for launch in table.launches_of(table.Case())}


@pytest.mark.slow
def test_the_committed_table_is_what_the_kernels_compile_to(table: ModuleType) -> None:
    pinned = re.search(r"^triton==(\S+)", (SCRIPT.parents[1] / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    if triton.__version__ != pinned[1]:
        pytest.skip(f"the table was made with Triton {pinned[1]}, and this is {triton.__version__}")
    with table.TABLE.open() as file:
        assert [tuple(row) for row in csv.reader(file)][1:] == table.rows()


def test_launches_of_a_step(table: ModuleType) -> None:
    """Ten decoder layers share their launches. No value is read from the device: these tensors have none."""
    names = {
        operation: [launch.name for launch in launches]
        for operation, launches in table.operations_of(table.Case(seed_on_device=True)).items()
    }
    assert names["assign"] == ["assign_problem"]
    assert names["mask_loss"] == ["sample_candidates", "choose", "loss_terms", "finish_losses"]
    assert names["mask_loss_backward"] == ["list_chosen", "slope_terms", "scatter"]
    assert names["match_cost"] == ["match_points", "match_targets", "match_cells", "match_terms", "finish_costs"]
    # Two parts of all queries of all layers; then a part for each image.
    pairs = ["match_terms", "finish_costs"]
    shared = ["match_points", "match_targets", *["match_cells", "sample_channels"] * 2]
    assert names["factored_match_cost"] == shared + pairs * 2
    assert names["factored_mask_loss"] == names["mask_loss"] * 2
    assert names["factored_mask_loss_backward"] == names["mask_loss_backward"] * 2
    for unit in ("clip", "volume"):
        stacks = table.operations_of(table.Case(seed_on_device=True, unit=unit))
        whole = {operation: [launch.name for launch in launches] for operation, launches in stacks.items()}
        assert whole["volume_cost"] == names["match_cost"]
        assert whole["volume_loss"] == names["mask_loss"]
        assert whole["volume_loss_backward"] == names["mask_loss_backward"]
    assert names["uncertain_points"] == ["sample_candidates", "choose", "write_points"]
    assert names["point_sample"] == ["sample_points"]
    assert names["point_sample_backward"] == ["scatter"]


def test_kernels_have_no_and_and_no_or() -> None:
    """Triton 3.3 fails on those of constants; of tensors they are & and |."""
    for path in sorted((SCRIPT.parents[1] / "src" / "maskloss" / "ops" / "gpu").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                found = [ast.unparse(each) for each in ast.walk(node) if isinstance(each, ast.BoolOp)]
                assert not found, f"{path.name}: {node.name}"


class NoDevice:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 1000  # what is compiled here is kept apart from what a real device compiles

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)


@pytest.mark.slow
def test_the_launcher_compiles_what_the_script_compiles(table: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches go through Triton's own launcher, up to the point where a driver is needed."""
    expected = table.operations_of(table.Case())
    compiled: list[Any] = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(launch(self, *args, grid=grid, warmup=True, **kwargs).src)

    @contextmanager
    def unchanged() -> Iterator[list[Any]]:
        yield []

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(table, "recorded", unchanged)
    monkeypatch.setattr(driver, "_active", NoDevice())
    table.operations_of(table.Case())
    for launched, source in zip([each for group in expected.values() for each in group], compiled, strict=True):
        assert source.signature == dict(launched.signature), launched.name
        assert source.constants == dict(launched.constants), launched.name
        assert {path for path, attributes in source.attrs.items() if attributes} == set(launched.aligned), launched.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_of_deterministic_gradients(table: ModuleType, dtype: torch.dtype) -> None:
    launches = table.operations_of(table.Case(dtype=dtype, deterministic=True))["mask_loss_backward"]
    names = {launch.name for launch in launches}
    assert names == {"list_chosen", "slope_terms", "claim_slots", "scatter", "write_planes"}
