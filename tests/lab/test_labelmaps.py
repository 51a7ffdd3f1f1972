"""Images with label maps beside them, of every kind that people have."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from lab.conftest import reads_little, write_cells
from maskloss import MaskLossError
from maskloss.lab.data.folder import FolderScenes
from maskloss.lab.data.images import read_image, read_size, to_unit
from maskloss.lab.data.maps import read_map
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import by_kind


def test_images_side_by_side_with_their_maps(cells):
    source = FolderScenes(str(cells), 32)
    assert source.found.kind == "labels" and source.class_names == ["instance"] and source.one_class_maps
    scene = source.held_out[0]
    truth = read_map(cells / scene.name.replace(".tif", "_masks.tif"))
    ids = [number for number in np.unique(truth) if number]
    masks = scene.masks()
    assert len(masks) == len(ids) == len(scene.labels) and not scene.labels.any()
    for mask, number in zip(masks, ids, strict=True):
        assert torch.equal(mask, torch.from_numpy(truth == number))


@pytest.mark.parametrize(("maps", "ending"), [("masks", ""), ("labels", ""), ("masks", "_masks"), ("label", "_label")])
def test_folders_beside_each_other(cells, tmp_path, maps, ending):
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / maps).mkdir()
    for number in range(6):
        (cells / f"{number}.tif").rename(root / "images" / f"{number}_img.tif")
        Image.fromarray(tifffile.imread(cells / f"{number}_masks.tif")).save(root / maps / f"{number}{ending}.png")
    source = FolderScenes(str(root), 32)
    assert (len(source.found.train), len(source.held_out)) == (5, 1)


def test_training_and_test_folders(cells, tmp_path):
    write_cells(tmp_path / "data" / "train", 3)
    write_cells(tmp_path / "data" / "test", 2)
    source = FolderScenes(str(tmp_path / "data"), 32)
    assert (len(source.found.train), len(source.held_out)) == (3, 2)


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [(suffix, dtype) for suffix in ("tif", "png") for dtype in (np.uint8, np.uint16)]
    + [("tif", dtype) for dtype in (np.int32, np.uint32, np.float32)],
)
def test_maps_of_any_depth(tmp_path, suffix, dtype):
    labels = np.zeros((20, 30), dtype=dtype)
    labels[2:9, 3:9], labels[12:18, 20:29] = 200, 3
    path = tmp_path / f"map.{suffix}"
    tifffile.imwrite(path, labels) if suffix == "tif" else Image.fromarray(labels).save(path)
    assert np.array_equal(read_map(path), labels)


def test_a_palette_does_not_change_the_numbers(tmp_path):
    labels = np.zeros((8, 8), dtype=np.uint8)
    labels[:4], labels[4:] = 1, 2
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + [0] * 759)
    image.save(tmp_path / "map.png")
    assert np.array_equal(read_map(tmp_path / "map.png"), labels)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(216).reshape(8, 9, 3).astype(np.uint8), "shape 8 x 9 x 3"),
        (np.full((8, 8), 0.5, np.float32), "holds fractions"),
        (np.full((8, 8), np.nan, np.float32), "holds fractions"),
        (np.full((8, 8), np.inf, np.float32), "holds fractions"),
        (np.full((8, 8), 3e9, np.float32), "numbers from 3000000000.0 to"),
        (np.ones((8, 8), np.complex64), "values of type complex64"),
        (np.full((8, 8), -1, np.int32), "numbers from -1 to -1"),
    ],
)
def test_what_is_no_label_map(tmp_path, array, message):
    tifffile.imwrite(tmp_path / "map.tif", array)
    with pytest.raises(MaskLossError, match=message):
        read_map(tmp_path / "map.tif")


def test_a_map_of_another_size_than_its_image(cells):
    tifffile.imwrite(cells / "2_masks.tif", np.ones((64, 63), np.uint8))
    with pytest.raises(MaskLossError, match=r"2_masks\.tif is 64 x 63, 2\.tif is 64 x 64"):
        FolderScenes(str(cells), 32)
    tolerant = FolderScenes(str(cells), 32, on_error="skip")
    assert len(tolerant.found.train) + len(tolerant.held_out) == 5
    assert "2_masks.tif" in dict(by_kind(tolerant.findings))["left out"]


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((40, 30), 3), ((40, 30, 3), 3), ((2, 40, 30), 3), ((5, 40, 30), 5), ((40, 30, 4), 4)],
)
def test_channels(tmp_path, shape, channels):
    write_cells(tmp_path, 2)
    random = np.random.default_rng(0)
    for number in range(2):
        metadata = {"axes": "CYX"} if len(shape) == 3 and shape[0] < 10 else None
        tifffile.imwrite(
            tmp_path / f"{number}.tif",
            random.integers(0, 4000, shape, dtype=np.uint16),
            metadata=metadata,
            photometric="minisblack",
            **({"planarconfig": "contig"} if len(shape) == 3 and shape[-1] < 10 else {}),
        )
        tifffile.imwrite(tmp_path / f"{number}_masks.tif", np.ones((40, 30), np.uint8))
    source = FolderScenes(str(tmp_path), 32)
    assert source.channels == channels
    assert source.batch(0, range(1), 1, 0).images.shape == (1, channels, 32, 32)


def test_a_stack_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((7, 40, 30), np.uint16), metadata={"axes": "ZYX"})
    with pytest.raises(MaskLossError, match="is a stack of 7"):
        read_image(tmp_path / "stack.tif")
    tifffile.imwrite(tmp_path / "long.tif", np.zeros((40, 40, 30), np.uint16), metadata={"axes": "TYX"})
    with pytest.raises(MaskLossError, match="one plane"):
        read_image(tmp_path / "long.tif")


def test_a_compression_that_only_pillow_knows(tmp_path):
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(image).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    assert np.array_equal(read_image(tmp_path / "lzw.tif")[..., 0], image)


def test_deep_images_are_stretched_between_percentiles(cells):
    image = to_unit(read_image(cells / "0.tif"), percentile=False)
    assert image.min() == 0 and image.max() == 1
    assert 0.6 < image[read_map(cells / "0_masks.tif") > 0].mean() <= 1
    hot = read_image(cells / "0.tif").copy()
    hot[0, 0] = 65535
    assert np.abs(to_unit(hot, percentile=False) - image)[1:].max() < 0.1


def test_a_flat_image_is_no_division_by_zero():
    assert np.isfinite(to_unit(np.full((5, 5, 1), 7, np.float32), percentile=True)).all()


def test_a_photograph_keeps_its_range():
    image = np.full((4, 4, 3), 51, np.uint8)
    assert np.allclose(to_unit(image, percentile=False), 0.2)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_broken_file(tmp_path, suffix):
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(b"no image at all")
    with pytest.raises(MaskLossError, match="every image must be readable"):
        read_image(path)
    with pytest.raises(MaskLossError, match="no such file"):
        read_image(tmp_path / f"missing.{suffix}")


def test_a_png_with_a_chunk_of_gigabytes(tmp_path):
    path = tmp_path / "0.png"
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(path)
    content = path.read_bytes()
    at = content.index(b"IDAT")
    path.write_bytes(content[: at - 4] + b"\x7f\xff\xff\xff" + content[at:])
    with reads_little(), contextlib.suppress(MaskLossError):
        assert read_image(path).ravel().tolist() == [*range(12)]


def test_an_image_that_would_fill_the_memory(tmp_path):
    """A PNG of 100,000 x 100,000 pixels takes a few bytes on the disk."""
    write_png_head(tmp_path / "bomb.png", 100_000, 100_000)
    with pytest.raises(MaskLossError, match=r"at most 268,435,456 pixels.*\n.*10,?000,?000,?000"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("read", [read_image, read_map, read_size])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_one_limit_of_pixels(tmp_path, suffix, read):
    """Pixels count, not channels, and it is this limit that is told, not Pillow's."""
    path = tmp_path / f"wide.{suffix}"
    for side in (16_000, 17_000) if read is read_size else (17_000,):
        if suffix == "png":
            write_png_head(path, side, side)
        else:
            write_zeros(path, side)
        if read is read_size and (side == 16_000 or suffix == "tif"):
            # A TIFF may be read in pieces.
            assert read(path) == (side, side)
        else:
            with pytest.raises(MaskLossError, match=r"at most 268,435,456 pixels.*\n.* 17,000 x 17,000 = 289,000,000"):
                read(path)


def write_png_head(path, height, width):
    """Write a PNG that ends after its head."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def write_zeros(path, side):
    """Write a square TIFF of zeros, as few bytes."""
    rows = 1000
    strip = zlib.compress(np.zeros((rows, side), np.uint8))
    tifffile.imwrite(
        path,
        itertools.repeat(strip, side // rows),
        shape=(side, side),
        dtype=np.uint8,
        rowsperstrip=rows,
        compression="zlib",
    )


def test_a_strip_that_unpacks_into_more_than_the_image(tmp_path):
    packer = zlib.compressobj(9)
    strip = b"".join(packer.compress(bytes(1 << 20)) for _ in range(80)) + packer.flush()
    options = {"shape": (8, 8), "dtype": np.uint8, "rowsperstrip": 8, "compression": "zlib"}
    tifffile.imwrite(tmp_path / "bomb.tif", iter([strip]), **options)
    with pytest.raises(MaskLossError, match=r"bomb\.tif has 8\d,\d* bytes for 64"), reads_little():
        read_image(tmp_path / "bomb.tif")


@pytest.mark.parametrize("large", ["0.tif", "0_masks.tif"])
def test_a_large_file_beside_a_small_one_is_not_read(cells, large):
    write_zeros(cells / large, 12_000)
    with pytest.raises(MaskLossError, match="12000 x 12000"), reads_little():
        FolderScenes(str(cells), 32)


@pytest.mark.parametrize("name", ["0.tif", "0_masks.tif", "0.png"])
def test_what_would_be_waited_for(cells, name):
    if name == "0.png":
        (cells / "0.tif").unlink()
    (cells / name).unlink(missing_ok=True)
    os.mkfifo(cells / name)
    with pytest.raises(MaskLossError, match=f"{name} is a named pipe"):
        FolderScenes(str(cells), 32)
    (cells / name).unlink()
    (cells / name).symlink_to(name)
    with pytest.raises(MaskLossError, match=f"{name}: too many levels of symbolic links"):
        FolderScenes(str(cells), 32)


def test_an_empty_folder(tmp_path):
    with pytest.raises(MaskLossError, match="none was found"):
        FolderScenes(str(tmp_path), 32)
    with pytest.raises(MaskLossError, match="there is no folder"):
        FolderScenes(str(tmp_path / "nowhere"), 32)


def test_a_format_that_is_not_there(cells):
    with pytest.raises(MaskLossError, match="a data set of the format 'coco'"):
        FolderScenes(str(cells), 32, options=DataOptions(format="coco"))


def test_warnings_of_broken_files_on_many_threads(tmp_path):
    """Pillow warns of each; no thread may turn the warnings of another on again, or leave them off for good."""
    paths = [tmp_path / f"{number}.png" for number in range(200)]
    tifffile.imwrite(paths[0], np.zeros((8, 8), np.uint8))
    for path in paths:
        path.write_bytes(paths[0].read_bytes()[:200])
    before = list(warnings.filters)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read_size, paths)) == {(8, 8)}
    assert list(warnings.filters) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "größe,a\n1,2\n".encode("latin-1")),
        ("train.csv", b"id,rle\n1," + b"1 " * 100_000 + b"\n"),
        ("large.csv", b"a,b\n" + b"1,2\n" * (1 << 20)),
        ("log.jsonl", b'{"step": 1}\n{"st'),
    ],
)
def test_a_file_of_something_else_is_no_obstacle(cells, name, content):
    (cells / name).write_bytes(content)
    assert FolderScenes(str(cells), 32).found.kind == "labels"
