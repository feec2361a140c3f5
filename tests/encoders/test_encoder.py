"""Around any model: order, batches, prompts, bad input, and going on after an interruption."""

import hashlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import nestvec as nv
from nestvec import CallableEncoder
from nestvec.errors import DataError, FileFormatError, ModelError, StorageError
from nestvec.space import Space


def hashed(texts: list[str]) -> np.ndarray:
    """Eight numbers that depend on the text alone."""
    return np.array([list(hashlib.sha256(t.encode()).digest()[:8]) for t in texts]) + 1.0


TEXTS = [f"text {i} " + "x" * (i * 37 % 101) for i in range(300)]


@pytest.fixture
def encoder() -> CallableEncoder:
    return CallableEncoder(hashed, name="hashed", batch_size=5)


def test_rows_come_in_the_order_given_whatever_their_length(encoder):
    want = hashed(TEXTS)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    got = encoder.encode(TEXTS)
    np.testing.assert_allclose(got.array, want, rtol=1e-6)
    assert got.space == Space.declared("hashed", dim=8)


def test_batches_hold_texts_of_like_length():
    batches = []

    def watched(texts):
        batches.append([len(t) for t in texts])
        return hashed(texts)

    CallableEncoder(watched, name="w", dim=8, batch_size=5).encode(TEXTS)
    assert [max(b) for b in batches] == sorted((max(b) for b in batches), reverse=True)
    assert max(max(b) - min(b) for b in batches) <= 5
    assert {len(b) for b in batches} == {5}


def test_prompts_are_put_before_the_text_and_are_in_the_space():
    encoder = CallableEncoder(hashed, name="m", document_prompt="d: ", query_prompt="q: ")
    plain = CallableEncoder(hashed, name="m")
    got, want = encoder.encode(["a"]), plain.encode(["d: a"])
    np.testing.assert_array_equal(got.array, want.array)
    got, want = encoder.encode(["a"], role="query"), plain.encode(["q: a"])
    np.testing.assert_array_equal(got.array, want.array)
    assert encoder.space.space_id != plain.space.space_id


def test_without_normalisation_the_vectors_are_the_functions_own():
    got = CallableEncoder(hashed, name="m", normalise=False).encode(TEXTS)
    np.testing.assert_array_equal(got.array, hashed(TEXTS))
    assert got.space.normalisation == "none"


def test_encode_takes_a_function_with_a_name():
    got = nv.encode(["a", "b"], model=hashed, name="hashed", ids=["x", "y"])
    assert got.space == Space.declared("hashed", dim=8)
    with pytest.raises(ModelError, match="a function needs name="):
        nv.encode(["a"], model=hashed)


@pytest.mark.parametrize(
    ("texts", "ids", "words"),
    [
        ([], None, "empty"),
        ("one text", None, r"pass \[text\]"),
        (["a", ""], None, "row 1 has no content"),
        (["a", "\n "], [7, 8], r"row 1 \(id 8\) has no content"),
        (["a", "hello \ud83d world"], ["x", "y"], r"row 1 \(id 'y'\) holds half of a character"),
        (["a", "undecodable \udcff"], None, "row 1 holds half of a character"),
        (["a", "b"], ["x", "x\ud83d"], "id of row 1, .* half of a character"),
        (["a", "b"], ["x", "x"], "duplicate ids"),
        (["a", "b"], ["x"], "one id a row"),
    ],
)
def test_bad_texts_are_refused_before_the_model_runs(texts, ids, words):
    def never(texts):
        raise AssertionError

    with pytest.raises(DataError, match=words):
        CallableEncoder(never, name="m", dim=8).encode(texts, ids=ids)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda t: np.full((len(t), 8), np.nan), "NaN"),
        (lambda t: np.zeros((len(t), 8)), "all zeros"),
        (lambda t: np.ones((len(t), 7)), "7 dims given where 8"),
        (lambda t: np.ones((len(t) + 1, 8)), "4 vectors for 3 texts"),
        (lambda t: [[1.0] * 8, [1.0]], "different lengths"),
        (lambda t: "x", "expected a matrix"),
    ],
)
def test_a_function_that_returns_no_vectors_is_refused(function, words):
    with pytest.raises(DataError, match=f"what the model returned .*{words}"):
        CallableEncoder(function, name="m", dim=8).encode(["a", "b", "c"])


def test_progress_is_on_stderr_and_only_when_wanted(encoder, capsys):
    encoder.encode(TEXTS)
    assert capsys.readouterr() == ("", "")
    encoder.encode(TEXTS, show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "encoding documents: 300/300 texts" in err


# --- resume ---------------------------------------------------------------------------------------


class Interrupted:
    """Stops like Ctrl-C after some batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, texts):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return hashed(texts)


def test_an_interrupted_run_goes_on_where_it_stopped(encoder, tmp_path):
    first = CallableEncoder(Interrupted(40), name="hashed", dim=8, batch_size=5)
    with pytest.raises(KeyboardInterrupt):
        first.encode(TEXTS, resume=tmp_path / "parts")
    second = CallableEncoder(Interrupted(60 - 32), name="hashed", dim=8, batch_size=5)
    got = second.encode(TEXTS, resume=tmp_path / "parts")
    assert second.report.n_resumed == 2 * 16 * 5  # two whole chunks of 16 batches
    np.testing.assert_array_equal(got.array, encoder.encode(TEXTS).array)


def test_a_damaged_chunk_is_encoded_again(encoder, tmp_path):
    whole = encoder.encode(TEXTS, resume=tmp_path)
    chunk = tmp_path / "000001.npy"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    again = encoder.encode(TEXTS, resume=tmp_path)
    np.testing.assert_array_equal(again.array, whole.array)
    assert encoder.report.n_resumed == 300 - 80


def test_chunks_of_another_encoding_are_refused(encoder, tmp_path):
    encoder.encode(TEXTS, resume=tmp_path)
    others = [
        lambda: encoder.encode(TEXTS[1:], resume=tmp_path),
        lambda: encoder.encode([*TEXTS[1:], TEXTS[0]], resume=tmp_path),
        lambda: encoder.encode(TEXTS, role="query", resume=tmp_path),
        lambda: CallableEncoder(hashed, name="other", batch_size=5).encode(TEXTS, resume=tmp_path),
        lambda: CallableEncoder(hashed, name="hashed", batch_size=6).encode(TEXTS, resume=tmp_path),
    ]
    for other in others:
        with pytest.raises(DataError, match="holds the chunks of another encoding"):
            other()


def test_a_folder_of_something_else_is_refused(encoder, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="not a folder of chunks"):
        encoder.encode(TEXTS, resume=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_encode_to_leaves_only_the_file(encoder, tmp_path):
    got = encoder.encode_to(tmp_path / "x.npz", TEXTS)
    np.testing.assert_array_equal(nv.load(tmp_path / "x.npz").array, got.array)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_encode_to_refuses_an_ending_before_the_work(tmp_path):
    with pytest.raises(FileFormatError, match=r"choose one of \.safetensors"):
        CallableEncoder(Interrupted(0), name="m", dim=8).encode_to(tmp_path / "x.csv", TEXTS)


@pytest.mark.parametrize("name", ["file/x.npz", "folder.npz"])
def test_encode_to_refuses_a_place_it_cannot_write_before_the_work(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "folder.npz" / "precious").write_text("")
    with pytest.raises(StorageError, match=f"cannot write .*{name}: "):
        CallableEncoder(Interrupted(0), name="m", dim=8).encode_to(tmp_path / name, TEXTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.npz"]


SLOW = """
import sys, time, hashlib
import numpy as np
from nestvec import CallableEncoder

def slow(texts):
    time.sleep(0.02)
    return np.array([list(hashlib.sha256(t.encode()).digest()[:8]) for t in texts]) + 1.0

texts = [f"text {i} " + "x" * (i * 37 % 101) for i in range(1000)]
CallableEncoder(slow, name="hashed", dim=8, batch_size=5).encode_to(sys.argv[1], texts)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_a_process_killed_half_way_loses_no_finished_chunk(tmp_path, how):
    path = tmp_path / "x.safetensors"
    old = CallableEncoder(hashed, name="old").encode(["old"])
    old.save(path)
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(path)], stderr=subprocess.PIPE)
    partial = tmp_path / "x.safetensors.partial"
    deadline = time.monotonic() + 30
    while len(list(partial.glob("*.npy"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(how)
    child.communicate()
    assert child.returncode != 0
    np.testing.assert_array_equal(nv.load(path).array, old.array)  # the old file stands

    texts = [f"text {i} " + "x" * (i * 37 % 101) for i in range(1000)]
    encoder = CallableEncoder(hashed, name="hashed", dim=8, batch_size=5)
    resumed = encoder.encode_to(path, texts)
    assert 240 <= encoder.report.n_resumed < 1000
    np.testing.assert_array_equal(resumed.array, encoder.encode(texts).array)
    assert not partial.exists()


def test_a_file_is_reused_only_for_the_same_texts_ids_and_role(tmp_path):
    calls = []

    def watched(texts):
        calls.append(len(texts))
        return hashed(texts)

    encoder = CallableEncoder(watched, name="m", dim=8, query_prompt="q: ")
    path = tmp_path / "x.npz"

    def encoded(texts, **more):
        calls.clear()
        got = encoder.encode_to(path, texts, reuse=True, **more)
        np.testing.assert_array_equal(got.array, encoder.encode(texts, **more).array)
        return len(calls) > 1  # the comparison is one call itself

    assert encoded(TEXTS[:20])
    assert not encoded(TEXTS[:20])
    assert encoded([*TEXTS[:19], "changed"])
    assert encoded([*TEXTS[:19], "changed"], ids=[f"i{n}" for n in range(20)])
    assert encoded([*TEXTS[:19], "changed"], ids=[f"i{n}" for n in range(20)], role="query")
    assert not encoded([*TEXTS[:19], "changed"], ids=[f"i{n}" for n in range(20)], role="query")


def test_a_file_that_was_overwritten_is_not_taken_for_the_encoded_one(encoder, tmp_path):
    path = tmp_path / "x.npz"
    encoder.encode_to(path, TEXTS[:5], reuse=True)
    CallableEncoder(hashed, name="other").encode_to(path, TEXTS[:5])
    got = encoder.encode_to(path, TEXTS[:5], reuse=True)
    assert got.space == encoder.space
