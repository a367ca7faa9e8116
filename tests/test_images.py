import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import ImageError, ImagePairs, Images, find_images

CPU = torch.device("cpu")
COUNTS = {"a": 5, "b": 3, "c": 4}


@pytest.fixture
def folder(tmp_path, write_images):
    return write_images(tmp_path / "images", COUNTS)


@pytest.fixture
def in_parts(tmp_path, write_images):
    write_images(tmp_path / "parts" / "train", COUNTS)
    write_images(tmp_path / "parts" / "val", {"a": 2, "b": 2, "c": 1}, seed=1)
    return tmp_path / "parts"


def zipped(folder):
    with zipfile.ZipFile(f"{folder}.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
    return folder.with_suffix(".zip")


def loaded(path, size=(8, 12), split="train"):
    images = Images(find_images(path, split), size)
    images.load(CPU, progress=False)
    return images


def test_classes_are_folders(folder):
    found = find_images(folder, "train")
    assert found.classes == ("a", "b", "c")
    assert found.labels.tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert found.names[0] == "a/000.png"
    # Not in parts: what there is serves for both.
    assert find_images(folder, "test").names == found.names


def test_parts_are_found_by_name(in_parts):
    assert len(find_images(in_parts, "train").names) == 12
    test = find_images(in_parts, "test")
    assert test.root == in_parts / "val"
    assert len(test.names) == 5
    shutil.rmtree(in_parts / "val")
    with pytest.raises(ImageError, match="parts holds train, and nothing to test on: name another path"):
        find_images(in_parts, "test")


@pytest.mark.parametrize("inside", ["", "train"])
def test_a_zip_holds_the_same_as_the_folder(in_parts, inside):
    archive = zipped(in_parts)
    one, other = find_images(in_parts / inside, "train"), find_images(archive / inside, "train")
    assert other.root == archive / "train"
    assert other.names == one.names
    assert torch.equal(other.labels, one.labels)
    assert torch.equal(loaded(in_parts / inside).pixels, loaded(archive / inside).pixels)


def test_pixels_fill_the_size_and_keep_their_proportions(tmp_path):
    # A black square in the middle of white: wide images lose their sides, and the square stays square.
    pixels = np.full((40, 120, 3), 255, np.uint8)
    pixels[10:30, 50:70] = 0
    (tmp_path / "x").mkdir()
    Image.fromarray(pixels).save(tmp_path / "x" / "wide.png")
    (image,) = loaded(tmp_path, size=(20, 20)).pixels
    assert image.shape == (3, 20, 20)
    dark = (image < 128).all(dim=0)
    assert dark.any(dim=0).sum() == dark.any(dim=1).sum() == 10


def test_images_without_folders_have_one_class(tmp_path, write_images):
    write_images(tmp_path, {"a": 3})
    found = find_images(tmp_path / "a", "train")
    assert found.classes == ("",)
    assert found.labels.tolist() == [0, 0, 0]


def test_damaged_images_are_left_out_and_named(folder):
    (folder / "b" / "001.png").write_bytes((folder / "b" / "001.png").read_bytes()[:60])
    images = loaded(folder)
    assert len(images.pixels) == len(images.found.names) == len(images.found.labels) == 11
    assert "b/001.png" not in images.found.names
    ((name, reason),) = images.refused.items()
    assert name == str(folder / "b" / "001.png")
    assert "cannot be decoded" in reason
    # Read batch by batch, the image before it stands in its place.
    streamed = Images(find_images(folder, "train"), (8, 12))
    batch = streamed.read([5, 6, 7])
    assert torch.equal(batch[1], batch[0])
    assert not torch.equal(batch[2], batch[0])
    assert list(streamed.refused) == [name]


def test_nothing_readable(folder, tmp_path):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ImageError, match="none of its 12 images can be decoded"):
        loaded(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="empty: no images in it"):
        find_images(tmp_path / "empty", "train")
    with pytest.raises(ImageError, match="nowhere: there is no folder of images"):
        find_images(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("in_memory", [True, False])
def test_every_epoch_shows_each_image_once_in_a_new_order(folder, in_memory):
    images = loaded(folder) if in_memory else Images(find_images(folder, "train"), (8, 12))
    batches = iter(ImagePairs(images, batch_size=4, seed=3))
    epochs = [[next(batches) for _ in range(3)] for _ in range(2)]
    orders = [[name for batch in epoch for name in batch.videos] for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == [folder / name for name in images.found.names]
    assert orders[0] != orders[1]
    truth = loaded(folder)
    for batch in epochs[0]:
        rows = [truth.found.names.index(str(name.relative_to(folder))) for name in batch.videos]
        assert torch.equal(batch.frames, truth.pixels[rows])
        assert torch.equal(batch.following, batch.frames)
        assert torch.equal(batch.labels, truth.found.labels[rows])


def test_the_order_goes_on_where_the_state_says(folder):
    images = loaded(folder)
    batches = iter(ImagePairs(images, 5, seed=0))
    seen = [next(batches) for _ in range(5)]
    resumed = ImagePairs(images, 5, seed=0)
    resumed.state = seen[2].state
    again = iter(resumed)
    for batch in seen[3:]:
        assert next(again).videos == batch.videos


def test_ranks_share_every_batch(folder):
    images = loaded(folder)
    whole = next(iter(ImagePairs(images, 6, seed=1)))
    parts = [next(iter(ImagePairs(images, 3, seed=1, rank=rank, ranks=2))) for rank in (0, 1)]
    assert parts[0].videos + parts[1].videos == whole.videos
    with pytest.raises(ImageError, match="12 images are fewer than a batch of 14"):
        ImagePairs(images, 7, seed=0, ranks=2)


def test_what_lies_beside_the_parts_or_around_them_is_left_alone(in_parts, tmp_path):
    Image.new("RGB", (9, 9)).save(in_parts / "preview.png")
    (in_parts / "unlabelled").mkdir()
    Image.new("RGB", (9, 9)).save(in_parts / "unlabelled" / "x.png")
    (in_parts / "train" / ".hidden").mkdir()
    Image.new("RGB", (9, 9)).save(in_parts / "train" / ".hidden" / "x.png")
    for path in (in_parts, tmp_path):  # itself, and the folder around it
        found = find_images(path, "train")
        assert found.root == in_parts / "train"
        assert found.classes == ("a", "b", "c")
        assert len(found.names) == 12
        assert len(find_images(path, "test").names) == 5


def test_labels_of_stand_ins_are_not_known(folder):
    (folder / "b" / "000.png").write_bytes(b"no image")
    pairs = ImagePairs(Images(find_images(folder, "train"), (8, 12)), 12, seed=0)
    batch = next(iter(pairs))
    names = [str(name.relative_to(folder)) for name in batch.videos]
    assert {name for name, label in zip(names, batch.labels, strict=True) if label < 0} == {"b/000.png"}
    with pytest.raises(ImageError, match=r"b/000\.png: cannot be decoded"):
        Images(find_images(folder, "train"), (8, 12), strict=True).read([4, 5])
    with pytest.raises(ImageError, match=r"b/000\.png: cannot be decoded"):
        Images(find_images(folder, "train"), (8, 12), strict=True).load(CPU, progress=False)


def test_a_fault_of_the_machine_is_not_the_image_s(folder, monkeypatch):
    def fail(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        loaded(folder)
