"""A teacher's scores are distilled at every size, asked once, and their scale is said."""

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")

from nestvec.errors import DataError, ModelError  # noqa: E402  # behind importorskip
from nestvec.train import ScoreDistillation, score_pairs  # noqa: E402

DIMS = (2, 8)


@pytest.fixture
def pairs(rng):
    return rng.normal(size=(6, 8)), rng.normal(size=(6, 8)), rng.normal(size=6)


def cosines(first, second, dim):
    return np.array(
        [
            sum(a * b for a, b in zip(oracle.unit(x[:dim]), oracle.unit(y[:dim]), strict=True))
            for x, y in zip(first, second, strict=True)
        ]
    )


def tensors(arrays):
    return [torch.from_numpy(np.asarray(one)) for one in arrays]


def test_mse_is_the_error_of_the_best_line_at_every_size(pairs):
    first, second, scores = pairs
    first[:, :] += 2 * scores[:, None] * second  # so that the slope is above 0 at every size
    want = 0.0
    for dim in DIMS:
        close = cosines(first, second, dim)
        slope, level = np.polyfit(close, scores, 1)
        assert slope > 0.01
        want += np.mean((slope * close + level - scores) ** 2)
    got = ScoreDistillation(DIMS)(*tensors((first, second, scores)))
    assert got.item() == pytest.approx(want, rel=1e-6)


def test_without_a_fit_scores_are_compared_as_they_are(pairs):
    first, second, scores = pairs
    want = sum(np.mean((cosines(first, second, dim) - scores) ** 2) for dim in DIMS)
    got = ScoreDistillation(DIMS, scale="none")(*tensors(pairs))
    assert got.item() == pytest.approx(want, rel=1e-6)


def test_margin_mse_compares_every_two_pairs(pairs):
    first, second, scores = pairs
    want = 0.0
    for dim in DIMS:
        close = cosines(first, second, dim)
        want += np.mean(
            [
                ((close[i] - close[j]) - (scores[i] - scores[j])) ** 2
                for i in range(6)
                for j in range(i + 1, 6)
            ]
        )
    loss = ScoreDistillation(DIMS, loss="margin_mse", scale="none")
    assert loss(*tensors(pairs)).item() == pytest.approx(want, rel=1e-6)


def test_margin_mse_of_triplets_is_the_paper_s(rng):
    queries, positives, negatives = (rng.normal(size=(5, 8)) for _ in range(3))
    margins = rng.normal(size=5)
    want = sum(
        np.mean(
            (cosines(queries, positives, dim) - cosines(queries, negatives, dim) - margins) ** 2
        )
        for dim in DIMS
    )
    loss = ScoreDistillation(DIMS, loss="margin_mse", scale="none")
    got = loss(*tensors((queries, positives, negatives, margins)))
    assert got.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kind", ["mse", "margin_mse"])
def test_fit_makes_the_teacher_s_scale_irrelevant_up_to_its_square(pairs, kind):
    first, second, scores = tensors(pairs)
    scores = scores + 3 * (first * second).sum(dim=1)
    loss = ScoreDistillation((8,), loss=kind)
    ten_times = 10 * scores + (7 if kind == "mse" else 0)
    torch.testing.assert_close(100 * loss(first, second, scores), loss(first, second, ten_times))


def test_line_found_aside_leaves_the_gradient_as_if_it_were_differentiated(pairs):
    first, second, scores = pairs
    first[:, :] += 2 * scores[:, None] * second
    first, second, scores = tensors((first, second, scores))
    first.requires_grad_()
    ScoreDistillation((8,))(first, second, scores).backward()
    numeric = torch.zeros_like(first)
    with torch.no_grad():
        for place in [(0, 0), (2, 5), (5, 7)]:
            moved = [first.clone(), first.clone()]
            moved[0][place] += 1e-5
            moved[1][place] -= 1e-5
            up, down = (ScoreDistillation((8,))(one, second, scores) for one in moved)
            numeric[place] = (up - down) / 2e-5
            assert first.grad is not None
            assert first.grad[place].item() == pytest.approx(numeric[place].item(), rel=1e-4)


def test_teacher_gets_no_gradient(pairs):
    first, second, scores = tensors(pairs)
    first.requires_grad_()
    scores.requires_grad_()
    ScoreDistillation(DIMS)(first, second, scores).backward()
    assert scores.grad is None
    assert first.grad is not None


def test_student_and_teacher_of_unlike_sizes_are_refused(pairs):
    first, second, scores = tensors(pairs)
    loss = ScoreDistillation(DIMS)
    with pytest.raises(DataError, match="do not fit"):
        loss(first, second, scores[:4])
    with pytest.raises(DataError, match="do not fit"):
        loss(first, second[:, :4], scores)
    with pytest.raises(DataError, match="one pair"):
        loss(first[:1], second[:1], scores[:1])
    with pytest.raises(DataError, match="margin_mse"):
        loss(first, second, second, scores)
    with pytest.raises(DataError, match="loss 'kl' is not one of mse, margin_mse"):
        ScoreDistillation(DIMS, loss="kl")


# --- the teacher -------------------------------------------------------------------------------


def lengths(first, second):
    return np.array([len(a) - len(b) for a, b in zip(first, second, strict=True)], np.float32)


def texts(n):
    return ["x" * (1 + i % 7) for i in range(n)], ["y" * (1 + i % 3) for i in range(n)]


def test_scores_are_the_teacher_s_in_order():
    first, second = texts(10)
    found = score_pairs(lengths, first, second, chunk_size=3)
    assert found.kind == "scored"
    assert found.texts == (first, second)
    assert found.targets is not None
    np.testing.assert_array_equal(found.targets, lengths(first, second))


def test_scoring_that_was_interrupted_goes_on(tmp_path):
    first, second = texts(10)
    asked = []

    def dies(first, second):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(first))
        return lengths(first, second)

    options = {"cache": tmp_path / "c", "name": "lengths", "chunk_size": 3}
    with pytest.raises(KeyboardInterrupt):
        score_pairs(dies, first, second, **options)

    def counts(first, second):
        asked.append(len(first))
        return lengths(first, second)

    found = score_pairs(counts, first, second, **options)
    assert asked == [3, 3, 3, 1]
    assert found.targets is not None
    np.testing.assert_array_equal(found.targets, lengths(first, second))


def test_cache_of_other_pairs_or_another_teacher_is_refused(tmp_path):
    first, second = texts(10)
    score_pairs(lengths, first, second, cache=tmp_path / "c", name="a")
    with pytest.raises(DataError, match="another scoring"):
        score_pairs(lengths, first, second, cache=tmp_path / "c", name="b")
    with pytest.raises(DataError, match="another scoring"):
        score_pairs(lengths, second, first, cache=tmp_path / "c", name="a")
    with pytest.raises(DataError, match="needs name="):
        score_pairs(lengths, first, second, cache=tmp_path / "d")


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (lambda a, b: np.ones((len(a), 2)), "one number a pair"),
        (lambda a, b: np.array([1.0, np.nan, 1.0]), "score of pair 1 is nan"),
        (lambda a, b: ["x"] * len(a), "one number a pair"),
    ],
    ids=["two-numbers", "nan", "text"],
)
def test_teacher_that_gives_no_scores_is_refused(teacher, says):
    with pytest.raises(DataError, match=says):
        score_pairs(teacher, *texts(3))


def test_texts_that_are_no_pairs_are_refused():
    with pytest.raises(DataError, match="3 first texts and 2 second"):
        score_pairs(lengths, ["a", "b", "c"], ["a", "b"])
    with pytest.raises(DataError, match="row 1 has no text"):
        score_pairs(lengths, ["a", " "], ["a", "b"])
    with pytest.raises(DataError, match="one string given"):
        score_pairs(lengths, "ab", "cd")


def test_cross_encoder_scores_as_it_does_itself(tmp_path):
    st = pytest.importorskip("sentence_transformers", reason="nestvec[text]")
    import tiny_model

    from nestvec.train import CrossEncoderTeacher

    bert = tiny_model.build(tmp_path / "m").parent / "bert"
    one = st.CrossEncoder(str(bert), num_labels=1, device="cpu")
    one.save_pretrained(str(tmp_path / "cross"))
    teacher = CrossEncoderTeacher(tmp_path / "cross", device="cpu")
    first, second = ["wing flow", "heat", "shock of the wing"], ["heat", "wing", "flow"]
    got = score_pairs(teacher, first, second).targets
    want = one.predict(list(zip(first, second, strict=True)))
    assert got is not None
    np.testing.assert_allclose(got, want, atol=1e-6)
    raw = CrossEncoderTeacher(one, raw=True)
    np.testing.assert_allclose(1 / (1 + np.exp(-raw(first, second))), want, atol=1e-6)
    assert raw.name != teacher.name
    assert CrossEncoderTeacher(one).name == teacher.name
    with pytest.raises(ModelError, match="2 numbers a pair"):
        CrossEncoderTeacher(st.CrossEncoder(str(bert), num_labels=2, device="cpu"))
    with pytest.raises(ModelError, match="cannot load a cross-encoder"):
        CrossEncoderTeacher(tmp_path / "nothing")
