"""The parts the training benchmarks share: scoring, corruptions and the slimmable baseline."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")
pytest.importorskip("sklearn", reason="nestvec[fit]")
transformers = pytest.importorskip("transformers", reason="nestvec[image]")
Image = pytest.importorskip("PIL.Image", reason="nestvec[image]")
import _classify  # noqa: E402  # behind importorskip
import _corruptions  # noqa: E402
import _slimmable  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from nestvec.encoders.image_network import small_resnet  # noqa: E402


def clusters(rng, n: int, *, n_classes: int = 4, dim: int = 12, noise: float = 0.3):
    centres = np.random.default_rng(7).normal(size=(n_classes, dim))
    labels = np.arange(n) % n_classes
    rows = centres[labels] + noise * rng.normal(size=(n, dim))
    return rows.astype(np.float32), labels


def nearest_by_hand(train, labels, test, dim, *, skip_own=False):
    found = []
    for at, row in enumerate(test):
        cosines = [
            -np.inf
            if skip_own and at == other
            else row[:dim] @ t[:dim] / np.linalg.norm(row[:dim]) / np.linalg.norm(t[:dim])
            for other, t in enumerate(train)
        ]
        found.append(labels[int(np.argmax(cosines))])
    return np.array(found)


def test_1nn_is_that_of_its_definition(rng):
    train, labels = clusters(rng, 40, noise=2)
    test, truth = clusters(rng, 30, noise=2)
    got = _classify.score(train, labels, test, truth, 5, kinds=["1nn"])
    expected = nearest_by_hand(train, labels, test, 5) == truth
    np.testing.assert_array_equal(got["1nn"], expected)
    assert 0 < expected.mean() < 1


def test_leave_one_out_never_finds_the_row_itself(rng):
    rows, labels = clusters(rng, 40, noise=2)
    rows[1] = rows[0]  # duplicates of different classes find each other
    expected = nearest_by_hand(rows, labels, rows, 5, skip_own=True) == labels
    np.testing.assert_array_equal(_classify.leave_one_out_1nn(rows, labels, 5), expected)
    assert not _classify.leave_one_out_1nn(rows, labels, 5)[:2].any()


def test_what_follows_the_prefix_and_the_length_of_a_row_count_for_nothing(rng):
    (train, labels), (test, truth) = clusters(rng, 80, noise=1), clusters(rng, 30, noise=1)
    got = _classify.score(train, labels, test, truth, 6)
    train, test = 4 * train, test / 4
    train[:, 6:], test[:, 6:] = 9, -9
    again = _classify.score(train, labels, test, truth, 6)
    for kind in _classify.KINDS:
        np.testing.assert_array_equal(got[kind], again[kind])
        assert got[kind].dtype == bool


def test_linear_head_learns_what_can_be_separated_and_guesses_otherwise(rng):
    (train, labels), (test, truth) = clusters(rng, 80), clusters(rng, 40)
    assert _classify.score(train, labels, test, truth, 12)["linear_head"].all()
    shuffled = rng.permutation(labels)
    assert _classify.score(train, shuffled, test, truth, 12)["linear_head"].mean() < 0.6


def test_row_of_zeros_is_counted_and_does_not_stop_the_run(rng):
    (train, labels), (test, truth) = clusters(rng, 40), clusters(rng, 20)
    train[3, :8] = test[5, :8] = 0
    got = _classify.score(train, labels, test, truth, 8)
    assert got["1nn"][5] == (labels[0] == truth[5])  # equally far from all: the lowest row


def test_csr_codes_tell_clusters_apart_with_two_active(rng):
    (train, labels), (test, truth) = clusters(rng, 200, noise=0.2), clusters(rng, 40, noise=0.2)
    got = _classify.csr_correct(train, labels, test, truth, 2)
    assert set(got) == set(_classify.KINDS)
    assert got["1nn"].mean() > 0.9
    assert got["linear_head"].mean() > 0.9


def test_sparse_and_dense_linear_head_agree(rng, monkeypatch):
    labels = np.arange(60) % 3
    codes = np.zeros((60, 40), np.float32)
    codes[np.arange(60), labels] = 1
    codes[np.arange(60), rng.integers(3, 40, 60)] = 1
    sparse = _classify.linear_head(codes, labels, codes)
    monkeypatch.setattr(_classify, "csr_array", np.asarray)
    np.testing.assert_array_equal(sparse, _classify.linear_head(codes, labels, codes))


def test_principal_rotation_keeps_cosines_and_packs_them_into_the_prefix(rng):
    train, test = (clusters(rng, n, dim=12)[0] for n in (60, 20))
    turned = _classify.rotations(train, test)["principal_rotation"]
    before, after = (
        _classify.unit_prefix(a, 12) @ _classify.unit_prefix(b, 12).T
        for a, b in ((test, train), turned[::-1])
    )
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert np.square(turned[1][:, :4]).sum() > 0.9 * np.square(turned[1]).sum()


def test_random_features_are_the_same_columns_in_an_order_by_seed(rng):
    train, test = (clusters(rng, n)[0] for n in (60, 20))
    ours = _classify.rotations(train, test, seed=1)["random_features"]
    columns = [int(np.flatnonzero((train == c[:, None]).all(axis=0))[0]) for c in ours[0].T]
    assert sorted(columns) == list(range(12))
    np.testing.assert_array_equal(ours[1], test[:, columns])
    again = _classify.rotations(train, test, seed=1)["random_features"]
    other = _classify.rotations(train, test, seed=2)["random_features"]
    np.testing.assert_array_equal(again[0], ours[0])
    assert (other[0] != ours[0]).any()


def test_paired_difference_is_in_points_and_of_the_mean_over_seeds():
    a = [np.array([1, 1, 1, 0], bool), np.array([1, 1, 0, 0], bool)]
    b = [np.array([1, 0, 0, 0], bool)]
    value, low, high = _classify.paired(a, b)
    assert value == pytest.approx(100 * (0.625 - 0.25))
    assert low <= value <= high


def test_rows_that_both_get_alike_leave_no_doubt(rng):
    a = rng.random((3, 500)) < 0.7
    value, low, high = _classify.paired(list(a), list(a[::-1]))
    assert max(abs(value), abs(low), abs(high)) < 1e-9


def test_interval_of_the_difference_has_the_width_theory_gives(rng):
    a, b = rng.random(2000) < 0.8, rng.random(2000) < 0.7
    value, low, high = _classify.paired([a], [b])
    wide = 2 * 1.96 * 100 * np.std(a.astype(float) - b) / np.sqrt(2000)
    assert high - low == pytest.approx(wide, rel=0.1)
    assert value == pytest.approx((low + high) / 2, abs=0.3)


@pytest.fixture
def photos(rng) -> np.ndarray:
    """Smooth pictures, (6, 32, 32, 3): on noise, JPEG would say little."""
    small = rng.uniform(0, 255, (6, 4, 4, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((32, 32))) for x in small])


def far(images, others) -> float:
    return float(np.square(images.astype(float) - others).mean() ** 0.5)


@pytest.mark.parametrize("kind", _corruptions.STRENGTHS)
def test_corruption_grows_with_severity_and_repeats_by_seed(photos, kind):
    for images in (photos, photos[..., :1], photos[..., 0]):
        found = [_corruptions.corrupt(images, kind, s, seed=3) for s in _corruptions.SEVERITIES]
        for one in found:
            assert one.shape == images.shape
            assert one.dtype == np.uint8
        away = [far(images, one) for one in found]
        assert away == sorted(away)
        assert 0 < away[0] < away[-1]
        np.testing.assert_array_equal(_corruptions.corrupt(images, kind, 5, seed=3), found[-1])


def test_noise_has_the_published_spread_and_does_not_wrap_around():
    grey = np.full((2, 64, 64, 3), 128, np.uint8)
    for severity, strength in [(1, 0.04), (3, 0.08), (5, 0.1)]:
        noisy = _corruptions.corrupt(grey, "noise", severity)
        assert noisy.std() / 255 == pytest.approx(strength, rel=0.03)
        assert noisy.mean() == pytest.approx(128, abs=0.5)
    assert _corruptions.corrupt(np.full_like(grey, 255), "noise", 5).min() > 128
    first, second = (_corruptions.corrupt(grey, "noise", 1, seed) for seed in (0, 1))
    assert (first != second).any()


def test_noise_of_an_image_does_not_depend_on_those_after_it(photos):
    few, all_ = (_corruptions.corrupt(x, "noise", 2) for x in (photos[:2], photos))
    np.testing.assert_array_equal(few, all_[:2])


def test_blur_stays_within_an_image_and_a_channel():
    images = np.zeros((2, 33, 33, 3), np.uint8)
    images[0, 16, 16, 1] = 255
    blurred = _corruptions.corrupt(images, "blur", 5)
    assert not blurred[1].any()
    assert not blurred[0, :, :, [0, 2]].any()
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / 2)
    expected = 255 * np.outer(kernel, kernel) / kernel.sum() ** 2
    np.testing.assert_allclose(blurred[0, 12:21, 12:21, 1], expected, atol=0.6)


def test_jpeg_is_that_of_pil_at_the_published_quality(photos):
    for severity, quality in ((1, 80), (5, 40)):
        file = BytesIO()
        Image.fromarray(photos[2]).save(file, "JPEG", quality=quality)
        got = _corruptions.corrupt(photos, "jpeg", severity)[2]
        np.testing.assert_array_equal(got, np.asarray(Image.open(file)))


@pytest.mark.parametrize(("kind", "severity"), [("fog", 1), ("blur", 0), ("blur", 6)])
def test_unknown_corruption_is_refused(photos, kind, severity):
    with pytest.raises(ValueError, match="no corruption"):
        _corruptions.corrupt(photos, kind, severity)


DIMS = (2, 4, 16)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def shake(module: nn.Module) -> None:
    """Give every weight and running mean a value of its own, as training would."""
    with torch.no_grad():
        for values in [*module.parameters(), *module.buffers()]:
            if values.is_floating_point():
                values += 0.1 * torch.rand_like(values)


@pytest.fixture
def resnet() -> _slimmable.SlimmableResNet:
    net = _slimmable.SlimmableResNet(DIMS, 1, (8, 16), (1, 2), 5, embedding_size=8)
    shake(net)
    return net.eval()


def plain_resnet(net: _slimmable.SlimmableResNet, dim: int) -> nn.Module:
    """An ordinary, narrower network made of the first channels of the slimmable one."""
    narrow = max(1, dim // 2)
    plain = small_resnet(
        n_channels=1, hidden_sizes=(narrow, dim), depths=(1, 2), embedding_size=narrow
    ).eval()
    given, place = net.network.state_dict(), DIMS.index(dim)
    state = {}
    for name, old in plain.backbone.state_dict().items():
        layer, _, last = name.rpartition(".")
        value = given.get(f"{layer}.whole.{last}")
        value = given[f"{layer}.{place}.{last}"] if value is None else value
        state[name] = value[tuple(slice(size) for size in old.shape)]
    plain.backbone.load_state_dict(state)
    return plain


@pytest.mark.parametrize("dim", DIMS)
def test_every_width_of_the_resnet_is_the_plain_network_of_its_slices(resnet, dim):
    pixels = torch.rand(3, 1, 32, 32)
    rows = resnet(pixels, dim)
    assert rows.shape == (3, dim)
    assert rows.std() > 0
    torch.testing.assert_close(rows, plain_resnet(resnet, dim)(pixels))


def test_slimmable_resnet_starts_from_the_weights_of_a_plain_one():
    torch.manual_seed(0)
    nn.Linear(16, 5)  # the classifier draws first
    plain = small_resnet(n_channels=3, hidden_sizes=(8, 16), depths=(1, 1), embedding_size=8).eval()
    torch.manual_seed(0)
    slim = _slimmable.SlimmableResNet(DIMS, 3, (8, 16), (1, 1), 5, embedding_size=8).eval()
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(slim(pixels, 16), plain(pixels))


@pytest.fixture
def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=12,
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    shake(model)
    return model.eval()


@pytest.fixture
def encoder(bert) -> _slimmable.SlimmableEncoder:
    net = _slimmable.SlimmableEncoder(bert.encoder.layer[1:], DIMS, 5)
    shake(net)
    return net.eval()


@pytest.fixture
def tokens(bert) -> dict:
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    ids = torch.randint(50, (2, 7))
    out = bert(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return {"hidden": out.hidden_states[1].detach(), "mask": mask, "last": out.last_hidden_state}


def test_full_width_of_the_encoder_starts_as_mean_pooling_of_the_given_one(bert, tokens):
    net = _slimmable.SlimmableEncoder(bert.encoder.layer[1:], DIMS, 5).eval()
    rows = net(tokens["hidden"], tokens["mask"], 16)
    expected = [tokens["last"][0].mean(dim=0), tokens["last"][1, :4].mean(dim=0)]
    torch.testing.assert_close(rows, torch.stack(expected))


def narrow_by_hand(net: _slimmable.SlimmableEncoder, hidden, dim: int):
    """One row without padding, a head at a time, from slices of the weights."""
    given, place = net.state_dict(), DIMS.index(dim)
    heads, inner = max(1, round(4 * dim / 16)), max(1, round(24 * dim / 16))

    def linear(rows, name, outs=slice(None), ins=slice(None)):
        return rows @ given[f"{name}.whole.weight"][outs, ins].T + given[f"{name}.whole.bias"][outs]

    def norm(rows, name):
        weight, bias = (given[f"{name}.{place}.{x}"] for x in ("weight", "bias"))
        return F.layer_norm(rows, (16,), weight, bias, 1e-12)

    for n in range(2):
        at = f"layers.{n}.attention"
        seen = []
        for head in range(heads):
            part = slice(4 * head, 4 * head + 4)
            query, key, value = (
                linear(hidden, f"{at}.self.{x}", part) for x in ("query", "key", "value")
            )
            seen.append(torch.softmax(query @ key.T / 2, dim=-1) @ value)
        joined = linear(torch.cat(seen, dim=-1), f"{at}.output.dense", ins=slice(4 * heads))
        hidden = norm(hidden + joined, f"{at}.output.LayerNorm")
        within = F.gelu(linear(hidden, f"layers.{n}.intermediate.dense", slice(inner)))
        joined = linear(within, f"layers.{n}.output.dense", ins=slice(inner))
        hidden = norm(hidden + joined, f"layers.{n}.output.LayerNorm")
    return linear(hidden.mean(dim=0), "projection", slice(dim))


@pytest.mark.parametrize("dim", DIMS)
def test_every_width_of_the_encoder_is_that_of_its_definition(encoder, tokens, dim):
    rows = encoder(tokens["hidden"], tokens["mask"], dim)
    torch.testing.assert_close(rows[0], narrow_by_hand(encoder, tokens["hidden"][0], dim))
    torch.testing.assert_close(rows[1], narrow_by_hand(encoder, tokens["hidden"][1, :4], dim))


def wreck(net, dim: int, used) -> None:
    """Put NaN wherever width ``dim`` has no business: weights beyond ``used``, others' norms."""
    place = net.dims.index(dim)
    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, _slimmable._Sliced):
                weight = module.whole.weight
                outs, ins = used(name, *weight.shape[:2])
                weight[outs:] = weight[:, ins:] = float("nan")
                if module.whole.bias is not None:
                    module.whole.bias[outs:] = float("nan")
            elif isinstance(module, _slimmable._NormOfWidth):
                for other in set(range(len(net.dims))) - {place}:
                    for values in module[other].parameters():
                        values.fill_(float("nan"))


@pytest.mark.parametrize("dim", DIMS)
def test_resnet_uses_no_weight_beyond_its_width(resnet, dim):
    pixels = torch.rand(3, 1, 32, 32)
    before = resnet.classifier(resnet(pixels, dim))

    def used(name, outs, ins):
        if name == "classifier":
            return outs, dim
        return outs * dim // 16, max(1, ins * dim // 16)  # the picture's one channel stays

    wreck(resnet, dim, used)
    after = resnet.classifier(resnet(pixels, dim))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("dim", DIMS)
def test_encoder_uses_no_weight_beyond_its_width(encoder, tokens, dim):
    arguments = tokens["hidden"], tokens["mask"], dim
    before = encoder.classifier(encoder(*arguments))
    heads, inner = max(1, dim // 4), 24 * dim // 16

    def used(name, outs, ins):
        if name == "classifier":
            return outs, dim
        if name == "projection":
            return dim, ins
        if ".self." in name:
            return 4 * heads, ins
        if ".intermediate." in name:
            return inner, ins
        return outs, 4 * heads if ".attention." in name else inner

    wreck(encoder, dim, used)
    after = encoder.classifier(encoder(*arguments))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_loss_is_the_sum_of_the_cross_entropies_of_all_widths(resnet, encoder, tokens):
    pixels, labels = torch.rand(2, 1, 32, 32), torch.tensor([1, 3])
    arguments = tokens["hidden"], tokens["mask"]
    for net, given in ((resnet, (pixels,)), (encoder, arguments)):
        head = net.classifier.whole
        expected = 0.0
        for dim in DIMS:
            logits = net(*given, dim) @ head.weight[:, :dim].T + head.bias
            expected -= torch.log_softmax(logits, dim=1)[[0, 1], labels].mean()
        torch.testing.assert_close(net.loss(*given, labels), expected)


@pytest.mark.parametrize("kind", ["resnet", "encoder"])
def test_a_step_trains_every_weight(kind, request, tokens):
    net = request.getfixturevalue(kind).train()
    given = (torch.rand(8, 1, 32, 32),) if kind == "resnet" else (tokens["hidden"], tokens["mask"])
    labels = torch.arange(len(given[0])) % 5
    net.loss(*given, labels).backward()
    assert [name for name, weight in net.named_parameters() if weight.grad is None] == []


def test_slimmable_network_learns_at_every_width():
    net = _slimmable.SlimmableResNet((2, 8), 1, (8, 8), (1, 1), 2, embedding_size=8)
    labels = torch.arange(32) % 2
    pixels = 0.3 * torch.rand(32, 1, 32, 32) + labels[:, None, None, None]
    adam = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(30):
        adam.zero_grad()
        net.loss(pixels, labels).backward()
        adam.step()
    net.eval()
    for dim in (2, 8):
        logits = net.classifier(net(pixels, dim))
        assert (logits.argmax(dim=1) == labels).float().mean() > 0.9


def test_width_that_was_not_made_is_refused(resnet):
    with pytest.raises(ValueError, match="not in tuple"):
        resnet(torch.rand(1, 1, 32, 32), 3)
    with pytest.raises(ValueError, match="dims end at 8"):
        _slimmable.SlimmableResNet((4, 8), 1, (8, 16), (1, 1), 2)
