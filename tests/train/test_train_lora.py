"""A LoRA is nested in its rank: any rank after one training is an ordinary LoRA of that rank."""

import json
import shutil
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")
pytest.importorskip("sentence_transformers", reason="nestvec[text]")
peft = pytest.importorskip("peft", reason="nestvec[train]")

import tiny_model  # noqa: E402  # behind importorskip
from safetensors.torch import load_file, save_file  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding  # noqa: E402
from torch import nn  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import nestvec as nv  # noqa: E402
from nestvec.cli import app  # noqa: E402
from nestvec.corpus import Images  # noqa: E402
from nestvec.corpus.examples import Examples  # noqa: E402
from nestvec.encoders import encoder_of  # noqa: E402
from nestvec.encoders.image_network import Preprocessing, save_image_model, small_resnet  # noqa: E402
from nestvec.errors import (  # noqa: E402
    DataError,
    DimensionError,
    FileFormatError,
    ModelError,
    TrainingError,
)
from nestvec.train import (  # noqa: E402
    DrawRanks,
    InfoNCE,
    Lora,
    NestedLoss,
    NestedRanks,
    Settings,
    cut_lora,
    load_lora,
    save_lora,
    save_merged,
    train_image,
    train_text,
)
from nestvec.train.lora import ADAPTER  # noqa: E402
from nestvec.train.text import TextTrainer  # noqa: E402
from nestvec.train.trainer import ModuleTrainer  # noqa: E402

RANK, ALPHA = 4, 6
QUICK: dict[str, Any] = {"batch_size": 16, "epochs": 3, "learning_rate": 1e-2}
TEXTS = ["wing flow heat shock", "a jet in the layer", "drag"]


class Small(nn.Module):
    """A convolution and a linear layer: (n, 2, 6, 6) to (n, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.linear = nn.Linear(27, 5)

    def forward(self, x):
        return self.linear(self.conv(x).flatten(1))


def small(**config):
    """The module above with LoRA layers whose B is not 0, and the module as it was."""
    torch.manual_seed(0)
    network, plain = Small(), Small()
    plain.load_state_dict(network.state_dict())
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["conv", "linear"], **config}
    tuned = peft.get_peft_model(network, peft.LoraConfig(**settings))
    give_weights(tuned)
    return tuned, plain


def give_weights(tuned):
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)


@pytest.fixture
def x():
    return torch.randn(7, 2, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.build(tmp_path_factory.mktemp("tiny") / "m")


def pairs(n=96):
    rng = np.random.default_rng(0)
    words: list[str] = list(tiny_model.WORDS)
    other = dict(zip(words, np.random.default_rng(7).permutation(words).tolist(), strict=True))
    first = [" ".join(rng.choice(words, 5)) for _ in range(n)]
    return Examples("pairs", (first, [" ".join(other[w] for w in text.split()) for text in first]))


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """A LoRA of rank 4 that a training left."""
    output = tmp_path_factory.mktemp("lora") / "mine"
    return train_text(
        str(model), pairs(), output, dims=(8, 32), lora=Lora(rank=RANK), settings=Settings(**QUICK)
    )


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


# --- what a rank is ---------------------------------------------------------------------------


@pytest.mark.parametrize("b", range(1, RANK + 1))
def test_a_rank_is_the_published_sum(x, b):
    """W x + alpha / b * B[:, :b] A[:b] x, added to the weights by hand."""
    tuned, plain = small()
    ranks = NestedRanks(tuned)
    ranks.rank = b
    layers = tuned.base_model.model
    with torch.no_grad():
        for name in ("conv", "linear"):
            a, up = (getattr(layers, name).__getattr__(f"lora_{k}")[ADAPTER].weight for k in "AB")
            product = up.flatten(1)[:, :b] @ a.flatten(1)[:b]
            weight = getattr(plain, name).weight
            weight += ALPHA / b * product.view_as(weight)
        torch.testing.assert_close(tuned.eval()(x), plain(x), rtol=1e-5, atol=1e-6)


def test_the_largest_rank_is_what_peft_computes(x):
    tuned, _ = small()
    with torch.no_grad():
        before = tuned.eval()(x)
        NestedRanks(tuned)
        torch.testing.assert_close(tuned(x), before, rtol=0, atol=0)


def test_ranks_are_drawn_uniformly():
    ranks = NestedRanks(small()[0], seed=3)
    drawn = np.array([ranks.draw() for _ in range(8000)])
    shares = np.bincount(drawn, minlength=RANK + 1) / len(drawn)
    np.testing.assert_allclose(shares, [0] + [1 / RANK] * RANK, atol=0.02)


def test_ranks_that_were_named_are_drawn_alone_and_uniformly():
    ranks = NestedRanks(small()[0], ranks=(1, 4), seed=3)
    drawn = np.array([ranks.draw() for _ in range(8000)])
    shares = np.bincount(drawn, minlength=RANK + 1) / len(drawn)
    np.testing.assert_allclose(shares, [0, 0.5, 0, 0, 0.5], atol=0.02)


def test_a_frozen_step_trains_what_the_next_smaller_rank_lacks(x):
    tuned, _ = small()
    ranks = NestedRanks(tuned, ranks=(1, 4), frozen=True)
    for drawn, touched in ((4, [False, True, True, True]), (1, [True, False, False, False])):
        tuned.zero_grad()
        ranks.drawn = drawn
        tuned.train()(x).square().sum().backward()
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                assert parameter.grad is not None
                a_row = parameter.grad if "lora_A" in name else parameter.grad.transpose(0, 1)
                assert (a_row.flatten(1) != 0).any(dim=1).tolist() == touched, name


@pytest.mark.parametrize("frozen", [False, True], ids=["all-below", "frozen"])
def test_a_step_trains_the_rows_that_were_drawn(x, frozen):
    tuned, _ = small()
    ranks = NestedRanks(tuned, frozen=frozen)
    ranks.drawn = 3
    tuned.train()
    x.requires_grad_(True)
    tuned(x).square().sum().backward()
    touched = [False, False, True, False] if frozen else [True, True, True, False]
    for name, parameter in tuned.named_parameters():
        if "lora_" not in name:
            assert parameter.grad is None
            continue
        a_row = parameter.grad if "lora_A" in name else parameter.grad.transpose(0, 1)
        moved = (a_row.flatten(1) != 0).any(dim=1)
        assert moved.tolist() == touched, name
    assert x.grad is not None  # what is frozen still passes its input's gradient on
    frozen_grad, x.grad = x.grad.clone(), None
    ranks.frozen = False
    tuned(x).square().sum().backward()
    torch.testing.assert_close(x.grad, frozen_grad)


def test_training_uses_what_was_drawn_and_looking_does_not(x):
    tuned, _ = small()
    ranks = NestedRanks(tuned)
    ranks.drawn = 1
    with torch.no_grad():
        full, one = tuned.eval()(x), tuned.train()(x)
        ranks.rank = 1
        torch.testing.assert_close(tuned.eval()(x), one)
    assert not torch.allclose(full, one)


def test_the_optimizer_learns_in_an_ordinary_trainer_of_transformers(x, tmp_path):
    """A script of one's own: peft's model, their Trainer, one callback, one line to save."""

    class Task(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x, labels):
            return {"loss": (self.network(x) - labels).square().mean()}

    tuned, _ = small()
    ranks = NestedRanks(tuned)
    drawn = []

    class Spy(DrawRanks):
        def on_step_begin(self, *args, **kwargs):
            super().on_step_begin(*args, **kwargs)
            drawn.append(self.ranks.drawn)

    rows: Any = [{"x": row, "labels": torch.zeros(5)} for row in x.detach()]
    arguments = TrainingArguments(
        str(tmp_path / "t"), max_steps=12, report_to="none", use_cpu=True, disable_tqdm=True
    )
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    Trainer(model=Task(tuned), args=arguments, train_dataset=rows, callbacks=[Spy(ranks)]).train()
    assert len(drawn) == 12
    assert len(set(drawn)) > 1
    moved = [n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])]
    assert moved
    assert all("lora_" in name for name in moved)
    save_lora(tmp_path / "l", tuned)
    cut_lora(tmp_path / "l", tmp_path / "c", rank=2)
    again = peft.PeftModel.from_pretrained(small()[1], str(tmp_path / "c"))
    ranks.rank = 2
    with torch.no_grad():
        torch.testing.assert_close(again(x), tuned.eval()(x), rtol=1e-6, atol=1e-6)


# --- a rank that is cut off -------------------------------------------------------------------


@pytest.mark.parametrize("b", range(1, RANK + 1))
def test_a_cut_lora_is_the_nested_one_for_peft_and_merged(x, tmp_path, b):
    tuned, plain = small()
    ranks = NestedRanks(tuned)
    save_lora(tmp_path / "all", tuned)
    ranks.rank = b
    with torch.no_grad():
        expected = tuned.eval()(x)
    cut_lora(tmp_path / "all", tmp_path / "cut", rank=b)
    config = json.loads((tmp_path / "cut/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (b, ALPHA)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path / "cut"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), expected, rtol=1e-6, atol=1e-6)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-6)


def test_a_cut_of_a_cut_is_a_cut(trained, tmp_path):
    cut_lora(trained.folder, tmp_path / "3", rank=3)
    cut_lora(tmp_path / "3", tmp_path / "2-of-3", rank=2)
    cut_lora(trained.folder, tmp_path / "2", rank=2)
    one, other = adapter(tmp_path / "2-of-3"), adapter(tmp_path / "2")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(DimensionError, match="nested at any rank from 1 to 3"):
        cut_lora(tmp_path / "3", tmp_path / "4", rank=4)


def test_a_lora_of_some_ranks_is_cut_to_these_alone(model, tmp_path):
    def train(ranks):
        settings = Settings(**{**QUICK, "epochs": 1})
        return train_text(
            str(model), pairs(), tmp_path / "x", lora=Lora(rank=ranks), settings=settings
        )

    done = train((4, 1, 2))
    card = (done.folder / "README.md").read_text()
    shown = [line.split(" | ")[0] for line in card.partition("| rank |")[2].splitlines()[2:5]]
    assert shown == ["| 1", "| 2", "| 4"]
    assert "ranks 1, 2, 4." in card
    with pytest.raises(DimensionError, match=r"rank 3 was not trained.* at ranks 1, 2, 4\."):
        cut_lora(done.folder, tmp_path / "3", rank=3)
    assert not (tmp_path / "3").exists()
    cut_lora(done.folder, tmp_path / "2", rank=2)
    cut_lora(tmp_path / "2", tmp_path / "1", rank=1)
    with pytest.raises(DimensionError, match="at any rank from 1 to 2"):
        load_lora(tmp_path / "2", rank=4)
    one, whole = adapter(tmp_path / "1"), adapter(done.folder)
    assert all(v.shape[0 if ".lora_A." in name else 1] == 1 for name, v in one.items())
    name = next(name for name in whole if ".lora_A." in name)
    assert torch.equal(one[name], whole[name][:1])
    with pytest.raises(TrainingError, match=r"lora\.rank was \[1, 2, 4\], now 4"):
        train(4)


def test_files_that_name_no_ranks_have_all_of_them(trained, tmp_path):
    """Those written before ranks could be chosen."""
    folder = tmp_path / "x"
    shutil.copytree(trained.folder, folder)
    state = adapter(folder)
    save_file(state, folder / "adapter_model.safetensors", {"nestvec": '{"nested": true}'})
    cut_lora(folder, tmp_path / "3", rank=3)
    with pytest.raises(DimensionError, match="any rank from 1 to 3"):
        cut_lora(tmp_path / "3", tmp_path / "4", rank=4)


def test_each_rank_is_a_space_and_sentence_transformers_reads_it(trained, model, tmp_path):
    rows = {}
    for b in (1, 2, RANK):
        encoder = load_lora(trained.folder, rank=b)
        rows[b] = encoder.encode(TEXTS)
        cut_lora(trained.folder, tmp_path / str(b), rank=b)
        st = SentenceTransformer(str(model), device="cpu")
        st.load_adapter(str(tmp_path / str(b)))
        theirs = st.encode(TEXTS, normalize_embeddings=True)
        np.testing.assert_allclose(rows[b].array, theirs, atol=1e-6)
        assert rows[b].space.nesting_dims == (8, 32)
    prints = {rows[b].space.fingerprint for b in rows}
    assert len({*prints, nv.TextEncoder(model).space.fingerprint}) == 4
    whole = encoder_of(trained.folder).encode(TEXTS)  # what the command line does with a folder
    assert whole.space == rows[RANK].space
    np.testing.assert_array_equal(whole.array, rows[RANK].array)


def test_merged_it_is_an_ordinary_model_folder(trained, tmp_path):
    encoder = load_lora(trained.folder, rank=2)
    save_merged(encoder, tmp_path / "model")
    again = nv.TextEncoder(tmp_path / "model")
    assert again.space.fingerprint == encoder.space.fingerprint
    assert again.space.nesting_dims == (8, 32)
    np.testing.assert_array_equal(again.encode(TEXTS).array, encoder.encode(TEXTS).array)


def test_a_base_in_memory_is_left_as_it_was(trained, model):
    st = SentenceTransformer(str(model), device="cpu")
    before = st.encode(TEXTS)
    given = load_lora(trained.folder, rank=2, base=st).encode(TEXTS)
    np.testing.assert_array_equal(st.encode(TEXTS), before)
    np.testing.assert_array_equal(
        given.array, load_lora(trained.folder, rank=2).encode(TEXTS).array
    )


def test_the_card_says_what_each_rank_is_worth(trained):
    card = (trained.folder / "README.md").read_text()
    shown = [line.split(" | ")[0] for line in card.partition("| rank |")[2].splitlines()[2:5]]
    assert shown == ["| 1", "| 2", "| 4"]
    full = " | ".join(f"{trained.metrics[name]:.3f}" for name in ("top1@8", "top1@32"))
    assert f"| 4 | {full} |" in card


# --- training ---------------------------------------------------------------------------------


def test_every_rank_learns_and_the_model_stays(model, tmp_path):
    train = pairs(64)
    st = SentenceTransformer(str(model), device="cpu")
    before = {name: value.clone() for name, value in st.state_dict().items()}
    settings = Settings(batch_size=32, epochs=8, learning_rate=3e-2)
    done = train_text(
        st, train, tmp_path / "x", dims=(32,), holdout=0, lora=Lora(rank=RANK), settings=settings
    )
    assert st.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in st.state_dict().items())
    assert all(parameter.requires_grad for parameter in st.parameters())
    assert (done.folder / "adapter_model.safetensors").stat().st_size < 60_000
    assert not (done.folder / "model.safetensors").exists()
    assert "any rank from 1 to 4" in (done.folder / "README.md").read_text()

    def loss(encoder):
        a, b = (torch.from_numpy(encoder.encode(texts).array) for texts in train.texts)
        return float(nn.functional.cross_entropy(20 * a @ b.T, torch.arange(64)))

    start = loss(nv.TextEncoder(st))
    for b in range(1, RANK + 1):
        assert loss(load_lora(done.folder, rank=b, base=st)) < start - 0.2


def test_frozen_layers_and_what_no_vector_needs_get_no_lora(model, tmp_path):
    settings = Settings(**{**QUICK, "max_steps": 1})
    options: dict[str, Any] = {"freeze_layers": 1, "settings": settings}
    done = train_text(str(model), pairs(), tmp_path / "x", lora=Lora(rank=2), **options)
    names = {name.partition(".lora_")[0] for name in adapter(done.folder)}
    assert len(names) == 6  # query, key, value, and three dense layers of the upper layer
    assert all(name.startswith("base_model.model.encoder.layer.1.") for name in names)
    some = Lora(rank=2, targets=("query", "output.dense"))
    done = train_text(str(model), pairs(), tmp_path / "y", lora=some, **options)
    assert len({name.partition(".lora_")[0] for name in adapter(done.folder)}) == 3


def test_a_layer_behind_the_transformer_stays(model, tmp_path):
    st = SentenceTransformer(str(model), device="cpu")
    st.append(Dense(32, 8))
    before = {name: value.clone() for name, value in st.state_dict().items()}
    settings = Settings(**{**QUICK, "max_steps": 2})
    done = train_text(st, pairs(), tmp_path / "x", lora=Lora(rank=2), settings=settings)
    assert all(torch.equal(value, before[name]) for name, value in st.state_dict().items())
    assert load_lora(done.folder, base=st).space.dim == 8


def test_a_model_without_a_transformer_has_no_layers_for_it(model, tmp_path):
    tokenizer = SentenceTransformer(str(model), device="cpu").tokenizer
    st = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    with pytest.raises(ModelError, match="StaticEmbedding has no layers"):
        train_text(st, pairs(), tmp_path / "x", lora=Lora(rank=2))


class Killed(BaseException):
    pass


def killed_at(step, trainer, monkeypatch, train):
    """Run a training that dies before a step."""
    whole, calls = trainer.training_step, []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return whole(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", dies)
        with pytest.raises(Killed):
            train()


def test_a_killed_training_goes_on_to_the_same_weights(trained, model, tmp_path, monkeypatch):
    """Drawn ranks and dropout (of the tiny model) are taken up where they were."""

    def train():
        return train_text(
            str(model),
            pairs(),
            tmp_path / "cut",
            dims=(8, 32),
            lora=Lora(rank=RANK),
            settings=Settings(**QUICK, save_every=3),
        )

    killed_at(8, TextTrainer, monkeypatch, train)
    checkpoint = tmp_path / "cut/checkpoints/checkpoint-6"
    assert not (checkpoint / "model.safetensors").exists()  # the base is there anyway
    done = train()
    one, other = adapter(trained.folder), adapter(done.folder)
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(TrainingError, match=r"lora\.rank was 4, now 3"):
        train_text(
            str(model),
            pairs(),
            tmp_path / "cut",
            dims=(8, 32),
            lora=Lora(rank=3),
            settings=Settings(**QUICK),
        )


class TurnsBad(nn.Module):
    def __init__(self):
        super().__init__()
        self.loss, self.calls = NestedLoss(InfoNCE(), (8, 32)), 0

    def forward(self, *rows):
        self.calls += 1
        return self.loss(*rows) * (1.0 if self.calls < 6 else float("nan"))


def test_nan_stops_it_and_the_model_is_given_back(model, tmp_path):
    st = SentenceTransformer(str(model), device="cpu")
    names = list(st.state_dict())
    with pytest.raises(TrainingError, match=r"stopped at step 6: .*checkpoint-4"):
        train_text(
            st,
            pairs(),
            tmp_path / "x",
            objective=TurnsBad(),
            lora=Lora(rank=2),
            settings=Settings(**QUICK, save_every=2),
        )
    assert list(st.state_dict()) == names


def test_keeping_neighbours_and_chunks_work_with_it(model, tmp_path):
    settings = Settings(**{**QUICK, "max_steps": 2}, chunk_size=5)
    done = train_text(
        str(model), pairs(), tmp_path / "x", keep=1.0, lora=Lora(rank=2), settings=settings
    )
    assert np.isfinite(done.records[0]["loss"])


# --- images -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    pixels = rng.integers(0, 80, size=(64, 32, 32)).astype(np.uint8)
    pixels[labels == 1, :16] += 150
    return Images([str(i) for i in range(64)], pixels, labels, ["low", "high"])


@pytest.fixture(scope="module")
def network(tmp_path_factory, images):
    """A ResNet whose batch norms have seen something."""
    torch.manual_seed(0)
    made = small_resnet(n_channels=1, hidden_sizes=(8, 16), depths=(1, 1), embedding_size=8)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.state_dict()["running_var"].uniform_(0.5, 2)
    folder = tmp_path_factory.mktemp("resnet") / "net"
    save_image_model(folder, made, Preprocessing(32, 1), (8, 16))
    return folder


def test_an_image_network_is_adapted_in_its_convolutions(network, images, tmp_path, monkeypatch):
    def train(output):
        settings = Settings(batch_size=16, epochs=3, learning_rate=1e-2, save_every=3)
        return train_image(str(network), images, output, lora=Lora(rank=3), settings=settings)

    done = train(tmp_path / "whole")
    assert not any("running" in name for name in adapter(done.folder))
    killed_at(6, ModuleTrainer, monkeypatch, lambda: train(tmp_path / "cut"))
    cut = train(tmp_path / "cut")
    one, other = adapter(done.folder), adapter(cut.folder)
    assert all(torch.equal(one[name], other[name]) for name in one)
    cut_lora(done.folder, tmp_path / "2", rank=2)
    two = load_lora(done.folder, rank=2)
    rows = two.encode(images.images[:4])
    np.testing.assert_allclose(
        rows.array, load_lora(tmp_path / "2").encode(images.images[:4]).array, atol=1e-6
    )
    before = nv.ImageEncoder(network).encode(images.images[:4])
    assert np.abs(rows.array - before.array).max() > 1e-3
    assert rows.space.nesting_dims == done.dims
    save_merged(two, tmp_path / "merged")
    again = nv.ImageEncoder(tmp_path / "merged").encode(images.images[:4])
    assert again.space.fingerprint == rows.space.fingerprint
    metrics = {k: v for k, v in done.metrics.items() if k.startswith("accuracy")}
    assert min(metrics.values()) > 0.5  # of a network in its full rank, batch norms held


def test_fresh_weights_are_not_adapted(images, tmp_path):
    with pytest.raises(ModelError, match="starts from nothing"):
        train_image("resnet", images, tmp_path / "x", lora=Lora(rank=2))


# --- what is refused --------------------------------------------------------------------------


def test_a_lora_that_is_not_nested_is_not_cut(model, tmp_path):
    st = SentenceTransformer(str(model), device="cpu")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["query"])
    tuned = peft.get_peft_model(st[0].auto_model, config)
    give_weights(tuned)
    tuned.save_pretrained(str(tmp_path / "theirs"))
    with torch.no_grad():
        expected = st.encode(TEXTS, normalize_embeddings=True)
    ours = train_text(
        str(model),
        pairs(),
        tmp_path / "ours",
        lora=Lora(rank=RANK, nested=False),
        settings=Settings(**{**QUICK, "max_steps": 1}),
    )
    for folder in (tmp_path / "theirs", ours.folder):
        with pytest.raises(ModelError, match=r"of rank 4 that is not rank-nested.*--lora-rank 4"):
            cut_lora(folder, tmp_path / "cut", rank=2)
        with pytest.raises(ModelError, match="not rank-nested"):
            load_lora(folder, rank=2, base=str(model))
        assert not (tmp_path / "cut").exists()
    rows = load_lora(tmp_path / "theirs", base=str(model)).encode(TEXTS)  # its own rank is fine
    np.testing.assert_allclose(rows.array, expected, atol=1e-6)


def test_a_nested_lora_trained_on_without_draws_is_nested_no_more(trained, model, tmp_path):
    """peft keeps no note of ours, so what it has trained on is refused."""
    st = SentenceTransformer(str(model), device="cpu")
    again = peft.PeftModel.from_pretrained(st[0].auto_model, str(trained.folder), is_trainable=True)
    again.save_pretrained(str(tmp_path / "x"))
    with pytest.raises(ModelError, match="not rank-nested"):
        cut_lora(tmp_path / "x", tmp_path / "y", rank=2)


@pytest.mark.parametrize("rank", [0, -1, RANK + 1])
def test_a_rank_that_was_not_trained_says_what_would_fit(trained, tmp_path, rank):
    with pytest.raises(DimensionError, match=f"rank {rank} was not trained.*from 1 to 4"):
        cut_lora(trained.folder, tmp_path / "x", rank=rank)
    ranks = NestedRanks(small()[0])
    with pytest.raises(DimensionError, match="was not trained"):
        ranks.rank = rank
    with pytest.raises(DimensionError, match="do not fit LoRA layers of rank 4"):
        NestedRanks(small()[0], ranks=(1, RANK + 1))


def test_another_base_is_refused(trained, tmp_path):
    other = tiny_model.build(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="was trained on a model with fingerprint"):
        load_lora(trained.folder, base=str(other))


def test_a_lora_that_names_no_base_asks_for_it(tmp_path):
    tuned, _ = small()
    NestedRanks(tuned)
    save_lora(tmp_path / "x", tuned)
    with pytest.raises(ModelError, match="pass base="):
        load_lora(tmp_path / "x")


def test_what_is_no_lora_or_damaged_says_so(trained, tmp_path):
    with pytest.raises(ModelError, match=r"holds no LoRA: it has no adapter_config\.json"):
        cut_lora(tmp_path, tmp_path / "x", rank=1)
    broken = tmp_path / "broken"
    shutil.copytree(trained.folder, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(FileFormatError, match="damaged"):
        cut_lora(broken, tmp_path / "x", rank=1)
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        cut_lora(broken, tmp_path / "x", rank=1)
    ia3 = peft.IA3Config(target_modules=["linear"], feedforward_modules=["linear"])
    peft.get_peft_model(Small(), ia3).save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(ModelError, match="IA3, which is no LoRA"):
        cut_lora(tmp_path / "ia3", tmp_path / "x", rank=1)


def test_weights_that_do_not_have_the_rank_they_claim_are_damaged(trained, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(trained.folder, folder)
    state = {name: value[:2].contiguous() for name, value in adapter(folder).items()}
    save_file(state, folder / "adapter_model.safetensors", {"nestvec": '{"nested": true}'})
    with pytest.raises(FileFormatError, match="rank"):
        cut_lora(folder, tmp_path / "y", rank=1)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"use_rslora": True}, "is a variant"),
        ({"use_dora": True}, "is a variant"),
        ({"rank_pattern": {"linear": 2}}, "rank or alpha of its own"),
    ],
    ids=["rslora", "dora", "ranks-of-their-own"],
)
def test_layers_that_cannot_be_nested_are_named(config, why):
    with pytest.raises(ModelError, match=rf"LoRA layer .*(conv|linear).* {why}"):
        NestedRanks(small(**config)[0])


def test_layers_without_lora_cannot_be_nested():
    with pytest.raises(ModelError, match="no LoRA layers"):
        NestedRanks(Small())
    with pytest.raises(ModelError, match="is no PeftModel"):
        save_lora("x", Small())


def test_settings_and_targets_that_do_not_fit(model, tmp_path):
    bad: list[dict[str, Any]] = [
        {"rank": 0},
        {"alpha": 0},
        {"rank": ()},
        {"rank": (0, 4)},
        {"rank": (2, 4), "nested": False},
        {"targets": "query"},
        {"targets": ()},
        {"nested": False, "frozen": True},
        {"dropout": 1.0},
    ]
    for settings in bad:
        with pytest.raises(DataError):
            Lora(**settings)
    with pytest.raises(ModelError, match=r"target 'q_proj'.*dense, key, query, value"):
        train_text(str(model), pairs(), tmp_path / "x", lora=Lora(targets=("q_proj",)))


# --- the command line -------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_train_cut_and_merge_from_the_command_line(model, tmp_path):
    source = tmp_path / "pairs.jsonl"
    rows = zip(*pairs(32).texts, strict=True)
    source.write_text("".join(json.dumps({"anchor": a, "positive": b}) + "\n" for a, b in rows))
    lora = tmp_path / "lora"
    options = ["--model", model, "--lora-rank", 3, "--max-steps", 2, "--batch-size", 8]
    done = run("train", "text", source, "-o", lora, *options)
    assert done.exit_code == 0, done.output
    done = run("lora", "cut", lora, "-o", tmp_path / "two", "--rank", 2, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rank"] == 2
    done = run("lora", "merge", tmp_path / "two", "-o", tmp_path / "model", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["space"]["nesting_dims"] == [16, 32]
    expected = load_lora(lora, rank=2).encode(TEXTS)
    np.testing.assert_array_equal(
        nv.TextEncoder(tmp_path / "model").encode(TEXTS).array, expected.array
    )
    done = run("lora", "merge", lora, "-o", tmp_path / "model", "--rank", 1)
    assert done.exit_code == 2  # it stands, and is somebody's model
    done = run("lora", "cut", lora, "-o", tmp_path / "x", "--rank", 5)
    assert done.exit_code == 2
    options[options.index("--lora-rank") + 1] = "1,3"
    done = run("train", "text", source, "-o", tmp_path / "some", *options)
    assert done.exit_code == 0, done.output
    done = run("lora", "cut", tmp_path / "some", "-o", tmp_path / "x", "--rank", 2)
    assert done.exit_code == 2
    options[options.index("--lora-rank") + 1] = "1-3"
    done = run("train", "text", source, "-o", tmp_path / "none", *options)
    assert done.exit_code == 2
    assert "like 1,2,4,8,16" in done.output
