"""A text model is trained to be nested: as its loss says, resumed exactly, loadable anywhere."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")
pytest.importorskip("sentence_transformers", reason="nestvec[text]")
pytest.importorskip("accelerate", reason="nestvec[text]")

import tiny_model  # noqa: E402  # behind importorskip
from safetensors.torch import load_file  # noqa: E402
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer  # noqa: E402
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments  # noqa: E402
from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402
from torch import nn  # noqa: E402

import nestvec as nv  # noqa: E402
from nestvec.corpus.examples import Examples, read_examples  # noqa: E402
from nestvec.errors import (  # noqa: E402
    DataError,
    DimensionError,
    ModelError,
    StorageError,
    TrainingError,
)
from nestvec.train import (  # noqa: E402
    InfoNCE,
    NestedLoss,
    SentenceTransformerLoss,
    Settings,
    load_classifier,
    train_text,
)
from nestvec.train.run import Run  # noqa: E402
from nestvec.train.text import TextTrainer, _split  # noqa: E402
from nestvec.train.validation import pair_accuracy  # noqa: E402

DIMS = (4, 8, 16, 32)
QUICK = {"batch_size": 16, "epochs": 3, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model without dropout, so that two ways to the same loss are the same."""
    folder = tmp_path_factory.mktemp("tiny") / "m"
    return tiny_model.build(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory):
    return tiny_model.build(tmp_path_factory.mktemp("tiny") / "m")


def sentences(n, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(tiny_model.WORDS, 5)) for _ in range(n)]


def pairs(n=96):
    """A sentence and its translation, word by word: nothing that is known without training."""
    words: list[str] = list(tiny_model.WORDS)
    other = dict(zip(words, np.random.default_rng(7).permutation(words).tolist(), strict=True))
    first = sentences(n)
    return Examples("pairs", (first, [" ".join(other[w] for w in text.split()) for text in first]))


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


# --- the loss -------------------------------------------------------------------------------------


def test_our_loss_is_that_of_sentence_transformers_on_the_same_batch(model):
    st = SentenceTransformer(str(model), device="cpu")
    columns = [st.preprocess(text[:12]) for text in pairs().texts]
    inner = theirs.MultipleNegativesRankingLoss(st)
    peer = theirs.MatryoshkaLoss(st, inner, matryoshka_dims=list(DIMS))
    ours = SentenceTransformerLoss(st, NestedLoss(InfoNCE(scale=20.0), DIMS))
    torch.testing.assert_close(ours(columns), peer(columns, None))


def test_our_loss_works_in_their_trainer(model, tmp_path):
    from datasets import Dataset

    st = SentenceTransformer(str(model), device="cpu")
    before = {name: value.clone() for name, value in st.state_dict().items()}
    first, second = pairs(32).texts
    SentenceTransformerTrainer(
        model=st,
        args=Arguments(output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True),
        train_dataset=Dataset.from_dict({"anchor": first, "positive": second}),
        loss=SentenceTransformerLoss(st, NestedLoss(InfoNCE(), DIMS), chunk_size=3),
    ).train()
    assert any(not torch.equal(before[name], value) for name, value in st.state_dict().items())


def test_chunks_train_as_the_whole_batch_does(model, tmp_path):
    found = [
        train_text(
            str(model),
            pairs(),
            tmp_path / str(chunk),
            dims=DIMS,
            holdout=0,
            settings=Settings(**QUICK, chunk_size=chunk),
        )
        for chunk in (None, 5)
    ]
    a, b = ([r["loss"] for r in one.records if "loss" in r] for one in found)
    assert a == pytest.approx(b, rel=1e-4)


# --- what is trained ------------------------------------------------------------------------------


def test_training_on_pairs_finds_more_partners_at_every_size(model, tmp_path):
    held_out = Examples("pairs", tuple(column[-32:] for column in pairs(160).texts))
    train = Examples("pairs", tuple(column[:128] for column in pairs(160).texts))
    options = {"dims": DIMS, "validation": held_out}
    start = train_text(
        str(model),
        train,
        tmp_path / "a",
        **options,
        settings=Settings(batch_size=16, max_steps=1, learning_rate=1e-9),
    )
    done = train_text(
        str(model),
        train,
        tmp_path / "b",
        **options,
        settings=Settings(batch_size=16, epochs=12, learning_rate=2e-3),
    )
    assert list(start.metrics) == [f"top1@{dim}" for dim in DIMS]
    for name, value in start.metrics.items():
        assert done.metrics[name] > value + 0.1


def test_every_kind_of_examples_is_trained_and_scored(model, tmp_path, rng):
    texts = sentences(100)
    labels = np.array(["wing" in text for text in texts]).astype(np.int64)
    kinds = {
        "spearman": Examples("scored", (texts, texts[::-1]), rng.random(100).astype(np.float32)),
        "accuracy": Examples("labelled", (texts,), labels, ("no", "yes")),
        "top1": Examples("triplets", (texts, texts[::-1], sentences(100, seed=1))),
    }
    settings = Settings(**{**QUICK, "epochs": 8}, head_learning_rate=0.05)
    for name, examples in kinds.items():
        done = train_text(str(model), examples, tmp_path / name, dims=DIMS, settings=settings)
        assert list(done.metrics) == [f"{name}@{dim}" for dim in DIMS]
    head, names = load_classifier(tmp_path / "accuracy")
    assert names == ("no", "yes")
    assert head.dims == DIMS
    rows = torch.from_numpy(nv.TextEncoder(tmp_path / "accuracy").encode(texts).array)
    guessed = head(rows)[32].argmax(dim=1).numpy()
    assert (guessed == labels).mean() > max(labels.mean(), 1 - labels.mean())


def test_frozen_layers_stay_and_the_others_move(model, tmp_path):
    before = weights_of(model)
    done = train_text(
        str(model), pairs(), tmp_path / "x", freeze_layers=1, settings=Settings(**QUICK)
    )
    after = weights_of(done.folder)
    frozen = [n for n in before if n.startswith(("embeddings.", "encoder.layer.0."))]
    moved = [n for n in before if n.startswith("encoder.layer.1.") and n.endswith("weight")]
    assert len(frozen) > 10
    assert_same_weights({n: before[n] for n in frozen}, {n: after[n] for n in frozen})
    assert not any(torch.equal(before[n], after[n]) for n in moved)


def test_the_seed_decides_everything(with_dropout, tmp_path):
    found = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = Settings(**QUICK, seed=seed)
        done = train_text(str(with_dropout), pairs(), tmp_path / name, settings=settings)
        found[name] = weights_of(done.folder)
    assert_same_weights(found["a"], found["b"])
    assert any(not torch.equal(found["a"][n], found["c"][n]) for n in found["a"])


def test_bfloat16_trains_and_leaves_float32_weights(model, tmp_path):
    settings = Settings(**QUICK, precision="bfloat16")
    done = train_text(str(model), pairs(), tmp_path / "x", dims=DIMS, settings=settings)
    weights = weights_of(done.folder)
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {
        torch.float32
    }


def test_texts_that_recur_are_trained_on_all_the_same(model, tmp_path):
    first, second = pairs(30).texts
    recurring = Examples("pairs", (first, [second[0]] * 29 + [second[1]]))
    done = train_text(
        str(model), recurring, tmp_path / "x", holdout=0, settings=Settings(learning_rate=1e-3)
    )
    assert max(record["step"] for record in done.records) == 1
    assert not torch.equal(
        *(weights_of(f)["embeddings.LayerNorm.weight"] for f in (model, done.folder))
    )


def test_all_rows_of_a_query_are_held_out_together(model, tmp_path):
    first, second = pairs(96).texts
    queries = [first[row // 4] for row in range(96)]
    train, held_out = _split(Examples("pairs", (queries, second)), None, 0.25, 0)
    assert held_out is not None
    assert len(train) + len(held_out) == 96
    assert not set(train.texts[0]) & set(held_out.texts[0])


def test_any_document_of_a_query_is_a_hit(rng):
    rows = torch.from_numpy(rng.normal(size=(3, 4)))
    queries, documents = rows[[0, 0, 1]], rows[[0, 2, 1]]  # the first query has two documents
    found = pair_accuracy(queries, documents, (4,), (["q", "q", "r"], ["a", "b", "c"]))
    assert found == {"top1@4": 1.0}


def test_prompts_of_the_model_are_trained_with(model, tmp_path, monkeypatch):
    """The tiny model puts "a wing " before queries."""
    seen = []
    preprocess = SentenceTransformer.preprocess

    def spy(self, inputs, *args, **kwargs):
        seen.append((kwargs.get("prompt"), list(inputs)))
        return preprocess(self, inputs, *args, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "preprocess", spy)
    train_text(str(model), pairs(), tmp_path / "x", settings=Settings(**QUICK))
    asked = {prompt for prompt, texts in seen if texts[0] in pairs().texts[0]}
    assert "a wing " in asked


def test_heads_are_clipped_with_the_model(model, tmp_path, monkeypatch):
    labels = np.arange(96) % 2
    examples = Examples("labelled", (sentences(96),), labels, ("no", "yes"))
    lengths = []
    norm = TextTrainer._norm

    def spy(self, model, most):
        found = norm(self, model, most)
        everything = [*model.parameters(), *self.beside[0].parameters()]
        grads = [p.grad.norm() for p in everything if p.grad is not None]
        lengths.append(float(torch.stack(grads).norm()))
        return found

    monkeypatch.setattr(TextTrainer, "_norm", spy)
    train_text(str(model), examples, tmp_path / "x", settings=Settings(**QUICK, max_grad_norm=1e-3))
    assert max(lengths) < 1.1e-3


# --- what is left ---------------------------------------------------------------------------------


def test_what_is_saved_loads_everywhere(model, tmp_path):
    done = train_text(
        str(model), pairs(), tmp_path / "mine", dims=(8, 4), settings=Settings(**QUICK)
    )
    config = json.loads((done.folder / "config.json").read_text())
    assert config["is_matryoshka"] is True
    assert config["matryoshka_dimensions"] == [4, 8, 32]
    cut = SentenceTransformer(str(done.folder), truncate_dim=4, device="cpu")
    texts = sentences(3)
    theirs = cut.encode(texts, normalize_embeddings=True)
    ours = nv.TextEncoder(done.folder).encode(texts)
    assert ours.space.nesting_dims == (4, 8, 32)
    np.testing.assert_allclose(ours.prefix(4).array, theirs, atol=1e-6)
    card = (done.folder / "README.md").read_text()
    assert f"| 4 | 16 | {done.metrics['top1@4']:.3f} |" in card
    assert "truncate_dim" in card
    assert not (done.folder / "checkpoints").exists()
    assert not list(done.folder.rglob("*.bin"))  # no pickles


def test_a_finished_training_is_not_done_again(model, tmp_path, capsys):
    first = train_text(str(model), pairs(), tmp_path / "x", settings=Settings(**QUICK))
    stamp = (tmp_path / "x/model.safetensors").stat().st_mtime_ns
    second = train_text(str(model), pairs(), tmp_path / "x", settings=Settings(**QUICK))
    assert "trained already" in capsys.readouterr().err
    assert second.metrics == first.metrics
    assert (tmp_path / "x/model.safetensors").stat().st_mtime_ns == stamp


class Killed(BaseException):
    pass


def test_what_is_drawn_and_learned_beside_the_model_is_resumed(model, tmp_path, monkeypatch):
    """Sizes drawn a step, dropout, and classifiers with a rate of their own."""
    texts = sentences(96)
    labels = np.array(["wing" in text for text in texts]).astype(np.int64)
    settings = Settings(**QUICK, save_every=3, head_learning_rate=0.05)
    labelled = Examples("labelled", (texts,), labels, ("no", "yes"))
    for name, examples, n_dims in (("drawn", pairs(), 2), ("head", labelled, -1)):
        options: dict[str, Any] = {"dims": DIMS, "settings": settings, "n_dims_per_step": n_dims}
        whole = train_text(str(model), examples, tmp_path / name, **options)
        step, calls = TextTrainer.training_step, []

        def dies(self, *args, step=step, calls=calls, **kwargs):
            calls.append(1)
            if len(calls) == 8:
                raise Killed
            return step(self, *args, **kwargs)

        out = tmp_path / f"{name}-cut"
        with monkeypatch.context() as patch:
            patch.setattr(TextTrainer, "training_step", dies)
            with pytest.raises(Killed):
                train_text(str(model), examples, out, **options)
        cut = train_text(str(model), examples, out, **options)
        assert_same_weights(weights_of(whole.folder), weights_of(cut.folder))
        assert whole.metrics == cut.metrics


# --- what goes wrong ------------------------------------------------------------------------------


class TurnsBad(nn.Module):
    """A loss that is no number from its sixth call on, or whose gradient is not."""

    def __init__(self, only_gradient):
        super().__init__()
        self.loss = NestedLoss(InfoNCE(), DIMS)
        self.only_gradient, self.calls = only_gradient, 0

    def forward(self, *rows):
        self.calls += 1
        loss = self.loss(*rows)
        if self.calls < 6:
            return loss
        if self.only_gradient:  # 0 where it is 0, and infinitely steep there
            return loss + (rows[0] - rows[0].detach()).abs().sqrt().sum()
        return loss * torch.tensor(float("nan"))


@pytest.mark.parametrize("only_gradient", [False, True], ids=["loss", "gradient"])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(model, tmp_path, only_gradient):
    with pytest.raises(TrainingError, match=r"stopped at step 6: .*checkpoint-4") as caught:
        train_text(
            str(model),
            pairs(),
            tmp_path / "x",
            objective=TurnsBad(only_gradient),
            settings=Settings(**QUICK, save_every=2),
        )
    assert ("gradient" in str(caught.value)) == only_gradient
    kept = weights_of(tmp_path / "x/checkpoints/checkpoint-4")
    assert all(torch.isfinite(value).all() for value in kept.values())


def test_a_folder_of_another_configuration_is_refused(model, tmp_path):
    train_text(str(model), pairs(), tmp_path / "x", dims=DIMS, settings=Settings(**QUICK))
    other = Settings(**{**QUICK, "learning_rate": 2e-3})
    with pytest.raises(TrainingError, match=r"settings.learning_rate was 0.001, now 0.002"):
        train_text(str(model), pairs(), tmp_path / "x", dims=DIMS, settings=other)
    with pytest.raises(TrainingError, match=r"dims was \[4, 8, 16, 32\], now \[8, 32\]"):
        train_text(str(model), pairs(), tmp_path / "x", dims=(8,), settings=Settings(**QUICK))
    with pytest.raises(TrainingError, match=r"examples was"):
        train_text(str(model), pairs(80), tmp_path / "x", dims=DIMS, settings=Settings(**QUICK))
    done = train_text(str(model), pairs(), tmp_path / "x", dims=DIMS, settings=other, fresh=True)
    assert json.loads((done.folder / "training.json").read_text())["finished"] is True


def test_objectives_are_told_apart_and_functions_can_be_resumed(model, tmp_path):
    options: dict[str, Any] = {"settings": Settings(**QUICK)}
    wide, narrow = (NestedLoss(InfoNCE(), dims) for dims in ((8, 32), (4, 32)))
    train_text(str(model), pairs(), tmp_path / "x", objective=wide, **options)
    with pytest.raises(TrainingError, match=r"objective was"):
        train_text(str(model), pairs(), tmp_path / "x", objective=narrow, **options)

    def plain(a, b):
        return (a - b).square().mean()

    train_text(str(model), pairs(), tmp_path / "y", objective=plain, **options)
    train_text(str(model), pairs(), tmp_path / "y", objective=plain, **options)


def test_weights_go_with_the_sizes_that_are_trained(model, tmp_path):
    with pytest.raises(DataError, match=r"2 weights for 3 sizes: give one for each of 8, 16, 32"):
        train_text(str(model), pairs(), tmp_path / "x", dims=(8, 16), weights=(2, 1))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"schedule": "cosin"}, {"log_every": 0}, {"warmup": -1}, {"seed": -1}, {"max_steps": 0}],
)
def test_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(DataError):
        Settings(**wrong)


def test_a_model_in_memory_is_left_as_it_was_frozen(model, tmp_path):
    st = SentenceTransformer(str(model), device="cpu")
    next(st.parameters()).requires_grad_(False)
    before = [p.requires_grad for p in st.parameters()]
    train_text(st, pairs(), tmp_path / "x", freeze_layers=1, settings=Settings(**QUICK))
    assert [p.requires_grad for p in st.parameters()] == before


def test_a_folder_of_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match=r"something that no training made"):
        train_text(str(model), pairs(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_bad_questions_are_answered_before_the_work(model, tmp_path):
    out = tmp_path / "x"
    with pytest.raises(DimensionError, match=r"size 64 does not fit a model of dim 32"):
        train_text(str(model), pairs(), out, dims=(64,))
    with pytest.raises(ModelError, match=r"the model has 2 layers"):
        train_text(str(model), pairs(), out, freeze_layers=3)
    with pytest.raises(DataError, match=r"at least 2"):
        train_text(str(model), pairs(1), out)
    with pytest.raises(DataError, match=r"validation holds scored"):
        train_text(
            str(model),
            pairs(),
            out,
            validation=Examples("scored", (["a"], ["b"]), np.array([1.0])),
        )
    with pytest.raises(DataError, match=r"batch_size 0"):
        Settings(batch_size=0)
    with pytest.raises(DataError, match=r"precision 'int4' is not one of"):
        Settings(precision="int4")
    with pytest.raises(DataError, match=r"log_to 'paper' is not one of"):
        train_text(str(model), pairs(), out, settings=Settings(log_to=("paper",)))
    if not torch.cuda.is_available():
        with pytest.raises(DataError, match=r"float16 needs an accelerator"):
            train_text(str(model), pairs(), out, settings=Settings(precision="float16"))
    assert not out.exists()


def test_a_checkpoint_that_was_cut_short_does_not_count(tmp_path):
    run = Run(tmp_path / "x", {"a": 1})
    for step in (2, 4, 6):
        folder = run.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(100))
        if step < 6:  # a kill came before the end of the third
            run.mark_complete(step)
    (run.checkpoints / "checkpoint-4/model.safetensors").write_bytes(bytes(50))
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-2"
    run.drop_torn()
    assert [p.name for p in run.checkpoints.iterdir()] == ["checkpoint-2"]


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(model, tmp_path, mounted):
    small = tmp_path / "small"
    mounted(small, "-t", "tmpfs", "-o", "size=900k", "none")
    settings = Settings(**QUICK, save_every=4)
    with pytest.raises(StorageError, match=r"no space left.*goes on from .*checkpoint-\d"):
        train_text(str(model), pairs(), small / "x", settings=settings)
    kept = list((small / "x/checkpoints").iterdir())
    assert kept
    assert all((folder / "complete").exists() for folder in kept)
    subprocess.run(["mount", "-o", "remount,size=9m", str(small)], check=True)
    done = train_text(str(model), pairs(), small / "x", settings=settings)
    whole = train_text(str(model), pairs(), tmp_path / "whole", settings=settings)
    assert_same_weights(weights_of(done.folder), weights_of(whole.folder))


def test_a_damaged_run_says_what_to_do(tmp_path):
    Run(tmp_path / "x", {"a": 1})
    (tmp_path / "x/training.json").write_text("{")
    with pytest.raises(TrainingError, match=r"damaged. Remove .* to start anew"):
        Run(tmp_path / "x", {"a": 1})


# --- real processes -------------------------------------------------------------------------------


def write_pairs(path, n=256):
    first, second = pairs(n).texts
    rows = [{"anchor": a, "positive": b} for a, b in zip(first, second, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(*words):
    return [sys.executable, "-m", "nestvec", "train", "text", *map(str, words)]


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def _one_torch_thread():
    """As `ENV` has it for processes: sums in another order are other sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_torch_thread")
def test_a_killed_run_goes_on_to_the_very_same_weights(with_dropout, tmp_path):
    source = write_pairs(tmp_path / "pairs.jsonl")
    options = ["--model", with_dropout, "--batch-size", 16, "--epochs", 12, "--dims", "8,32"]
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(source, "-o", killed, *options), env=ENV, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(killed.glob("checkpoints/*/complete")):  # then it is well on its way
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(
        command(source, "-o", killed, *options), env=ENV, capture_output=True, text=True, check=True
    )
    assert "going on from step" in again.stderr
    run = train_text(
        str(with_dropout),
        read_examples(source),
        tmp_path / "whole",
        dims="8,32",
        settings=Settings(batch_size=16, epochs=12),
    )
    assert_same_weights(weights_of(killed), weights_of(run.folder))
    steps = [json.loads(x)["step"] for x in (killed / "log.jsonl").read_text().splitlines()]
    assert steps == [record["step"] for record in run.records]


def test_two_processes_train_as_one_does(model, tmp_path):
    source = write_pairs(tmp_path / "pairs.jsonl", 64)
    options = ["--model", model, "--batch-size", 16, "--epochs", 2, "--dims", "8,32"]
    options += ["--learning-rate", "1e-3"]
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "nestvec", "train", "text"),
            *map(str, [source, "-o", tmp_path / "two", *options]),
        ],
        env=ENV,
        check=True,
        capture_output=True,
        timeout=300,
    )
    one = train_text(
        str(model),
        read_examples(source),
        tmp_path / "one",
        dims="8,32",
        settings=Settings(batch_size=16, epochs=2, learning_rate=1e-3),
    )
    records = [json.loads(x) for x in (tmp_path / "two/log.jsonl").read_text().splitlines()]
    two = [r["loss"] for r in records if "loss" in r]
    assert two == pytest.approx([r["loss"] for r in one.records if "loss" in r], rel=1e-4)
    a, b = weights_of(tmp_path / "two"), weights_of(one.folder)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
