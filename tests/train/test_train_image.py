"""An image network is trained to be nested, resumes exactly, and is an encoder like any other."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")
pytest.importorskip("transformers", reason="nestvec[image]")
pytest.importorskip("accelerate", reason="nestvec[image]")
Image = pytest.importorskip("PIL.Image", reason="nestvec[image]")

import tiny_model  # noqa: E402  # behind importorskip
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

import nestvec as nv  # noqa: E402
from nestvec.corpus import Images  # noqa: E402
from nestvec.encoders.image_network import (  # noqa: E402
    ImageNetwork,
    Preprocessing,
    load_image_model,
    small_resnet,
    small_vit,
)
from nestvec.errors import (  # noqa: E402
    DataError,
    DimensionError,
    FileFormatError,
    SpaceMismatchError,
    TrainingError,
)
from nestvec.train import (  # noqa: E402
    NestedDropout,
    Settings,
    ShiftAndFlip,
    load_classifier,
    train_image,
    train_image_text,
)
from nestvec.train.image import read_labelled  # noqa: E402
from nestvec.train.trainer import ModuleTrainer  # noqa: E402

DIMS = (4, 8, 16)
QUICK = Settings(batch_size=16, epochs=8, learning_rate=1e-2)


@pytest.fixture
def stripes(rng):
    """Four classes: where a bright stripe lies."""
    labels = np.arange(96) % 4
    pixels = rng.integers(0, 80, size=(96, 32, 32)).astype(np.uint8)
    for row, label in enumerate(labels):
        pixels[row, 8 * label : 8 * label + 8] += 150
    return Images([str(i) for i in range(96)], pixels, labels, ["n", "e", "s", "w"])


def tiny(seed=0):
    torch.manual_seed(seed)
    return small_resnet(n_channels=1, hidden_sizes=(8, 16), depths=(1, 1), embedding_size=8)


def assert_same_weights(a, b):
    one, other = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_every_size_learns_the_classes(stripes, tmp_path):
    done = train_image(tiny(), stripes, tmp_path / "x", dims=DIMS, settings=QUICK)
    assert list(done.metrics) == [f"accuracy@{dim}" for dim in DIMS]
    assert min(done.metrics.values()) > 0.6  # a quarter by chance
    head, names = load_classifier(done.folder)
    assert names == ("n", "e", "s", "w")
    network, preprocessing, dims = load_image_model(done.folder)
    assert dims == DIMS
    with torch.no_grad():
        logits = head(network(preprocessing(stripes.images)))
    for dim in DIMS:
        assert (logits[dim].argmax(dim=1).numpy() == stripes.labels).mean() > 0.6


@pytest.mark.parametrize("tied", [False, True], ids=["mrl", "mrl-e"])
def test_heads_are_one_a_size_or_one_for_all(stripes, tmp_path, tied):
    done = train_image(tiny(), stripes, tmp_path / "x", dims=DIMS, tied=tied, settings=QUICK)
    head, _ = load_classifier(done.folder)
    assert len(head.heads) == (1 if tied else 3)


def test_contrastive_training_needs_no_classifier(stripes, tmp_path):
    done = train_image(
        tiny(),
        stripes,
        tmp_path / "x",
        dims=DIMS,
        objective="supervised_contrastive",
        settings=QUICK,
    )
    assert list(done.metrics) == [f"1nn@{dim}" for dim in DIMS]
    assert min(done.metrics.values()) > 0.6
    assert not (done.folder / "classifier.safetensors").exists()


def test_what_is_saved_is_an_encoder_and_a_transformers_model(stripes, tmp_path):
    from transformers import AutoModel

    done = train_image(tiny(), stripes, tmp_path / "mine", dims=DIMS, settings=QUICK)
    config = json.loads((done.folder / "config.json").read_text())
    assert config["matryoshka_dimensions"] == list(DIMS)
    assert type(AutoModel.from_pretrained(str(done.folder))).__name__ == "ResNetModel"
    found = nv.ImageEncoder(done.folder).encode(stripes.images, ids=stripes.ids)
    assert found.space.nesting_dims == DIMS
    again = nv.encode(stripes.images[:3], model=str(done.folder))
    np.testing.assert_allclose(again.array, found.array[:3], atol=1e-6)
    assert "| 4 | 16 |" in (done.folder / "README.md").read_text()


def test_a_small_vision_transformer_and_a_module_of_ones_own_are_trained_too(stripes, tmp_path):
    vit = small_vit(n_channels=1, size=32, patch_size=8, dim=16, layers=1, heads=2)
    done = train_image(vit, stripes, tmp_path / "vit", dims=DIMS, settings=QUICK)
    assert load_image_model(done.folder)[0].dim == 16
    own = nn.Sequential(nn.Flatten(), nn.Linear(1024, 16))
    done = train_image(
        ImageNetwork(own, dim=16), stripes, tmp_path / "own", dims=DIMS, settings=QUICK
    )
    fresh = nn.Sequential(nn.Flatten(), nn.Linear(1024, 16))
    network, *_ = load_image_model(done.folder, backbone=fresh)
    torch.testing.assert_close(network.backbone[1].weight, own[1].weight)  # pyright: ignore


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_to_the_very_same_weights(stripes, tmp_path, monkeypatch):
    """Augmentation and batch norm included: they draw and remember, too."""
    options = {"dims": DIMS, "augment": ShiftAndFlip(2)}
    settings = Settings(batch_size=16, epochs=4, learning_rate=1e-2, save_every=3)
    whole = train_image(tiny(), stripes, tmp_path / "whole", **options, settings=settings)
    step = ModuleTrainer.training_step
    calls = []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 11:  # after the checkpoint of step 9
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ModuleTrainer, "training_step", dies)
    with pytest.raises(Killed):
        train_image(tiny(), stripes, tmp_path / "cut", **options, settings=settings)
    monkeypatch.undo()
    cut = train_image(tiny(), stripes, tmp_path / "cut", **options, settings=settings)
    assert_same_weights(whole.folder, cut.folder)


def test_a_run_that_was_killed_before_it_saved_is_finished(stripes, tmp_path, monkeypatch):
    whole = train_image(tiny(), stripes, tmp_path / "whole", dims=DIMS, settings=QUICK)

    def dies(*args):
        raise Killed

    monkeypatch.setattr("nestvec.train.image.save_image_model", dies)
    with pytest.raises(Killed):
        train_image(tiny(), stripes, tmp_path / "cut", dims=DIMS, settings=QUICK)
    monkeypatch.undo()
    cut = train_image(tiny(), stripes, tmp_path / "cut", dims=DIMS, settings=QUICK)
    assert_same_weights(whole.folder, cut.folder)
    assert cut.metrics == whole.metrics


def test_shifts_and_flips_move_pixels_and_make_up_none(rng):
    torch.manual_seed(0)
    batch = torch.from_numpy(rng.permutation(64 * 3 * 8 * 8).reshape(64, 3, 8, 8)).float()
    out = ShiftAndFlip(2)(batch)
    assert out.shape == batch.shape
    for before, after in zip(batch, out, strict=True):
        assert set(after.flatten().tolist()) <= set(before.flatten().tolist())
    assert not torch.equal(out, batch)
    middle = batch[:, :, 3, 3]
    assert all(m in a for m, a in zip(middle[:, 0], out[:, 0].flatten(1), strict=True))
    torch.testing.assert_close(ShiftAndFlip(0, flip=False)(batch), batch)


def test_a_generator_inside_the_network_is_resumed(stripes, tmp_path, monkeypatch):
    def network():
        torch.manual_seed(0)
        drops = NestedDropout(rate=0.2, generator=torch.Generator().manual_seed(3))
        return ImageNetwork(nn.Sequential(nn.Flatten(), nn.Linear(1024, 16), drops), dim=16)

    settings = Settings(batch_size=16, epochs=2, learning_rate=1e-2, save_every=3)
    whole = train_image(network(), stripes, tmp_path / "whole", dims=DIMS, settings=settings)
    step, calls = ModuleTrainer.training_step, []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ModuleTrainer, "training_step", dies)
    with pytest.raises(Killed):
        train_image(network(), stripes, tmp_path / "cut", dims=DIMS, settings=settings)
    monkeypatch.undo()
    cut = train_image(network(), stripes, tmp_path / "cut", dims=DIMS, settings=settings)
    assert_same_weights(whole.folder, cut.folder)


def test_tied_weights_are_saved(stripes, tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, stride=4)
            self.a = nn.Linear(8, 16)
            self.b = nn.Linear(8, 16)
            self.b.weight = self.a.weight

        def forward(self, x):
            x = self.conv(x).amax(dim=(2, 3))
            return self.a(x) + self.b(x)

    own = ImageNetwork(Tied(), dim=16)
    done = train_image(own, stripes, tmp_path / "x", dims=DIMS, settings=QUICK)
    network, *_ = load_image_model(done.folder, backbone=Tied())
    torch.testing.assert_close(network.backbone.a.weight, network.backbone.b.weight)  # pyright: ignore


def test_a_large_photo_does_not_set_the_size(stripes, tmp_path):
    big = [np.kron(row, np.ones((10, 10), np.uint8)) for row in stripes.images[:16]]
    images = Images(stripes.ids[:16], big, stripes.labels[:16])
    settings = Settings(batch_size=8, max_steps=1)
    done = train_image(tiny(), images, tmp_path / "x", dims=DIMS, settings=settings)
    assert load_image_model(done.folder)[1].size == 224


# --- both towers ----------------------------------------------------------------------------------


def test_images_and_texts_meet_in_one_space(stripes, tmp_path):
    words = ["wing", "flow", "heat", "shock"]
    said = [words[label] for label in stripes.labels]
    text = tiny_model.build(tmp_path / "m")
    done = train_image_text(
        tiny(),
        str(text),
        Images(stripes.ids, stripes.images),  # no labels are needed
        said,
        tmp_path / "x",
        dims=DIMS,
        validation=(stripes, said),
        settings=Settings(batch_size=16, epochs=10, learning_rate=1e-2),
    )
    assert min(done.metrics.values()) > 0.6
    pictures = nv.ImageEncoder(done.folder / "image").encode(stripes.images, ids=stripes.ids)
    asks = nv.encode(words, model=str(done.folder / "text"), role="query")
    assert asks.space.space_id == pictures.space.space_id
    assert asks.space.nesting_dims == DIMS
    for dim in DIMS:
        found = nv.cascade_search(asks, pictures, f"{dim}@5").ids
        right = [stripes.labels[int(i)] == row for row, ids in enumerate(found) for i in ids]
        assert np.mean(right) > 0.6
    weights = done.folder / "image/model.safetensors"
    state = load_file(weights)
    name = next(n for n in state if n.endswith("convolution.weight"))
    state[name] = state[name] * 1.5
    from safetensors.torch import save_file

    save_file(state, weights, {"format": "pt"})  # trained further, elsewhere
    moved = nv.ImageEncoder(done.folder / "image").encode(stripes.images)
    with pytest.raises(SpaceMismatchError):
        nv.cascade_search(asks, moved, "16@5")


def test_captions_that_do_not_fit_are_refused(stripes, tmp_path):
    text = str(tiny_model.build(tmp_path / "m"))
    for captions, message in (
        (["wing"] * 95, r"95 captions for 96 images"),
        (["wing"] * 95 + [" "], r"caption 95 has no text"),
        (["wing"] * 96, r"all captions are the same"),
    ):
        with pytest.raises(DataError, match=message):
            train_image_text(tiny(), text, stripes, captions, tmp_path / "x")
        if "same" not in message:
            with pytest.raises(DataError, match=message):
                train_image_text(
                    tiny(),
                    text,
                    stripes,
                    ["a", "b"] * 48,
                    tmp_path / "x",
                    validation=(stripes, captions),
                )
    assert not (tmp_path / "x").exists()


# --- bad input ------------------------------------------------------------------------------------


def test_labels_that_do_not_fit_are_refused(stripes, tmp_path):
    out = tmp_path / "x"
    unlabelled = Images(stripes.ids, stripes.images)
    with pytest.raises(DataError, match=r"the images have no labels"):
        train_image(tiny(), unlabelled, out)
    same = Images(stripes.ids, stripes.images, np.zeros(96, int))
    with pytest.raises(DataError, match=r"two classes are needed"):
        train_image(tiny(), same, out)
    strange = Images(["a", "b"], stripes.images[:2], [0, 1], ["n", "elsewhere"])
    with pytest.raises(DataError, match=r"validation has the class 'elsewhere'"):
        train_image(tiny(), stripes, out, validation=strange)
    with pytest.raises(DimensionError, match=r"size 32 does not fit a model of dim 16"):
        train_image(tiny(), stripes, out, dims=(8, 32))
    with pytest.raises(DataError, match=r"give 'resnet', 'vit', a model folder"):
        train_image(object(), stripes, out)
    assert not out.exists()


def test_a_corrupt_image_stops_the_run_with_its_name(stripes, tmp_path):
    for label in ("n", "s"):
        (tmp_path / "photos" / label).mkdir(parents=True)
    for row in range(8):
        label = "ns"[row % 2]
        Image.fromarray(stripes.images[row]).save(tmp_path / f"photos/{label}/{row}.png")
    whole = (tmp_path / "photos/s/5.png").read_bytes()
    (tmp_path / "photos/s/5.png").write_bytes(whole[: len(whole) // 2])
    images, _ = read_labelled(tmp_path / "photos")
    settings = Settings(batch_size=4, epochs=1)
    with pytest.raises(FileFormatError, match=r"5\.png"):
        train_image(tiny(), images, tmp_path / "x", holdout=0, settings=settings)


def test_images_of_mixed_sizes_are_brought_to_one(stripes, tmp_path):
    mixed = [row if i % 2 else row[:24, :20] for i, row in enumerate(stripes.images)]
    images = Images(stripes.ids, mixed, stripes.labels)
    done = train_image(tiny(), images, tmp_path / "x", dims=DIMS, size=32, settings=QUICK)
    assert load_image_model(done.folder)[1].size == 32


def test_a_rate_that_is_far_too_high_stops_the_run(stripes, tmp_path):
    settings = Settings(batch_size=16, epochs=4, learning_rate=1e30, save_every=1, max_grad_norm=1)
    with pytest.raises(TrainingError, match=r"stopped at step \d+"):
        train_image(tiny(), stripes, tmp_path / "x", dims=DIMS, settings=settings)


def test_preprocessing_is_measured_on_the_training_images(stripes, tmp_path):
    done = train_image(tiny(), stripes, tmp_path / "x", dims=DIMS, holdout=0, settings=QUICK)
    _, preprocessing, _ = load_image_model(done.folder)
    plain = stripes.images / 255
    assert isinstance(preprocessing, Preprocessing)
    assert preprocessing.mean == pytest.approx((plain.mean(),), abs=1e-4)
    assert preprocessing.std == pytest.approx((plain.std(),), rel=1e-3)


def test_the_command_trains_and_the_others_take_the_model(stripes, tmp_path):
    from typer.testing import CliRunner

    from nestvec.cli import app

    held = np.arange(96) % 5 == 0
    np.savez(
        tmp_path / "s.npz",
        x_train=stripes.images[~held],
        y_train=stripes.labels[~held],
        x_test=stripes.images[held],
        y_test=stripes.labels[held],
    )
    run = CliRunner().invoke
    words = f"train image {tmp_path}/s.npz -o {tmp_path}/m --validation test --epochs 1 --dims 8,64"
    done = run(app, [*words.split(), "--shift", "2", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found["metrics"]) == ["accuracy@8", "accuracy@64", "accuracy@256"]
    for split in ("train", "test"):
        words = f"embed {tmp_path}/s.npz -o {tmp_path}/{split}.npz --split {split}"
        done = run(app, [*words.split(), "--model", f"{tmp_path}/m"])
        assert done.exit_code == 0, done.output
    words = f"train image {tmp_path}/s.npz -o {tmp_path}/m --validation test --epochs 1 --dims 8,64"
    again = run(app, [*words.split(), "--shift", "1"])
    assert again.exit_code == 2
    assert "augment was 'ShiftAndFlip(pixels=2, flip=False)'" in again.output
    assert "--fresh" in again.output
    words = f"train image {tmp_path}/s.npz -o {tmp_path}/n --validation tset"
    assert "no split 'tset'; its splits are: train, test" in run(app, words.split()).output
