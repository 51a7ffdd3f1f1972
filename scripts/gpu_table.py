"""Compile the Triton kernels ahead of time and tabulate registers, spills and shared memory: no GPU is needed.

    python scripts/gpu_table.py            write docs/gpu-kernels.csv: the default options, all dtypes and targets,
                                           of planes, and of volumes where they are compiled anew
    python scripts/gpu_table.py --check    exit with 1 if the committed table is not what the kernels compile to

The launches are recorded from the operations themselves, called on tensors without data, so what is compiled is what
runs: the same argument types, constants and launch options.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from maskloss._abi import (
    IMAGE_COLUMNS,
    INDEX_COLUMNS,
    POINT_COLUMNS,
    QUERY,
    TABLE_COLUMNS,
    WINDOW_COLUMNS,
    Draw,
    Factors,
    Gradients,
    Instances,
    Job,
    Stack,
    Targets,
    Term,
    accumulation_dtype,
)
from maskloss.ops import factored, gpu
from maskloss.ops.gpu import volumes
from maskloss.points import PointSampling

TABLE = Path(__file__).parent.parent / "docs" / "gpu-kernels.csv"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
HEADER = ("kernel", "logits", "warps", *TARGETS, "spilled bytes", "shared bytes")
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Case:
    """One configuration of the operations; the sizes are those of the coco preset."""

    dtype: torch.dtype = torch.float32
    encoding: str = "bits"
    data: torch.dtype = torch.uint8
    padding: str = "zeros"
    target_mode: str = "bilinear"
    focal: tuple[float, float] = (-1.0, -1.0)
    dice: str = "standard"
    ignore: bool = False
    given: torch.dtype | None = None
    seed_on_device: bool = False
    deterministic: bool = False
    widest: int = 20
    layout: str = "independent"
    unit: str = ""  # "clip" or "volume": of five dimensions, for the operations on those


@dataclass(frozen=True)
class Launch:
    """A kernel, and everything that its compiled form depends on."""

    kernel: JITFunction[Any]
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    aligned: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """The kernel's name."""
        name: str = self.kernel.fn.__name__
        return name.lstrip("_")


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes."""

    registers: int
    spilled: int
    shared: int
    assembly: str


# ------------------------------------------------------------------------------------------------ recording launches


def _argument(value: Any, path: tuple[int, ...], constants: dict[Any, Any], aligned: list[Any], pinned: bool) -> Any:
    """Type of an argument as Triton's launcher would find it; addresses count as divisible by 16."""
    if isinstance(value, tuple):
        return tuple(_argument(each, (*path, i), constants, aligned, pinned) for i, each in enumerate(value))
    if isinstance(value, Tensor):
        aligned.append(path)
        return "*" + _TYPES[value.dtype]
    if value is None or (value == 1 and isinstance(value, int) and not pinned):
        constants[path] = value
        return "constexpr"
    if value % 16 == 0 and not pinned:
        aligned.append(path)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _record(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    values = dict(zip(kernel.arg_names, args, strict=False)) | {
        k: v for k, v in kwargs.items() if k in kernel.arg_names
    }
    options = {
        k: v for k, v in kwargs.items() if k in {"num_warps", "maxnreg", "enable_fp_fusion", "sanitize_overflow"}
    }
    signature, constants, aligned = [], {}, []
    for position, (parameter, name) in enumerate(zip(kernel.params, kernel.arg_names, strict=True)):
        path = (position,)
        if parameter.is_constexpr:
            constants[path] = values[name]
            signature.append((name, "constexpr"))
        else:
            pinned = parameter.do_not_specialize
            signature.append((name, _argument(values[name], path, constants, aligned, pinned)))
    return Launch(kernel, tuple(signature), tuple(constants.items()), tuple(aligned), tuple(sorted(options.items())))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches instead of making them."""
    launches: list[Launch] = []

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_record(self, args, kwargs))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def operations_of(case: Case) -> dict[str, list[Launch]]:
    """List the kernels that each operation launches for one training step, in order.

    The tensors have no data, so an operation that looked at a value on the device would raise.
    """
    layers, batch, queries, size, sampling = 10, 2, 100, 256, PointSampling()
    meta = torch.device("meta")

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=meta)

    count, num_points = layers * batch * case.widest, sampling.num_points
    shape = (64, size, size) if case.unit else (size, size)
    logits = [torch.empty(batch, queries, *shape, dtype=case.dtype, device=meta) for _ in range(layers)]
    ignore = torch.empty(64 if case.ignore else 0, dtype=torch.uint8, device=meta)
    windows = torch.empty(batch, WINDOW_COLUMNS, device=meta)
    rows = batch * case.widest
    described = [integers(rows, TABLE_COLUMNS), integers(batch, IMAGE_COLUMNS), windows, ignore]
    targets = Targets(case.encoding, torch.empty(4096, dtype=case.data, device=meta), *described)
    seed = integers(1)[0] if case.seed_on_device else torch.tensor(2**62)
    columns = POINT_COLUMNS + bool(case.unit)
    given = torch.empty(count, num_points, columns, dtype=case.given or torch.float32, device=meta)
    index = integers(count, INDEX_COLUMNS)
    instances = Instances(logits, index, [rows] * layers)
    draw = Draw(integers(batch), seed, num_points, sampling.num_candidates, sampling.num_uncertain, case.layout)
    term = Term(case.padding, case.target_mode, *case.focal, case.dice)
    job = Job(targets, draw, term)
    inputs = (instances, job._replace(points=given) if case.given else job)
    if case.unit:
        return _operations_on_stacks(*inputs, [case.widest] * batch, case)
    maps, mode = logits[0][0], case.target_mode
    channels, planes = 256, layers * case.widest
    embeddings = [torch.empty(batch, queries, channels, dtype=case.dtype, device=meta) for _ in range(layers)]
    biases = [torch.empty(batch, queries, dtype=case.dtype, device=meta) for _ in range(layers)]
    features = torch.empty(batch, channels, size, size, dtype=case.dtype, device=meta)
    # One part for each image.
    factors = Factors(embeddings, biases, [features], [0] * layers, planes * maps[0].nbytes)
    products = (factors, index, [case.widest] * (layers * batch), *inputs[1:])
    result: dict[str, list[Launch]] = {}
    torch.use_deterministic_algorithms(case.deterministic)
    try:
        with recorded() as result["match_cost"]:
            gpu.match_cost(logits, [case.widest] * batch, job)
        with recorded() as result["assign"]:
            cost = torch.empty(layers, batch, queries, case.widest, dtype=accumulation_dtype(case.dtype), device=meta)
            gpu.assign(cost, integers(rows), described[1], [case.widest] * batch, 80, 1)
        with recorded() as result["mask_loss"]:
            ce, dice, saved = gpu.mask_loss(*inputs)
        with recorded() as result["mask_loss_backward"]:
            gpu.mask_loss_backward(Gradients(ce, dice), saved, *inputs, [True] * layers)
        with recorded() as result["factored_match_cost"]:
            factored.match_cost(gpu, factors, [case.widest] * batch, job)
        with recorded() as result["factored_mask_loss"]:
            *terms, kept = factored.mask_loss(gpu, *products)
        with recorded() as result["factored_mask_loss_backward"]:
            factored.mask_loss_backward(gpu, Gradients(*terms), kept, *products, [True, True, True])
        with recorded() as result["uncertain_points"]:
            gpu.uncertain_points(instances, draw, windows, case.padding)
        with recorded() as result["point_sample"]:
            values = gpu.point_sample(maps, index[:, QUERY], given, mode, case.padding)
        with recorded() as result["point_sample_backward"]:
            gpu.point_sample_backward(values, maps, index[:, QUERY], given, mode, case.padding)
    finally:
        torch.use_deterministic_algorithms(False)
    return result


def _operations_on_stacks(instances: Instances, job: Job, counts: Sequence[int], case: Case) -> dict[str, list[Launch]]:
    """Launches of the operations on volumes and whole clips."""
    stack = Stack(instances.logits[0].shape[2], case.unit == "volume")
    result: dict[str, list[Launch]] = {}
    torch.use_deterministic_algorithms(case.deterministic)
    try:
        with recorded() as result["volume_cost"]:
            volumes.volume_cost(instances.logits, counts, job, stack)
        with recorded() as result["volume_loss"]:
            ce, dice, saved = volumes.volume_loss(instances, job, stack)
        with recorded() as result["volume_loss_backward"]:
            needs_grad = [True] * len(instances.logits)
            volumes.volume_loss_backward(Gradients(ce, dice), saved, instances, job, stack, needs_grad)
    finally:
        torch.use_deterministic_algorithms(False)
    return result


def launches_of(case: Case) -> list[Launch]:
    """List what has to be compiled: every launch of every operation, once."""
    return list(dict.fromkeys(launch for launches in operations_of(case).values() for launch in launches))


# ------------------------------------------------------------------------------------------------------- compiling


def compiled(launch: Launch, target: GPUTarget) -> Usage:
    """Compile for a target, and read what the assembler says."""
    # What `gpu` passes where torch is built for ROCm.
    constants = {k: "ieee" if target.backend == "hip" and v in ("sum", "tf32x3") else v for k, v in launch.constants}
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        constexprs=constants,
        attrs={path: [["tt.divisibility", 16]] for path in launch.aligned},
    )
    options = {k: v for k, v in launch.options if target.backend == "cuda" or k != "maxnreg"}
    binary = triton.compile(source, target=target, options=options)
    shared = int(binary.metadata.shared)
    if target.backend == "hip":
        text = binary.asm["amdgcn"]
        registers = int(_number(r"\.vgpr_count:\s+(\d+)", text))
        spills = [int(_number(rf"\.{kind}_spill_count:\s+(\d+)", text)) for kind in ("vgpr", "sgpr")]
        return Usage(registers, 4 * sum(spills), shared, text)
    fused = bool(dict(launch.options).get("enable_fp_fusion", True))
    said = _ptxas(binary.asm["ptx"], fused)
    spilled = int(_number(r"(\d+) bytes spill stores", said)) + int(_number(r"(\d+) bytes spill loads", said))
    return Usage(int(_number(r"Used (\d+) registers", said)), spilled, shared, binary.asm["ptx"])


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"nothing in the assembler's output matches {pattern}: {text[-2000:]}")
    return found.group(1)


def _ptxas(ptx: str, fused: bool) -> str:
    """Assemble as Triton does, and return the statistics."""
    architecture = _number(r"\.target (sm_\d+a?)", ptx)
    tool = get_ptxas(int(_number(r"sm_(\d+)", architecture))).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={architecture}", str(file), "-o", str(Path(folder) / "kernel.cubin")]
        run = subprocess.run(command + ["--fmad=false"] * (not fused), capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


# ----------------------------------------------------------------------------------------------------------- table


def rows(dtypes: Sequence[str] = tuple(DTYPES)) -> list[tuple[str, ...]]:
    """Compile the default options: registers by target; dtypes with the same numbers share a row."""
    found: dict[tuple[str, ...], list[str]] = {}
    for dtype in dtypes:
        planes = launches_of(Case(dtype=DTYPES[dtype]))
        stacks = [each for each in launches_of(Case(dtype=DTYPES[dtype], unit="volume")) if each not in planes]
        kernels = _by_kernel(planes) | {f"{name}, volumes": each for name, each in _by_kernel(stacks).items()}
        for name, launches in kernels.items():
            usages = [[compiled(launch, target) for launch in launches] for target in TARGETS.values()]
            registers = [str(max(usage.registers for usage in each)) for each in usages]
            spilled = max(usage.spilled for each in usages for usage in each)
            shared = max(usage.shared for each in usages for usage in each)
            warps = dict(launches[0].options)["num_warps"]
            found.setdefault((name, str(warps), *registers, str(spilled), str(shared)), []).append(dtype)
    return sorted((row[0], " ".join(names), *row[1:]) for row, names in found.items())


def _by_kernel(launches: Sequence[Launch]) -> dict[str, list[Launch]]:
    """Group the variants of a kernel."""
    groups: dict[str, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(launch.name, []).append(launch)
    return groups


def main() -> int:
    """Write the table, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    check = parser.parse_args().check
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(rows())
    if not check:
        TABLE.write_text(text.getvalue())
        return 0
    same = TABLE.read_text() == text.getvalue()
    sys.stdout.write("the table is up to date\n" if same else "the table differs: run scripts/gpu_table.py\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
