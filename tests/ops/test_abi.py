"""What the backends share has one home: kernels hold its numbers, and nobody writes them a second time."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import maskloss
from maskloss import MaskTargets, ops
from maskloss import _abi as abi

ROOM = Path(maskloss.__file__).parent / "ops"
FILES = sorted(path for room in ("cpu", "gpu", "reference") for path in (ROOM / room).glob("*.py"))
NUMBERS = {name: value for name, value in vars(abi).items() if name.isupper() and isinstance(value, int)}
# In the high half of a counter.
SHIFTED = {"CANDIDATES", "RANDOM", "MATCHER", "DEPTH_STREAM"}


def load(path: Path) -> ModuleType:
    if path.parent.name == "gpu":
        pytest.importorskip("triton")
    name = path.parent.name if path.stem == "__init__" else f"{path.parent.name}.{path.stem}"
    return import_module(f"maskloss.ops.{name}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_kernels_hold_the_shared_numbers(path: Path) -> None:
    for name, held in vars(load(path)).items():
        shared = name.lstrip("_")
        value = getattr(held, "value", held)
        if shared in NUMBERS and isinstance(value, int):
            shift = abi.STREAM_SHIFT if path.parent.name == "gpu" and shared in SHIFTED else 0
            assert value == NUMBERS[shared] << shift, f"{path}: {name}"


def test_the_kernels_of_the_gpu_hold_every_column_that_they_read() -> None:
    pytest.importorskip("triton")
    from maskloss.ops.gpu import sampling

    held = {name.lstrip("_") for name in vars(sampling)}
    assert held >= {"LAYER", "IMAGE", "QUERY", "TARGET", "INDEX_COLUMNS", "TABLE_COLUMNS", "IMAGE_COLUMNS"}
    assert held >= {"OFFSET", "STRIDE", "TOP", "LEFT", "CROP_H", "CROP_W", "FRAME_H", "FRAME_W", "LABEL"}


BARE = re.compile(
    r"\b(?:index|rows|row|table|images|windows?|described|image_row)\[(?:[^][]*, )?\d+(?:, None)?\]"
    r"|tl\.load\((?:row|image_row|index_row|window|point)(?: \+ \d+)?[,)]|<< 16"
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_bare_columns(path: Path) -> None:
    code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
    assert not BARE.findall(code)


NAMES = "|".join(name for name, value in vars(abi).items() if name.isupper() and not isinstance(value, (list, dict)))
# A name of the shared module that is given a number or a text of its own, or one of Threefry's constants in figures.
AGAIN = re.compile(
    rf"^_?(?:{NAMES})(?:, _?[A-Z_]+)*(?:: [^=\n]*)? = (?![a-zA-Z_])|(?i:0x1bd11bda)|13, 15, 26, 6", re.MULTILINE
)


def test_no_shared_number_is_written_twice() -> None:
    package = Path(maskloss.__file__).parent
    paths = [path for path in package.glob("*.py") if path.stem != "_abi"]
    paths += [*(package / "targets").rglob("*.py"), *(package / "ops").rglob("*.py")]
    again = {str(path): AGAIN.findall(path.read_text()) for path in paths}
    assert not {path: found for path, found in again.items() if found}


def test_numbers_written_twice_would_be_found() -> None:
    for line in ("STREAM_SHIFT = 16", "_CELL_BITS, POSITION_SHIFT = 16, 39", 'LAYOUTS = ("a",)', "key ^ 0x1BD11BDA"):
        assert AGAIN.search(line), line
    assert not AGAIN.search("_CELL_BITS: tl.constexpr = tl.constexpr(abi.CELL_BITS)")


def test_bare_columns_would_be_found() -> None:
    for line in ("x = rows[:, 1]", "tl.load(row)", "tl.load(row + 2)", "index[item, 0]", "layer << 16", "window[3]"):
        assert BARE.search(line), line


def test_tables_have_the_columns() -> None:
    targets = MaskTargets.from_masks(torch.rand(2, 5, 7) > 0.5)
    assert targets.table.shape[1] == abi.TABLE_COLUMNS == abi.IGNORE_OFFSET + 1
    assert targets.images.shape[1] == abi.IMAGE_COLUMNS == abi.IMAGE_W + 1
    assert targets.windows.shape[1] == abi.WINDOW_COLUMNS == abi.WINDOW_H + 1
    assert abi.CROP_W + 1 == abi.PLACE_COLUMNS and abi.TARGET + 1 == abi.INDEX_COLUMNS
    row = targets.images[0].tolist()
    assert (row[abi.COUNT], row[abi.FIRST], row[abi.IMAGE_H], row[abi.IMAGE_W]) == (2, 0, 5, 7)
    assert targets.encoding in abi.ENCODINGS
    # The sums of the sizes follow them, in the same order.
    assert tuple(size + abi.SIZES for size in (abi.COUNT, abi.SIZE, abi.IGNORE_SIZE)) == (
        abi.FIRST,
        abi.BASE,
        abi.IGNORE_BASE,
    )


def test_codes_do_not_meet() -> None:
    codes = [abi.BITS + code for code in abi.INTEGER_CODES.values()]
    codes += [abi.LABELS + code for code in abi.INTEGER_CODES.values()]
    codes += [abi.VALUES + code for code in abi.FLOAT_CODES.values()]
    assert len(set(codes)) == len(codes)


def test_schemas_are_the_groups_one_after_another() -> None:
    def arguments(name: str) -> list[str]:
        return [argument.name for argument in getattr(torch.ops.maskloss, name).default._schema.arguments]

    def fields(*groups: Any) -> list[str]:
        return [field for group in groups for field in group._fields]

    loss = [*fields(abi.Instances, abi.Targets, abi.Draw), *arguments("mask_loss")[-7:]]
    assert arguments("mask_loss") == loss
    assert loss[-7:] == ["padding", "target_mode", "focal_alpha", "focal_gamma", "dice", "points", "backend"]
    assert len(fields(abi.Term)) == 5
    backward = ["grad_ce", "grad_dice", "chosen", "soft", "kept_logits", *loss[:-1], "needs_grad", "backend"]
    assert arguments("mask_loss_backward") == backward
    assert arguments("match_cost") == ["logits", "num_targets", *fields(abi.Targets, abi.Draw), *loss[-7:-2], "backend"]
    assert ops.BACKENDS == ("reference", "cpu", "gpu")


def test_numbers_of_candidates_that_mean_nothing() -> None:
    draw = abi.Draw(torch.zeros(1, dtype=torch.int64), torch.tensor(0), 10, 30, 7)
    targets = abi.Targets("bits", *MaskTargets.from_masks(torch.ones(1, 2, 2, dtype=torch.bool)).tensors)
    assert abi.Job(targets, draw, abi.Term()).drawn is draw
    given = abi.Job(targets, draw, abi.Term(), torch.rand(1, 10, 2))
    for job in (given, abi.Job(targets, draw._replace(num_uncertain=0), abi.Term())):
        assert (job.drawn.num_points, job.drawn.num_candidates, job.drawn.num_uncertain) == (10, 0, 0)
        assert abi.Job.of(job.flat) == job
