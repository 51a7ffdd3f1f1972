"""TIFFs beyond the limit of pixels, which are read in pieces; the limit is set low here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from pycocotools import mask as codec

from lab.conftest import run_once
from lab.folders.pieces import coco, text
from maskloss import MaskLossError
from maskloss.lab.config import TrainConfig
from maskloss.lab.data import catalog, options, tiff
from maskloss.lab.data.catalog import Entry, Map
from maskloss.lab.data.folder import FolderScenes, HeldOut
from maskloss.lab.data.images import read_image, read_size
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import Problems
from maskloss.lab.data.readers.shapes import Drawn
from maskloss.lab.data.sizes import _pieces
from maskloss.lab.results import predict, trained
from maskloss.lab.results.inference import Instance, Predictor

SIDE = 96
SPOTS = [(top, left) for top in range(4, 90, 24) for left in range(8, 80, 34)]


@pytest.fixture(autouse=True)
def low_limit(monkeypatch):
    monkeypatch.setattr(tiff, "MOST_PIXELS", 5000)
    monkeypatch.setattr(options, "PIECE", 48)
    monkeypatch.setattr(trained, "PIECE", 48)


def spotted(dtype=np.uint8) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of bright spots of which some lie across the edges of pieces, and their numbers."""
    image = np.random.default_rng(0).integers(0, 60, (SIDE, SIDE)).astype(dtype)
    labels = np.zeros((SIDE, SIDE), np.uint16)
    for number, (top, left) in enumerate(SPOTS, start=1):
        image[top : top + 9, left : left + 11] = 220
        labels[top : top + 9, left : left + 11] = number
    return image, labels


LAYOUTS = {
    "tiles": {"tile": (32, 16), "compression": "zlib"},
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "uncompressed": {},
    "big-endian": {"byteorder": ">"},
    "uncompressed tiles": {"tile": (16, 32)},
}


@pytest.mark.parametrize("colors", ["gray", "deep", "color", "planes"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_piece_is_what_the_whole_holds_there(tmp_path, monkeypatch, layout, colors):
    drawn = np.random.default_rng(1).integers(0, 255, (SIDE, 70, 3)).astype(np.uint8)
    pixels = {"gray": drawn[..., 0], "deep": drawn[..., 0] * np.uint16(200), "color": drawn}.get(colors, drawn)
    options = dict(LAYOUTS[layout])
    if colors in {"color", "planes"}:
        options["photometric"] = "rgb"
    if colors == "planes":
        options["planarconfig"] = "separate"
        pixels = np.moveaxis(drawn, -1, 0)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, **options)
    pieces = tiff.windows(path, 40)
    for ending, (top, left, height, width) in [*pieces, ("#95,69,1x1.tif", (95, 69, 1, 1))]:
        piece = path.with_name(path.name + ending)
        found = read_image(piece)
        assert read_size(piece) == (height, width)
        monkeypatch.setattr(tiff, "MOST_PIXELS", 1 << 20)
        whole = read_image(path)
        monkeypatch.setattr(tiff, "MOST_PIXELS", 5000)
        np.testing.assert_array_equal(found, whole[top : top + height, left : left + width])
    assert sum(height * width for _, (_, _, height, width) in pieces) == SIDE * 70


def write(root: Path, truth: str) -> None:
    image, labels = spotted()
    (root / "images").mkdir(parents=True)
    tifffile.imwrite(root / "images/slide.tif", image, tile=(32, 32), compression="zlib")
    if truth == "maps":
        (root / "masks").mkdir()
        tifffile.imwrite(root / "masks/slide.tif", labels, rowsperstrip=5, compression="zlib")
        return
    if truth == "ImageScope":
        corners = "".join(
            f"<Vertex X='{left + x}' Y='{top + y}'/>"
            for top, left in SPOTS
            for x, y in ((0, 0), (11, 0), (11, 9), (0, 9))
        ).split("<Vertex")[1:]
        regions = (
            f"<Region><Vertices><Vertex{'<Vertex'.join(corners[at : at + 4])}</Vertices></Region>"
            for at in range(0, len(corners), 4)
        )
        text(root / "images/slide.xml", f"<Annotations><Annotation>{''.join(regions)}</Annotation></Annotations>")
        return
    content = coco(["slide.tif"])
    content["images"][0].update(height=SIDE, width=SIDE)
    content["annotations"] = [
        {
            "id": number,
            "image_id": 1,
            "category_id": 1,
            "segmentation": [[left, top, left + 11, top, left + 11, top + 9, left, top + 9]],
            "bbox": [left, top, 11, 9],
        }
        for number, (top, left) in enumerate(SPOTS, start=1)
    ]
    text(root / "instances.json", content)


@pytest.mark.parametrize("truth", ["maps", "polygons", "ImageScope"])
def test_pieces_are_images_of_their_own(tmp_path, truth):
    write(tmp_path / "data", truth)
    source = FolderScenes(str(tmp_path / "data"), 32, crop=16, augment=False)
    assert (len(source.found.train), len(source.found.held_out)) == (3, 1)
    told = "\n".join(str(each) for each in source.findings)
    assert "images of more than 5,000 pixels cut into pieces, each an image of its own: 1" in told
    assert "beyond" not in told and "images in both parts" not in told
    scenes = [scene for part in (source.found.train, source.found.held_out) for scene in HeldOut(part, source.reading)]
    assert sum(scene.height * scene.width for scene in scenes) == SIDE * SIDE
    for scene in scenes:
        bright = scene.image.mean(0) > 0.6
        assert (scene.masks().any(0) == bright).float().mean() > 0.999, scene.name
    batch = source.batch(0, range(3), 3, 0)
    assert batch.images.shape == (3, 3, 32, 32) and len(batch.labels)
    [name] = source.held_out_files
    listed = tmp_path / "list.txt"
    listed.write_text(name)
    again = FolderScenes(str(tmp_path / "data"), 32, crop=16, options=DataOptions(val=str(listed)))
    assert again.held_out_files == [name]


def test_pieces_of_an_image_are_in_one_part(tmp_path):
    """Those of one slide are much alike: with several, none is in both parts; with one, it is told."""
    write(tmp_path / "alone", "maps")
    root, options = tmp_path / "data", DataOptions(crop=24)
    for name in "abc":
        for kind in ("images", "masks"):
            (root / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / f"alone/{kind}/slide.tif", root / kind / f"{name}.tif")
    source = FolderScenes(str(root), 32, crop=24, options=options)
    parts = [
        {tiff.window_of(Path(file))[0] for file in part.files} for part in (source.found.train, source.found.held_out)
    ]
    assert [len(part) for part in parts] == [2, 1] and not parts[0] & parts[1]
    assert len(source.found.train) == 2 * len(source.found.held_out)
    listed = tmp_path / "val.txt"
    [name] = parts[1]
    listed.write_text(f"{name.relative_to(root)}\n")
    again = FolderScenes(str(root), 32, crop=24, options=options._replace(val=str(listed)))
    assert again.found.held_out.files == source.found.held_out.files
    alone = FolderScenes(str(tmp_path / "alone"), 32, crop=24, options=options)
    assert "pieces of one image in both parts" in "\n".join(map(str, alone.findings))
    assert not any("pieces of one image" in str(each) for each in source.findings)


def test_what_cannot_be_read_in_pieces(tmp_path, monkeypatch):
    image, _ = spotted()
    write(tmp_path / "data", "polygons")
    with pytest.raises(MaskLossError, match=r"at most 268,435,456 pixels.*\n.*96 x 96 = 9,216.*\n.*TIFF.*--crop"):
        FolderScenes(str(tmp_path / "data"), 32)
    path = tmp_path / "data/images/slide.tif"
    monkeypatch.setattr(tiff, "_MOST_AT_ONCE", 4000)
    for stored, why in (
        ({"extratags": [(274, "H", 1, 3, True)]}, "has several, or is to be turned"),
        ({"compression": "zlib", "rowsperstrip": SIDE}, "strips or tiles of .* have 9,216 values"),
    ):
        tifffile.imwrite(path, image, **stored)
        with pytest.raises(MaskLossError, match=why):
            FolderScenes(str(tmp_path / "data"), 32, crop=16)
    with pytest.raises(MaskLossError, match=r"at most 5,000 pixels\n.*slide has 96 x 96"):
        Drawn(Entry("", SIDE, SIDE, []), {}, "slide", Problems()).polygons(
            "a", [[0, 0, 9, 0, 9, 9]], [[1, 1, 5, 1, 5, 4]]
        )
    write(tmp_path / "runs", "polygons")
    content = coco(["slide.tif"])
    content["images"][0].update(height=SIDE, width=SIDE)
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0]["segmentation"] = {"size": [SIDE, SIDE], "counts": [10, 20, SIDE * SIDE - 30]}
    del content["annotations"][0]["bbox"]
    text(tmp_path / "runs/instances.json", content)
    write(tmp_path / "map", "polygons")
    mapped = Entry(str(tmp_path / "map/images/slide.tif"), SIDE, SIDE, [catalog.Instance(1, 0)], Map("a.png", "colors"))
    with pytest.raises(MaskLossError, match="map of a benchmark"):
        _pieces(mapped, DataOptions(crop=16), Problems())
    with pytest.raises(MaskLossError, match="must have polygons or a label map"):
        FolderScenes(str(tmp_path / "runs"), 32, crop=16)


def test_a_slide_is_predicted_as_the_whole_image(tmp_path, monkeypatch):
    from lab.test_inference import Threshold

    class Facts:
        channels, percentile = 3, False

    _, labels = spotted()
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, np.where(labels > 0, np.uint8(102), np.uint8(0)), tile=(32, 32), compression="zlib")
    predictor = Predictor(Threshold(), 32, 32, cut=True)
    run = trained.TrainedRun(tmp_path, Facts(), predictor)  # type: ignore[arg-type]
    slide = run.read(path)
    assert isinstance(slide, trained.Slide)
    monkeypatch.setattr(tiff, "MOST_PIXELS", 1 << 20)
    whole = run.read(path)
    assert not isinstance(whole, trained.Slide)
    np.testing.assert_array_equal(slide.overview(3), whole[:, ::3, ::3])
    monkeypatch.setattr(tiff, "MOST_PIXELS", 5000)
    found, expected = predictor([slide]), predictor([whole])
    monkeypatch.setattr(Facts, "percentile", True)
    assert run.read(path)[:, 0:48, 0:96].max() == 1  # type: ignore[index]
    for one, other in zip(found, expected, strict=True):
        assert len(one.instances) == len(other.instances) > 0
        np.testing.assert_array_equal(one.label_map()[0], other.label_map()[0])


def test_a_run_learns_from_a_slide_and_predicts_it(tmp_path, monkeypatch):
    write(tmp_path / "data", "maps")
    short = {"steps": 2, "batch_size": 2, "evaluations": 1, "num_points": 16, "size": 32, "workers": 0}
    run = run_once(TrainConfig(data=str(tmp_path / "data"), crop=32, device="cpu", **short), tmp_path / "run")
    monkeypatch.setattr(predict, "_LARGEST_PICTURE", 40)
    image, found = tmp_path / "data/images/slide.tif", tmp_path / "found"
    predict.predict_images(run, [image], found, device="cpu", threshold=0)
    monkeypatch.setattr(tiff, "MOST_PIXELS", 1 << 20)
    predict.predict_images(run, [image], tmp_path / "whole", device="cpu", threshold=0)
    labels = [tifffile.imread(folder / "slide_found.tif") for folder in (found, tmp_path / "whole")]
    assert labels[0].shape == labels[1].shape == (SIDE, SIDE)
    for each in json.loads((found / "predictions.json").read_text()):
        mask, number = codec.decode(each["segmentation"]).astype(bool), each["label_map_number"]
        assert mask.shape == (SIDE, SIDE) and (not number or mask[labels[0] == number].all())
    sizes = [read_size(folder / "slide_overlay.png") for folder in (found, tmp_path / "whole")]
    # Every third row and column, enlarged as a small image is.
    assert sizes[0][0] % 32 == 0 and sizes[1][0] % SIDE == 0


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_of_a_part_are_those_of_the_whole(seed):
    from maskloss.instances import run_lengths

    random = np.random.default_rng(seed)
    height, width = random.integers(1, 9, 2)
    top, left = random.integers(0, 4, 2)
    mask = random.random((height, width)) < random.choice([0.1, 0.5, 1.0])
    instance = Instance(int(top), int(left), mask, 0, 1.0)
    frame = (int(top + height + random.integers(0, 3)), int(left + width + random.integers(0, 3)))
    assert instance.run_lengths(*frame) == run_lengths(instance.whole(*frame))
    step = int(random.integers(1, 4))
    small, expected = instance.reduced(step), instance.whole(*frame)[::step, ::step]
    assert (small.whole(*expected.shape) == expected).all() if small else not expected.any()


def test_the_overview_of_a_wide_slide_is_read_in_squares(tmp_path):
    class Facts:
        channels, percentile = 1, False

    pixels = np.random.default_rng(0).integers(0, 255, (24, 300)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "wide.tif", pixels, tile=(32, 32), compression="zlib")
    found = trained.Slide(tmp_path / "wide.tif", Facts()).overview(5)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found[0], pixels[::5, ::5] / np.float32(255))


def test_a_slide_has_as_many_pixels_as_run_lengths_can_count(tmp_path, monkeypatch):
    write(tmp_path, "polygons")
    monkeypatch.setattr(trained, "_MOST_COUNTED", SIDE * SIDE)
    with pytest.raises(MaskLossError, match="fewer than 9,216 pixels"):
        trained.Slide(tmp_path / "images/slide.tif", None)  # type: ignore[arg-type]
