"""`patch(model, factors=True)`: masks that are never formed train the same model."""

from __future__ import annotations

import copy
import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from maskloss import MaskLossError
from maskloss.factors import MaskFactors
from maskloss.integrations.transformers import factors as integration
from maskloss.integrations.transformers import families, forward_pass, patch, unpatch
from support import tiny
from support.forced import answered, fix_seed, recorded

pytest.importorskip("transformers")

FAMILIES = ("mask2former", "oneformer", "eomt", "eomt_dinov3", "rf_detr")

pytestmark = pytest.mark.skipif(
    families.transformers_version() < (4, 39), reason="this Transformers computes masks of Mask2Former by channel"
)
LAYERS = {"mask2former": 3, "oneformer": 3, "eomt": 3, "eomt_dinov3": 3, "rf_detr": 3}
FINAL = {"rf_detr": "pred_masks"}
TOLERANCE = 1e-4

# An attention mask is what the model compares with 0: a logit of rounding size may fall on either side.
ROUNDING = 1e-5


class Resized(TorchFunctionMode):
    """Collects the logits that attention masks are made of: what a model resizes that has a plane for each query."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.interpolate and args[0].shape[1] in (tiny.QUERIES, 2 * tiny.QUERIES):
            self.logits.append(out.detach())
        return out


@contextmanager
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Collect every product that stays factors."""
    found: list[Any] = []
    inner = integration.LayerFactors.of

    def spy(*args: Any) -> Any:
        found.append(inner(*args))
        return found[-1]

    with monkeypatch.context() as patched:
        patched.setattr(integration.LayerFactors, "of", staticmethod(spy))
        yield found


def test_a_version_that_has_no_product_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.mask2former()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.38.2")
    with pytest.raises(MaskLossError, match=r"Transformers 4\.38 adds channel by channel[\s\S]*4\.39 or later"):
        patch(model, factors=True)
    patch(model).undo()


@pytest.mark.parametrize("family", FAMILIES)
def test_terms_and_gradients_agree_with_the_unpatched_model(
    family: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny.build(family), tiny.batch_for(family)
    rf_detr = family == "rf_detr"
    with (
        patch(model, backend=backend, factors=True),
        recorded(monkeypatch, one_image=rf_detr) as recorder,
        products(monkeypatch) as made,
        Resized() as our_logits,
    ):
        loss, terms = tiny.run(model, family, batch)
        ours = tiny.gradients(model, loss)
    assert len(made) == LAYERS[family]
    with (
        answered(monkeypatch, recorder, final_first=not rf_detr, shared=rf_detr),
        Resized() as their_logits,
    ):
        theirs_loss, theirs_terms = tiny.run(model, family, batch)
    theirs = tiny.gradients(model, theirs_loss)

    assert bool(our_logits.logits) == (not rf_detr)
    flipped = [(a > 0) != (b > 0) for a, b in zip(our_logits.logits, their_logits.logits, strict=True)]
    print(f"{family}: {sum(int(e.sum()) for e in flipped)} of {sum(e.numel() for e in flipped)} attention logits flip")
    for mine, other, flips in zip(our_logits.logits, their_logits.logits, flipped, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=ROUNDING)
        assert (other[flips].abs() < ROUNDING).all()

    assert list(terms) == list(theirs_terms)
    torch.testing.assert_close(loss, theirs_loss, rtol=TOLERANCE, atol=0)
    for name, value in theirs_terms.items():
        torch.testing.assert_close(terms[name], value, rtol=TOLERANCE, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert ours.keys() == theirs.keys()
    largest = max(float(g.norm()) for g in theirs.values())
    for name, gradient in theirs.items():
        bound = TOLERANCE * max(float(gradient.norm()), 1e-2 * largest)
        assert float((ours[name] - gradient).norm()) <= bound, name


def outputs_of(model: Any, batch: dict[str, Any]) -> Any:
    torch.manual_seed(7)
    return model(**batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_model_returns(family: str) -> None:
    """The final masks are a tensor with a graph; those of the other layers, where they are returned, are factors."""
    model, batch = tiny.build(family), tiny.batch_for(family)
    options = {"output_auxiliary_logits": True} if family in ("mask2former", "oneformer") else {}
    with patch(model, backend="reference"):
        before = outputs_of(model, batch | options)
    with patch(model, backend="reference", factors=True):
        after = outputs_of(model, batch | options)
    assert list(before) == list(after)
    name = FINAL.get(family, "masks_queries_logits")
    torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)
    head = next(p for n, p in model.named_parameters() if re.search("mask_embed.*weight|mask_head.fc3|query.*proj", n))
    assert torch.autograd.grad(after[name].sum(), head, retain_graph=True)[0].any()
    if family == "oneformer":
        assert after.transformer_decoder_mask_predictions is after.masks_queries_logits
    others = {"mask2former": "auxiliary_logits", "rf_detr": "auxiliary_outputs", "oneformer": "auxiliary_predictions"}
    if family not in others:
        return
    inner = {"rf_detr": "pred_masks"}.get(family, "masks_queries_logits")
    for mine, other in zip(after[others[family]], before[others[family]], strict=True):
        assert isinstance(mine[inner], MaskFactors)
        torch.testing.assert_close(mine[inner].dense(), other[inner], rtol=1e-5, atol=1e-6)


def test_layers_share_their_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """One features object, and one resized copy for each size of attention: 3 sizes for the 4 layers here."""
    model, batch = tiny.build("mask2former", decoder_layers=5), tiny.batch_for("mask2former")
    kept: list[int] = []
    with patch(model, backend="reference", factors=True), products(monkeypatch) as layers, Resized() as resized:
        model.criterion.register_forward_pre_hook(lambda *_: kept.append(len(layers[0].shared.resized.made)))
        model(**batch)
    assert len(layers) == 5
    assert len({id(layer.features) for layer in layers}) == 1
    assert len({id(layer.shared) for layer in layers}) == 1
    assert len(resized.logits) == 5
    assert kept == [3]
    # What is returned keeps none of it alive.
    assert layers[0].shared.resized.source is None


class Largest(TorchDispatchMode):
    """The number of elements of the largest output of any operation that is as wide as a layer's masks."""

    def __init__(self, planes: int, pixels: int) -> None:
        super().__init__()
        self.planes, self.pixels, self.found = planes, pixels, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor) and each.numel() == self.planes * self.pixels and each.shape[-2:].numel() > 1:
                self.found += each.shape[0] == 2
        return out


def test_intermediate_layers_form_no_masks_in_the_model() -> None:
    """Up to the criterion, which is left out here, the model makes no tensor of the size of a layer's masks."""
    model, batch = tiny.build("mask2former"), tiny.batch_for("mask2former")
    counts = []
    for factors in (False, True):
        with patch(model, factors=factors), Largest(2 * tiny.QUERIES, 16 * 16) as seen:
            model.criterion.forward = lambda **_: {"loss_mask": torch.zeros((), requires_grad=True) + 0}
            model(**batch)
            del model.criterion.forward
        counts.append(seen.found)
    # The final layer's masks are the one that is left: their product, reshaped or not.
    assert counts[0] >= 3
    assert counts[1] < counts[0]
    assert counts[1] <= counts[0] // 3 + 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["evaluation", "no targets"])
def test_nothing_changes_otherwise(family: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.build(family), tiny.batch_for(family)
    if how == "evaluation":
        model.eval()
    else:
        batch = {name: v for name, v in batch.items() if name not in ("mask_labels", "class_labels", "labels")}
    fix_seed(monkeypatch, 5)
    with patch(model, backend="reference"):
        before = outputs_of(model, batch)
    with patch(model, backend="reference", factors=True), products(monkeypatch) as made:
        after = outputs_of(model, batch)
    assert not made
    assert list(before) == list(after)
    for name, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(after[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_restores_everything(family: str) -> None:
    model = tiny.BUILDERS[family]()
    classes, states = {n: type(m) for n, m in model.named_modules()}, list(model.state_dict())

    def tables() -> dict[str, Any]:
        return {
            f"{n}.{name}": (dict(value) if isinstance(value, dict) and "hooks" in name else id(type(value)))
            for n, m in model.named_modules()
            for name, value in vars(m).items()
        }

    before = tables()
    handle = patch(model, factors=True)
    assert tables() != before
    assert list(model.state_dict()) == states
    handle.undo()
    assert tables() == before
    assert {n: type(m) for n, m in model.named_modules()} == classes


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_train_on_factors_too(family: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_seed(monkeypatch, 5)
    model, batch = tiny.build(family), tiny.batch_for(family)
    with patch(model, backend="reference", factors=True):
        loss, _ = tiny.run(model, family, batch)
        again = copied(model, how)
    with products(monkeypatch) as made:
        same, _ = tiny.run(again, family, batch)
        torch.testing.assert_close(same, loss)
        assert len(made) == LAYERS[family]
        unpatch(again)
        tiny.run(again, family, batch)
        assert len(made) == LAYERS[family]
    assert {n: type(m) for n, m in again.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    with patch(again):
        pass


def copied(model: Any, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(model)
    buffer = io.BytesIO()
    try:
        torch.save(model, buffer)
    except AttributeError as error:
        # Transformers hangs local functions into some models, patched or not.
        pytest.skip(f"Transformers' own: {error}")
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_models_built_under_a_global_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = tiny.batch_for("mask2former")
    with patch(backend="reference", factors=True), products(monkeypatch) as made:
        model = tiny.build("mask2former")
        tiny.run(model, "mask2former", batch)
        assert len(made) == 3
        with pytest.raises(MaskLossError, match="VidEoMT's forward takes no targets"):
            tiny.videomt()
    with products(monkeypatch) as made:
        tiny.run(model, "mask2former", batch)
    assert not made


def test_a_family_whose_masks_cannot_stay_factors_says_so() -> None:
    model = tiny.videomt()
    with pytest.raises(MaskLossError, match="VidEoMT's forward takes no targets and returns the masks"):
        patch(model, factors=True)
    # And is left as it was.
    with patch(model):
        pass
    both = nn.ModuleList([tiny.mask2former(), model])
    with pytest.raises(MaskLossError, match="VidEoMT"):
        patch(both, factors=True)
    with patch(both):
        pass
    with pytest.raises(MaskLossError, match="factors must be True or False"):
        patch(model, factors="yes")  # type: ignore[arg-type]


def test_a_model_that_does_not_multiply_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.build("mask2former"), tiny.batch_for("mask2former")
    predictor = model.model.transformer_module.decoder.mask_predictor

    def by_channel(outputs: Tensor, pixels: Tensor, attention_mask_target_size: Any = None) -> Any:
        embeddings = predictor.mask_embedder(outputs.transpose(0, 1))
        masks = sum(embeddings[..., c, None, None] * pixels[:, None, c] for c in range(pixels.shape[1]))
        resized = torch.nn.functional.interpolate(masks, size=attention_mask_target_size, mode="bilinear")
        return masks, resized.flatten(2).repeat(1, predictor.num_heads, 1).flatten(0, 1).unflatten(0, (-1, 6)) < 0

    predictor.forward = by_channel
    with (
        patch(model, backend="reference", factors=True),
        pytest.raises(
            MaskLossError, match=r"Mask2Former\w+ of this version of Transformers computes them in another way"
        ),
    ):
        model(**batch)
    assert not forward_pass._PASSES.of


# ----------------------------------------------------------------------------------------------- the state of one pass


def test_an_error_ends_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.build("mask2former"), tiny.batch_for("mask2former")
    with patch(model, backend="reference", factors=True), products(monkeypatch) as made:
        with pytest.raises(MaskLossError):
            model(**(batch | {"mask_labels": 3}))
        assert len(made) == 3
        assert not forward_pass._PASSES.of
        # Its forward is called without hooks, and so without a pass.
        out = model.forward(**batch)
        assert len(made) == 3
        assert isinstance(out.masks_queries_logits, Tensor)


def test_an_interrupt_leaves_nothing_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.build("mask2former"), tiny.batch_for("mask2former")
    plain = {"pixel_values": batch["pixel_values"]}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with patch(model, backend="reference", factors=True):
        hook = model.criterion.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
        hook.remove()
        assert isinstance(model(**plain).masks_queries_logits, Tensor)
        assert not forward_pass._PASSES.of
        assert tiny.run(model, "mask2former", batch)[0].isfinite()


def test_a_model_may_be_called_inside_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the outer pass is dense; the loss is the same."""
    fix_seed(monkeypatch, 5)
    model, batch = tiny.build("mask2former"), tiny.batch_for("mask2former")
    layers = model.model.transformer_module.decoder.layers
    inside: list[Any] = []

    def call_again(*_: Any) -> None:
        if not inside:
            inside.append(None)
            inside.append(model(pixel_values=batch["pixel_values"]))

    with patch(model, backend="reference", factors=True), products(monkeypatch) as made:
        expected, _ = tiny.run(model, "mask2former", batch)
        assert len(made) == 3
        hook = layers[0].register_forward_pre_hook(call_again)
        loss, _ = tiny.run(model, "mask2former", batch)
        hook.remove()
        assert len(made) == 4
    assert isinstance(inside[1].masks_queries_logits, Tensor)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_targets_may_be_given_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.build("mask2former"), tiny.batch_for("mask2former")
    with patch(model, backend="reference", factors=True), products(monkeypatch) as made:
        model(batch["pixel_values"], batch["mask_labels"], batch["class_labels"])
        assert len(made) == 3
        model(batch["pixel_values"], batch["mask_labels"])
    assert len(made) == 3


def test_hooks_of_others_see_what_the_model_returns() -> None:
    model, batch = tiny.build("mask2former"), tiny.batch_for("mask2former")
    seen: list[Any] = []
    model.register_forward_hook(lambda _, __, out: seen.append(type(out.masks_queries_logits)))
    with patch(model, backend="reference", factors=True):
        model(**batch)
    assert seen == [Tensor]


def test_embeddings_are_a_tensor_to_everybody_else() -> None:
    plain = torch.randn(2, 3, 4, requires_grad=True)
    waiting = integration.Embeddings.wait(plain, integration.SharedWork())
    assert type(waiting + 1) is Tensor
    assert type(torch.einsum("bqc,bqc->bq", waiting, plain)) is Tensor
    assert torch.equal(torch.autograd.grad((waiting * 2).sum(), plain)[0], torch.full((2, 3, 4), 2.0))
    layer = torch.einsum("bqc, bchw -> bqhw", waiting, torch.randn(2, 4, 5, 6))
    assert isinstance(layer, MaskFactors)
    assert layer.embeddings is plain
    with pytest.raises(MaskLossError, match="the model calls softmax with them"):
        torch.softmax(layer, 1)
    with pytest.raises(MaskLossError, match="the model calls add with them"):
        layer + torch.ones(1) + torch.ones(1)


# ------------------------------------------------------------------------------------- with what else people train with


@pytest.mark.parametrize("family", ["mask2former", "eomt", "rf_detr"])
def test_autocast(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_seed(monkeypatch, 5)
    model, batch = tiny.build(family), tiny.batch_for(family)
    found = []
    for factors in (False, True):
        with patch(model, backend="reference", factors=factors), torch.autocast("cpu", dtype=torch.bfloat16):
            out = outputs_of(model, batch)
        found.append((out.loss, out[FINAL.get(family, "masks_queries_logits")], tiny.gradients(model, out.loss)))
    (loss, masks, theirs), (other, others, ours) = found
    torch.testing.assert_close(other, loss, rtol=2e-2, atol=0)
    assert others.dtype == masks.dtype
    assert ours.keys() == theirs.keys()
    assert all(g.isfinite().all() for g in ours.values())


def test_what_accelerate_converts() -> None:
    """Accelerate runs the forward under autocast and makes float32 of all that it returns in half precision."""
    operations = pytest.importorskip("accelerate.utils.operations")
    model, batch = tiny.build("mask2former"), tiny.batch_for("mask2former")
    kinds = []
    for factors in (False, True):
        with patch(model, backend="reference", factors=factors):
            inner = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
            model.forward = operations.convert_outputs_to_fp32(inner)
            out = model(**batch)
            del model.forward
        kinds.append({name: value.dtype for name, value in out.items() if isinstance(value, Tensor)})
    assert kinds[0] == kinds[1]
    assert kinds[1]["masks_queries_logits"] == torch.float32


def test_gradient_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_seed(monkeypatch, 5)
    model, batch = tiny.build("mask2former"), tiny.batch_for("mask2former")
    decoder = model.model.transformer_module.decoder
    with patch(model, backend="reference", factors=True):
        loss, _ = tiny.run(model, "mask2former", batch)
        expected = tiny.gradients(model, loss)
        recomputed = []
        for layer in decoder.layers:
            inner = layer.forward

            def checkpointed(*args: Any, inner: Any = inner, **kwargs: Any) -> Any:
                recomputed.append(1)
                return torch.utils.checkpoint.checkpoint(inner, *args, use_reentrant=False, **kwargs)

            layer.forward = checkpointed
        again, _ = tiny.run(model, "mask2former", batch)
        found = tiny.gradients(model, again)
    assert len(recomputed) == 2
    torch.testing.assert_close(again, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_data_parallel_wrappers(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    fix_seed(monkeypatch, 5)
    model, batch = tiny.build("mask2former"), tiny.batch_for("mask2former")
    with patch(model, backend="reference", factors=True):
        loss, _ = tiny.run(model, "mask2former", batch)
        expected = tiny.gradients(model, loss)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        with patch(wrapped, backend="reference", factors=True), products(monkeypatch) as made:
            torch.manual_seed(7)
            again = wrapped(**batch).loss
            found = tiny.gradients(model, again)
        assert len(made) == 3
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(again, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_while_code_is_compiled_masks_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision is made where the product is: there is no pass, and no product of factors, in compiled code."""
    model, batch = tiny.build("mask2former"), tiny.batch_for("mask2former")
    with patch(model, backend="reference", factors=True), products(monkeypatch) as made:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        out = model(pixel_values=batch["pixel_values"])
        head = model.get_submodule("model.transformer_module.decoder.mask_predictor.mask_embedder")
        assert type(head(torch.randn(2, 3, 32))) is Tensor
    assert not made
    assert type(out.masks_queries_logits) is Tensor


@pytest.mark.slow
# Dynamo looks at the .grad of tensors that have none, and warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_model_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_seed(monkeypatch, 5)
    model, batch = tiny.build("eomt"), tiny.batch_for("eomt")
    with patch(model, backend="reference", factors=True):
        torch.manual_seed(7)
        expected = tiny.gradients(model, model(**batch).loss)
        compiled = torch.compile(model, backend="eager")
        torch.manual_seed(7)
        found = tiny.gradients(model, compiled(**batch).loss)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-6, name
