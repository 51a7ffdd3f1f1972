"""`maskloss export`: the file computes what the model computes, or is not written."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from lab.conftest import CocoFolder, run_once
from maskloss import MaskLossError, MissingExtraError, find_instances
from maskloss.lab import load_run
from maskloss.lab.cli import main
from maskloss.lab.config import TrainConfig
from maskloss.lab.results import export


def train_on(folder, out, **options):
    given = {"steps": 1, "batch_size": 2, "evaluations": 1, "workers": 0, "device": "cpu", "size": 64}
    return run_once(TrainConfig(data=str(folder.root), **(given | options)), out)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    return train_on(CocoFolder(root / "shapes"), root / "run", size=32)


@pytest.fixture(scope="module")
def packages():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


@pytest.fixture(scope="module")
def exported(run, packages):
    """The file, and what the exporter made."""
    made = []
    with pytest.MonkeyPatch.context() as patched:
        original = export._exported
        patched.setattr(export, "_exported", lambda *given: made.append(original(*given)) or made[0])
        assert main(["export", str(run), "--out", str(run / "model.onnx")]) == 0
    return run / "model.onnx", made[0]


@pytest.mark.slow
def test_the_file_is_the_model(run, exported):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported[0]), providers=["CPUExecutionProvider"])
    assert [each.shape for each in session.get_inputs()] == [["batch", 3, 32, 32]]
    loaded = load_run(run, device="cpu")
    image = loaded.read(run.parent / "shapes" / "images" / "4.png")  # 64 x 64: half as large in the model
    small = torch.nn.functional.interpolate(image[None], (32, 32), mode="bilinear", antialias=True)
    classes, masks = map(torch.from_numpy, session.run(None, {"images": small.numpy()}))
    [found] = find_instances(classes, masks, size=(64, 64), threshold=0)
    expected = loaded.predict(run.parent / "shapes" / "images" / "4.png", threshold=0)
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.scores.tolist() == pytest.approx(expected.scores.tolist(), abs=1e-4)
    assert (found.dense().numpy() != expected.masks).mean() < 1e-3


@pytest.mark.slow
def test_the_file_describes_itself(exported):
    import onnx

    held = {each.key: each.value for each in onnx.load(exported[0]).metadata_props}
    assert json.loads(held["classes"]) == ["box", "disc"] and json.loads(held["category_ids"]) == [3, 7]
    assert held["images"].startswith("divided by 255; of more than 8 bits, stretched between the percentiles 1.0 and")


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_written(run, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_exported", lambda *_: exported[1])
    original = export.Whole.forward

    def other(self, images):
        classes, masks = original(self, images)
        return classes, masks + 0.01 * masks.abs().max()

    monkeypatch.setattr(export.Whole, "forward", other)
    with pytest.raises(
        MaskLossError, match=r"must compute what the model computes[\s\S]*mask_logits of 1 images differ"
    ):
        export.export_run(run, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_that_does_not_take_every_batch_is_not_written(run, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_exported", lambda whole, example: _fixed(exported[0]))
    with pytest.raises(MaskLossError, match=r"ONNX Runtime: [\s\S]*nothing was written"):
        export.export_run(run, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def _fixed(path):
    """The program of a file, of two images only."""
    import onnx

    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    described = type("Described", (), {"metadata_props": {}})
    return type("Program", (), {"model": described, "save": staticmethod(lambda to: onnx.save(model, to))})


def test_where_to_write_is_asked_first(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("maskloss.lab.commands.export.export_run", lambda *_, **__: pytest.fail("exported first"))
    for out, message in (("model.pt", "--out must end in .onnx"), ("no/model.onnx", "a file that can be written")):
        assert main(["export", str(run), "--out", str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err


def test_without_the_packages_the_extra_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'maskloss\[export\]'"):
        export.export_run(run, tmp_path / "model.onnx")


@pytest.mark.long
@pytest.mark.parametrize("family", ["mask2former", "eomt", "eomt_dinov3", "rf_detr"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pretrained_models(family, folder, tmp_path, packages):
    from lab.test_pretrained import write_model

    trained = train_on(folder, tmp_path / "run", model=str(write_model(family, tmp_path / "model")))
    found = export.export_run(trained, tmp_path / "model.onnx")
    assert found.path.is_file() and found.largest < 1e-4 and np.isfinite(found.largest)
