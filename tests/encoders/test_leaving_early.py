"""An encoder left after a layer: shorter, in its own Space, exported as a model of its own."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="nestvec[text]")
pytest.importorskip("sentence_transformers", reason="nestvec[text]")

import tiny_model  # noqa: E402  # behind importorskip
from sentence_transformers import SentenceTransformer  # noqa: E402

import nestvec as nv  # noqa: E402
from nestvec.cli import app  # noqa: E402
from nestvec.encoders.folder import export_folder  # noqa: E402
from nestvec.encoders.layers import Layers  # noqa: E402
from nestvec.errors import (  # noqa: E402
    DataError,
    DimensionError,
    ModelError,
    SpaceMismatchError,
    StorageError,
)

TEXTS = ["wing flow", "heat of the jet in a lift and a shock", "drag", "a cone and a plate"]
LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tiny_model.build(tmp_path_factory.mktemp("tiny") / "m", num_hidden_layers=LAYERS)
    path = made / "config.json"
    config = json.loads(path.read_text())
    sizes = {"matryoshka_dimensions": [8, 16, 32], "matryoshka_layers": [1, 2, 3]}
    path.write_text(json.dumps(config | {"is_matryoshka": True} | sizes))
    return made


@pytest.fixture(scope="module")
def whole(folder):
    return nv.TextEncoder(str(folder), device="cpu")


def test_a_left_model_is_shorter_and_gives_the_vectors_of_its_layer(folder, whole):
    every = whole.encode_layers(TEXTS)
    assert list(every) == [1, 2, 3]
    for layer, want in every.items():
        encoder = nv.TextEncoder(str(folder), layer=layer, device="cpu")
        got = encoder.encode(TEXTS)
        np.testing.assert_allclose(got.array, want.array, atol=1e-6)
        got.space.check_same(want.space)
        assert Layers(encoder.model).n == layer
        np.testing.assert_allclose(np.linalg.norm(want.array, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(every[3].array, whole.encode(TEXTS).array, atol=1e-6)


def test_the_layer_stands_in_the_space_and_the_last_is_the_plain_model(folder, whole):
    spaces = {n: e.space for n, e in whole.encode_layers(TEXTS).items()}
    assert [space.layer for space in spaces.values()] == [1, 2, None]
    spaces[3].check_same(whole.space)
    with pytest.raises(SpaceMismatchError, match="leave the encoder at layers 1 and 2: use one"):
        spaces[1].check_same(spaces[2])
    short = nv.encode(TEXTS, model=str(folder), layer=2, dim=8)
    assert short.space.space_id == f"{spaces[2].space_id}/8"
    assert short.array.shape == (4, 8)
    np.testing.assert_allclose(
        short.array, whole.encode_layers(TEXTS, layers=[2])[2].prefix(8).array, atol=1e-6
    )


def test_ids_roles_prompts_and_resumed_chunks_are_those_of_encode(folder, tmp_path):
    encoder = nv.TextEncoder(str(folder), device="cpu", batch_size=2)
    ids = ["d", "c", "b", "a"]
    found = encoder.encode_layers(TEXTS, layers="1", role="query", ids=ids, resume=tmp_path / "r")
    want = nv.TextEncoder(str(folder), layer=1, device="cpu").encode(TEXTS, role="query", ids=ids)
    np.testing.assert_allclose(found[1].array, want.array, atol=1e-6)
    assert found[1].ids.tolist() == ids
    encoder.encode_layers(TEXTS, layers="1", role="query", resume=tmp_path / "r")
    assert encoder.report.n_resumed == len(TEXTS)
    with pytest.raises(DataError, match="holds the chunks of another encoding"):
        encoder.encode_layers(TEXTS, layers="1,2", role="query", resume=tmp_path / "r")


def test_a_model_in_memory_is_followed_as_it_is_trained(folder):
    model = SentenceTransformer(str(folder), device="cpu")
    encoder = nv.TextEncoder(model, layer=1)
    before = encoder.encode(TEXTS)
    assert Layers(model).n == LAYERS
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = encoder.encode(TEXTS)
    assert before.space.space_id != after.space.space_id
    fresh = nv.TextEncoder(model).encode_layers(TEXTS, layers=[1])[1]
    np.testing.assert_allclose(after.array, fresh.array, atol=1e-6)
    after.space.check_same(fresh.space)


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_a_layer_that_is_not_there_is_refused(folder, layer, whole, tmp_path):
    with pytest.raises(DataError, match="do not fit a model of 3 layers"):
        nv.TextEncoder(str(folder), layer=layer)
    with pytest.raises(DataError, match="do not fit a model of 3 layers"):
        export_folder(whole, tmp_path / "out", layer=layer)
    assert not list(tmp_path.iterdir())


def test_an_export_is_a_small_model_with_the_vectors_of_the_whole(whole, folder, tmp_path):
    space = export_folder(whole, tmp_path / "small", layer=2, dim=8)
    want = nv.encode(TEXTS, model=str(folder), layer=2, dim=8)
    small = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    np.testing.assert_allclose(small.encode(TEXTS), want.array, atol=1e-5)
    modules = json.loads((tmp_path / "small" / "modules.json").read_text())
    assert all(one["type"].startswith("sentence_transformers.") for one in modules)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert config["matryoshka_dimensions"] == [8]
    assert config["matryoshka_layers"] == [1, 2]
    bytes_of = [(f / "model.safetensors").stat().st_size for f in (tmp_path / "small", folder)]
    assert bytes_of[0] < bytes_of[1]
    again = nv.TextEncoder(str(tmp_path / "small"), device="cpu").encode(TEXTS)
    again.space.check_same(want.space)  # one gallery for both
    again.space.check_same(space)
    assert again.space.nesting_dims == (8,)


def test_an_export_may_be_left_cut_and_exported_again(whole, tmp_path):
    export_folder(whole, tmp_path / "small", layer=2, dim=16)
    encoder = nv.TextEncoder(str(tmp_path / "small"), device="cpu")
    assert [e.space.layer for e in encoder.encode_layers(TEXTS).values()] == [1, 2]
    smaller = export_folder(encoder, tmp_path / "smaller", layer=1, dim=8)
    want = whole.encode_layers(TEXTS, layers=[1])[1].prefix(8)
    smaller.check_same(want.space)
    got = nv.encode(TEXTS, model=str(tmp_path / "smaller"))
    np.testing.assert_allclose(got.array, want.array, atol=1e-5)


def test_an_export_that_was_trained_further_is_a_space_of_its_own(whole, tmp_path):
    space = export_folder(whole, tmp_path / "small", layer=2, dim=8)
    model = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    model.save_pretrained(str(tmp_path / "small"), create_model_card=False)
    with pytest.raises(SpaceMismatchError):
        nv.TextEncoder(str(tmp_path / "small")).space.check_same(space)


def test_a_folder_that_is_no_export_stays(whole, folder, tmp_path):
    export_folder(whole, tmp_path / "small", layer=2)
    export_folder(whole, tmp_path / "small", layer=1, dim=8)  # an export is replaced
    assert Layers(SentenceTransformer(str(tmp_path / "small"), device="cpu")).n == 1
    (tmp_path / "small" / "notes.txt").write_text("mine")
    for place in (tmp_path / "small", folder):
        before = sorted(p.name for p in place.iterdir())
        with pytest.raises(StorageError, match="a folder stands there with"):
            export_folder(whole, place, layer=1)
        assert sorted(p.name for p in place.iterdir()) == before


def test_what_cannot_be_exported_says_so(whole, tmp_path, monkeypatch):
    with pytest.raises(DimensionError, match="not one of this model's nesting dims"):
        export_folder(whole, tmp_path / "out", dim=9)
    with pytest.raises(ModelError, match="text models can"):
        export_folder(nv.CallableEncoder(lambda t: [[1.0]], name="f", dim=1), tmp_path / "out")
    with pytest.raises(ModelError, match="settings belong where the encoder is made"):
        nv.encode(TEXTS, model=whole, layer=1)
    monkeypatch.setattr("nestvec.encoders.folder._TOLERANCE", -1.0)
    with pytest.raises(ModelError, match=r"rows are off by .* so it was not written"):
        export_folder(whole, tmp_path / "out", layer=1)
    assert not list(tmp_path.iterdir())


def test_onnx_of_a_layer_is_its_vectors(whole, folder, tmp_path):
    pytest.importorskip("onnxscript", reason="nestvec[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="nestvec[onnx]")
    from nestvec.encoders.onnx import export_onnx

    space = export_onnx(str(folder), tmp_path / "small.onnx", layer=1, dim=8)
    session = runtime.InferenceSession(str(tmp_path / "small.onnx"))
    tokens = whole.model.tokenizer(TEXTS, padding=True, return_tensors="np")
    got = session.run(None, {one.name: tokens[one.name] for one in session.get_inputs()})[0]
    want = whole.encode_layers(TEXTS, layers=[1])[1].prefix(8)
    np.testing.assert_allclose(got, want.array, atol=1e-5)
    space.check_same(want.space)


def test_the_commands_leave_early_export_and_search_what_was_embedded(folder, tmp_path):
    def run(*words):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.stdout

    (tmp_path / "docs.txt").write_text("\n".join(TEXTS))
    docs = tmp_path / "docs.safetensors"
    run("embed", tmp_path / "docs.txt", "-o", docs, "--model", folder, "--layer", 2)
    found = nv.load(docs)
    assert found.space.layer == 2
    answer = json.loads(run("search", docs, "wing flow", "--model", folder, "-k", 1, "--json"))
    words = ["export", folder, "-o", tmp_path / "small", "--layer", 2, "--dim", 8, "--json"]
    said = json.loads(run(*words))
    assert said["space"]["space_id"] == found.prefix(8).space.space_id
    small = tmp_path / "small.safetensors"
    run("embed", tmp_path / "docs.txt", "-o", small, "--model", tmp_path / "small")
    nv.load(small).space.check_same(found.prefix(8).space)
    again = run("search", small, "wing flow", "--model", tmp_path / "small", "-k", 1, "--json")
    assert type(json.loads(again)) is type(answer)
    done = CliRunner().invoke(app, ["export", str(folder), "-o", str(folder), "--layer", "1"])
    assert done.exit_code == 2
    assert "a folder stands there with" in done.stderr
