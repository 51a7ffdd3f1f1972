"""The Triton kernels, compiled ahead of time for GPUs that are not there: they assemble, and nothing spills.

Each launch is the one that the operations make (see `scripts/gpu_table.py`).
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
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
    {"widest": 50},
    {"widest": 200, "focal": (0.25, 2.0)},
]


# Kernels whose results must be those of the reference bit by bit: no operation may be fused with the next one.
EXACT = {"sample_candidates", "sample_points", "write_points", "match_points", "choose"}
FUSED = re.compile(r"\bfma\.rn\S*\.f(32|64)|\bv_(pk_)?(fma|fmac|mad|mac)\w*_f(32|64)")


def compile_all(table: ModuleType, case: Any, targets: list[str]) -> None:
    launches = table.launches_of(case)
    assert {launch.name for launch in launches} >= {"loss_terms", "slope_terms", "scatter", "match_terms"}
    for launch in launches:
        for target in targets:
            usage = table.compiled(launch, table.TARGETS[target])
            assert usage.spilled == 0, f"{launch.name} spills {usage.spilled} bytes on {target}: {case}"
            assert launch.name not in EXACT or not FUSED.search(usage.assembly), f"{launch.name} on {target}: {case}"


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
    assert all(row[-2] == "0" for row in rows)
    assert {row[0] for row in rows} >= {launch.name for launch in table.launches_of(table.Case())}


def test_launches_of_a_step(table: ModuleType) -> None:
    """Ten decoder layers share their launches. No value is read from the device: these tensors have none."""
    names = {
        operation: [launch.name for launch in launches]
        for operation, launches in table.operations_of(table.Case(seed_on_device=True)).items()
    }
    assert names["mask_loss"] == ["sample_candidates", "choose", "loss_terms", "finish_losses"]
    assert names["mask_loss_backward"] == ["list_chosen", "slope_terms", "scatter"]
    assert names["match_cost"] == ["match_points", "match_targets", "match_cells", "match_terms", "finish_costs"]
    assert names["uncertain_points"] == ["sample_candidates", "choose", "write_points"]
    assert names["point_sample"] == ["sample_points"]
    assert names["point_sample_backward"] == ["scatter"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_of_deterministic_gradients(table: ModuleType, dtype: torch.dtype) -> None:
    launches = table.operations_of(table.Case(dtype=dtype, deterministic=True))["mask_loss_backward"]
    names = {launch.name for launch in launches}
    assert names == {"list_chosen", "slope_terms", "claim_slots", "scatter", "write_planes"}
