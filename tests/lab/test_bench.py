"""The benchmark: does it compare like with like, and does it measure what it says?"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from maskloss import MaskLossError, PointSampling, ops
from maskloss.lab.bench import measure, plots, rf_detr, runner, table, worker
from maskloss.lab.bench.arms import ARMS, MasklossArm, make_arm
from maskloss.lab.bench.cases import FAMILIES, PEERS, PRESETS, STRATIFIED, Case, choose, family
from maskloss.lab.bench.check import compare
from maskloss.lab.bench.counting import StepCounter, _copies_to_host
from maskloss.lab.bench.inputs import Inputs, make_inputs
from maskloss.lab.bench.measure import Clock, PeakMemory, StageClock
from maskloss.lab.commands import bench as bench_command

CPU = torch.device("cpu")
TINY = PRESETS["tiny"]
SETTINGS = runner.Settings(("maskloss", "reference"), steps=3, seconds=60, threads=2, device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def _little_to_collect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that runs tests has a million objects, of which nothing here looks at what is freed."""
    monkeypatch.setattr(measure, "gc", SimpleNamespace(collect=lambda: 0))


class Here:
    """A worker in this process: one of its own imports PyTorch first."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.worker = worker.Worker()

    def __enter__(self) -> Here:  # noqa: PYI034 (Self is newer than Python 3.10)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, do: str, **arguments: Any) -> Any:
        return json.loads(json.dumps(getattr(self.worker, do)(**arguments)))


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(TINY, seed=0, dtype=torch.float32, device=CPU)


# -------------------------------------------------------------------------------------------------- cases and inputs


def test_presets_are_the_published_ones() -> None:
    coco, crowded = PRESETS["coco"], PRESETS["crowded"]
    assert (coco.batch, coco.queries, coco.targets, coco.layers, coco.points) == (2, 100, 20, 10, 12544)
    assert (crowded.queries, crowded.targets, crowded.instances) == (300, 200, 2000)
    assert PRESETS["cityscapes"].target_size == (1024, 2048)
    assert coco.logit_count == 10 * 2 * 100 * 256 * 256


@pytest.mark.parametrize("name", ["rf-detr", "rf-detr-head", "tiny-rf-detr", "tiny-rf-detr-head"])
def test_presets_of_rf_detr_have_one_point_for_sixteen_pixels(name: str) -> None:
    case = PRESETS[name]
    height, width = case.logit_size
    assert case.points == max(height, height * width // 16)
    assert case.queries % case.groups == 0
    # Its matcher draws one set of points for the batch, this library's one for each image.
    assert case.batch == 1
    if "tiny" not in name:
        assert (case.queries, case.groups, case.groups * case.layers, case.instances) == (2600, 13, 78, 1560)


def test_queries_of_every_group_know_every_target() -> None:
    case = PRESETS["tiny-rf-detr"]
    found = make_inputs(case, seed=0, dtype=torch.float32, device=CPU)
    assert [tuple(each.shape) for each in found.class_logits] == [(1, 12, 4)] * 3
    assert [tuple(each.shape) for each in found.boxes] == [(1, 12, 4)] * 3
    [wanted], [masks] = found.target_boxes, found.masks
    for (x, y, width, height), mask in zip(wanted.tolist(), masks, strict=True):
        left, right, top, bottom = (64 * at for at in (x - width / 2, x + width / 2, y - height / 2, y + height / 2))
        rows, columns = mask.nonzero().unbind(1)
        assert (left, right) == pytest.approx((int(columns.min()), int(columns.max()) + 1))
        assert (top, bottom) == pytest.approx((int(rows.min()), int(rows.max()) + 1))
    # Those of the final layer that have a target have nearly its box, and each group has one for each of them.
    near = (found.boxes[-1][0].view(2, 6, 1, 4) - wanted).abs().amax(-1) < 0.06
    assert bool(near.any(1).all())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_changes_one_size(name: str) -> None:
    cases = family(name)
    for case in cases:
        assert re.fullmatch(rf"{name}=\d+", case.name)
        differing = [key for key, value in case.as_dict().items() if value != cases[0].as_dict()[key]]
        assert set(differing) <= {"name", name.replace("-", "_")}
    assert len({case.describe() for case in cases}) == 1


def test_cases_survive_json() -> None:
    assert Case.from_dict(json.loads(json.dumps(TINY.as_dict()))) == TINY


def test_an_unknown_case_is_refused() -> None:
    assert [case.name for case in choose(["tiny"], ["layers"])][:2] == ["tiny", "layers=1"]
    with pytest.raises(MaskLossError, match=r"there must be a preset of that name(.|\n)*take one of coco, crowded"):
        choose(["coc"], [])


def test_inputs_depend_on_the_seed_alone(inputs: Inputs) -> None:
    again = make_inputs(TINY, seed=0, dtype=torch.float32, device=CPU)
    other = make_inputs(TINY, seed=1, dtype=torch.float32, device=CPU)
    assert inputs.digest() == again.digest() != other.digest()


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_inputs_look_like_instances(name: str) -> None:
    case = PRESETS[name]
    found = make_inputs(case, seed=3, dtype=torch.bfloat16, device=CPU)
    assert [tuple(each.shape) for each in found.masks] == [(case.targets, *case.target_size)] * case.batch
    for masks in found.masks:
        shares = masks.float().mean((1, 2))
        assert bool((shares > 0).all())
        assert bool((shares < 0.6).all())
    for logits in found.mask_logits:
        assert logits.shape == (case.batch, case.queries, *case.logit_size)
        assert logits.dtype == torch.bfloat16
        assert logits.requires_grad


def test_later_layers_know_more() -> None:
    """Each target has a query that predicts it, so a match exists, and it is better in the final layer."""
    case = PRESETS["small"]
    found = make_inputs(case, seed=0, dtype=torch.float32, device=CPU)
    arm = MasklossArm(case, CPU)
    out = arm.compute(found, arm.prepare(found.masks), seed=1)
    assert out.loss_mask[-1] < 0.7 * out.loss_mask[0]
    assert out.loss_class[-1] < 0.7 * out.loss_class[0]


# ------------------------------------------------------------------------------------------------------------- check


def test_the_reference_agrees(inputs: Inputs) -> None:
    found = compare(TINY, inputs, "reference", seed=5)
    assert found.passed
    assert found.pairs == found.pairs_equal == TINY.instances
    assert found.loss < 1e-5


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_transformers_agrees_when_given_the_same_random_numbers(name: str) -> None:
    pytest.importorskip("transformers")
    case = PRESETS[name]
    found = compare(case, make_inputs(case, seed=0, dtype=torch.float32, device=CPU), "transformers", seed=5)
    assert found.passed
    assert found.pairs == found.pairs_equal == case.instances
    assert found.loss < 1e-5
    assert found.mask_gradient < 5e-3


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-volume"])
def test_dense_masks_of_clips_and_volumes_agree_when_given_the_same_random_numbers(name: str) -> None:
    case = PRESETS[name]
    inputs = make_inputs(case, seed=0, dtype=torch.float32, device=CPU)
    assert {each.shape[1:] for each in inputs.masks} == {case.target_shape}
    found = compare(case, inputs, "dense", seed=5)
    assert found.passed
    assert found.pairs == found.pairs_equal == case.instances == 6
    assert max(found.loss, found.mask_gradient, found.class_gradient) < 1e-5
    assert case.arms(ARMS) == tuple(arm for arm in ARMS if arm not in ("factors", "transformers", "rfdetr"))
    assert "dense" not in TINY.arms(ARMS)


@pytest.mark.parametrize("head", ["", "-head"])
@pytest.mark.parametrize("other", ["reference", "factors", "transformers", "rfdetr", "stratified/4"])
def test_criteria_of_rf_detr_agree(other: str, head: str) -> None:
    if other in PEERS:
        pytest.importorskip(
            {"transformers": "transformers.loss.loss_rf_detr", "rfdetr": "rfdetr.models.criterion"}[other]
        )
    case = PRESETS[f"tiny-rf-detr{head}"]
    found = compare(case, make_inputs(case, seed=0, dtype=torch.float32, device=CPU), other, seed=5)
    assert found.passed
    assert found.base == {"rfdetr": "maskloss with border padding", "stratified/4": "the reference backend"}.get(
        other, "maskloss"
    )
    assert found.pairs == found.pairs_equal == case.instances == 18
    assert max(found.loss, found.mask_gradient, found.class_gradient) < 1e-5


@pytest.mark.parametrize("what", ["matches", "boxes", "groups"])
def test_a_wrong_criterion_of_rf_detr_is_caught(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    case = PRESETS["tiny-rf-detr"]
    inputs, right = make_inputs(case, seed=0, dtype=torch.float32, device=CPU), rf_detr.ours.rf_detr_loss

    def wrong(*arguments: Any, **options: Any) -> Any:
        if options["backend"] == "reference":
            arguments = list(arguments)  # type: ignore[assignment]
            if what == "groups":
                arguments[5].num_queries *= 2
            else:
                place = 3 if what == "boxes" else 4
                arguments[place] = arguments[place].flip(1)  # type: ignore[index]
        return right(*arguments, **options)

    monkeypatch.setattr(rf_detr.ours, "rf_detr_loss", wrong)
    assert not compare(case, inputs, "reference", seed=5).passed


@pytest.mark.parametrize(("name", "points"), [("stratified", TINY.points), ("stratified/4", TINY.points // 4)])
def test_stratified_points_are_compared_with_the_same_of_the_reference_backend(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, name: str, points: int
) -> None:
    ran = []
    right = MasklossArm.compute

    def watched(self: MasklossArm, inputs: Inputs, targets: Any, seed: int) -> Any:
        loss, matcher = self.criterion.mask_loss, self.criterion.matcher
        ran.append(
            (loss.options.backend, loss.sampling, matcher.options.backend, matcher.num_points, matcher.layout, seed)
        )
        return right(self, inputs, targets, seed)

    monkeypatch.setattr(MasklossArm, "compute", watched)
    found = compare(TINY, inputs, name, seed=5)
    sampling = PointSampling(points, layout="stratified")
    assert ran == [(backend, sampling, backend, points, "stratified", 5) for backend in (None, "reference")]
    assert found.passed
    assert (found.other, found.base) == (name, "the reference backend")
    assert found.pairs == found.pairs_equal == TINY.instances
    assert found.loss < 1e-5


@pytest.mark.parametrize("other", ["reference", *STRATIFIED])
@pytest.mark.parametrize("what", ["points", "loss", "gradient", "nan"])
def test_a_wrong_implementation_is_caught(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, what: str, other: str
) -> None:
    right = MasklossArm.compute

    def wrong(self: MasklossArm, inputs: Inputs, targets: Any, seed: int) -> Any:
        if self.criterion.mask_loss.options.backend == "reference":
            return right(self, inputs, targets, seed)
        out = right(self, inputs, targets, seed + (what == "points"))
        if what == "loss":
            return out._replace(loss_dice=out.loss_dice * 1.001)
        if what == "nan":
            return out._replace(loss_dice=out.loss_dice * float("nan"))
        return out._replace(total=out.total * 1.05) if what == "gradient" else out

    monkeypatch.setattr(MasklossArm, "compute", wrong)
    assert not compare(TINY, inputs, other, seed=5).passed


# ---------------------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    ("call", "transfers"),
    [
        (lambda x: x.sum(), 0),
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: x.cpu().numpy(), 1),
        (lambda x: x.to("cpu").tolist(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x[torch.tensor([0, 2])], 0),
        (lambda x: torch.tensor([1.0, 2.0]).sum().item(), 0),
        (lambda x: (x.sum().item(), x.cpu().double().sum().item()), 2),
        (lambda x: x.masked_select(x > 0).sum().tolist(), 2),
    ],
)
def test_transfers(call: Callable[[torch.Tensor], Any], transfers: int) -> None:
    counter = StepCounter(CPU)
    with counter:
        call(torch.ones(4))
    assert counter.transfers.total() == transfers, counter.transfers


def test_operations_count_forward_and_backward_once() -> None:
    x = torch.ones(3, 3, requires_grad=True)
    counter = StepCounter(CPU)
    with counter:
        (x @ x).sum().backward()
    assert counter.operations["aten::mm"] == 3  # matmul is made of mm and does not count itself
    assert "aten::matmul" not in counter.operations


def test_a_step_waits_for_the_assignment_on_the_host_alone(inputs: Inputs) -> None:
    counts = {}
    for name in ("maskloss", "reference"):
        arm = make_arm(name, TINY, CPU)
        targets = arm.prepare(inputs.masks)
        counter = StepCounter(CPU)
        with counter:
            arm.forward(inputs, targets, 0).backward()
        counts[name] = counter.as_dict()
        assert counts[name]["transfers_by"] == ({"assign": 1} if name == "reference" else {})
    # The kernels of one are single operations, the other is made of PyTorch's.
    assert counts["reference"]["operations"] > 10 * counts["maskloss"]["operations"]


def test_transformers_waits_for_every_image_and_layer(inputs: Inputs) -> None:
    pytest.importorskip("transformers")
    arm = make_arm("transformers", TINY, CPU)
    targets = arm.prepare(inputs.masks)
    counter = StepCounter(CPU)
    with counter:
        arm.forward(inputs, targets, 0).backward()
    assert counter.transfers.total() == TINY.layers * TINY.batch


def test_copies_from_a_device_are_told_from_others() -> None:
    there, here = torch.ones(2, device="meta"), torch.ones(2)
    assert _copies_to_host("_to_copy", (there,), {"device": CPU})
    assert _copies_to_host("copy_", (here, there), {})
    assert not _copies_to_host("_to_copy", (there,), {"dtype": torch.float64})
    assert not _copies_to_host("_to_copy", (here,), {"device": "meta"})
    assert not _copies_to_host("copy_", (there, here), {})


@pytest.mark.gpu
def test_a_step_does_not_wait_on_a_gpu() -> None:
    device = torch.device("cuda")
    found = make_inputs(TINY, seed=0, dtype=torch.float32, device=device)
    for name, waits in (("maskloss", 0), ("reference", 1)):
        arm = make_arm(name, TINY, device)
        targets = arm.prepare(found.masks)
        arm.forward(found, targets, 0).backward()
        counter = StepCounter(device)
        with counter:
            arm.forward(found, targets, 0).backward()
        assert counter.transfers.total() == waits, counter.transfers


# -------------------------------------------------------------------------------------------------- clocks and memory


def test_clock_gives_the_spans_between_marks() -> None:
    clock = Clock(CPU)
    for _ in range(3):
        clock.mark()
    assert len(clock.spans()) == 2
    assert clock.spans() == []


def test_a_stage_does_not_count_the_stages_that_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    clock = StageClock(CPU)

    def pause(seconds: float) -> None:
        now[0] += seconds

    inner = clock.timed("inner", pause)
    with clock.stage("outer"):
        pause(1)
        inner(5)
        pause(2)
        inner(1)
    assert clock.take() == {"outer": 3, "inner": 6}
    assert clock.take() == {}


COMES_AND_GOES = """
import torch
from maskloss.lab.bench.measure import PeakMemory

torch.ones(100).sum()
meter = PeakMemory(torch.device("cpu"))
meter.start()
torch.ones(16_000_000).sum()
print(meter.why_not or [meter.peak(), meter.current()])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_came_and_went() -> None:
    """In a process in which nothing else comes and goes."""
    told = subprocess.run([sys.executable, "-c", COMES_AND_GOES], check=True, capture_output=True, text=True).stdout
    if not told.startswith("["):
        pytest.skip(told)
    peak, left = json.loads(told)
    assert 0.95 < peak / 64_000_000 < 1.2
    assert left < 0.2 * 64_000_000


def test_memory_that_cannot_be_measured_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_has_peak", lambda: False)
    meter = PeakMemory(CPU)
    meter.start()
    assert meter.peak() is None
    assert meter.current() is None
    assert meter.why_not is not None
    assert table.memory(meter.peak()) == "not measured"


# ------------------------------------------------------------------------------------------------- samples to numbers


def samples(*steps: tuple[int, float], packed: bool = False) -> list[dict[str, float]]:
    """Steps of the given lengths; with packed targets they take half as long."""
    return [
        {"round": turn, "targets": 1.0, "forward": 0.75 * step, "backward": 0.25 * step}
        | ({"packed_forward": 0.375 * step, "packed_backward": 0.125 * step} if packed else {})
        for turn, step in steps
    ]


def test_summary_keeps_both_kinds_of_steps_apart() -> None:
    found = runner.summarise(samples((0, 2.0), (1, 4.0), (2, 3.0), packed=True))
    assert found["step"]["median"] == 3
    assert found["packed"]["median"] == 1.5
    assert found["forward"]["median"] == 2.25
    assert found["step"]["low"] < 3 < found["step"]["high"]
    assert "packed" not in runner.summarise(samples((0, 2.0)))


def test_ratios_compare_within_a_round() -> None:
    slow, fast = samples((0, 4.0), (1, 40.0), (2, 9.0)), samples((0, 2.0), (1, 20.0))
    found = runner.ratios(slow, fast)
    assert found == {"median": 2, "low": 2, "high": 2}
    assert runner.ratios(slow, []) is None
    packed = runner.ratios(slow, samples((0, 2.0), (1, 20.0), packed=True), packed=True)
    assert packed == {"median": 4, "low": 4, "high": 4}


@pytest.mark.parametrize(("default", "passive", "waiting"), [(3.0, 2.0, "passive"), (2.0, 3.0, "default")])
def test_of_a_peer_the_better_way_of_waiting_is_kept(default: float, passive: float, waiting: str) -> None:
    found = {
        name: {"samples": samples((0, step)), "summary": runner.summarise(samples((0, step)))}
        for name, step in (("maskloss", 1.0), ("transformers", default), ("transformers, passive", passive))
    }
    kept = runner.better_waiting(found)
    assert list(kept) == ["maskloss", "transformers"]
    assert kept["transformers"]["summary"]["step"]["median"] == 2
    assert kept["transformers"]["waiting"] == waiting
    assert kept["transformers"]["other_waiting"]["median"] == 3
    assert "waiting" not in kept["maskloss"]


def test_a_peer_that_fails_with_one_way_of_waiting_is_kept_with_the_other() -> None:
    works = {"samples": samples((0, 3.0)), "summary": runner.summarise(samples((0, 3.0)))}
    found = {"transformers": {"failed": "out of memory", "details": ""}, "transformers, passive": works}
    [kept] = runner.better_waiting(found).values()
    assert kept["waiting"] == "passive"
    assert kept["other_waiting"] is None
    assert "failed" not in kept


def test_workers_wait_as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the shell is set up: no policy for an arm, PASSIVE for the second process of a peer."""
    seen: list[dict[str, str]] = []
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MASKLOSS_BACKEND"):
        monkeypatch.setenv(name, "ACTIVE")
    monkeypatch.setattr(runner.subprocess, "Popen", lambda *_, env, **__: seen.append(env))
    for passive in (False, True):
        runner.Process(SETTINGS, TINY.worker, passive=passive).log.close()
    assert {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MASKLOSS_BACKEND"}.isdisjoint({*seen[0], *seen[1]})
    assert [environment.get("OMP_WAIT_POLICY") for environment in seen] == [None, "PASSIVE"]
    arms = ("maskloss", "transformers")
    assert list(runner._entries(arms, SETTINGS)) == ["maskloss", "transformers", "transformers, passive"]
    assert list(runner._entries(arms, replace(SETTINGS, device="cuda"))) == ["maskloss", "transformers"]


# ------------------------------------------------------------------------------------------------- workers and runner


def test_a_group_of_queries_is_what_decides_where_an_assignment_is_solved() -> None:
    cost = torch.rand(1, 1, 2600, 2)
    for groups, waits in ((13, 0), (1, 1)):
        with StepCounter(CPU) as counter:
            ops.assign(cost, torch.tensor([0, 1]), torch.zeros(1, 11, dtype=torch.int64), [2], 3, groups=groups)
        assert counter.transfers.total() == waits


@pytest.mark.parametrize("name", ["tiny-rf-detr", "tiny-rf-detr-head"])
def test_a_worker_measures_rf_detr(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = PRESETS[name]
    # Stages are functions of classes and modules, which other tests call as well.
    undone = lambda timed, owner, name, stage: monkeypatch.setattr(owner, name, timed(stage, getattr(owner, name)))  # noqa: E731
    monkeypatch.setattr(rf_detr, "wrap", undone)
    setup = {"case": case.as_dict(), "device": "cpu", "dtype": "float32", "seed": 0}
    for arm in ("maskloss", "factors", "transformers"):
        measuring = worker.Worker()
        ready = measuring.setup(arm=arm, **setup)
        assert ready["memory"]["gradient"] == 4 * sum(each.numel() for each in measuring.inputs.logits)
        if arm != "transformers":
            assert ready["counts"]["transfers_by"] == {}
        losses = measuring.step(seed=1)
        assert losses["forward"] > 0
        [stages] = measuring.stages(seed=1, steps=1)
        mine = {"packing"} if arm != "transformers" else set()
        assert set(stages) == (set(table.STAGES) - {"packing"}) | mine


@pytest.mark.parametrize("arm", ["maskloss", *STRATIFIED])
def test_a_worker_answers_errors_and_goes_on(arm: str) -> None:
    setup = {"case": TINY.as_dict(), "device": "cpu", "dtype": "float32", "seed": 0}
    commands = [
        {"do": "fly"},
        {"do": "setup", "arm": arm, **setup},
        {"do": "step", "seed": 1},
        {"do": "stages", "seed": 1, "steps": 2},
    ]
    answers = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(each) + "\n" for each in commands)), answers, worker.Worker())
    wrong, ready, step, stages = map(json.loads, answers.getvalue().splitlines())
    assert wrong["error"] == "AttributeError: 'Worker' object has no attribute 'fly'"
    assert ready["result"]["backend"] == "cpu"
    assert ready["result"]["memory"]["gradient"] == 4 * (TINY.logit_count + 2 * 8 * 5)
    assert step["result"]["forward"] > 0
    assert step["result"]["packed_forward"] > 0
    assert step["result"]["packed_loss"] == step["result"]["loss"]
    assert ready["result"]["counts"]["transfers"] == 0
    assert set(table.STAGES) == set(stages["result"][0])


def test_a_worker_that_dies_says_so() -> None:
    with runner.Process(SETTINGS, TINY.worker) as process:
        with pytest.raises(runner.WorkerError, match="no attribute 'fly'") as wrong:
            process.ask("fly")
        assert "Traceback" in wrong.value.details
        process.child.kill()
        os.waitid(os.P_PID, process.child.pid, os.WEXITED | os.WNOWAIT)  # what is sent now is never read
        with pytest.raises(runner.WorkerError, match="the worker died with exit status -9"):
            process.ask("step", seed=0)


@pytest.mark.parametrize(
    ("arms", "others"),
    [
        (("maskloss",), ["reference"]),
        (("maskloss", "stratified", "stratified/4"), ["stratified", "stratified/4", "reference"]),
        (("maskloss", "stratified", "transformers"), ["stratified", "transformers"]),
        (("maskloss", "factors"), ["factors"]),
    ],
)
def test_no_arm_is_left_unchecked(monkeypatch: pytest.MonkeyPatch, arms: tuple[str, ...], others: list[str]) -> None:
    """What checks a stratified arm says nothing about `maskloss`, so something else must."""
    process = MagicMock()
    monkeypatch.setattr(runner, "Process", process)
    runner._check(TINY, arms, SETTINGS, lambda _: None)
    [asked] = process.return_value.__enter__.return_value.ask.call_args_list
    assert (asked.args, asked.kwargs["others"]) == (("check",), others)


def test_nothing_is_timed_behind_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        {"other": "stratified", "base": "the reference backend", "passed": False},
        {"other": "transformers", "base": "maskloss", "passed": True},
        {"other": "reference", "base": "maskloss", "passed": False},
    ]
    answer = {"digest": "", "checks": checks}
    monkeypatch.setattr(runner, "_check", lambda *_: answer)
    monkeypatch.setattr(runner, "_measure", lambda *_: pytest.fail("was timed"))
    report = runner.run_case(TINY, SETTINGS, lambda _: None)
    assert report["failed"] == (
        "the reference backend and stratified, maskloss and reference do not agree; nothing was timed"
    )
    assert report["arms"] == {}


def test_a_case_that_does_not_fit_is_not_tried() -> None:
    huge = Case("huge", 64, 1000, 1000, 10, 80, (1024, 1024), (8192, 8192))
    report = runner.run_case(huge, SETTINGS, lambda _: None)
    assert re.fullmatch(r"needs about \d+ GB of memory, but \d+ GB are free", report["failed"])


def test_a_case_without_any_of_the_arms_says_so() -> None:
    report = runner.run_case(TINY, replace(SETTINGS, arms=("factors", "rfdetr")), lambda _: None)
    assert report["failed"] == "has none of the arms factors, rfdetr"


def test_the_arm_of_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_command, "find_spec", lambda _: None)
    with pytest.raises(
        MaskLossError, match=r"the arm rfdetr needs RF-DETR's package(.|\n)*pip install 'rfdetr\[train\]'"
    ):
        run("--preset", "tiny-rf-detr", "--arms", "maskloss", "rfdetr", "--out", str(tmp_path))


def test_a_slow_arm_takes_fewer_turns_but_never_less_than_three(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def one_step(arm: str, samples: list[Any], turn: int, settings: runner.Settings) -> dict[str, Any]:
        order.append(arm)
        if arm == "broken":
            raise runner.WorkerError("out of memory")
        seconds = 100.0 if arm == "slow" else 1.0
        return {"samples": [*samples, {"round": turn, "targets": 0.0, "forward": seconds, "backward": 0.0}]}

    monkeypatch.setattr(runner, "_one_step", one_step)
    arms = ("quick", "slow", "broken")
    settings = runner.Settings(arms, steps=6, seconds=50, threads=1, device="cpu", dtype="float32")
    found: dict[str, dict[str, Any]] = {arm: {"samples": []} for arm in arms}
    runner._take_turns(found, {arm: arm for arm in arms}, settings, lambda _: None)  # type: ignore[misc]
    assert [len(found[arm]["samples"]) for arm in arms] == [6, 3, 0]
    assert found["broken"]["failed"] == "out of memory"
    assert order[:5] == ["quick", "slow", "broken", "slow", "quick"]


# -------------------------------------------------------------------------------------------------------- the command


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench_command.add_arguments(parser)
    return bench_command.main(parser.parse_args(arguments))


@pytest.mark.parametrize(
    "arms",
    [
        ("reference", "maskloss"),
        pytest.param(("stratified/4", "reference", "stratified", "maskloss"), marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_the_command_measures_and_writes(
    arms: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(arms) == 2:
        monkeypatch.setattr(runner, "Process", Here)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as workers have it
    out = tmp_path / "results"
    stages = ["--stages"] if len(arms) == 4 else []
    assert run("--preset", "tiny", "--quick", *stages, "--threads", "1", "--arms", *arms, "--out", str(out)) == 0
    text = capsys.readouterr().out
    assert "✓ reference, from the same random numbers: 6 of 6 matches" in text
    for arm in set(arms) & set(STRATIFIED):
        assert f"✓ {arm}, against the reference backend: 6 of 6 matches" in text
    assert re.search(r"maskloss +[\d.,]+ m?s", text)
    assert ("matching cost" in text) == bool(stages)
    report = json.loads((out / "bench.json").read_text())
    assert "OMP_WAIT_POLICY" not in report["settings"]["environment"]
    assert {"cpu", "cores", "memory"} <= set(report["machine"])
    assert report["software"]["torch"] == torch.__version__
    [case] = report["cases"]
    assert list(case["arms"]) == [arm for arm in ARMS if arm in arms]
    for arm, found in case["arms"].items():
        assert len(found["samples"]) == 3
        assert found["summary"]["packed"]["median"] > 0
        assert found["counts"]["transfers"] == (arm == "reference")
        assert found.get("stages", {}).keys() <= set(table.STAGES)
        assert ("stages" in found) == bool(stages)
    for arm, found in case["arms"].items():
        assert found["backend"] == ("reference" if arm == "reference" else "cpu")
    # Two arms drew the same points in every round, the others points of their own.
    losses = {arm: [sample["loss"] for sample in found["samples"]] for arm, found in case["arms"].items()}
    assert losses["maskloss"] == pytest.approx(losses["reference"], rel=1e-5)
    own = [losses[arm] for arm in arms if arm != "reference"]
    assert all(len({f"{loss:.5g}" for loss in turn}) == len(own) for turn in zip(*own, strict=True))
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "scaling.png").exists()


def synthetic_report(more: dict[str, float] | None = None) -> dict[str, Any]:
    """A report in which one arm failed, another could not measure memory, and a family grows.

    More arms take so many times as long as maskloss.
    """
    speeds = {"maskloss": 1.0, "transformers": 7.0} | (more or {})
    cases = []
    for case in [TINY, *family("targets")]:
        arms: dict[str, Any] = {}
        for arm, speed in sorted(speeds.items(), key=lambda each: ARMS.index(each[0])):
            steps = ((0, 0.011 * speed), (1, 0.012 * speed), (2, 0.013 * speed))
            taken = samples(*steps, packed=arm not in PEERS)
            memory = {"peak": None, "extra": None, "gradient": 100} if case is TINY else {"peak": 5e6, "extra": 0}
            memory["not_measured"] = "a reason" if case is TINY else None
            counts = {"operations": 1000, "transfers": 20}
            arms[arm] = {"samples": taken, "summary": runner.summarise(taken), "memory": memory, "counts": counts}
        arms["transformers"] |= {"waiting": "passive", "other_waiting": {"median": 0.1, "low": 0.1, "high": 0.1}}
        if case.targets == 400:
            arms["transformers"] = {"failed": "out of memory", "details": ""}
        cases.append({"name": case.name, "sizes": case.as_dict(), "arms": arms, "checks": []})
    return {
        "date": "2026-01-01T00:00:00+00:00",
        "machine": {"cpu": "A processor", "cores": 8, "load_before": 0.0},
        "software": {"maskloss": "1.0", "torch": "2.9", "python": "3.12"},
        "settings": SETTINGS.as_dict(),
        "cases": cases,
    }


def test_what_was_measured_outlives_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal unwinds the stack, through the code that ends the workers, and the first case is written."""
    done = [case for case in synthetic_report()["cases"] if case["name"] == TINY.name]

    def measure_case(*_: object, **__: object) -> dict[str, Any]:
        if not done:
            os.kill(os.getpid(), signal.SIGTERM)
        return done.pop()

    monkeypatch.setattr(bench_command, "run_case", measure_case)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run("--preset", "tiny", "small", "--arms", "maskloss", "--out", str(tmp_path))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert [case["name"] for case in json.loads((tmp_path / "bench.json").read_text())["cases"]] == [TINY.name]


def test_tables_show_failures_and_gaps() -> None:
    console = pytest.importorskip("rich.console").Console(width=120, file=io.StringIO())
    report = synthetic_report()
    console.print(table.heading(report))
    console.print(table.case_table(report["cases"][0]))
    console.print(table.case_table(report["cases"][-1]))
    console.print(table.family_table("targets", report["cases"][1:]))
    text = console.file.getvalue()
    assert "A processor" in text
    assert "not measured" in text
    assert re.search(r"transformers.*7\.0 × +14 ×", text)
    assert re.search(r"maskloss.* 1 +6\.00 ms", text)
    assert table.waiting_line(report["cases"][0]) == (
        "[dim]transformers: faster with OMP_WAIT_POLICY=PASSIVE; with the default policy 100 ms[/]"
    )
    assert re.search(r"transformers +failed", text)
    assert re.search(r"400 +12\.0 ms +5\.00 MB +failed", text)
    assert max(map(len, text.splitlines())) <= 120


def test_a_table_compares_every_arm_with_maskloss_and_with_transformers() -> None:
    console = pytest.importorskip("rich.console").Console(width=124, file=io.StringIO())
    report = synthetic_report({"stratified": 1.25, "stratified/4": 0.5})
    console.print(table.case_table(report["cases"][0]))
    console.print(table.family_table("targets", report["cases"][1:]))
    text = console.file.getvalue()
    assert re.search(r"stratified +15\.0 ms.*1\.25 × +7\.50 ms", text)
    assert re.search(r"stratified/4 +6\.00 ms.*0\.50 × +3\.00 ms", text)
    assert re.search(r"transformers.*7\.0 × +14 ×", text)
    assert re.search(r"maskloss +peak +stratified +peak +relative +stratified/4 +peak +relative +transformers", text)
    assert re.search(r"400 .*15\.0 ms +5\.00 MB +1\.25 × +6\.00 ms +5\.00 MB +0\.50 × +failed", text)
    assert "…" not in text
    assert table.speed_line(report["cases"][0]) == (
        "speed versus transformers: maskloss [bold]7.0 ×[/] (packed 14 ×), stratified [bold]5.6 ×[/] (11 ×), "
        "stratified/4 [bold]14 ×[/] (28 ×)"
    )
    # Where Transformers failed there is nothing to compare with; without other arms the table says it already.
    assert table.speed_line(report["cases"][-1]) == ""
    assert table.speed_line(synthetic_report()["cases"][0]) == ""


def test_the_documentation_gets_a_row_for_every_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = synthetic_report({"stratified": 1.25, "stratified/4": 0.5, "rfdetr": 3.0})
    for arm, found in report["cases"][0]["arms"].items():
        found["stages"] = dict.fromkeys(table.STAGES, 0.001 if arm == "maskloss" else 0.002)
    (tmp_path / "bench.json").write_text(json.dumps(report))
    script = Path(__file__).parents[2] / "scripts" / "bench_tables.py"
    spec = importlib.util.spec_from_file_location("bench_tables", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "bench.json")])
    module.main()
    steps, stages, packages = capsys.readouterr().out.split("\n\n")
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in steps.splitlines())
    assert {len(row) for row in rows} == {len(head)}
    tiny = [dict(zip(head, row, strict=True)) for row in rows if row[0] == "`tiny`"]
    assert [(row["arm"], row["step"]) for row in tiny] == [
        ("maskloss", "12.0 ms"),
        ("stratified", "15.0 ms"),
        ("stratified/4", "6.00 ms"),
    ]
    assert [row[head.index("ratio")] for row in rows[:3]] == ["7.0 ×", "5.6 ×", "14 ×"]
    assert stages.startswith("| stage | `tiny` | `tiny`, stratified | `tiny`, stratified/4 |")
    assert re.search(r"\| all \| 7\.00 ms \| 14\.0 ms \| 14\.0 ms \|", stages)
    assert "| `tiny` | 12.0 ms | 36.0 ms | **3.0 ×** | 84.0 ms | **7.0 ×** |\n" in packages
    assert "| backward | 1.00 ms | 2.00 ms | 2.0 × | 2.00 ms | 2.0 × |\n" in packages


def test_every_arm_has_a_color_and_a_label_of_its_own(tmp_path: Path) -> None:
    assert plots._COLORS.keys() == set(ARMS)
    assert len({color for pair in plots._COLORS.values() for color in pair}) == 2 * len(ARMS)
    report = synthetic_report(dict.fromkeys(ARMS, 1.0) | {"transformers": 7.0})
    assert plots.plot_presets(report, tmp_path / "bench.png")
    assert plots.plot_families(report, tmp_path / "scaling.png")


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0.1, 0.5, 0.7], [0.1, 0.5, 0.7]),
        ([0.1, 0.1, 0.15, 0.8], [0.1, 0.3, 0.5, 0.8]),
        ([0.85, 0.95], [0.7, 0.9]),
        ([], []),
    ],
)
def test_labels_move_apart(heights: list[float], expected: list[float]) -> None:
    assert plots._apart(heights, 0.2) == pytest.approx(expected)


def test_pictures_are_drawn_from_what_there_is(tmp_path: Path) -> None:
    report = synthetic_report()
    written = bench_command.write_results(report, tmp_path)
    assert [path.name for path in written] == ["bench.json", "bench.png", "scaling.png"]
    assert all(path.stat().st_size > 1000 for path in written)
    report["cases"] = []
    assert not plots.plot_presets(report, tmp_path / "none.png")
    assert not plots.plot_families(report, tmp_path / "none.png")


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--arms", "magic"], ["--preset", "huge"], ["--device", "abacus"]]
)
def test_arguments_that_make_no_sense(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*arguments)
    assert "error: argument" in capsys.readouterr().err
