"""Images in, rows of the network out: converted as said, in order, in a Space of their own."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import nestvec as nv
from nestvec._pixels import as_pixels, with_channels
from nestvec.errors import DataError, DimensionError, FileFormatError, ModelError, StorageError

torch = pytest.importorskip("torch", reason="nestvec[image]")
pytest.importorskip("transformers", reason="nestvec[image]")
pil = pytest.importorskip("PIL.Image", reason="nestvec[image]")

from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTModel  # noqa: E402

from nestvec.encoders.image import is_image_model  # noqa: E402
from nestvec.encoders.image_network import (  # noqa: E402
    ImageNetwork,
    Preprocessing,
    load_image_model,
    save_image_model,
    small_resnet,
    small_vit,
)

SIXTEEN = Preprocessing(16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


def resnet(seed: int = 0, n_channels: int = 3) -> ImageNetwork:
    torch.manual_seed(seed)
    return small_resnet(
        n_channels=n_channels, hidden_sizes=(8, 16), depths=(1, 1), embedding_size=8
    )


def vit(seed: int = 0) -> ImageNetwork:
    torch.manual_seed(seed)
    return small_vit(size=16, patch_size=8, dim=16, layers=1, heads=2)


def without_pooler() -> ImageNetwork:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return ImageNetwork(ViTModel(config, add_pooling_layer=False))


def own(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "model"
    save_image_model(path, resnet(), SIXTEEN, (4, 8))
    return path


@pytest.fixture
def pictures(rng) -> np.ndarray:
    return rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def encoder(folder) -> nv.ImageEncoder:
    return nv.ImageEncoder(folder, batch_size=8, device="cpu")


def by_hand(network: ImageNetwork, pictures: np.ndarray) -> np.ndarray:
    """Preprocess, run and normalise as the definition has it, one image at a time."""
    rows = []
    for image in pictures:
        scaled = (image / 255 - SIXTEEN.mean) / SIXTEEN.std
        values = torch.tensor(scaled.transpose(2, 0, 1)[None], dtype=torch.float32)
        with torch.no_grad():
            output = network.eval().backbone(values)
        rows.append(output.pooler_output.flatten().numpy())
    return np.stack([row / np.linalg.norm(row) for row in rows])


# --- preprocessing --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(50, 40, 3), (16, 16, 3), (9, 70, 3)])
def test_preprocessing_is_what_transformers_does_with_the_same_folder(folder, rng, shape):
    images = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(3)]
    theirs = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    torch.testing.assert_close(SIXTEEN(images), theirs["pixel_values"])


def test_grey_and_rgb_become_each_other_as_pil_does_it(rng):
    rgb = rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)
    grey = np.asarray(pil.fromarray(rgb).convert("L"))
    np.testing.assert_array_equal(with_channels(rgb, 1)[:, :, 0], grey)
    np.testing.assert_array_equal(
        with_channels(grey[:, :, None], 3), np.asarray(pil.fromarray(grey).convert("RGB"))
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_of_pil_with_8_bits_is_read(rng, mode):
    image = pil.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).convert(mode)
    want = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(with_channels(as_pixels(image), 3), want)


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_is_read_without_a_warning(rng, tmp_path):
    image = pil.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    want = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(as_pixels(tmp_path / "a.png"), want)


def test_a_photo_is_turned_as_its_exif_says(tmp_path, rng):
    upright = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    exif = pil.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pil.fromarray(np.rot90(upright)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(as_pixels(tmp_path / "a.png"), upright)


def test_preprocessing_saved_is_preprocessing_loaded(tmp_path):
    for one in (SIXTEEN, Preprocessing(35, n_channels=1, mean=0.08, std=0.3, resample="bicubic")):
        one.save(tmp_path)
        assert Preprocessing.load(tmp_path) == one


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": {"shortest_edge": 224}}, "shortest_edge"),
        ({"do_center_crop": True}, "a crop"),
        ({"do_rescale": False}, "no rescaling"),
        ({"image_mean": None}, "without a mean"),
        ({"image_mean": [0.5]}, "does not fit"),
    ],
)
def test_a_preprocessor_that_does_more_is_refused_not_ignored(tmp_path, change, words):
    SIXTEEN.save(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((ModelError, DataError), match=words):
        Preprocessing.load(tmp_path)


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [resnet, vit, without_pooler])
def test_a_saved_network_is_the_same_network(tmp_path, pictures, make):
    network = make().eval()
    save_image_model(tmp_path / "m", network, SIXTEEN, (4,))
    again, preprocessing, dims = load_image_model(tmp_path / "m")
    assert (preprocessing, dims, again.dim, again.nesting_dims) == (SIXTEEN, (4, 16), 16, (4, 16))
    with torch.no_grad():
        torch.testing.assert_close(again(SIXTEEN(pictures)), network(SIXTEEN(pictures)))


@pytest.mark.parametrize("make", [resnet, vit])
def test_transformers_gives_the_same_rows_from_the_folder(tmp_path, pictures, make):
    network = make().eval()
    save_image_model(tmp_path / "m", network, SIXTEEN, (4,))
    theirs = AutoModel.from_pretrained(tmp_path / "m")
    assert theirs.config.is_matryoshka
    assert theirs.config.matryoshka_dimensions == [4, 16]
    with torch.no_grad():
        got = theirs(SIXTEEN(pictures)).pooler_output.flatten(1)
        torch.testing.assert_close(got, network(SIXTEEN(pictures)))


def test_a_module_of_ones_own_needs_an_instance_to_load_into(tmp_path, pictures):
    network = ImageNetwork(own(), dim=16)
    save_image_model(tmp_path / "m", network, SIXTEEN, (4,))
    with pytest.raises(ModelError, match=r"Sequential, which transformers .*backbone="):
        load_image_model(tmp_path / "m")
    again, _, _ = load_image_model(tmp_path / "m", backbone=own(seed=1))
    torch.testing.assert_close(again(SIXTEEN(pictures)), network(SIXTEEN(pictures)))
    with pytest.raises(ModelError, match="cannot load the image model"):
        load_image_model(tmp_path / "m", backbone=torch.nn.Linear(3, 3))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_damaged_model_folder_is_one_sentence(folder, tmp_path, name):
    for broken in (b"{", None):
        copy = shutil.copytree(folder, tmp_path / f"{broken}")
        (copy / name).unlink() if broken is None else (copy / name).write_bytes(broken)
        with pytest.raises(ModelError, match=r"model folder|cannot load the image model"):
            load_image_model(copy)


def test_a_folder_that_lacks_weights_is_not_filled_with_random_ones(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "m")
    weights = load_file(copy / "model.safetensors")
    weights.pop(next(name for name in weights if "normalization.weight" in name))
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing"):
        load_image_model(copy)


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "photo.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"photo\.txt"):
        save_image_model(tmp_path, resnet(), SIXTEEN, (4,))
    with pytest.raises(DimensionError, match="does not fit embeddings of dim 16"):
        save_image_model(tmp_path / "m", resnet(), SIXTEEN, (4, 32))


# --- the encoder ----------------------------------------------------------------------------------


def test_rows_are_the_networks_own_normalised_in_order(encoder, pictures):
    got = encoder.encode(pictures)
    np.testing.assert_allclose(got.array, by_hand(resnet(), pictures), atol=1e-5)
    assert got.space.nesting_dims == (4, 8, 16)
    assert got.prefix(4).array.shape == (20, 4)


def test_arrays_lists_pil_and_files_give_the_same_rows(encoder, pictures, tmp_path):
    want = encoder.encode(pictures).array
    paths = []
    for i, image in enumerate(pictures):
        pil.fromarray(image).save(tmp_path / f"{i:02}.png")
        paths.append(tmp_path / f"{i:02}.png")
    for images in (list(pictures), [pil.fromarray(p) for p in pictures], paths, map(str, paths)):
        np.testing.assert_allclose(encoder.encode(images).array, want, atol=1e-6)
    found = nv.read_images(tmp_path)
    np.testing.assert_allclose(encoder.encode(found.images, ids=found.ids).array, want, atol=1e-6)


def test_mixed_sizes_and_channels_are_brought_to_what_the_network_takes(encoder, rng):
    images = [
        rng.integers(0, 256, shape, dtype=np.uint8)
        for shape in [(16, 16), (20, 9, 1), (30, 8, 3), (16, 16, 4)]
    ]
    got = encoder.encode(images).array
    np.testing.assert_allclose(
        got[0], encoder.encode([np.stack([images[0]] * 3, 2)]).array[0], atol=1e-6
    )
    np.testing.assert_allclose(got[3], encoder.encode([images[3][:, :, :3]]).array[0], atol=1e-6)
    grey = nv.ImageEncoder(resnet(n_channels=1), preprocessing=Preprocessing(16, n_channels=1))
    assert grey.encode(images).array.shape == (4, 16)


def test_whole_numbers_of_any_kind_are_pixels(encoder, pictures):
    want = encoder.encode(pictures).array
    np.testing.assert_array_equal(encoder.encode(pictures.astype(np.int64)).array, want)


SMALL = np.zeros((16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([], "empty"),
        (np.zeros((0, 16, 16), np.uint8), "none of them 0"),
        ("photo.png", r"one image given.*pass \[image\]"),
        (pil.fromarray(SMALL), "one image given"),
        (SMALL[:, :9], r"looks like one image.*images\[None\]"),
        (SMALL[None] / 255.0, "float64 values from 0 to 0 given where uint8"),
        ([SMALL, SMALL + 0.5], r"row 1: float64 .*where uint8"),
        ([SMALL, np.full((16, 16), np.nan)], "row 1: float64 values from nan to nan"),
        ([SMALL, SMALL - np.int64(1)], "row 1: int64 values from -1 to -1"),
        ([SMALL, SMALL > 0], "row 1: bool values"),
        ([SMALL, SMALL[:0]], r"row 1: shape \(0, 16, 3\) is no image"),
        ([SMALL, SMALL[:, :, :2]], "row 1: 2 channels cannot become the 3"),
        ([SMALL, SMALL.transpose(2, 0, 1)], "row 1: 16 channels .*Channels come last"),
        (np.zeros((5, 16, 16, 2), np.uint8), "2 channels cannot become the 3"),
        ([SMALL, pil.new("I;16", (9, 9))], "row 1: a PIL image of mode 'I;16' .*uint8"),
        ([SMALL, None], "row 1"),
        (["nothing.png"], "cannot read nothing.png"),
        (["a text" * 99], "cannot read a text.*name too long"),
    ],
)
def test_bad_images_are_refused_before_the_network_runs(folder, images, words, monkeypatch):
    encoder = nv.ImageEncoder(folder, device="cpu")
    monkeypatch.setattr(encoder, "network", None)
    with pytest.raises((DataError, StorageError), match=words):
        encoder.encode(images)


def test_the_id_of_a_bad_image_is_named(encoder):
    with pytest.raises(DataError, match=r"row 1 \(id 'b'\): float64"):
        encoder.encode([SMALL, SMALL / 2], ids=["a", "b"])


def test_a_file_that_is_no_image_is_named_before_the_work(encoder, tmp_path):
    pil.fromarray(SMALL).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("not an image")
    with pytest.raises(FileFormatError, match=r"b\.png is not an image"):
        encoder.encode(nv.read_images(tmp_path).images)


@pytest.mark.parametrize("ending", ["png", "jpg", "gif"])
def test_a_truncated_file_is_named(encoder, tmp_path, rng, ending):
    path = tmp_path / f"cut.{ending}"
    pil.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FileFormatError, match=rf"cut\.{ending}: .*truncated"):
        encoder.encode([path])
    with pil.open(path) as image, pytest.raises(FileFormatError, match=r"row 0: .*truncated"):
        encoder.encode([image])


# --- its Space ------------------------------------------------------------------------------------


def test_the_space_is_the_same_from_folder_copy_and_memory(encoder, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "other name")
    for same in (
        nv.ImageEncoder(copy),
        nv.ImageEncoder(resnet(), preprocessing=SIXTEEN, batch_size=1),
        nv.ImageEncoder(load_image_model(folder)[0], preprocessing=SIXTEEN),
    ):
        assert same.space.space_id == encoder.space.space_id


def test_what_decides_the_rows_decides_the_space(encoder, folder):
    others = [
        nv.ImageEncoder(resnet(seed=1), preprocessing=SIXTEEN),
        nv.ImageEncoder(vit(), preprocessing=SIXTEEN),
        nv.ImageEncoder(folder, preprocessing=Preprocessing(16)),
        nv.ImageEncoder(folder, preprocessing=Preprocessing(17, 3, SIXTEEN.mean, SIXTEEN.std)),
        nv.ImageEncoder(folder, normalise=False),
    ]
    ids = {one.space.space_id for one in [encoder, *others]}
    assert len(ids) == 6


def test_a_network_trained_in_memory_is_another_space(pictures):
    network = resnet()
    encoder = nv.ImageEncoder(network, preprocessing=SIXTEEN)
    before = encoder.encode(pictures).space
    network.train()
    with torch.no_grad():
        next(network.parameters()).add_(1)
    assert encoder.encode(pictures).space.space_id != before.space_id
    assert all(module.training for module in network.modules())


def test_short_prefixes_of_a_small_resnet_have_a_direction(pictures):
    with torch.no_grad():
        rows = resnet().eval()(SIXTEEN(pictures))
    assert (rows[:, :2] != 0).all()


def test_without_normalisation_lengths_stay(folder, pictures):
    got = nv.ImageEncoder(folder, normalise=False).encode(pictures)
    assert got.space.normalisation == "none"
    assert np.ptp(np.linalg.norm(got.array, axis=1)) > 1e-3


def test_a_network_in_memory_needs_preprocessing():
    with pytest.raises(ModelError, match="needs preprocessing="):
        nv.ImageEncoder(resnet())
    with pytest.raises(ModelError, match="pass dim="):
        ImageNetwork(own())
    with pytest.raises(DimensionError, match="returned 16 dims where dim=8"):
        nv.ImageEncoder(ImageNetwork(own(), dim=8), preprocessing=SIXTEEN).encode(SMALL[None])


# --- going on after an interruption ---------------------------------------------------------------


def test_an_interrupted_run_goes_on_and_other_images_are_refused(folder, pictures, tmp_path):
    encoder = nv.ImageEncoder(folder, batch_size=1, device="cpu")
    whole = encoder.encode(pictures)
    vectors, calls = encoder._vectors, []

    def stops(images, role):
        calls.append(len(images))
        if len(calls) == 17:
            raise KeyboardInterrupt
        return vectors(images, role)

    encoder._vectors = stops
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(pictures, resume=tmp_path / "part")
    again = encoder.encode(pictures, resume=tmp_path / "part")
    assert encoder.report.n_resumed == 16
    assert str(encoder.report).startswith("20 images in")
    np.testing.assert_array_equal(again.array, whole.array)
    changed = pictures.copy()
    changed[3, 0, 0, 0] ^= 1
    with pytest.raises(DataError, match="other images, model"):
        encoder.encode(changed, resume=tmp_path / "part")


def test_a_file_that_changed_is_encoded_again(encoder, tmp_path, pictures, capsys):
    pil.fromarray(pictures[0]).save(tmp_path / "a.png")
    images = nv.read_images(tmp_path).images
    first = encoder.encode_to(tmp_path / "v.npz", images, reuse=True)
    encoder.encode_to(tmp_path / "v.npz", images, reuse=True, show_progress=True)
    assert "the same 1 images" in capsys.readouterr().err
    pil.fromarray(pictures[1]).save(tmp_path / "a.png")
    second = encoder.encode_to(tmp_path / "v.npz", images, reuse=True)
    assert (first.array != second.array).any()


# --- the spine ------------------------------------------------------------------------------------


def test_encode_takes_an_image_folder_and_a_network(folder, encoder, pictures):
    want = encoder.encode(pictures)
    assert is_image_model(folder)
    given: list[tuple[Any, dict[str, Any]]] = [
        (folder, {}),
        (str(folder), {}),
        (resnet(), {"preprocessing": SIXTEEN}),
    ]
    for model, settings in given:
        got = nv.encode(pictures, model=model, **settings)
        got.space.check_same(want.space)
        np.testing.assert_allclose(got.array, want.array, atol=1e-6)


def test_text_is_refused_by_an_image_model(folder):
    with pytest.raises(ModelError, match="holds an image model, which reads no text"):
        nv.TextEncoder(folder)


def run(*words, code=0):
    from nestvec.cli import app

    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, done.output
    return done


def test_images_are_embedded_measured_and_searched_from_the_command_line(
    folder, pictures, tmp_path
):
    labels = np.arange(20) % 2
    pictures[labels == 1] //= 8  # dark
    source = tmp_path / "set.npz"
    np.savez(
        source, x_train=pictures[:14], y_train=labels[:14], x_test=pictures[14:], y_test=labels[14:]
    )
    train, test = tmp_path / "train.safetensors", tmp_path / "test.npz"
    for split, to in (("train", train), ("test", test)):
        said = run(
            "embed", source, "--split", split, "-o", to, "--model", folder,
            "--labels", to.with_suffix(".txt"), "--json",
        )  # fmt: skip
        assert json.loads(said.stdout)["space"]["nesting_dims"] == [4, 8, 16]
    assert nv.load(train).ids[0] == "train-0"
    measured = run(
        "measure", train, "--labels", train.with_suffix(".txt"), "--test", test,
        "--test-labels", test.with_suffix(".txt"), "--baselines", "none", "--json",
    )  # fmt: skip
    rows = [r for r in json.loads(measured.stdout)["rows"] if r["metric"] == "accuracy_1nn"]
    assert {r["dim"] for r in rows} == {4, 8, 16}
    assert all(r["value"] == 1 for r in rows)
    found = run("search", train, "--queries", train, "--plan", "8@10 > 16@1", "--json")
    hits = [q["hits"][0]["id"] for q in json.loads(found.stdout)["queries"]]
    assert hits == nv.load(train).ids.tolist()


def test_options_that_have_no_meaning_for_the_model_are_refused(folder, tmp_path):
    np.savez(tmp_path / "a.npz", x=SMALL[None])
    out = tmp_path / "v.npz"
    for words in (["--max-length", 3], ["--column", "text"], ["--query-prompt", "q"]):
        done = run("embed", tmp_path / "a.npz", "-o", out, "--model", folder, *words, code=2)
        assert f"{words[0]} has no meaning here" in done.stderr
    done = run("embed", tmp_path / "a.npz", "-o", out, "--split", "train", code=2)
    assert "--split has no meaning here" in done.stderr
    labels = tmp_path / "l.txt"
    done = run(
        "embed", tmp_path / "a.npz", "-o", out, "--model", folder, "--labels", labels, code=2
    )
    assert "has no labels to write" in done.stderr
