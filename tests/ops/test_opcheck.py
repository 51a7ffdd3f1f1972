"""Every operation against torch's own checks: schema, shape function, autograd registration, tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from maskloss import MaskTargets, ops
from maskloss.ops import dense, products, volumes

# PyTorch 2.14 hides this warning of its own checks, but not from those who have warnings raised.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

Args = tuple[Any, ...]

POINTS, CANDIDATES, UNCERTAIN, LAYOUT = 20, 50, 12, "stratified"
SEED = torch.tensor(3)
FOCAL = (0.3, 1.5)
# Two layers of different sizes, two images, three queries; (layer, image, query, target) sorted by layer.
INDEX = torch.tensor([[0, 0, 2, 1], [0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1], [1, 1, 2, 0]])
LAYER_SIZES, IMAGE_IDS = (2, 3), torch.tensor([7, 8])
DRAW_FOR_MATCHING = (IMAGE_IDS, SEED, POINTS, 0, 0, LAYOUT)

# Themselves, without what serves `torch.func`.
MASK_LOSS, VOLUME_LOSS = dense._MASKS.operation.operation, volumes._VOLUMES.operation.operation


def layers(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 3, *size, dtype=dtype).requires_grad_() for size in ((5, 8), (9, 4))]


def targets(encoding: str) -> MaskTargets:
    masks = [torch.rand(2, 11, 13) > 0.5, torch.rand(1, 6, 7) > 0.5]
    if encoding == "labels":
        return MaskTargets.cat([MaskTargets.from_label_map(each[0].int(), [0, 1][: len(each)]) for each in masks])
    soft = [each * 0.7 for each in masks] if encoding == "values" else masks
    ignore = torch.rand(6, 7) > 0.7
    return MaskTargets.cat([MaskTargets.from_masks(soft[0]), MaskTargets.from_masks(soft[1], ignore=ignore)])


def point_sample(backend: str, mode: str = "bilinear") -> Args:
    index = torch.tensor([1, 0, 1])
    return torch.randn(2, 5, 8, requires_grad=True), index, torch.rand(3, POINTS, 2), mode, "zeros", backend


def point_sample_backward(backend: str) -> Args:
    maps, *rest = point_sample(backend)
    return torch.randn(3, POINTS), maps.detach(), *rest


def uncertain_points(backend: str, num_uncertain: int = UNCERTAIN) -> Args:
    windows = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.3, 0.5, 0.5]])
    plain = [layer.detach() for layer in layers()]
    drawn = (IMAGE_IDS, SEED, POINTS, CANDIDATES, num_uncertain, LAYOUT)
    return plain, INDEX, LAYER_SIZES, *drawn, windows, "border", backend


def mask_loss(
    backend: str,
    encoding: str = "bits",
    *,
    given: bool = False,
    dtype: torch.dtype = torch.float32,
    dice: str = "standard",
) -> Args:
    packed = targets(encoding)
    points = torch.rand(len(INDEX), POINTS, 2) if given else None
    return (
        *(layers(dtype), INDEX, LAYER_SIZES, packed.encoding, *packed.tensors),
        *(IMAGE_IDS, SEED, POINTS, CANDIDATES, UNCERTAIN, LAYOUT),
        *("zeros", "bilinear", *FOCAL, dice, points, backend),
    )


def mask_loss_backward(backend: str, encoding: str = "bits") -> Args:
    logits, *rest, _ = mask_loss(backend, encoding)
    plain = [layer.detach() for layer in logits]
    _, _, *saved = MASK_LOSS(plain, *rest, backend)
    gradients = torch.randn(len(INDEX)), torch.randn(len(INDEX))
    return *gradients, *saved, plain, *rest, [True, False], backend


def match_cost(backend: str, encoding: str = "bits") -> Args:
    packed = targets(encoding)
    plain = [layer.detach() for layer in layers()]
    options = ("zeros", "nearest", *FOCAL, "soft", backend)
    return plain, packed.num_targets, packed.encoding, *packed.tensors, *DRAW_FOR_MATCHING, *options


def stacks(encoding: str) -> MaskTargets:
    masks = [torch.rand(2, 3, 11, 13) > 0.5, torch.rand(1, 3, 6, 7) > 0.5]
    return MaskTargets.from_masks([each * 0.7 for each in masks] if encoding == "values" else masks)


def volume_loss(backend: str, encoding: str = "bits", *, linear: bool = True) -> Args:
    packed = stacks(encoding)
    stacked = [torch.randn(2, 3, 4, *size).requires_grad_() for size in ((5, 8), (9, 4))]
    return (
        *(stacked, INDEX, LAYER_SIZES, packed.encoding, *packed.tensors),
        *(IMAGE_IDS, SEED, POINTS, CANDIDATES, UNCERTAIN, LAYOUT),
        *("zeros", "bilinear", *FOCAL, "soft", None, 3, linear, backend),
    )


def volume_loss_backward(backend: str) -> Args:
    logits, *rest, _ = volume_loss(backend)
    plain = [layer.detach() for layer in logits]
    _, _, *saved = VOLUME_LOSS(plain, *rest, backend)
    gradients = torch.randn(len(INDEX)), torch.randn(len(INDEX))
    return *gradients, *saved, plain, *rest, [True, False], backend


def volume_cost(backend: str) -> Args:
    packed = stacks("bits")
    plain = [layer.detach() for layer in volume_loss(backend)[0]]
    options = ("zeros", "bilinear", *FOCAL, "standard", None, 3, False, backend)
    return plain, packed.num_targets, packed.encoding, *packed.tensors, *DRAW_FOR_MATCHING, *options


def factors(dtype: torch.dtype = torch.float32) -> Args:
    """Two layers that are products, with features of their own."""
    rows = [torch.randn(2, 3, 4, dtype=dtype).requires_grad_() for _ in range(2)]
    biases = [torch.randn(2, 3, dtype=dtype).requires_grad_() for _ in range(2)]
    features = [torch.randn(2, 4, *size, dtype=dtype).requires_grad_() for size in ((5, 8), (9, 4))]
    return rows, biases, features, [0, 1], 2 * 40 * dtype.itemsize


def factored_match_cost(backend: str, num_points: int = POINTS) -> Args:
    packed = targets("bits")
    lists = [[each.detach() for each in listed] for listed in factors()[:3]]
    options = ("zeros", "bilinear", *FOCAL, "semimetric", backend)
    described = (packed.num_targets, packed.encoding, *packed.tensors)
    return *lists, *factors()[3:], *described, IMAGE_IDS, SEED, num_points, 0, 0, LAYOUT, *options


def factored_mask_loss(
    backend: str,
    encoding: str = "bits",
    *,
    given: bool = False,
    dtype: torch.dtype = torch.float32,
    dice: str = "semimetric",
) -> Args:
    packed = targets(encoding)
    points = torch.rand(len(INDEX), POINTS, 2) if given else None
    return (
        *(*factors(dtype), INDEX, [1, 1, 2, 1], packed.encoding, *packed.tensors),
        *(IMAGE_IDS, SEED, POINTS, CANDIDATES, UNCERTAIN, LAYOUT),
        *("zeros", "bilinear", *FOCAL, dice, points, backend),
    )


def factored_mask_loss_backward(backend: str, encoding: str = "bits", *, needed: bool = True) -> Args:
    *arguments, _ = factored_mask_loss(backend, encoding)
    plain = [[each.detach() for each in listed] for listed in arguments[:3]]
    inputs = (*plain, *arguments[3:])
    _, _, *kept = products._factored_mask_loss(*inputs, backend)
    gradients = torch.randn(len(INDEX)), torch.randn(len(INDEX))
    return *gradients, *kept, *inputs, [True, needed, needed, True], backend


@pytest.mark.parametrize(
    ("operation", "make"),
    [
        pytest.param(ops._point_sample, point_sample, id="point_sample"),
        pytest.param(ops._point_sample, lambda backend: point_sample(backend, "nearest"), id="point_sample, nearest"),
        pytest.param(ops._point_sample_backward, point_sample_backward, id="point_sample_backward"),
        pytest.param(ops._uncertain_points, uncertain_points, id="uncertain_points"),
        pytest.param(ops._uncertain_points, lambda backend: uncertain_points(backend, 0), id="uniform points"),
        pytest.param(MASK_LOSS, mask_loss, id="mask_loss"),
        pytest.param(MASK_LOSS, lambda backend: mask_loss(backend, "labels"), id="mask_loss, label maps"),
        pytest.param(MASK_LOSS, lambda backend: mask_loss(backend, "values", dice="soft"), id="mask_loss, soft"),
        pytest.param(MASK_LOSS, lambda backend: mask_loss(backend, given=True), id="mask_loss, given points"),
        pytest.param(
            MASK_LOSS,
            lambda backend: mask_loss(backend, "values", dtype=torch.bfloat16),
            id="mask_loss, bfloat16",
        ),
        pytest.param(dense._MASKS.backward, mask_loss_backward, id="mask_loss_backward"),
        pytest.param(
            dense._MASKS.backward,
            lambda backend: mask_loss_backward(backend, "values"),
            id="mask_loss_backward soft",
        ),
        pytest.param(VOLUME_LOSS, volume_loss, id="volume_loss"),
        pytest.param(VOLUME_LOSS, lambda backend: volume_loss(backend, "values", linear=False), id="volume_loss, soft"),
        pytest.param(volumes._VOLUMES.backward, volume_loss_backward, id="volume_loss_backward"),
        pytest.param(volumes._volume_cost, volume_cost, id="volume_cost"),
        pytest.param(ops._match_cost, match_cost, id="match_cost"),
        pytest.param(ops._match_cost, lambda backend: match_cost(backend, "labels"), id="match_cost, label maps"),
    ],
)
def test_operation(backend: str, operation: Any, make: Callable[[str], Args]) -> None:
    torch.library.opcheck(operation, make(backend))


@pytest.mark.parametrize(
    ("operation", "make"),
    [
        pytest.param(products._factored_match_cost, factored_match_cost, id="factored_match_cost"),
        pytest.param(
            products._factored_match_cost,
            lambda backend: factored_match_cost(backend, 50),
            id="factored_match_cost, more points than pixels",
        ),
        pytest.param(products._factored_mask_loss, factored_mask_loss, id="factored_mask_loss"),
        pytest.param(
            products._factored_mask_loss,
            lambda backend: factored_mask_loss(backend, "values"),
            id="factored_mask_loss, soft",
        ),
        pytest.param(
            products._factored_mask_loss,
            lambda backend: factored_mask_loss(backend, given=True, dtype=torch.bfloat16),
            id="factored_mask_loss, given points, bfloat16",
        ),
        pytest.param(
            products._factored_mask_loss_backward, factored_mask_loss_backward, id="factored_mask_loss_backward"
        ),
        pytest.param(
            products._factored_mask_loss_backward,
            lambda backend: factored_mask_loss_backward(backend, "labels", needed=False),
            id="factored_mask_loss_backward, some gradients",
        ),
    ],
)
def test_operation_on_factors(operation: Any, make: Callable[[str], Args]) -> None:
    """The reference takes dense logits."""
    torch.library.opcheck(operation, make("cpu"))


def test_assign() -> None:
    labels, counts = torch.tensor([0, 1, 1, 0, 2]), (4, 0, 1)
    images = MaskTargets.cat([MaskTargets.from_masks(torch.ones(count, 2, 2)) for count in counts]).images
    torch.library.opcheck(ops._assign, (torch.rand(2, 3, 6, 4), labels, images, counts, 3, 2))
    # The kernel itself needs a device; what is known of its result does not.
    with FakeTensorMode():
        cost, fake = torch.empty(2, 3, 6, 4), torch.empty(5, dtype=torch.int64)
        assert ops._assign_on_device(cost, fake, fake, counts, 3, 2).shape == (4 * 2 * 2 * 4 + 36,)


def test_every_operation_is_checked() -> None:
    known = {
        *("point_sample", "point_sample_backward", "uncertain_points", "match_cost", "assign"),
        "assign_on_device",
        *("mask_loss", "mask_loss_backward"),
        *("factored_match_cost", "factored_mask_loss", "factored_mask_loss_backward"),
        *("volume_cost", "volume_loss", "volume_loss_backward"),
    }
    assert set(dir(torch.ops.maskloss)) - {"name"} >= known
    registered = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("maskloss::")}  # fmt: skip
    assert registered == known


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this PyTorch does not partition graphs")
@pytest.mark.parametrize(
    "name",
    [
        *("assign", "match_cost", "uncertain_points", "mask_loss", "mask_loss_backward"),
        *("factored_match_cost", "factored_mask_loss", "factored_mask_loss_backward"),
        *("volume_cost", "volume_loss", "volume_loss_backward"),
    ],
)
def test_what_a_graph_of_the_compiler_must_not_capture(name: str) -> None:
    """A wait for the device would fail there, and a seed on the host would be read once and for all."""
    operation = getattr(torch.ops.maskloss, name).default
    assert torch.Tag.cudagraph_unsafe in operation.tags
    assert torch.Tag.pt2_compliant_tag in operation.tags
