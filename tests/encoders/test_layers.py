"""Every layer's vectors come from one pass, and a model cut after a layer gives the same ones."""

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="nestvec[text]")
transformers = pytest.importorskip("transformers", reason="nestvec[text]")
pytest.importorskip("sentence_transformers", reason="nestvec[text]")

import tiny_model  # noqa: E402  # behind importorskip
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import modules  # noqa: E402

from nestvec.encoders.layers import Layers, parse_layers, reading  # noqa: E402
from nestvec.errors import DataError, ModelError  # noqa: E402

TEXTS = ["wing flow", "heat of the jet in a lift and a shock", "drag"]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES = {"intermediate_size": 64, "max_position_embeddings": 64}
KEYS = {"num_key_value_heads": 2, "head_dim": 16}
T5_SHAPE = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2}
DISTIL = {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}
ENDS = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", SHAPE | SIZES),
    "mpnet": ("MPNetModel", "MPNetConfig", SHAPE | SIZES),
    "distilbert": ("DistilBertModel", "DistilBertConfig", DISTIL),
    "modernbert": ("ModernBertModel", "ModernBertConfig", SHAPE | SIZES | ENDS),
    "qwen3": ("Qwen3Model", "Qwen3Config", SHAPE | SIZES | KEYS),
    "t5": ("T5EncoderModel", "T5Config", T5_SHAPE),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tiny_model.build(tmp_path_factory.mktemp("tiny") / "m")
    return SentenceTransformer(str(folder), device="cpu").tokenizer


def model_of(name, tokenizer, folder, *more):
    """A sentence-transformers model of 3 fresh layers of an architecture, mean pooling behind."""
    kind, config, settings = name if isinstance(name, tuple) else FAMILIES[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(vocab_size=len(tokenizer), **settings)
    transformer = getattr(transformers, kind)(made)
    for parameter in transformer.parameters():  # norms start as 1 and 0, which would hide them
        parameter.data += 0.1 * torch.randn_like(parameter)
    transformer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = SentenceTransformer(str(folder), device="cpu")
    return SentenceTransformer(modules=[*found, *more], device="cpu")


def transformer_of(model) -> Any:
    return model[0].auto_model


def read(model, chosen):
    layers = Layers(model)
    with layers.kept():
        rows = reading(layers, chosen).encode(TEXTS)
    return rows.reshape(len(TEXTS), len(chosen), -1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_that_is_read_is_the_model_cut_there_also_when_saved(name, tokenizer, tmp_path):
    model = model_of(name, tokenizer, tmp_path / "whole", modules.Normalize())
    rows = read(model, (1, 2, 3))
    for layer in (1, 2, 3):
        cut = Layers(model).cut(layer)
        np.testing.assert_allclose(cut.encode(TEXTS), rows[:, layer - 1], atol=1e-6)
    np.testing.assert_allclose(model.encode(TEXTS), rows[:, 2], atol=1e-6)
    shorter = Layers(model).cut(2)
    shorter.save_pretrained(str(tmp_path / "cut"), create_model_card=False)
    again = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    assert Layers(again).n == transformer_of(again).config.num_hidden_layers == 2
    np.testing.assert_allclose(again.encode(TEXTS), rows[:, 1], atol=1e-6)


def test_a_dense_and_a_norm_behind_the_pooling_are_passed_by_every_layer(tokenizer, tmp_path):
    model = model_of("bert", tokenizer, tmp_path, modules.Dense(32, 8), modules.Normalize())
    rows = read(model, (1, 3))
    assert rows.shape == (3, 2, 8)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=2), 1, atol=1e-6)
    np.testing.assert_allclose(Layers(model).cut(1).encode(TEXTS), rows[:, 0], atol=1e-6)


def test_the_model_is_left_as_it_was(tokenizer, tmp_path):
    model = model_of("bert", tokenizer, tmp_path)
    before = model.encode(TEXTS)
    forward, training = model[0].forward, model.training
    read(model, (1, 2))
    cut = Layers(model).cut(1)
    assert model[0].forward == forward
    assert model.training == training
    assert not transformer_of(model).config.output_hidden_states
    assert "all_layer_embeddings" not in model(model.preprocess(TEXTS))
    np.testing.assert_array_equal(model.encode(TEXTS), before)
    assert len(transformer_of(cut).encoder.layer) == 1
    assert len(transformer_of(model).encoder.layer) == 3


def test_a_cut_model_has_its_weights_in_common_with_the_whole(tokenizer, tmp_path):
    model = model_of("bert", tokenizer, tmp_path)
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in own for parameter in Layers(model).cut(2).parameters())


def test_gradients_reach_an_early_layer_and_none_above_it(tokenizer, tmp_path):
    model = model_of("bert", tokenizer, tmp_path)
    layers = Layers(model)
    with layers.kept():
        rows = layers.rows(model(dict(model.preprocess(TEXTS))), (2,))
    rows.sum().backward()
    stack = transformer_of(model).encoder.layer
    reached = [any(p.grad is not None for p in layer.parameters()) for layer in stack]
    assert reached == [True, True, False]


def test_more_behind_the_last_layer_than_is_known_is_refused(tokenizer, tmp_path):
    odd = ("RobertaPreLayerNormModel", "RobertaPreLayerNormConfig", SHAPE | SIZES)
    with pytest.raises(ModelError, match="layer 2 of this RobertaPreLayerNormModel is off by"):
        Layers(model_of(odd, tokenizer, tmp_path))


def test_layers_that_share_their_weights_are_refused(tokenizer, tmp_path):
    albert = ("AlbertModel", "AlbertConfig", SHAPE | SIZES | {"embedding_size": 16})
    with pytest.raises(ModelError, match="keeps no layers where they are looked for"):
        Layers(model_of(albert, tokenizer, tmp_path))


def test_layers_are_read_from_words_and_numbers():
    assert parse_layers("all", 3) == (1, 2, 3)
    assert parse_layers("3, 1", 3) == parse_layers([3, 1, 1], 3) == (1, 3)


@pytest.mark.parametrize("layers", [[0], [4], [], "two", "1.5", "0,1"])
def test_bad_layers_say_what_would_fit(layers):
    with pytest.raises(DataError, match=r"layers .* (do not fit a model of 3|are not whole)"):
        parse_layers(layers, 3)
