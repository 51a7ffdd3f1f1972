"""`maskloss check`: what is suspicious is found by one look at every image, and nothing else is."""

from __future__ import annotations

import io
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from lab.conftest import CocoFolder, write_cells
from maskloss.lab.cli import main
from maskloss.lab.data import survey, truth
from maskloss.lab.data.folder import FolderScenes
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import LOOK, SUSPICIOUS
from maskloss.lab.results.checkpage import draw


def look(root: Path, size: int | None = None, *, crop: int | None = None, queries: int | None = None, **options: Any):
    source = FolderScenes(str(root), size, crop=crop, options=DataOptions(**options), on_error=LOOK)
    if queries:
        source.limit(queries)
    return source, survey.survey(source)


def suspicions(source: FolderScenes) -> str:
    return "\n".join(str(each) for each in source.findings if each.kind == SUSPICIOUS)


def check(folder: Path, out: Path, *options: str) -> tuple[int, str]:
    """Run the command; return its status and the page."""
    status = main(["check", str(folder), "--out", str(out), *options])
    return status, out.read_text(encoding="utf-8") if out.exists() else ""


# ------------------------------------------------------------------------------------------------------- what is found


def add(folder: CocoFolder, image: int, polygon: list[float], **more: Any) -> None:
    annotations = folder.content["annotations"]
    box = {**annotations[1], "id": len(annotations) + 1, "image_id": image, "segmentation": [polygon], **more}
    annotations.append(box)


def twice(folder: CocoFolder) -> None:
    add(folder, 100, [20, 22, 38, 22, 38, 31.6, 20, 32])


def without_pixels(folder: CocoFolder) -> None:
    add(folder, 102, [30, 3, 30.1, 3, 30.1, 3.1])


def tiny(folder: CocoFolder) -> None:
    add(folder, 101, [30, 3, 31.5, 3, 31.5, 4.4, 30, 4.4])


def beyond(folder: CocoFolder) -> None:
    add(folder, 104, [50, 50, 200, 50, 200, 60, 50, 60])


def outside(folder: CocoFolder) -> None:
    add(folder, 104, [500, 50, 600, 50, 600, 60, 500, 60])


def unseen_class(folder: CocoFolder) -> None:
    folder.content["categories"].append({"id": 5, "name": "star"})
    add(folder, 100, [2, 30, 12, 30, 12, 38, 2, 38], category_id=5)


def repeated(folder: CocoFolder) -> None:
    shutil.copy(folder.root / "images/1.png", folder.root / "images/6.bmp")
    with Image.open(folder.root / "images/1.png") as image:
        image.save(folder.root / "images/6.png")
    (folder.root / "images/6.bmp").unlink()
    folder.content["images"].append({**folder.content["images"][1], "id": 106, "file_name": "6.png"})
    add(folder, 106, [20, 22, 38, 22, 38, 32, 20, 32])


def all_crowds(folder: CocoFolder) -> None:
    runs = [each for each in folder.content["annotations"] if isinstance(each["segmentation"], dict)]
    for each in runs:
        each["iscrowd"] = 1


SIGNS = {
    "twice": (twice, r"there twice.*: 1 \(0\.png\)"),
    "without pixels": (without_pixels, r"without a pixel, left out: 1 \(2\.png\)"),
    "tiny": (tiny, r"fewer than 4 pixels at the size 64: a larger --size, or --crop, .*: 1 \(1\.png\)"),
    "beyond": (beyond, r"reach beyond their image.*: 1 \(4\.png\)"),
    "outside": (outside, r"outside of their image left out: 1 \(4\.png\)"),
    "a class in one part": (unseen_class, r"classes without a held-out instance: 1 \('star'\)"),
    "an image twice": (repeated, r"(very pixels of another one|in the other part).*: 1 \("),
    "all crowds": (all_crowds, r"run lengths with iscrowd 1 counted as instances, .*: 7"),
}


@pytest.mark.parametrize("sign", SIGNS)
def test_what_is_suspicious_is_found_where_it_is(folder, sign):
    change, told = SIGNS[sign]
    change(folder)
    folder.save()
    found = suspicions(look(folder.root)[0])
    # This, and nothing else.
    assert re.fullmatch(f".*{told}.*", found), found


@pytest.mark.parametrize("make", [CocoFolder, write_cells])
def test_nothing_is_suspicious_about_clean_data(tmp_path, make):
    make(tmp_path / "data")
    assert suspicions(look(tmp_path / "data")[0]) == ""
    assert check(tmp_path / "data", tmp_path / "page.html", "--strict")[0] == 0


def test_more_instances_than_queries(folder):
    source, _ = look(folder.root, queries=1)
    assert "beyond the 1 that the model can find in an image made ignore regions" in suspicions(source)
    assert "smallest ones: 5 (" in suspicions(source)
    assert suspicions(look(folder.root, queries=2)[0]) == ""
    # A crop of a quarter of the image has a share of its instances.
    cells = write_cells(folder.root.parent / "cells", side=128, discs=40)
    assert "can find in a crop" in suspicions(look(cells, crop=64, queries=10)[0])
    assert "can find in a crop" not in suspicions(look(cells, crop=64, queries=30)[0])


def test_an_image_in_both_parts(tmp_path):
    """Known by its pixels, whatever its name and its format are; blank images are no copies."""
    cells = write_cells(tmp_path / "cells")
    other = write_cells(tmp_path / "other")
    tifffile.imwrite(other / "x.tif", tifffile.imread(cells / "0.tif"), compression="zlib")
    shutil.move(other / "0_masks.tif", other / "x_masks.tif")
    for number in range(6):
        (other / f"{number}.tif").unlink()
    tifffile.imwrite(other / "blank.tif", np.full((64, 64), 300, np.uint16))
    shutil.copy(other / "5_masks.tif", other / "blank_masks.tif")
    for root in (cells, other):
        for path in root.glob("[1-5]_masks.tif"):
            path.unlink()
        for path in root.glob("[1-5].tif"):
            path.unlink()
    shutil.copy(other / "blank.tif", cells / "blank.tif")
    shutil.copy(other / "blank_masks.tif", cells / "blank_masks.tif")
    source, seen = look(cells, val=str(other))
    assert f"{survey.LEAKED}: 1 (x.tif)" in suspicions(source)
    assert survey.REPEATED not in suspicions(source)
    assert seen.places[survey.LEAKED] == [survey.Place(True, 1)]


def test_the_background_has_a_number(tmp_path):
    cells = write_cells(tmp_path / "cells")
    for path in cells.glob("*_masks.tif"):
        labels = tifffile.imread(path)
        tifffile.imwrite(path, np.where(labels, labels, 99))
    assert f"{survey.BACKGROUND}: 6 (" in suspicions(look(cells)[0])


def test_one_large_object_is_no_background(folder):
    add(folder, 102, [-1, -1, 60, -1, 60, 60, -1, 60])
    folder.save()
    assert survey.BACKGROUND not in suspicions(look(folder.root)[0])


def test_strict(folder, tmp_path):
    twice(folder)
    folder.save()
    status, page = check(folder.root, tmp_path / "page.html", "--strict")
    assert status == 1 and 'class="kind suspicious"' in page and '<div class="raised"><b>1</b>' in page
    assert check(folder.root, tmp_path / "page.html")[0] == 0


# --------------------------------------------------------------------------------------------- what training would ask


def maps(root: Path, change) -> Path:
    write_cells(root)
    for path in root.glob("*_masks.tif"):
        Image.fromarray(change(tifffile.imread(path))).save(path.with_suffix(".png"))
        path.unlink()
    return root


def of_jpeg(labels: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(((labels > 0) * 200).astype(np.uint8)).save(buffer, "JPEG", quality=80)
    return np.asarray(Image.open(buffer))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda labels: ((labels > 0) * 255).astype(np.uint8),
            "look like classes: all 6 maps have the values 0 and 255",
        ),
        (lambda labels: np.where(labels == 47, 255, labels).astype(np.uint8), "255, which usually stands for void"),
        (of_jpeg, "look like a JPEG that was stored again"),
    ],
)
def test_the_question_that_training_would_ask(tmp_path, capsys, change, why):
    """The page shows the data all the same, and the command ends as training would."""
    root = maps(tmp_path / "data", change)
    status, page = check(root, tmp_path / "page.html")
    assert status == 2 and re.search(why, page) and "training would not start" in page
    assert page.count('src="data:image/webp') >= 6
    assert re.search(why, capsys.readouterr().err)
    assert main(["train", "--data", str(root), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 2
    assert re.search(why, capsys.readouterr().err)


def test_the_noise_of_a_jpeg_can_be_taken_as_it_is(tmp_path):
    root = maps(tmp_path / "data", of_jpeg)
    source, _ = look(root, semantic="instances")
    assert "label maps with the noise of a JPEG or of resizing, taken as they are: 6" in suspicions(source)


def test_one_image_is_shown(tmp_path, capsys):
    cells = write_cells(tmp_path / "cells", count=1)
    status, page = check(cells, tmp_path / "page.html")
    assert status == 2 and page.count('src="data:image/webp') == 1
    assert "there must be at least two images" in capsys.readouterr().err


def test_what_is_broken_is_listed(folder, tmp_path, capsys):
    for name in ("1.png", "2.png"):
        path = folder.root / "images" / name
        path.write_bytes(path.read_bytes()[:200])
    status, page = check(folder.root, tmp_path / "page.html")
    assert status == 2 and "What is broken" in page and page.count("1.png") and page.count("2.png")
    assert re.search(
        r"training stops at what is broken: 2 images or annotations are; the first: ", capsys.readouterr().err
    )
    assert check(folder.root, tmp_path / "page.html", "--on-error", "skip")[0] == 0
    assert check(folder.root, tmp_path / "page.html", "--on-error", "skip", "--strict")[0] == 1


# ------------------------------------------------------------------------------------------------- what the page shows


def test_a_picture_shows_what_the_loss_reads(folder):
    """Where a target is one half or more at a point, there is color, and where nothing is asked, it is hatched."""
    source, _ = look(folder.root, 32)
    number = next(place for place, name in enumerate(source.found.train.files) if name.endswith("4.png"))
    picture = np.asarray(Image.open(io.BytesIO(draw(source, survey.Place(False, number))))).astype(int)
    assert picture.shape == (440, 440, 3)
    scale = 440 / 64
    # On the edge of the box (rows 22 to 32, columns 20 to 38), in its color; inside of it, between that and the image.
    edge, inside = picture[int(27 * scale), int(20 * scale) + 1], picture[int(27 * scale), int(30 * scale)]
    assert np.abs(edge - (0xF5, 0xA3, 0x00)).max() < 90 and np.abs(inside - (0xF5, 0xA3, 0x00)).max() > 100
    beside = picture[int(27 * scale), int(20 * scale) - 6]
    assert np.abs(beside - (0xF5, 0xA3, 0x00)).max() > 100
    # The crowd, rows 40 to 50 and columns 10 to 30, is hatched in light gray.
    crowd = picture[int(41 * scale) : int(49 * scale), int(11 * scale) : int(29 * scale)]
    assert ((crowd > 170).all(-1).mean() > 0.3) and (crowd.max(-1) < 150).mean() > 0.3


def test_a_picture_of_a_crop_counts_the_instances_of_the_crop(tmp_path):
    """Of four instances one lies in the crop in the middle, which one query finds; of the whole image it would not."""
    labels = np.zeros((96, 96), np.uint8)
    for number, (top, left) in enumerate(((2, 2), (2, 70), (70, 2), (44, 44)), start=1):
        labels[top : top + (9 if number == 4 else 20), left : left + (9 if number == 4 else 20)] = number
    for number in range(2):
        Image.fromarray((labels > 0).astype(np.uint8) * 120 + 10 * number).save(tmp_path / f"{number}.png")
        Image.fromarray(labels).save(tmp_path / f"{number}_masks.png")
    source, _ = look(tmp_path, crop=32, queries=1)
    picture = np.asarray(Image.open(io.BytesIO(draw(source, survey.Place(False, 0))))).astype(int)
    # Rows and columns 32 to 64 are shown: an edge is orange, and nothing is hatched.
    assert np.abs(picture[int(48 * 440 / 32 - 440), int(12 * 440 / 32) + 1] - (0xF5, 0xA3, 0x00)).max() < 90
    assert not ((picture > 190) & (picture < 210)).all(-1).any()


def test_the_page_and_the_table(folder, tmp_path, capsys):
    status, page = check(folder.root, tmp_path / "page.html", "--size", "48", "--val", "0.4")
    printed = capsys.readouterr().out
    assert status == 0 and page.count('src="data:image/webp') == 6
    assert re.search(r"^images +4 +2$", printed, re.MULTILINE)
    assert re.search(r"^instances +8 +4$", printed, re.MULTILINE)
    assert re.search(r"^disc +4 +2 +249$", printed, re.MULTILINE)
    assert "nothing is suspicious" in printed and str(tmp_path / "page.html") in printed
    assert re.search(r"<pre>maskloss train --data \S+ --val 0.4 --size 48</pre>", page)
    for text in (
        "prefers-color-scheme: dark",
        "<td>disc</td><td>4</td><td>2</td><td>249</td>",
        "2 instances</figcaption>",
    ):
        assert text in page, text
    assert "://" not in page


def test_names_cannot_break_the_page(folder, tmp_path):
    folder.content["categories"][0]["name"] = "<script>alert(1)</script>"
    folder.save()
    _, page = check(folder.root, tmp_path / "page.html")
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_an_earlier_page_is_replaced_and_nothing_else(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert check(folder.root, out)[0] == check(folder.root, out)[0] == 0
    out.write_text("<html>mine</html>")
    status, page = check(folder.root, out)
    assert status == 2 and page == "<html>mine</html>"
    assert "--out must be a new file, or a page of an earlier check" in capsys.readouterr().err


def test_options_are_those_of_training(folder, tmp_path, capsys):
    for wrong, told in (
        (("--size", "3"), "--size must be a whole number from 16 to 4,096"),
        (("--queries", "0"), "--queries must be a whole number, at least 1"),
        (("--semantic", "x"), "--semantic must be one of"),
    ):
        assert check(folder.root, tmp_path / "page.html", *wrong)[0] == 2
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        check(folder.root, tmp_path / "page.html", "--steps", "3")
    assert "there is no option --steps" in capsys.readouterr().err


def test_images_are_not_kept(tmp_path, monkeypatch):
    """However many there are, a few of them are in memory."""
    source = FolderScenes(str(write_cells(tmp_path / "cells", count=40)), on_error=LOOK)
    images: list[weakref.ref[Any]] = []
    alive: list[int] = []
    plain = truth.load

    def load(entry: Any) -> truth.Loaded:
        loaded = plain(entry)
        images.append(weakref.ref(loaded.image))
        alive.append(sum(each() is not None for each in images))
        return loaded

    monkeypatch.setattr(truth, "load", load)
    seen = survey.survey(source)
    assert len(seen.train.numbers) + len(seen.held_out.numbers) == len(images) == 40
    assert max(alive) <= 2 * survey.AHEAD


def test_training_tells_the_same_and_looks_at_some(folder, tmp_path, no_pictures, monkeypatch):
    from maskloss.lab.config import TrainConfig
    from maskloss.lab.files import read_json
    from maskloss.lab.loop.progress import Listener
    from maskloss.lab.loop.run import train

    twice(folder)
    folder.save()
    told: list[Any] = []
    config = TrainConfig(
        data=str(folder.root), steps=1, batch_size=2, evaluations=1, num_points=16, workers=0, device="cpu"
    )
    train(config, tmp_path / "run", Listener.silent()._replace(facts=told.append))
    assert "that are there twice" in dict(told[0])["suspicious"]
    kept = read_json(tmp_path / "run" / "summary.json", "")["findings"]
    assert kept[0]["kind"] == SUSPICIOUS and "there twice" in kept[0]["text"]
    source = FolderScenes(str(folder.root))
    seen = survey.survey(source, most=3)
    assert len(seen.train.numbers) + len(seen.held_out.numbers) == 3
