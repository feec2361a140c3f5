"""Images of one's own are read from where they are: folders, npz files, datasets."""

import json
from pathlib import Path

import numpy as np
import pytest

import nestvec as nv
from nestvec._pixels import as_pixels
from nestvec.corpus import Images
from nestvec.errors import DataError, FileFormatError, StorageError

pil = pytest.importorskip("PIL.Image", reason="nestvec[image]")


@pytest.fixture
def pictures(rng) -> np.ndarray:
    return rng.integers(0, 256, (6, 9, 7, 3), dtype=np.uint8)


def put(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pil.fromarray(pixels).save(path)
    return path


def npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def decoded(images: Images) -> np.ndarray:
    return np.stack([as_pixels(image) for image in images.images])


def test_folders_are_classes_and_the_pixels_are_those_that_were_saved(tmp_path, pictures):
    put(tmp_path / "dog/b.png", pictures[2])
    put(tmp_path / "cat/a.PNG", pictures[0])
    put(tmp_path / "cat/deep/a.png", pictures[1])
    put(tmp_path / "cat/.hidden.png", pictures[3])
    (tmp_path / "cat/notes.txt").write_text("no image")
    got = nv.read_images(tmp_path)
    assert got.ids == ["cat/a.PNG", "cat/deep/a.png", "dog/b.png"]
    assert got.label_names == ["cat", "dog"]
    np.testing.assert_array_equal(got.labels, [0, 0, 1])
    np.testing.assert_array_equal(decoded(got), pictures[:3])
    assert repr(got) == "Images(3 images, 2 classes)"


def test_a_class_has_the_same_number_in_every_split(tmp_path, pictures):
    for name in ("ant", "bee", "cow"):
        put(tmp_path / f"train/{name}/0.png", pictures[0])
    put(tmp_path / "test/cow/1.png", pictures[1])
    got = nv.read_images(tmp_path, split="test")
    assert (got.ids, got.labels.tolist()) == (["test/cow/1.png"], [2])
    assert got.label_names == nv.read_images(tmp_path, split="train").label_names


def test_a_flat_folder_and_a_file_have_no_labels(tmp_path, pictures):
    for i in (1, 0):
        put(tmp_path / f"{i}.png", pictures[i])
    got = nv.read_images(tmp_path)
    assert (got.ids, got.labels, len(got)) == (["0.png", "1.png"], None, 2)
    np.testing.assert_array_equal(decoded(got), pictures[:2])
    one = nv.read_images(tmp_path / "1.png")
    np.testing.assert_array_equal(decoded(one), pictures[1:2])


def test_files_are_not_opened_before_they_are_used(tmp_path, pictures, monkeypatch):
    put(tmp_path / "a/0.png", pictures[0])
    monkeypatch.setattr(pil, "open", None)
    assert nv.read_images(tmp_path).images == [tmp_path / "a/0.png"]


@pytest.mark.parametrize(
    ("names", "split", "ids"),
    [
        (("x_train", "y_train"), "train", "train-0"),
        (("x_train", "y_train"), None, "train-0"),
        (("x", "y"), None, "0"),
        (("images", "labels"), None, "0"),
    ],
)
def test_an_npz_is_read_by_the_names_of_its_arrays(tmp_path, pictures, names, split, ids):
    arrays = dict(zip(names, (pictures, np.arange(6) % 3), strict=True))
    got = nv.read_images(npz(tmp_path / "a.npz", **arrays, lt_idx=np.arange(2)), split=split)
    np.testing.assert_array_equal(got.images, pictures)
    np.testing.assert_array_equal(got.labels, np.arange(6) % 3)
    assert got.ids[0] == ids


def test_the_sets_of_issue_3_are_read(data):
    for name, shape in (
        ("cifar10/cifar10_10k", (32, 32, 3)),
        ("omniglot_small/omniglot_small", (35, 35, 1)),
    ):
        got = nv.read_images(data / f"{name}.npz", split="test")
        assert got.images.shape[1:] == shape
        assert len(got.labels) == len(got)


def test_text_labels_are_numbered_over_all_splits(tmp_path, pictures):
    path = npz(
        tmp_path / "a.npz",
        x_train=pictures[:3], y_train=np.array(["cow", "ant", "bee"]),
        x_test=pictures[3:4], y_test=np.array(["cow"]),
    )  # fmt: skip
    got = nv.read_images(path, split="test")
    assert (got.labels.tolist(), got.label_names) == ([2], ["ant", "bee", "cow"])


def dataset(pictures, labels, **features):
    datasets = pytest.importorskip("datasets")
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}
    columns = {"image": [pil.fromarray(p) for p in pictures], "label": labels}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds | features))


def test_a_datasets_folder_keeps_pixels_labels_and_names(tmp_path, pictures):
    datasets = pytest.importorskip("datasets")
    parts = {"train": dataset(pictures[:4], [0, 1, 1, 0]), "test": dataset(pictures[4:], [1, 0])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    got = nv.read_images(tmp_path / "both", split="test")
    assert (got.ids, got.labels.tolist(), got.label_names) == (
        ["test-0", "test-1"], [1, 0], ["ant", "bee"]
    )  # fmt: skip
    np.testing.assert_array_equal(decoded(got), pictures[4:])
    np.testing.assert_array_equal(as_pixels(got.images[-1]), pictures[5])
    parts["train"].save_to_disk(tmp_path / "one")
    assert nv.read_images(tmp_path / "one").ids == ["0", "1", "2", "3"]


def test_a_dataset_that_hides_its_labels_has_none(tmp_path, pictures):
    dataset(pictures[:2], [-1, -1]).save_to_disk(tmp_path / "a")
    assert nv.read_images(tmp_path / "a").labels is None


def test_a_damaged_row_of_a_dataset_is_named(tmp_path, pictures):
    datasets = pytest.importorskip("datasets")
    rows = dataset(pictures[:2], [0, 1]).cast_column("image", datasets.Image(decode=False))
    cut = [{"bytes": r["image"]["bytes"][:60], "path": None} for r in rows]
    rows = datasets.Dataset.from_dict({"image": cut})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "a")
    with pytest.raises(FileFormatError, match=r"a: image 1: .*truncated or damaged"):
        as_pixels(nv.read_images(tmp_path / "a").images[1])


def test_text_labels_of_a_dataset_are_refused(tmp_path, pictures):
    datasets = pytest.importorskip("datasets")
    dataset(pictures[:2], ["a", "b"], label=datasets.Value("string")).save_to_disk(tmp_path / "a")
    with pytest.raises(DataError, match="class_encode_column"):
        nv.read_images(tmp_path / "a")


def test_a_dataset_without_images_says_what_it_has(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "a")
    with pytest.raises(FileFormatError, match=r"no column of images.*text \(string\)"):
        nv.read_images(tmp_path / "a")


def test_a_damaged_datasets_folder_is_one_sentence(tmp_path, pictures):
    dataset(pictures[:2], [0, 1]).save_to_disk(tmp_path / "a")
    for file in (tmp_path / "a").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(FileFormatError, match="cannot read the datasets folder"):
        nv.read_images(tmp_path / "a")


def test_an_unknown_split_names_those_that_exist(tmp_path, pictures):
    path = npz(tmp_path / "a.npz", x_train=pictures, x_test=pictures)
    with pytest.raises(DataError, match=r"no split 'val'; its splits are: train, test"):
        nv.read_images(path, split="val")
    with pytest.raises(DataError, match="say which, split='train'"):
        nv.read_images(path)
    for split in ("train", "test"):
        put(tmp_path / f"folder/{split}/a/0.png", pictures[0])
    with pytest.raises(DataError, match=r"no split 'val'; its splits are: test, train"):
        nv.read_images(tmp_path / "folder", split="val")
    with pytest.raises(DataError, match="has no splits"):
        nv.read_images(tmp_path / "folder/train", split="val")


MIXED = np.array([np.zeros((2, 2)), np.zeros((3, 3))], dtype=object)


@pytest.mark.parametrize(
    ("arrays", "error", "words"),
    [
        ({"x": MIXED}, DataError, "Python objects .images of mixed shapes"),
        ({"x": np.zeros((4, 5))}, DataError, "float64 values from 0 to 0 given where uint8"),
        ({"x": np.full((2, 4, 4), np.nan)}, DataError, "float64 .*where uint8"),
        ({"x": np.full((2, 4, 4), 300)}, DataError, "int64 values from 300 to 300"),
        ({"x": np.zeros((4, 5), np.uint8)}, DataError, r"shape \(4, 5\) does not hold images"),
        ({"x": np.zeros((4, 0, 5), np.uint8)}, DataError, "none of them 0"),
        ({"x": np.zeros((4, 5, 3), np.uint8)}, DataError, r"looks like one image.*images\[None\]"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": [0]}, DataError, "1 labels for 2 images"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": [0.5, 1]}, DataError, "whole number"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": [0, -2]}, DataError, "row 1 has label -2"),
        ({"z": np.zeros(3)}, FileFormatError, "no array of images, only z"),
    ],
)
def test_arrays_that_are_no_images_are_refused_with_the_file(tmp_path, arrays, error, words):
    with pytest.raises(error, match=rf"a\.npz.*{words}"):
        nv.read_images(npz(tmp_path / "a.npz", **arrays))


def test_a_truncated_npz_is_one_sentence(tmp_path, pictures):
    path = npz(tmp_path / "a.npz", x=pictures)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FileFormatError, match=r"cannot read .*a\.npz: .*damaged"):
        nv.read_images(path)


def test_folders_without_images_and_mixtures_are_refused(tmp_path, pictures):
    (tmp_path / "empty/cat").mkdir(parents=True)
    (tmp_path / "empty/cat/a.txt").write_text("text")
    with pytest.raises(DataError, match="no images found in"):
        nv.read_images(tmp_path / "empty")
    put(tmp_path / "mixed/a.png", pictures[0])
    put(tmp_path / "mixed/cat/a.png", pictures[0])
    with pytest.raises(DataError, match="not clear what the classes are"):
        nv.read_images(tmp_path / "mixed")
    for name in ("train", "cat"):
        put(tmp_path / f"unclear/{name}/0.png", pictures[0])
    with pytest.raises(DataError, match="splits or classes"):
        nv.read_images(tmp_path / "unclear")


def test_what_is_no_image_source_is_refused(tmp_path):
    with pytest.raises(StorageError, match="no such file"):
        nv.read_images(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(FileFormatError, match="holds no images"):
        nv.read_images(tmp_path / "a.txt")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/state.json").write_text(json.dumps({}))
    with pytest.raises(FileFormatError, match="datasets folder"):
        nv.read_images(tmp_path / "a")


def test_ids_and_names_have_to_fit(pictures):
    with pytest.raises(DataError, match="duplicate ids"):
        Images(["a", "a"], pictures[:2])
    with pytest.raises(DataError, match=r"row 1 has label 2; class numbers are 0\.\.1"):
        Images(["a", "b"], pictures[:2], [0, 2], ["x", "y"])
