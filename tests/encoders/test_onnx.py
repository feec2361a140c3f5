"""An exported file gives the encoder's own rows, at any batch, length and size asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from typer.testing import CliRunner

import nestvec as nv
from nestvec.errors import DimensionError, FileFormatError, ModelError
from nestvec.space import Space

torch = pytest.importorskip("torch", reason="nestvec[image]")
pytest.importorskip("onnxscript", reason="nestvec[onnx]")
runtime = pytest.importorskip("onnxruntime", reason="nestvec[onnx]")

from nestvec.encoders.image_network import (  # noqa: E402
    ImageNetwork,
    Preprocessing,
    save_image_model,
    small_resnet,
    small_vit,
)
from nestvec.encoders.onnx import export_onnx  # noqa: E402

TEXTS = ["a wing", "heat in the layer of a plate and shock on the cone", "jet", "flow and drag"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> nv.TextEncoder:
    folder = tiny_model.build(tmp_path_factory.mktemp("text") / "built")
    config = json.loads((folder / "config.json").read_text())
    config |= {"is_matryoshka": True, "matryoshka_dimensions": [8, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    return nv.TextEncoder(
        str(folder), document_prompt="cone ", query_prompt="a wing ", device="cpu"
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("image") / "model"
    torch.manual_seed(0)
    network = small_vit(size=16, patch_size=8, dim=16, layers=1, heads=2)
    save_image_model(folder, network, Preprocessing(16), (4, 8))
    return folder


def opened(path: Path) -> tuple[Any, dict[str, str]]:
    session = runtime.InferenceSession(str(path))
    return session, session.get_modelmeta().custom_metadata_map


def embedded(session, encoder: nv.TextEncoder, texts: list[str]) -> np.ndarray:
    tokens = encoder.model.tokenizer(texts, padding=True, return_tensors="np")
    names = [one.name for one in session.get_inputs()]
    return session.run(["embedding"], {name: tokens[name] for name in names})[0]


def test_text_is_embedded_as_the_encoder_does_it(encoder, tmp_path):
    space = export_onnx(encoder, tmp_path / "m.onnx")
    session, about = opened(tmp_path / "m.onnx")
    assert Space.from_dict(json.loads(about["nestvec"])) == space == encoder.space
    for texts in (TEXTS, TEXTS[:1]):
        got = embedded(session, encoder, [f"cone {text}" for text in texts])
        np.testing.assert_allclose(got, encoder.encode(texts).array, atol=1e-4)
    asked = embedded(session, encoder, [f"a wing {text}" for text in TEXTS])
    np.testing.assert_allclose(asked, encoder.encode(TEXTS, role="query").array, atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_size_is_cut_before_it_is_normalised(encoder, tmp_path):
    space = export_onnx(encoder, tmp_path / "m.onnx", dim=8)
    session, about = opened(tmp_path / "m.onnx")
    want = encoder.encode(TEXTS).prefix(8)
    got = embedded(session, encoder, [f"cone {text}" for text in TEXTS])
    np.testing.assert_allclose(got, want.array, atol=1e-4)
    assert Space.from_dict(json.loads(about["nestvec"])) == space == want.space


@pytest.mark.parametrize("normalise", [True, False])
def test_images_are_embedded_as_the_encoder_does_it(images, tmp_path, rng, normalise):
    pictures = rng.integers(0, 256, (5, 30, 20, 3), dtype=np.uint8)
    encoder = nv.ImageEncoder(images, normalise=normalise, device="cpu")
    export_onnx(encoder, tmp_path / "m.onnx")
    session, about = opened(tmp_path / "m.onnx")
    assert Preprocessing(**json.loads(about["preprocessing"])) == encoder.preprocessing
    values = encoder.preprocessing(pictures).numpy()
    got = session.run(["embedding"], {"pixel_values": values})[0]
    np.testing.assert_allclose(got, encoder.encode(pictures).array, atol=1e-4)


def test_a_truncate_dim_on_the_model_is_not_exported(encoder, tmp_path):
    encoder.model.truncate_dim = 4
    try:
        assert export_onnx(encoder, tmp_path / "m.onnx").size == 32
    finally:
        encoder.model.truncate_dim = None
    assert opened(tmp_path / "m.onnx")[0].get_outputs()[0].shape[1] == 32


def test_a_resnet_is_exported_from_memory_as_it_is_in_use(tmp_path, rng):
    torch.manual_seed(0)
    network = small_resnet(hidden_sizes=(8, 16), depths=(1, 1), embedding_size=8).train()
    encoder = nv.ImageEncoder(network, preprocessing=Preprocessing(32))
    export_onnx(encoder, tmp_path / "m.onnx", dim=4, allow_untrained=True)
    pictures = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    values = encoder.preprocessing(pictures).numpy()
    got = opened(tmp_path / "m.onnx")[0].run(None, {"pixel_values": values})[0]
    want = encoder.encode(pictures).prefix(4, allow_untrained=True).array
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert network.training


def test_what_does_not_fit_is_refused_and_nothing_is_written(images, tmp_path):
    with pytest.raises(DimensionError, match="not one of this model's nesting dims"):
        export_onnx(images, tmp_path / "m.onnx", dim=5)
    with pytest.raises(FileFormatError, match=r"ends in \.onnx"):
        export_onnx(images, tmp_path / "m.bin")
    with pytest.raises(ModelError, match="no network to export"):
        export_onnx(nv.CallableEncoder(lambda t: [[1.0]], name="f", dim=1), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class DecidesByValue(torch.nn.Module):
    """What the exporter cannot follow: Python looks at a value."""

    def forward(self, pixel_values):
        rows = pixel_values.flatten(1)[:, :8]
        return rows + 1 if rows.sum().item() > 0 else rows


def test_a_model_that_cannot_be_exported_is_one_sentence(tmp_path):
    encoder = nv.ImageEncoder(ImageNetwork(DecidesByValue(), dim=8), preprocessing=Preprocessing(4))
    with pytest.raises(ModelError, match=r"DecidesByValue.*cannot be exported to ONNX"):
        export_onnx(encoder, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class LooksAtTheFirstCall(torch.nn.Module):
    """A module whose rows depend on how often it was called, as no graph can."""

    calls = 0

    def forward(self, pixel_values):
        self.calls += 1
        return pixel_values.flatten(1)[:, :8] + 10.0 * self.calls * torch.arange(8)


def test_a_file_that_gives_other_rows_is_not_written(tmp_path):
    encoder = nv.ImageEncoder(
        ImageNetwork(LooksAtTheFirstCall(), dim=8), preprocessing=Preprocessing(4), normalise=False
    )
    with pytest.raises(ModelError, match=r"off by .* was not written"):
        export_onnx(encoder, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_command_exports_a_size(images, tmp_path):
    from nestvec.cli import app

    words = ["export", str(images), "-o", str(tmp_path / "m.onnx"), "--dim", "8", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["space"]["dim"] == 8
    assert opened(tmp_path / "m.onnx")[0].get_outputs()[0].shape == ["batch", 8]
    done = CliRunner().invoke(app, [*words[:-2], "7"])
    assert done.exit_code == 2
    assert "add --allow-untrained" in done.stderr
