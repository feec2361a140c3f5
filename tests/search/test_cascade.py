"""A plan reads back what it prints, and its cost is what the paper counts."""

import itertools
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestvec import Cascade, Plan, Stage
from nestvec.errors import PlanError

PRECISIONS = ("float32", "float16", "int8", "binary")


@st.composite
def plans(draw):
    n = draw(st.integers(1, 4))
    dims = sorted(draw(st.lists(st.integers(1, 4096), min_size=n, max_size=n, unique=True)))
    keeps = sorted(draw(st.lists(st.integers(1, 10**6), min_size=n, max_size=n)), reverse=True)
    kinds = draw(st.lists(st.sampled_from(PRECISIONS), min_size=n, max_size=n))
    knobs = draw(
        st.dictionaries(
            st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True),
            st.integers(-1000, 1000) | st.floats(-1e6, 1e6),
            max_size=3,
        )
    )
    structure = draw(st.sampled_from(["exact", "graph", "lists", "faiss_hnsw32"]))
    stages = [Stage(d, k, p) for d, k, p in zip(dims, keeps, kinds, strict=True)]
    return Plan(Cascade(stages), structure, knobs)


@given(plans())
def test_parse_reads_back_what_str_prints(plan):
    assert Plan.parse(str(plan)) == plan
    assert eval(repr(plan), {"Plan": Plan}) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert hash(Plan.parse(str(plan))) == hash(plan)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("384@10", "exact 384@10"),
        (" 64:int8@400>384@10 ", "exact 64:int8@400 > 384@10"),
        ("64:float32@100 > 384@10", "exact 64@100 > 384@10"),
        ("graph(ef=80) 384:int8@40 > 384@10", "graph(ef=80) 384:int8@40 > 384@10"),
        ("lists( nprobe=4,x=0.5 ) 8@1", "lists(nprobe=4, x=0.5) 8@1"),
    ],
)
def test_text_form(text, printed):
    assert str(Plan.parse(text)) == printed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read"),
        ("exact", "has no stages"),
        ("64", "cannot be read"),
        ("64@0", "keep is a whole number >= 1"),
        ("0@4", "dim is a whole number >= 1"),
        ("64:int4@10", "precision 'int4' is not one of"),
        ("384@10 > 64@5", "Dims rise"),
        ("64@10 > 384@20", "Shortlists shrink"),
        ("graph(ef=many) 8@1", "knob 'ef=many'"),
        ("graph(8) 8@1", "knob '8'"),
        ("graph(ef=nan) 8@1", "knob 'ef=nan'"),
        ("graph(ef=8, ef=9) 8@1", "'ef' is given twice"),
        ("16@20 > 16@10", "finer precision"),
        ("16@20 > 16:binary@10", "finer precision"),
        ("64@10 > ", "cannot be read"),
    ],
)
def test_what_cannot_be_read_says_how_to_write_it(text, says):
    with pytest.raises(PlanError, match=says):
        Plan.parse(text)


def test_macs_count_as_the_paper_does():
    # ImageNet-1K, 16 -> 2048 with a shortlist of 200 (arXiv 2205.13147): reranking costs 400 KFLOPs
    cascade = Cascade.adaptive(shortlist_dim=16, rerank_dim=2048, shortlist=200, k=10)
    assert cascade.macs(1_281_167) == 1_281_167 * 16 + 200 * 2048
    exact = Cascade([Stage(2048, 10)]).macs(1_281_167)
    assert exact / (1_281_167 * 16) == 128  # the paper's "128x fewer FLOPs" leaves reranking out


def test_the_papers_funnel():
    got = Cascade.funnel((16, 32, 64, 128, 256, 2048), shortlist=200, k=10)
    assert str(got) == "16@200 > 32@100 > 64@50 > 128@25 > 256@12 > 2048@10"


def test_a_funnel_halves_keeps_while_dims_double():
    stages = Cascade.funnel([8 << i for i in range(10)], shortlist=1000, k=7).stages
    for before, after in itertools.pairwise(stages[:-1]):
        assert (after.dim, after.keep) == (2 * before.dim, before.keep // 2)
    assert (stages[-1].dim, stages[-1].keep) == (4096, 7)


def test_bytes_tell_precisions_apart_where_macs_do_not():
    float32, int8, binary = (Cascade.parse(t) for t in ("64@10", "64:int8@10", "64:binary@10"))
    assert float32.macs(1000) == int8.macs(1000) == binary.macs(1000) == 64_000
    assert [c.bytes_read(1000) for c in (float32, int8, binary)] == [256_000, 64_000, 8_000]
