"""A batch in chunks has the loss and gradients of the whole one, and holds one chunk at a time."""

import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")
from torch import nn  # noqa: E402  # behind importorskip
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402

from nestvec.errors import DataError  # noqa: E402
from nestvec.train import InfoNCE, NestedLoss, encode_in_chunks  # noqa: E402

DIMS = (2, 4, 8)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def network(*, dropout=0.0):
    layers = (nn.Linear(5, 16), nn.Tanh(), nn.Dropout(dropout), nn.LayerNorm(16), nn.Linear(16, 8))
    return nn.Sequential(*layers).double()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 12])
def test_loss_and_gradients_are_those_of_the_whole_batch(chunk_size):
    model, loss = network(), NestedLoss(InfoNCE(symmetric=True), DIMS)
    queries, documents, hard = (torch.randn(n, 5, dtype=torch.double) for n in (10, 10, 7))
    whole = loss(model(queries), model(documents), model(hard))
    parts = loss(*(encode_in_chunks(model, one, chunk_size) for one in (queries, documents, hard)))
    torch.testing.assert_close(parts, whole, atol=1e-10, rtol=0)
    for got, want in zip(gradients(model, parts), gradients(model, whole), strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_dropout_drops_the_same_when_a_chunk_is_run_again():
    """The oracle runs the chunks in the same order with the same seed and keeps everything."""
    model, loss = network(dropout=0.5), NestedLoss(InfoNCE(), DIMS)
    queries = torch.randn(10, 5, dtype=torch.double)
    torch.manual_seed(1)
    kept = torch.cat([model(chunk) for chunk in queries.split(3)])
    torch.manual_seed(1)
    chunked = encode_in_chunks(model, queries, 3)
    torch.testing.assert_close(chunked, kept, atol=0, rtol=0)
    torch.rand(3)  # what others draw in between does not matter
    torch.testing.assert_close(
        gradients(model, loss(chunked, chunked.flip(0))),
        gradients(model, loss(kept, kept.flip(0))),
        atol=1e-10,
        rtol=0,
    )


class Watched(nn.Module):
    """Notes at each run which chunk it is, and how many earlier activations are still alive."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 64)
        self.held, self.chunks, self.alive = [], [], []

    def forward(self, rows):
        hidden = torch.sigmoid(self.linear(rows))  # sigmoid saves its output for the backward pass
        self.alive.append(sum(not one.expired() for one in self.held))
        self.held.append(StorageWeakRef(hidden.untyped_storage()))
        self.chunks.append(int(rows[0, 0]))
        return torch.tanh(hidden)[:, :8]


def test_activations_of_one_chunk_at_a_time_are_alive():
    rows = torch.arange(12.0).repeat_interleave(5).reshape(12, 5)
    kept, model = Watched(), Watched()
    InfoNCE()(torch.cat([kept(chunk) for chunk in rows.split(3)]), rows[:, :1].expand(12, 8))
    assert kept.alive == [0, 1, 2, 3]
    found = encode_in_chunks(model, rows, 3)
    assert model.chunks == [0, 3, 6, 9]
    InfoNCE()(found, rows[:, :1].expand(12, 8)).backward()
    assert model.chunks == [0, 3, 6, 9, 9, 6, 3, 0]
    assert model.alive == [0] * 8
    assert all(one.expired() for one in model.held)


def tokens(lengths):
    mask = (torch.arange(max(lengths) + 2) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 9, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "prompt_length": 2}


class Pooled(nn.Module):
    """A mean over tokens that, as sentence-transformers do, writes into what it is handed."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.widths = []

    def forward(self, features):
        mask = features["attention_mask"][..., None]
        self.widths.append(mask.shape[1])
        assert features["input_ids"].shape == mask.shape[:2]
        assert features["prompt_length"] == 2
        assert "token_embeddings" not in features
        features["token_embeddings"] = self.words(features["input_ids"])
        return (features["token_embeddings"] * mask).sum(dim=1) / mask.sum(dim=1)


def test_each_chunk_is_cut_to_its_longest_row_and_nothing_changes():
    model, features = Pooled(), tokens([2, 3, 9, 4, 1])
    whole = model(dict(features))
    model.widths.clear()
    parts = encode_in_chunks(model, features, 2)
    assert model.widths == [3, 9, 1]
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(
        gradients(model, InfoNCE()(parts, parts.flip(0))),
        gradients(model, InfoNCE()(whole, whole.flip(0))),
    )


def test_padding_on_the_left_is_kept():
    model, features = Pooled(), tokens([2, 3, 4])
    features |= {name: features[name].flip(1) for name in ("input_ids", "attention_mask")}
    want = model(dict(features))
    torch.testing.assert_close(encode_in_chunks(model, features, 1), want)
    assert set(model.widths) == {6}


def test_without_gradients_each_chunk_runs_once():
    model, rows = Watched(), torch.ones(7, 5)
    with torch.no_grad():
        found = encode_in_chunks(model, rows, 3)
        torch.testing.assert_close(found, model(rows))
    assert len(model.chunks) == 4
    assert not found.requires_grad


def test_mixed_precision_is_the_same_in_both_runs():
    model, rows = network().float(), torch.randn(10, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = torch.cat([model(chunk) for chunk in rows.split(3)])
        chunked = encode_in_chunks(model, rows, 3)
        assert chunked.dtype == torch.bfloat16
        losses = [InfoNCE()(found, found.flip(0)) for found in (chunked, kept)]
    got, want = (gradients(model, loss) for loss in losses)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("features", "chunk_size", "says"),
    [
        (torch.ones(3, 5), 0, "at least one row"),
        (torch.ones(0, 5), 2, "no rows"),
        ({"name": "no tensor"}, 2, "no rows"),
        ({"a": torch.ones(3, 5), "b": torch.ones(2, 5)}, 2, "'a': 3, 'b': 2"),
    ],
)
def test_what_cannot_be_cut_into_chunks_is_refused(features, chunk_size, says):
    with pytest.raises(DataError, match=says):
        encode_in_chunks(network(), features, chunk_size)
