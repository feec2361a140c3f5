"""New models are trained to hold an old one's Space, and say so; images and texts."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")
pytest.importorskip("transformers", reason="nestvec[image]")
pytest.importorskip("accelerate", reason="nestvec[train]")
pytest.importorskip("sentence_transformers", reason="nestvec[text]")

import tiny_model  # noqa: E402  # behind importorskip
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import nestvec as nv  # noqa: E402
from nestvec.cli import app  # noqa: E402
from nestvec.corpus import Examples, Images  # noqa: E402
from nestvec.encoders.image_network import ImageNetwork, load_image_model  # noqa: E402
from nestvec.errors import (  # noqa: E402
    DataError,
    DimensionError,
    ModelError,
    SpaceMismatchError,
    TrainingError,
)
from nestvec.train import (  # noqa: E402
    OCA_CONFIGURED,
    OCA_PUBLISHED,
    InfoNCE,
    Settings,
    StationaryClassifier,
    load_classifier,
    train_image,
    train_text,
    widened,
)
from nestvec.train.pixels import embed_images  # noqa: E402
from nestvec.train.trainer import ModuleTrainer  # noqa: E402
from nestvec.upgrade import compatible_prefix  # noqa: E402

QUICK = Settings(batch_size=16, epochs=8, learning_rate=1e-2)


@pytest.fixture(scope="module")
def stripes():
    """Four classes: where a bright stripe lies."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 4
    pixels = rng.integers(0, 80, size=(96, 16, 16)).astype(np.uint8)
    for row, label in enumerate(labels):
        pixels[row, 4 * label : 4 * label + 4] += 150
    return Images([str(i) for i in range(96)], pixels, labels, ["n", "e", "s", "w"])


class Flat(nn.Module):
    """A backbone that trains in no time."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(256, 24), nn.GELU())

    def forward(self, x):
        return self.layers(x)


def flat(seed=0):
    torch.manual_seed(seed)
    return ImageNetwork(Flat(), dim=24)


@pytest.fixture(scope="module")
def old(stripes, tmp_path_factory):
    """The old model knows two of the four classes; its network, and its encoder."""
    chosen = np.flatnonzero(np.asarray(stripes.labels) < 2)
    some = Images(
        [stripes.ids[i] for i in chosen], stripes.images[chosen], stripes.labels[chosen], ["n", "e"]
    )
    folder = tmp_path_factory.mktemp("old") / "model"
    torch.manual_seed(0)  # BCT has room for two more classes beside some old models only
    network = ImageNetwork(nn.Sequential(Flat(), nn.Linear(24, 16)), dim=16)
    train_image(network, some, folder, dims=(4, 8, 16), holdout=0, settings=QUICK)
    backbone = nn.Sequential(Flat(), nn.Linear(24, 16))
    loaded, preprocessing, _ = load_image_model(folder, backbone=backbone)
    return nv.ImageEncoder(loaded, preprocessing=preprocessing)


def encoder_of(folder):
    network, preprocessing, dims = load_image_model(folder, backbone=Flat())
    encoder = nv.ImageEncoder(network, preprocessing=preprocessing)
    encoder._folder = folder  # as for a model of transformers, which loads without a backbone
    encoder._space = encoder._describe()
    return encoder, dims


@pytest.mark.parametrize(("method", "size"), [("oca", 20), ("bt2", 20), ("bct", 16)])
def test_new_queries_find_their_class_in_the_old_gallery(stripes, old, tmp_path, method, size):
    done = train_image(
        flat(),
        stripes,
        tmp_path / "new",
        dims=(size,),
        compatible_with=old,
        compatible=method,
        extra_dims=4,
        settings=Settings(batch_size=16, epochs=20, learning_rate=1e-2),
    )
    assert done.dims == tuple(sorted({4, 8, 16, size}))  # the old model's, and the full one
    encoder, dims = encoder_of(done.folder)
    assert dims == done.dims
    new = encoder.encode(stripes.images, ids=stripes.ids)
    gallery = old.encode(stripes.images, ids=stripes.ids)
    asks = compatible_prefix(new, gallery.space)
    for dim in (4, 8, 16):
        found = nv.cascade_search(asks, gallery, f"{dim}@3").rows
        right = stripes.labels[found] == stripes.labels[:, None]
        assert right.mean() > 0.6, dim  # a quarter by chance, and the old model knows two of four
    assert {f"1nn_old@{d}" for d in (4, 8, 16)} | {f"1nn@{d}" for d in done.dims} == set(
        done.metrics
    )
    card = (done.folder / "README.md").read_text()
    assert "Compatible with an older model" in card
    assert gallery.space.space_id in card
    if method == "bt2":
        assert not (done.folder / "classifier.safetensors").exists()
    else:
        head, names = load_classifier(done.folder)
        assert names == ("n", "e", "s", "w")
        logits = head(torch.from_numpy(new.array))[size]
        assert (logits.argmax(dim=1).numpy() == stripes.labels).mean() > 0.9


def test_oca_holds_both_parts_at_a_length_unless_it_is_to_be_as_published(stripes, old, tmp_path):
    settings = Settings(batch_size=16, max_steps=3)
    lengths = []
    for name, options in (("usual", None), ("plain", OCA_PUBLISHED), ("own", {"balance": 3})):
        done = train_image(
            flat(),
            stripes,
            tmp_path / name,
            compatible_with=old,
            compatible_options=options,
            extra_dims=4,
            settings=settings,
        )
        network, preprocessing, _ = load_image_model(done.folder, backbone=Flat())
        found = embed_images(network, preprocessing, stripes, np.arange(9), 9)
        lengths.append(found[:, 16:].norm(dim=1) / found[:, :16].norm(dim=1))
    usual, plain, own = lengths
    torch.testing.assert_close(usual, torch.full((9,), 1.4))
    torch.testing.assert_close(own, torch.full((9,), 3.0))
    assert plain.std() > 0.01
    with pytest.raises(TrainingError, match=r"compatible_by was .*scale=16"):
        train_image(
            flat(),
            stripes,
            tmp_path / "usual",
            compatible_with=old,
            compatible_options={"scale": 1},
            extra_dims=4,
            settings=settings,
        )


def test_a_model_that_was_trained_further_makes_no_claim(stripes, old, tmp_path):
    settings = Settings(batch_size=16, max_steps=2)
    done = train_image(
        flat(), stripes, tmp_path / "x", compatible_with=old, extra_dims=4, settings=settings
    )
    about = json.loads((done.folder / "compatible_with.json").read_text())
    assert (about["space_id"], about["dim"]) == (old.space.space_id, 16)
    compatible_prefix(encoder_of(done.folder)[0].encode(stripes.images[:2]))
    weights = done.folder / "model.safetensors"
    moved = {name: value * 1.1 for name, value in load_file(weights).items()}
    save_file(moved, weights, {"format": "pt"})
    with pytest.raises(SpaceMismatchError, match=r"to hold no other"):
        compatible_prefix(encoder_of(done.folder)[0].encode(stripes.images[:2]))


def test_old_vectors_alone_are_enough(stripes, old, tmp_path):
    vectors = old.encode(stripes.images, ids=stripes.ids)[::-1]
    settings = Settings(batch_size=16, max_steps=4)
    for name, given in (("a", old), ("b", vectors)):
        train_image(
            flat(), stripes, tmp_path / name, compatible_with=given, extra_dims=4, settings=settings
        )
    one, other = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(DataError, match=r"unknown id '0'"):
        train_image(flat(), stripes, tmp_path / "c", compatible_with=vectors[:90])


def test_a_killed_run_goes_on_to_the_very_same_weights(stripes, old, tmp_path, monkeypatch):
    options = {"compatible_with": old, "compatible": "bt2", "extra_dims": 4}
    options["settings"] = Settings(batch_size=16, epochs=3, learning_rate=1e-2, save_every=3)
    whole = train_image(flat(), stripes, tmp_path / "whole", **options)
    step, calls = ModuleTrainer.training_step, []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ModuleTrainer, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_image(flat(), stripes, tmp_path / "cut", **options)
    monkeypatch.undo()
    cut = train_image(flat(), stripes, tmp_path / "cut", **options)
    for file in ("model.safetensors", "head.safetensors"):
        one, other = (load_file(run.folder / file) for run in (whole, cut))
        assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(TrainingError, match=r"compatible_by was"):
        train_image(
            flat(),
            stripes,
            tmp_path / "cut",
            **{**options, "compatible_options": {"lambdas": OCA_CONFIGURED[::-1]}},
        )


def test_a_series_is_trained_to_one_simplex(stripes, tmp_path):
    chosen = np.flatnonzero(np.asarray(stripes.labels) < 2)
    some = Images(
        [str(i) for i in chosen], stripes.images[chosen], stripes.labels[chosen], ["n", "e"]
    )
    options = {"objective": "simplex", "capacity": 9, "dims": (4, 8), "settings": QUICK}
    first = train_image("resnet", some, tmp_path / "first", size=32, **options)
    assert first.dims == (4, 8)
    corners = StationaryClassifier.load(first.folder)
    with pytest.raises(DataError, match=r"4 classes do not fit 3 corners"):
        train_image(flat(), stripes, tmp_path / "few", objective="simplex", capacity=3)
    new = train_image(
        flat(),
        stripes,
        tmp_path / "new",
        compatible_with=str(first.folder),
        compatible="simplex",
        settings=Settings(batch_size=16, epochs=20, learning_rate=1e-2),
    )
    assert StationaryClassifier.load(new.folder).basis_id == corners.basis_id
    asks = compatible_prefix(encoder_of(new.folder)[0].encode(some.images))
    gallery = nv.ImageEncoder(first.folder).encode(some.images)
    found = nv.cascade_search(asks, gallery, "8@1").rows[:, 0]
    assert (some.labels[found] == some.labels).mean() > 0.9


def test_what_does_not_fit_is_refused_before_anything_is_written(stripes, old, tmp_path):
    out = tmp_path / "x"
    with pytest.raises(DataError, match=r"compatible 'magic' is not one of oca, bt2, bct, simplex"):
        train_image(flat(), stripes, out, compatible_with=old, compatible="magic")
    with pytest.raises(DataError, match=r"needs capacity="):
        train_image(flat(), stripes, out, objective="simplex")
    with pytest.raises(DataError, match=r"corners lie in its folder"):
        train_image(flat(), stripes, out, compatible_with=old, compatible="simplex")
    with pytest.raises(ModelError, match=r"there is no model folder"):
        train_image(flat(), stripes, out, compatible_with=tmp_path / "none")
    wide = ImageNetwork(Flat(), dim=16, head=nn.Linear(24, 16, bias=False))
    with pytest.raises(DimensionError, match=r"has a last layer already"):
        train_image(wide, stripes, out, compatible_with=old)
    with pytest.raises(DimensionError, match=r"1 <= extra <= old_dim"):
        train_image(flat(), stripes, out, compatible_with=old, compatible="bt2", extra_dims=0)
    assert not out.exists()


def test_the_command_keeps_an_old_gallery(stripes, tmp_path):
    """From pixels on disk to a search of the old gallery, as a shell does it."""
    for row, label in enumerate(stripes.labels):
        place = tmp_path / "photos" / stripes.label_names[label] / f"{row}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.kron(stripes.images[row], np.ones((2, 2), np.uint8))).save(place)

    def run(*words):
        found = CliRunner().invoke(app, [str(word) for word in words])
        assert found.exit_code == 0, found.output
        return found

    few = ("--max-steps", 2, "--batch-size", 16, "--json")
    photos = tmp_path / "photos"
    run("train", "image", photos, "-o", tmp_path / "old", "--dims", "32,256", *few)
    options = ("--compatible-with", tmp_path / "old", "--compatible", "bt2", "--extra-dims", 8)
    run("train", "image", photos, "-o", tmp_path / "new", "--dims", "32", *options, *few)
    new = nv.ImageEncoder(tmp_path / "new").encode(stripes.images[:3])
    assert new.space.nesting_dims == (32, 256, 264)
    old = nv.ImageEncoder(tmp_path / "old")
    assert compatible_prefix(new).space == old.space
    refused = CliRunner().invoke(
        app, ["train", "image", str(photos), "-o", str(tmp_path / "x"), "--objective", "simplex"]
    )
    assert refused.exit_code == 2
    assert "needs capacity" in " ".join(refused.output.split())


# --- texts ----------------------------------------------------------------------------------------

WORDS = ["wing", "flow", "heat", "shock", "layer", "plate", "cone", "jet"]


def pairs(n=64):
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, 3)) for _ in range(n)]
    return Examples("pairs", (texts, [f"the {text} of a {text.split()[0]}" for text in texts]))


def test_new_texts_find_old_documents(tmp_path):
    old = nv.TextEncoder(str(tiny_model.build(tmp_path / "old", seed=1)))
    done = train_text(
        str(tiny_model.build(tmp_path / "base", seed=2)),
        pairs(),
        tmp_path / "new",
        compatible_with=old,
        extra_dims=8,
        dims=(16,),
        holdout=0.25,
        settings=Settings(batch_size=16, epochs=10, learning_rate=4e-3),
    )
    assert done.dims == (16, 32, 40)
    assert list(done.metrics) == [
        *("top1@16", "top1@32", "top1@40"),
        "top1_old@32",  # the one size that the old model has
    ]
    new = nv.TextEncoder(str(done.folder))
    texts, documents = pairs().texts
    gallery = old.encode(sorted(set(documents)), ids=sorted(set(documents)))
    asks = compatible_prefix(new.encode(texts, role="query"), old.space)
    there, here = old.encode(documents).array, compatible_prefix(new.encode(documents)).array
    assert (there * here).sum(axis=1).mean() > 0.8
    found = nv.cascade_search(asks, gallery, "32@3").ids
    hits = np.mean([own in ids for own, ids in zip(documents, found, strict=True)])
    with pytest.raises(SpaceMismatchError):
        nv.cascade_search(new.encode(texts, role="query"), gallery, "32@3")
    assert hits > 0.5  # 3 of some 60 by chance


def test_a_wider_model_starts_as_what_it_was(tmp_path):
    model = nv.TextEncoder(str(tiny_model.build(tmp_path / "m"))).model
    wide = widened(model, 40)
    before, after = (m.encode(["a wing", "heat flow"]) for m in (model, wide))
    np.testing.assert_allclose(after[:, :32], before, atol=1e-6)
    assert np.abs(after[:, 32:]).max() > 0.01
    assert wide.prompts == model.prompts
    with pytest.raises(DimensionError, match=r"dim 32 is not widened to 24"):
        widened(model, 24)


def test_texts_that_do_not_fit_are_refused(tmp_path):
    base = str(tiny_model.build(tmp_path / "m"))
    labelled = Examples("labelled", (WORDS,), np.arange(8) % 2, ("a", "b"))
    with pytest.raises(DataError, match=r"is for pairs and triplets, and these are labelled"):
        train_text(base, labelled, tmp_path / "x", compatible_with=base)
    with pytest.raises(DataError, match=r"brings its own objective"):
        train_text(base, pairs(), tmp_path / "x", compatible_with=base, objective=InfoNCE())
    assert not (tmp_path / "x").exists()
