"""Every compiled kernel against its plain twin, and laws that hold for both."""

import os
import subprocess
import sys

import numpy as np
import pytest

from nestvec.search.kernels import NOTHING, _numba, _numpy

N, DIM, ASKED = 600, 96, 7
ALL = np.empty(0, np.bool_)


@pytest.fixture
def codes(rng):
    return rng.integers(1, 256, (N, DIM)).astype(np.uint8)


@pytest.fixture
def queries(rng):
    return rng.integers(-127, 128, (ASKED, DIM)).astype(np.int8)


@pytest.fixture
def graph(rng):
    """Rows linked to chance neighbours, some to fewer; two upper levels."""
    links = np.full((N, 16), -1, np.int32)
    for row in range(N):
        n = rng.integers(4, 17)
        links[row, :n] = rng.choice(N, n, replace=False)
    upper = rng.integers(0, 30, (40, 8)).astype(np.int32)
    upper[30:] = rng.integers(0, 10, (10, 8))
    upper[:, 6:] = -1
    upper_rows = rng.permutation(N)[:40].astype(np.int32)
    upper_rows[30:] = upper_rows[:10]
    down = np.concatenate([upper_rows[:30], np.arange(10)]).astype(np.int32)
    return links, upper, np.array([0, 30, 40]), upper_rows, down


def shortlists(rng, width=50):
    out = np.full((ASKED, width), NOTHING, np.int32)
    for line in out:
        n = rng.integers(1, width + 1)
        line[rng.choice(width, n, replace=False)] = rng.choice(N, n, replace=False)
    return out


def both(name, *arguments, keep=20, scored: type = np.int32):
    """What the two say: (scores, rows, answer) twice."""
    found = []
    for module in (_numba, _numpy):
        scores, rows = np.zeros((ASKED, keep), scored), np.zeros((ASKED, keep), np.int32)
        answer = getattr(module, name)(*arguments, scores, rows)
        scores[rows == NOTHING] = 0
        found.append((scores, rows, answer))
    return found


def assert_same(found):
    (scores, rows, answer), (wanted_scores, wanted_rows, wanted) = found
    np.testing.assert_array_equal(rows, wanted_rows)
    np.testing.assert_allclose(scores, wanted_scores, rtol=0, atol=1e-6)
    assert answer == wanted


@pytest.mark.parametrize("dim", [32, 64, 96, 160])
@pytest.mark.parametrize("n", [1, 10, N])
def test_scan_agrees_with_its_twin(rng, dim, n):
    codes = rng.integers(1, 256, (n, dim)).astype(np.uint8)
    queries = rng.integers(-127, 128, (ASKED, dim)).astype(np.int8)
    assert_same(both("scan", codes, queries, ALL))
    assert_same(both("scan", codes, queries, rng.random(n) < 0.5))


def test_scan_over_several_tiles_agrees(rng, queries):
    codes = rng.integers(1, 256, (3000, DIM)).astype(np.uint8)  # more than a tile of 256 kB
    assert_same(both("scan", codes, queries, ALL, keep=700))


def test_extreme_codes_do_not_overflow():
    codes, queries = np.full((N, DIM), 255, np.uint8), np.full((ASKED, DIM), -127, np.int8)
    assert_same(both("scan", codes, queries, ALL))


def test_equal_scores_go_to_the_lower_row(queries):
    codes = np.full((N, DIM), 130, np.uint8)
    (_, rows, _), _ = both("scan", codes, queries, ALL)
    np.testing.assert_array_equal(rows, np.tile(np.arange(20), (ASKED, 1)))


def test_lists_agree_with_their_twin(rng, codes, queries):
    starts = np.array([0, 100, 100, 350, N])
    numbers = rng.permutation(N).astype(np.int32)
    probes = np.array([rng.choice(4, 2, replace=False) for _ in range(ASKED)]).astype(np.int32)
    assert_same(both("scan_lists", codes, starts, numbers, probes, queries, ALL))
    alive = rng.random(N) < 0.5
    assert_same(both("scan_lists", codes, starts, numbers, probes, queries, alive))


def test_all_lists_together_are_a_scan(rng, codes, queries):
    numbers = rng.permutation(N).astype(np.int32)
    probes = np.tile(np.arange(3, dtype=np.int32), (ASKED, 1))
    starts = np.array([0, 7, 400, N])
    (_, rows, _), _ = both("scan_lists", codes[numbers], starts, numbers, probes, queries, ALL)
    (_, scanned, _), _ = both("scan", codes, queries, ALL)
    np.testing.assert_array_equal(rows, scanned)


@pytest.mark.parametrize("ef", [1, 5, 40])
def test_walk_agrees_with_its_twin(graph, codes, queries, ef):
    seen, clock = np.zeros(N, np.uint16), np.zeros(1, np.int64)
    assert_same(both("walk", *graph, codes, queries, seen, clock, keep=ef))


def test_a_walk_keeps_equals_in_the_order_it_met_them(graph, rng):
    codes = rng.integers(127, 130, (N, 32)).astype(np.uint8)  # few scores for many rows
    asked = rng.integers(-1, 2, (ASKED, 32)).astype(np.int8)
    assert_same(both("walk", *graph, codes, asked, np.zeros(N, np.uint16), np.zeros(1, np.int64)))


def test_walk_forgets_earlier_queries_when_its_clock_starts_again(graph, codes, queries):
    fresh = both("walk", *graph, codes, queries, np.zeros(N, np.uint16), np.zeros(1, np.int64))
    seen, clock = np.full(N, 2, np.uint16), np.array([2**16 - 3])
    assert_same([both("walk", *graph, codes, queries, seen, clock)[0], fresh[1]])


def test_a_walk_that_keeps_every_row_of_a_connected_graph_is_a_scan(rng, codes, queries):
    ring = np.stack([np.roll(np.arange(N), 1), np.roll(np.arange(N), -1)], axis=1)
    one = np.zeros(1, np.int32)
    graph = ring.astype(np.int32), np.full((1, 1), -1, np.int32), np.array([0, 1]), one, one
    seen, clock = np.zeros(N, np.uint16), np.zeros(1, np.int64)
    (scores, _, _), _ = both("walk", *graph, codes, queries, seen, clock, keep=N)
    (scanned, _, _), _ = both("scan", codes, queries, ALL, keep=N)
    np.testing.assert_array_equal(scores, scanned)


def test_rescore_agrees_with_its_twin(rng, codes, queries):
    assert_same(both("rescore", codes, queries, shortlists(rng)))


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("dim", [DIM, 83])
def test_rescoring_by_decoded_codes_agrees_with_its_twin(rng, codes, dim, in_order):
    codes[5, :dim] = 128  # no length
    places = np.arange(0) if in_order else rng.permutation(N)
    scale = rng.uniform(0.01, 0.1, dim).astype(np.float32)
    asked = 100 * rng.normal(size=(ASKED, DIM)).astype(np.float32)
    lists = shortlists(rng)
    lists[0, :50] = np.arange(50)
    arguments = codes, scale, places.astype(np.int32), asked, lists
    assert_same(both("rescore_decoded", *arguments, scored=np.float32))


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("dim", [DIM, 83])
def test_rescoring_by_finer_codes_agrees_with_its_twin(rng, codes, dim, in_order):
    places = np.arange(0) if in_order else rng.permutation(N)
    scale = rng.uniform(0.01, 0.1, dim).astype(np.float32)
    codes[5, :dim] = 128
    steps = np.where(np.arange(dim) % 7, scale / 8, 0).astype(np.float32)
    rests = rng.integers(0, 256, (N, codes.shape[1] // 4)).astype(np.uint8)
    asked = 100 * rng.normal(size=(ASKED, DIM)).astype(np.float32)
    arguments = codes, rests, scale, steps, places.astype(np.int32), asked, shortlists(rng)
    assert_same(both("rescore_finer", *arguments, scored=np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("dim", [DIM, 24])
def test_rerank_agrees_with_its_twin(rng, dtype, dim):
    vectors = rng.normal(size=(N, DIM)).astype(dtype)
    words = vectors.view({2: np.uint16, 4: np.uint32}[vectors.itemsize])
    queries = rng.normal(size=(ASKED, dim)).astype(np.float32)
    sums = words[:, :dim].sum(axis=1, dtype=np.uint32)
    found = both("rerank", words, sums, queries, shortlists(rng), scored=np.float32)
    assert_same(found)
    assert found[0][2] == NOTHING


@pytest.mark.parametrize("bit", [0, 13, 31])
def test_rerank_names_a_row_in_which_a_bit_was_flipped(rng, bit):
    vectors = rng.normal(size=(N, DIM)).astype(np.float32)
    words = vectors.view(np.uint32)
    sums = words.sum(axis=1, dtype=np.uint32)
    lists = shortlists(rng)
    row = lists[3][lists[3] >= 0][0]
    words[row, 50] ^= np.uint32(1 << bit)
    queries = rng.normal(size=(ASKED, DIM)).astype(np.float32)
    _, _, named = both("rerank", words, sums, queries, lists, scored=np.float32)[0]
    assert named == row


def test_the_plain_product_agrees_with_the_instruction(codes, queries):
    # What other processors run; the two definitions exist on this one only if it has the other.
    plain = (codes.astype(np.int32) @ queries.astype(np.int32).T).T
    for place in range(ASKED):
        assert [_numba._dot(codes, row, queries[place]) for row in range(20)] == list(
            plain[place][:20]
        )


def test_kernels_run_as_a_user_without_a_home_from_a_folder_that_cannot_be_written(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    code = (
        "import os, warnings, numba, numpy as np, nestvec.search\n"
        "numba.njit(lambda x: x + 1)(np.zeros(3))\n"  # Python itself may be root's alone
        "os.setgid(65534); os.setuid(65534)\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    from nestvec.search import kernels\n"
        "    scores, rows = np.empty((1, 2), np.int32), np.empty((1, 2), np.int32)\n"
        "    codes = np.full((3, 32), 130, np.uint8)\n"
        "    kernels.scan(codes, np.ones((1, 32), np.int8), np.empty(0, np.bool_), scores, rows)\n"
        "said = [str(w.message)[:25] for w in said if w.category is RuntimeWarning]\n"
        "print(rows.tolist(), said)\n"
    )
    tmp_path.chmod(0o555)
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "NUMBA_CACHE_DIR")}
    environment |= {"HOME": str(tmp_path / "none"), "XDG_CACHE_HOME": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[[0, 1]] ['no folder can be written ']", done.stderr


def test_fold_agrees_with_its_twin_and_steps_are_of_each_query(rng):
    queries = rng.normal(size=(200, 40)).astype(np.float32)
    queries *= rng.choice([1e-20, 1, 1e20], (200, 1)).astype(np.float32)
    queries[3] = 0
    scale = rng.random(33).astype(np.float32)
    ours, plain = np.ones((200, 64), np.int8), np.ones((200, 64), np.int8)
    _numba.fold(queries, scale, ours)
    _numpy.fold(queries, scale, plain)
    np.testing.assert_array_equal(ours, plain)
    assert (np.abs(np.delete(ours, 3, axis=0).astype(int)).max(axis=1) == 127).all()
    assert not ours[3].any()
    assert not ours[:, 33:].any()


@pytest.mark.parametrize("size", [1e-40, 1e-36, 1e-30])
def test_a_query_of_the_smallest_numbers_folds_as_it_does_at_length_one(rng, size):
    queries = (rng.normal(size=(200, 40)) * size).astype(np.float32)
    scale = (0.01 * rng.random(33)).astype(np.float32)
    lifted = (queries.astype(np.float64) / size).astype(np.float32)
    ours, plain, wanted = (np.ones((200, 64), np.int8) for _ in range(3))
    _numba.fold(queries, scale, ours)
    _numpy.fold(queries, scale, plain)
    _numpy.fold(lifted, scale, wanted)
    np.testing.assert_array_equal(ours, plain)
    assert (ours != wanted).mean() < 1e-3  # the halves between two steps
    np.testing.assert_allclose(ours, wanted, atol=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_unit_agrees_with_its_twin_and_names_what_changed(rng, dtype):
    vectors = rng.normal(size=(N, DIM)).astype(dtype)
    vectors[7, :24] = 0
    words = vectors.view({2: np.uint16, 4: np.uint32}[vectors.itemsize])
    sums = words[:, :64].sum(axis=1, dtype=np.uint32)
    ours, plain = np.empty((N, 24), np.float32), np.empty((N, 24), np.float32)
    for module, out in ((_numba, ours), (_numpy, plain)):
        assert module.unit(words, sums, 64, out) == NOTHING
        words[9, 63] ^= words.dtype.type(1 << 7)
        assert module.unit(words, sums, 64, out.copy()) == 9
        words[9, 63] ^= words.dtype.type(1 << 7)
    np.testing.assert_allclose(ours, plain, rtol=1e-6)
    assert not ours[7].any()
    np.testing.assert_allclose(np.linalg.norm(np.delete(ours, 7, axis=0), axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1, 1e25])
def test_a_cosine_does_not_depend_on_lengths_and_is_zero_for_no_length(rng, scale):
    vectors = rng.normal(size=(N, DIM)).astype(np.float32)
    vectors[5] = 0
    queries = rng.normal(size=(ASKED, DIM)).astype(np.float32)
    lists = np.tile(np.arange(20, dtype=np.int32), (ASKED, 1))
    words = (vectors * np.float32(scale)).view(np.uint32)
    sums = words.sum(axis=1, dtype=np.uint32)
    asked = queries * np.float32(1 / scale)
    found = both("rerank", words, sums, asked, lists, scored=np.float32)
    assert_same(found)
    unit = vectors[:20] / np.maximum(np.linalg.norm(vectors[:20], axis=1, keepdims=True), 1e-9)
    cosines = queries @ unit.T / np.linalg.norm(queries, axis=1, keepdims=True)
    np.testing.assert_allclose(found[0][0], -np.sort(-cosines, axis=1), atol=1e-5)
