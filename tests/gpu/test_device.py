"""What needs a real GPU: full sizes, CUDA graphs, torch.compile, deterministic mode, and no wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from maskloss import MaskCriterion, MaskFactors, MaskLoss, MaskTargets, PointSampling, graphs
from maskloss.matches import Matches

pytestmark = pytest.mark.gpu

BATCH, QUERIES, TARGETS, SIZE = 2, 30, 6, 128


@pytest.fixture
def forbid_waiting() -> Iterator[Callable[[], None]]:
    """From the call on, every wait of the host for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def make_logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(BATCH, QUERIES, SIZE, SIZE, device="cuda") * 3).to(dtype).requires_grad_()


def make_targets() -> MaskTargets:
    masks = [torch.rand(TARGETS, 4 * SIZE, 4 * SIZE) > 0.7 for _ in range(BATCH)]
    return MaskTargets.from_masks(masks).to("cuda")


def make_matches() -> Matches:
    pairs = [(torch.randperm(QUERIES)[:TARGETS], torch.arange(TARGETS)) for _ in range(BATCH)]
    found = Matches.from_pairs(pairs, num_queries=QUERIES, num_targets=[TARGETS] * BATCH)
    return found.to("cuda")


def step(
    criterion: MaskLoss, logits: Tensor, targets: MaskTargets, matches: Matches, seed: Tensor
) -> tuple[Any, Tensor]:
    out = criterion(logits, targets, matches=matches, seed=seed)
    (gradient,) = torch.autograd.grad(out.total, logits)
    return out, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_size_against_the_reference(dtype: torch.dtype) -> None:
    logits, targets, matches = make_logits(dtype), make_targets(), make_matches()
    seed = torch.tensor(1234567)
    (fast, gradient), (plain, wanted) = (
        step(MaskLoss(backend=name), logits, targets, matches, seed) for name in ("gpu", "reference")
    )
    torch.testing.assert_close(fast.per_instance.ce, plain.per_instance.ce, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast.per_instance.dice, plain.per_instance.dice, rtol=1e-5, atol=1e-6)
    tolerance = float(wanted.abs().max()) * (1e-5 if dtype == torch.float32 else 2**-8)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=tolerance)


def test_the_criterion_against_the_reference() -> None:
    logits = [make_logits() for _ in range(3)]
    classes = [torch.randn(BATCH, QUERIES, 11, device="cuda") for _ in range(3)]
    labels = [torch.randint(10, (TARGETS,), device="cuda") for _ in range(BATCH)]
    targets = {"masks": make_targets(), "labels": labels}
    fast, plain = (
        MaskCriterion(10, backend=name).cuda()(classes, logits, targets, seed=5) for name in ("gpu", "reference")
    )
    assert torch.equal(fast.matches.index, plain.matches.index)
    torch.testing.assert_close(fast.total, plain.total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("form", ["packed", "dense"])
def test_the_criterion_copies_nothing_but_the_description_of_masks(form: str, layers: int) -> None:
    """As the driver saw it: no copy to the host, and one to the device with the description of dense masks."""
    criterion = MaskCriterion(10).cuda()
    logits = [make_logits() for _ in range(layers)]
    classes = [torch.randn(BATCH, QUERIES, 11, device="cuda", requires_grad=True) for _ in range(layers)]
    masks = [torch.rand(TARGETS, 256, 256, device="cuda") > 0.7 for _ in range(BATCH)]
    forms = masks if form == "dense" else [MaskTargets.from_masks(each) for each in masks]
    labels = torch.arange(TARGETS, device="cuda")
    targets = [{"masks": each, "labels": labels} for each in forms]
    criterion(classes, logits, targets).total.backward()  # compiles
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        criterion(classes, logits, targets).total.backward()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert sum("Memcpy DtoH" in name for name in names) == 0
    assert sum("Memcpy HtoD" in name for name in names) == (form == "dense")


@pytest.mark.parametrize("seed_device", ["cpu", "cuda"])
def test_the_loss_never_waits_for_the_device(seed_device: str, forbid_waiting: Callable[[], None]) -> None:
    logits, targets, matches = make_logits(), make_targets(), make_matches()
    seed = torch.tensor(3).to(seed_device)
    forbid_waiting()
    step(MaskLoss(backend="gpu"), logits, targets, matches, seed)


def make_factors(dtype: torch.dtype) -> tuple[MaskFactors, list[Tensor]]:
    embeddings = torch.randn(BATCH, QUERIES, 64, device="cuda").to(dtype).requires_grad_()
    features = (torch.randn(BATCH, 64, SIZE, SIZE, device="cuda") / 4).to(dtype).requires_grad_()
    bias = torch.randn(QUERIES, device="cuda").to(dtype).requires_grad_()
    return MaskFactors(embeddings, features, bias, scratch_mb=0.3), [embeddings, features, bias]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_against_dense_logits(dtype: torch.dtype, deterministic: bool) -> None:
    (factors, leaves), targets, matches = make_factors(dtype), make_targets(), make_matches()
    points = torch.rand(len(matches), 2000, 2, device="cuda")
    found = []
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        for layer in (factors, factors.dense()):
            out = MaskLoss(backend="gpu")(layer, targets, matches=matches, points=points)
            found.append((out.total, *torch.autograd.grad(out.total, leaves)))
    finally:
        torch.use_deterministic_algorithms(False)
    bound = 1e-4 if dtype == torch.float32 else 2**-5
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=float(theirs.abs().max()) * bound)


def test_costs_of_factors_against_dense_logits() -> None:
    (factors, _), labels = make_factors(torch.float32), torch.arange(TARGETS, device="cuda")
    targets = {"masks": make_targets(), "labels": [labels] * BATCH}
    classes = torch.randn(BATCH, QUERIES, 11, device="cuda")
    criterion = MaskCriterion(10, sampling=PointSampling(num_points=3000)).cuda()
    with torch.no_grad():
        mine, theirs = (criterion(classes, layer, targets, seed=5) for layer in (factors, factors.dense()))
    assert torch.equal(mine.matches.index, theirs.matches.index)
    torch.testing.assert_close(mine.total, theirs.total, rtol=1e-3, atol=1e-3)


def test_the_loss_of_factors_never_waits_for_the_device(forbid_waiting: Callable[[], None]) -> None:
    (factors, leaves), targets, matches = make_factors(torch.float32), make_targets(), make_matches()
    loss = MaskLoss(backend="gpu")
    forbid_waiting()
    torch.autograd.grad(loss(factors, targets, matches=matches, seed=torch.tensor(3)).total, leaves)


def test_a_captured_graph_draws_new_points_from_its_seed() -> None:
    criterion, logits, targets, matches = MaskLoss(backend="gpu"), make_logits(), make_targets(), make_matches()
    seed = torch.tensor(1, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(criterion, logits, targets, matches, seed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, gradient = step(criterion, logits, targets, matches, seed)
    seen = []
    for value in (2, 3):
        seed.fill_(value)
        with torch.no_grad():
            logits.mul_(-1.1)
        graph.replay()
        eager, wanted = step(criterion, logits, targets, matches, torch.tensor(value))
        torch.testing.assert_close(captured.total, eager.total)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)
        seen.append(float(captured.total))
    assert seen[0] != seen[1]


@pytest.mark.parametrize("form", ["dense", "factors"])
def test_the_whole_criterion_in_a_graph(form: str) -> None:
    """Captured once, replayed with targets of other numbers: the losses and gradients of the eager criterion."""
    criterion = MaskCriterion(10).cuda()
    classes = torch.randn(BATCH, QUERIES, 11, device="cuda", requires_grad=True)
    layer, leaves = make_factors(torch.float32) if form == "factors" else (logits := make_logits(), [logits])
    leaves = [classes, *leaves]

    def drawn(counts: tuple[int, int]) -> list[dict[str, Any]]:
        masks = [torch.rand(count, 4 * SIZE, 4 * SIZE) > 0.7 for count in counts]
        return [{"masks": each, "labels": torch.randint(10, (len(each),))} for each in masks]

    def pad(targets: list[dict[str, Any]]) -> graphs.PaddedTargets:
        return graphs.pad_targets(targets, 8, data_size=2**20)

    static, seed = pad(drawn((3, 6))).to("cuda"), torch.tensor(0, device="cuda")

    def one() -> tuple[Any, tuple[Tensor, ...]]:
        out = graphs.padded_loss(criterion, classes, layer, static, seed=seed)
        return out, torch.autograd.grad(out.total, leaves)

    captured = graphs.capture(one)
    for number, counts in enumerate(((6, 2), (0, 8), (0, 0))):
        targets = drawn(counts)
        static.copy_(pad(targets))
        seed.fill_(number)
        found, gradients = captured.replay()
        moved = [{name: each.cuda() for name, each in entry.items()} for entry in targets]
        eager = criterion(classes, layer, moved, seed=number)
        torch.testing.assert_close(found.total, eager.total, rtol=1e-5, atol=1e-6)
        wanted = torch.autograd.grad(eager.total, leaves)
        for mine, theirs in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own parts
def test_torch_compile() -> None:
    criterion, logits, targets, matches = MaskLoss(backend="gpu"), make_logits(), make_targets(), make_matches()
    seed = torch.tensor(7)

    def total(logits: Tensor) -> Tensor:
        result: Tensor = criterion(2 * logits, targets, matches=matches, seed=seed).total
        return result

    expected = total(logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    compiled = torch.compile(total)(logits)
    (gradient,) = torch.autograd.grad(compiled, logits)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_mode_gives_the_same_bits(dtype: torch.dtype) -> None:
    criterion, logits, targets, matches = MaskLoss(backend="gpu"), make_logits(dtype), make_targets(), make_matches()
    seed = torch.tensor(11)
    usual = step(criterion, logits, targets, matches, seed)[1]
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (step(criterion, logits, targets, matches, seed)[1] for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, usual, rtol=2**-6, atol=float(usual.abs().max()) * 1e-5)


def test_a_plane_of_more_than_two_to_the_31_elements_away() -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < 6 * 2**30:
        pytest.skip("needs 6 GiB of GPU memory")
    planes = torch.empty_strided((1, 2, 256, 256), (0, 2**31, 256, 1), dtype=torch.bfloat16, device="cuda").normal_()
    loss = MaskLoss(backend="gpu", sampling=PointSampling(num_points=500))
    targets = MaskTargets.from_masks([torch.rand(1, 64, 64) > 0.5]).to("cuda")
    pairs = [(torch.tensor([1]), torch.tensor([0]))]
    found, same = (loss(each, targets, matches=pairs, seed=3).total for each in (planes, planes.contiguous()))
    assert torch.equal(found, same)
