"""Patching: what it changes, that it can be undone, and what it refuses."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import importlib.util
import pickle
import re
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from maskloss import MaskLossError, MaskTargets, PointSampling, distributed, ops
from maskloss._abi import Draw, Job
from maskloss.integrations import _targets
from maskloss.integrations import transformers as transformers_integration
from maskloss.integrations.transformers import families, patch, unpatch
from maskloss.integrations.transformers.families import FAMILIES
from maskloss.integrations.transformers.universal import PointCriterion
from support import tiny
from support.forced import fix_seed

transformers = pytest.importorskip("transformers")

INSTALLED = [family for family in FAMILIES if family.is_installed()]
FOLDERS = {
    "Mask2Former": "mask2former",
    "OneFormer": "oneformer",
    "EoMT": "eomt",
    "EoMT-DINOv3": "eomt_dinov3",
    "VidEoMT": "videomt",
    "RF-DETR segmentation": "rf_detr",
}


def library() -> dict[str, Any]:
    """Every class and function in the modules of the supported models, and the methods of those that matter."""
    found: dict[str, Any] = {}
    for family in INSTALLED:
        module = importlib.import_module(family.path)
        found |= {f"{family.path}.{name}": value for name, value in vars(module).items()}
        for name in (family.model, family.criterion):
            if name is not None:
                found |= {f"{family.path}.{name}.{k}": v for k, v in vars(getattr(module, name)).items()}
    if importlib.util.find_spec("transformers.loss") is not None:
        mapping = importlib.import_module("transformers.loss.loss_utils").LOSS_MAPPING
        found |= {f"LOSS_MAPPING.{name}": value for name, value in mapping.items()}
    return found


def changed(before: dict[str, Any]) -> list[str]:
    after = library()
    different = [name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)]
    # What Transformers remembers about a class when its first model is built.
    return [name for name in different if not name.endswith("_cached_value")]


def is_patched(model: Any) -> bool:
    return isinstance(getattr(model, "criterion", None), PointCriterion) or "_loss_function" in vars(model)


@pytest.fixture(params=tiny.BUILDERS)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in {FOLDERS[f.name] for f in INSTALLED}:
        pytest.skip(f"this Transformers has no {name}")
    return name


def test_points_may_be_others_than_the_configurations(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = PointSampling(17, 2.0, 0.5, layout="stratified")
    drawn: list[Draw] = []
    for name in ("mask_loss", "match_cost"):
        original = getattr(ops, name)

        def spy(*args: Any, _original: Any = original) -> Any:
            drawn.extend(arg.draw for arg in args if isinstance(arg, Job))
            return _original(*args)

        monkeypatch.setattr(ops, name, spy)
    model = tiny.BUILDERS[family]()
    with patch(model, sampling=sampling, backend="reference"):
        assert torch.isfinite(tiny.run(model, family, tiny.batch_for(family))[0]).all()
    assert {(draw.num_points, draw.layout) for draw in drawn} == {(17, "stratified")}
    assert {(draw.num_candidates, draw.num_uncertain) for draw in drawn} == {(0, 0), (34, 8)}
    with pytest.raises(MaskLossError, match="sampling must be a PointSampling"):
        patch(model, sampling=17)  # type: ignore[arg-type]


def test_mask_terms_may_keep_their_scale_on_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers divides the mean number of masks over the ranks by the number of ranks once more."""
    model, batch = tiny.mask2former(), tiny.batch_for("mask2former")
    found = []
    for scale in (False, True):
        fix_seed(monkeypatch, 5)
        monkeypatch.setattr(distributed, "world_size", lambda group: 2)
        monkeypatch.setattr(distributed, "mean_over_ranks", lambda counts, *_: list(counts))
        with patch(model, scale_by_ranks=scale):
            masks = [masks[:2] for masks in batch["mask_labels"]]
            labels = [labels[:2] for labels in batch["class_labels"]]
            generator = torch.Generator().manual_seed(0)
            logits = torch.randn(2, tiny.QUERIES, 8, 8, generator=generator)
            found.append(model.criterion(logits, torch.zeros(2, tiny.QUERIES, tiny.CLASSES + 1), masks, labels))
    plain, scaled = found
    assert plain["loss_cross_entropy"] == scaled["loss_cross_entropy"]
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(scaled[name], 2 * plain[name])
    with pytest.raises(MaskLossError, match="scale_by_ranks must be True or False"):
        patch(model, scale_by_ranks=2)  # type: ignore[arg-type]


def test_a_model_is_patched_and_undone(family: str) -> None:
    before, model = library(), tiny.BUILDERS[family]()
    names, parts = list(model.state_dict()), dict(model.named_modules())
    classes, attributes = {n: type(m) for n, m in parts.items()}, {n: set(vars(m)) for n, m in parts.items()}
    parameters = list(model.parameters())
    handle = patch(model)
    assert changed(before) == []
    assert is_patched(model)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(isinstance(m, classes[n]) for n, m in model.named_modules())
    assert FOLDERS[handle.families[0]] == family
    handle.undo()
    handle.undo()
    assert not is_patched(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert repr(handle) == "Patch(undone)"


def test_models_built_while_the_patch_is_on_are_patched(family: str) -> None:
    before, early = library(), tiny.BUILDERS[family]()
    with patch() as handle:
        assert handle.families == ()
        assert repr(handle) == "Patch(models and criteria built from now on)"
        inside = tiny.BUILDERS[family]()
        assert [FOLDERS[name] for name in handle.families] == [family]
        assert is_patched(inside)
        assert not is_patched(early)
        builders = [f"{f.path}.{f.model}.__init__" for f in INSTALLED]
        builders += [f"{f.path}.{f.criterion}.__setattr__" for f in INSTALLED if f.criterion is not None]
        assert sorted(changed(before)) == sorted(builders)
    assert changed(before) == []
    assert not is_patched(inside)
    assert not is_patched(tiny.BUILDERS[family]())


def test_a_patch_is_undone_after_an_error() -> None:
    before = library()
    with pytest.raises(KeyError), patch():
        raise KeyError
    assert changed(before) == []


def test_a_patch_keeps_no_model_alive() -> None:
    with patch():
        model = tiny.mask2former()
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None


def test_wrapped_models_are_found() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([tiny.mask2former(), nn.Linear(2, 2)])

    wrapper = Wrapper()
    with patch(wrapper):
        assert is_patched(wrapper.inner[0])


def test_copies_and_pickles_of_a_patched_model_are_patched(family: str) -> None:
    model = tiny.BUILDERS[family]()
    with patch(model, backend="reference"):
        batch = tiny.batch_for(family)
        tiny.run(model, family, batch)
        again = copy.deepcopy(model)
        assert is_patched(again)
        # Not the whole model: Transformers hangs local functions into some.
        if family == "rf_detr":
            again._loss_function = pickle.loads(pickle.dumps(model._loss_function))
        else:
            again.criterion = pickle.loads(pickle.dumps(model.criterion))
        assert is_patched(again)
        loss, _ = tiny.run(again, family, batch)
        assert loss.isfinite().all()


def test_what_is_no_module_is_told() -> None:
    with pytest.raises(MaskLossError, match=r"must be a torch\.nn\.Module[\s\S]*patch\(\) changes all"):
        patch(nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(MaskLossError, match=r"must be a torch\.nn\.Module[\s\S]*give its model"):
        unpatch(None)  # type: ignore[arg-type]


def test_a_label_map_alone_has_all_that_occur() -> None:
    labels = torch.randint(0, 4, (9, 12), dtype=torch.uint8)
    found, wanted = (_targets.pack_masks([each], torch.device("cpu")) for each in (labels, (labels, [1, 2, 3])))
    assert torch.equal(found.dense(), wanted.dense())


@pytest.mark.parametrize("factors", [False, True])
def test_checkpoints_load_both_ways(factors: bool) -> None:
    if factors and families.transformers_version() < (4, 39):
        pytest.skip("this Transformers computes masks of Mask2Former by channel")
    plain, patched = tiny.mask2former(), tiny.mask2former()
    with patch(patched, factors=factors):
        for source, target in ((plain, patched), (patched, plain)):
            with torch.no_grad():
                for weight in source.parameters():
                    weight.add_(1)
            saved = {name: value.clone() for name, value in source.state_dict().items()}
            target.load_state_dict(saved)
            loaded = target.state_dict()
            assert list(loaded) == list(saved)
            assert all(torch.equal(loaded[name], value) for name, value in saved.items())


def test_pretrained_models_load_into_the_patch(tmp_path: Any) -> None:
    tiny.mask2former().save_pretrained(tmp_path)
    kind = tiny.model_class("mask2former", "Mask2FormerForUniversalSegmentation")
    with patch():
        # Another number of labels: Transformers makes the criterion's buffer anew.
        model = kind.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)  # type: ignore[attr-defined]
        assert is_patched(model)
        batch = tiny.batch_for("mask2former")
        tiny.run(model, "mask2former", batch)[0].backward()
    torch.testing.assert_close(model.criterion.empty_weight, torch.tensor([1.0] * 5 + [0.1]))


def test_class_weights_of_a_checkpoint_count() -> None:
    model, batch = tiny.mask2former(), tiny.batch_for("mask2former")
    with patch(model):
        terms = tiny.run(model, "mask2former", batch)[1]
        model.criterion.empty_weight[:] = torch.tensor([5.0, 1.0, 0.2, 0.7])
        changed = tiny.run(model, "mask2former", batch)[1]
    assert terms["loss_cross_entropy@0"] != changed["loss_cross_entropy@0"]


@pytest.mark.parametrize("kind", ["packed images", "packed batch", "label maps", "bool", "one tensor"])
def test_mask_labels_in_other_forms(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = [torch.randint(0, 5, (64, 64), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    dense = [torch.stack([(m == i).float() for i in (1, 4)]) for m in maps]
    packed = [MaskTargets.from_masks(m) for m in dense]
    forms: dict[str, Any] = {
        "packed images": packed,
        "packed batch": MaskTargets.cat(packed),
        "label maps": [(m, [1, 4]) for m in maps],
        "bool": [m.bool() for m in dense],
        "one tensor": torch.stack(dense),
    }
    model, batch = tiny.BUILDERS[family](), tiny.batch_for(family, dense)
    fix_seed(monkeypatch, 5)
    with patch(model):
        expected, _ = tiny.run(model, family, batch)
        if family == "rf_detr":
            if kind in ("packed batch", "one tensor"):
                pytest.skip("RF-DETR has one dict per image")
            for entry, masks in zip(batch["labels"], forms[kind], strict=True):
                entry |= {"masks": masks[0], "ids": masks[1]} if kind == "label maps" else {"masks": masks}
        else:
            batch["mask_labels"] = forms[kind]
        loss, _ = tiny.run(model, family, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.fixture(params=["eomt", "eomt_dinov3"])
def layerwise(request: pytest.FixtureRequest) -> str:
    """The families that call their criterion once for each layer."""
    name: str = request.param
    if name not in {FOLDERS[f.name] for f in INSTALLED}:
        pytest.skip(f"this Transformers has no {name}")
    return name


def test_masks_are_packed_once_for_all_layers_of_a_pass(layerwise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    inner = MaskTargets.from_masks
    monkeypatch.setattr(MaskTargets, "from_masks", staticmethod(lambda *a, **k: made.append(1) or inner(*a, **k)))
    model, batch = tiny.BUILDERS[layerwise](), tiny.batch_for(layerwise)
    with patch(model):
        tiny.run(model, layerwise, batch)
        assert len(made) == 1
        tiny.run(model, layerwise, batch)
        assert len(made) == 2
        # The criterion by itself belongs to no pass.
        logits = torch.randn(2, tiny.QUERIES, 8, 8), torch.randn(2, tiny.QUERIES, tiny.CLASSES + 1)
        for _ in range(2):
            model.criterion(*logits, batch["mask_labels"], batch["class_labels"])
        assert len(made) == 4


@pytest.mark.parametrize("write", ["numpy", "data", "in place"])
def test_masks_that_change_between_passes_are_packed_again(
    layerwise: str, write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where PyTorch does not see the change: a loader that fills one buffer again and again."""
    fix_seed(monkeypatch, 5)
    model, batch = tiny.BUILDERS[layerwise](), tiny.batch_for(layerwise)
    buffers = [masks.numpy().copy() for masks in batch["mask_labels"]]
    batch["mask_labels"] = [torch.from_numpy(buffer) for buffer in buffers]
    with patch(model, backend="reference"):
        before, _ = tiny.run(model, layerwise, batch)
        for buffer, masks in zip(buffers, batch["mask_labels"], strict=True):
            if write == "numpy":
                buffer[:] = 1 - buffer
            elif write == "data":
                masks.data.copy_(1 - masks)
            else:
                masks.neg_().add_(1)
        after, _ = tiny.run(model, layerwise, batch)
        fresh = batch | {"mask_labels": [masks.clone() for masks in batch["mask_labels"]]}
        expected, _ = tiny.run(model, layerwise, fresh)
    assert before != after
    assert torch.equal(after, expected)


def test_dense_masks_are_not_kept(layerwise: str) -> None:
    model, batch = tiny.BUILDERS[layerwise](), tiny.batch_for(layerwise)
    with patch(model):
        tiny.run(model, layerwise, batch)
        gone = weakref.ref(batch["mask_labels"][0])
        del batch
        gc.collect()
        assert gone() is None


# ------------------------------------------------------------------------------------------ whose patch, and who undoes


def test_copies_are_unpatched(family: str) -> None:
    model = tiny.BUILDERS[family]()
    with patch():
        inside = copy.deepcopy(tiny.BUILDERS[family]())
    with patch(model):
        again = copy.deepcopy(model)
    for each in (inside, again):
        assert is_patched(each)
        with pytest.raises(MaskLossError, match=r"unpatch\(model\) takes a patch back, also from a copy"):
            patch(each)
        unpatch(each)
        unpatch(each)
        assert not is_patched(each)
        assert {n: type(m) for n, m in each.named_modules()} == {n: type(m) for n, m in model.named_modules()}
        with patch(each):
            assert is_patched(each)


def test_unpatch_knows_only_supported_models() -> None:
    with pytest.raises(MaskLossError, match="unpatch: the model must be of a supported family"):
        unpatch(nn.Linear(2, 2))


def test_undo_leaves_what_is_another_patchs() -> None:
    model = tiny.mask2former()
    first = patch(model)
    unpatch(model)
    second = patch(model)
    first.undo()
    assert is_patched(model)
    second.undo()
    assert not is_patched(model)


def test_undo_leaves_what_others_have_put_in_place() -> None:
    model: Any = tiny.mask2former()
    handle = patch(model)
    replaced = model.criterion = nn.Identity()
    handle.undo()
    assert model.criterion is replaced
    if not INSTALLED[-1].name.startswith("RF-DETR"):
        pytest.skip("this Transformers has no RF-DETR")
    other: Any = tiny.rf_detr()
    handle = patch(other)
    function = other.loss_function = lambda *_: None
    handle.undo()
    assert other.loss_function is function


def test_undo_leaves_constructors_that_somebody_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = tiny.model_class("mask2former", "Mask2FormerForUniversalSegmentation")
    original = kind.__init__
    handle = patch()
    ours, built = kind.__init__, []

    @functools.wraps(ours)
    def theirs(self: Any, *args: Any, **kwargs: Any) -> None:
        ours(self, *args, **kwargs)
        built.append(self)

    kind.__init__ = theirs
    try:
        assert is_patched(tiny.mask2former())
        handle.undo()
        assert kind.__init__ is theirs
        assert not is_patched(tiny.mask2former())
        with patch():
            assert is_patched(tiny.mask2former())
        assert kind.__init__ is theirs
        assert not is_patched(tiny.mask2former())
        assert len(built) == 4
    finally:
        kind.__init__ = original


def test_a_global_patch_does_not_grow_with_models_that_are_gone() -> None:
    with patch() as handle:
        sizes = []
        for _ in range(3):
            model = tiny.mask2former()
            del model
            gc.collect()
            sizes.append((len(handle._steps), len(transformers_integration._OWNERS)))
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[0][1] == 0


def test_a_patch_that_fails_halfway_is_taken_back() -> None:
    good, bad = tiny.mask2former(), tiny.mask2former()
    bad.criterion = nn.Identity()
    with pytest.raises(MaskLossError, match="the criterion must be Transformers' own"):
        patch(nn.ModuleList([good, bad]))
    assert not is_patched(good)


def _patched_twice() -> None:
    model = tiny.mask2former()
    patch(model)
    patch(model)


def _all_patched_twice() -> None:
    with patch():
        patch()


def _other_criterion() -> None:
    model: Any = tiny.mask2former()
    model.criterion = nn.CrossEntropyLoss()
    patch(model)


def _maskformer() -> None:
    config = transformers.MaskFormerConfig(
        backbone_config=tiny.swin(), decoder_config=transformers.DetrConfig(d_model=32, decoder_layers=1)
    )
    patch(transformers.MaskFormerForInstanceSegmentation(config))


ERRORS = {
    "supported: Mask2Former (Mask2FormerForUniversalSegmentation), OneFormer": lambda: patch(nn.Linear(2, 2)),
    "backend must be one of reference, cpu, gpu": lambda: patch(tiny.mask2former(), backend="tpu"),
    "the model must not be patched already": _patched_twice,
    "the models must not be patched already": _all_patched_twice,
    "the criterion must be Transformers' own Mask2FormerLoss": _other_criterion,
    "MaskFormer's loss covers every pixel": _maskformer,
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_cannot_be_patched_is_refused(message: str) -> None:
    before = library()
    with pytest.raises(MaskLossError, match=re.escape(message)):
        ERRORS[message]()
    assert changed(before) == []


def test_wrong_targets_are_refused() -> None:
    model, batch = tiny.mask2former(), tiny.batch_for("mask2former")
    with patch(model):
        wrong = {
            "masks and labels must pair up": {"class_labels": [torch.tensor([0]), torch.tensor([0, 1, 2])]},
            "labels must lie in [0, 4)": {"class_labels": [torch.tensor([0, 4]), torch.tensor([0, 1, 2])]},
            '"masks" must be a tensor, an array or a MaskTargets': {"mask_labels": ["mask", "mask"]},
            "the same number of images": {"mask_labels": batch["mask_labels"][:1]},
            "masks must have one entry per image": {"mask_labels": 3},
            "labels must be an integer tensor [T]": {"class_labels": [[0.5, 1], [0, 1, 2]]},
        }
        for message, change in wrong.items():
            with pytest.raises(MaskLossError, match=re.escape(message)) as error:
                model(**(batch | change))
            assert "maskloss in Transformers" in str(error.value)
