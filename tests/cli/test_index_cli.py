"""An index on the command line: rows in from files, searched, planned, changed, kept."""

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_model
from typer.testing import CliRunner

import nestvec as nv
from nestvec._checks import normalise
from nestvec.cli import app
from nestvec.cli._rows import lines, matrices, tables

DIM = 32
N = 120
SPACE = nv.Space.declared("things", dim=DIM, nesting_dims=(8, 16, DIM))
NAMED = ["--model-name", "things"]


def unit_rows(n, seed):
    return normalise(np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32))


VECTORS = unit_rows(N, 0)
QUERIES = unit_rows(7, 1)
IDS = [f"ding-{i}-ü" for i in range(N)]
TITLES = [f"the [b]{i}th" for i in range(N)]
YEARS = [2000 + i % 20 for i in range(N)]


def table(vectors=VECTORS, ids=IDS, stamp=None, **columns):
    held = {"title": TITLES, "year": YEARS} if not columns else columns
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(vectors)), len(vectors[0]))
    found = pa.table({"id": ids, "vector": lists, **held})
    return found.replace_schema_metadata({"nestvec": json.dumps((stamp or SPACE).to_dict())})


def json_lines(ids=IDS, vectors=VECTORS, **columns):
    rows = zip(ids, vectors.tolist(), *columns.values(), strict=True)
    names = ["id", "vector", *columns]
    return "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows) + "\n"


def run(*words, code=0, stdin=None):
    done = CliRunner().invoke(app, [str(w) for w in words], input=stdin)
    assert done.exit_code == code, done.output
    return done


def said(*words, **more):
    return json.loads(run(*words, "--json", **more).stdout)


def refused(*words, **more):
    done = run(*words, code=2, **more)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    return line


@pytest.fixture
def docs(tmp_path):
    pq.write_table(table(), tmp_path / "docs.parquet")
    return tmp_path / "docs.parquet"


@pytest.fixture
def made(docs, tmp_path):
    run("index", "create", tmp_path / "a.nest", docs, "--durability", "process")
    return tmp_path / "a.nest"


@pytest.fixture
def asks(tmp_path):
    nv.Embeddings(QUERIES, SPACE).save(tmp_path / "asks.npz")
    return tmp_path / "asks.npz"


@pytest.mark.parametrize(
    "name", [*"create add upsert delete get compact check stats".split(), "plan"]
)
def test_help_shows_examples(name):
    words = ["plan"] if name == "plan" else ["index", name]
    shown = run(*words, "--help").output.partition("Examples:")[2]
    assert f"nestvec {' '.join(words)} " in shown


# --- rows in --------------------------------------------------------------------------------------


def bare(path):
    """Write a file without a stamp; return the ids that its rows have."""
    if path.name == "x.npy":
        np.save(path, VECTORS)
        return list(range(N))
    if path.name == "x.csv":
        cells = (",".join(map(repr, row.tolist())) for row in VECTORS)
        lines = [f"{i},{c}" for i, c in zip(IDS, cells, strict=True)]
        path.write_text("id," + ",".join(f"v{i}" for i in range(DIM)) + "\n" + "\n".join(lines))
    elif path.name == "x.jsonl.gz":
        path.write_bytes(gzip.compress(json_lines().encode()))
    else:
        path.write_text(json_lines())
    return IDS


STAMPED = [".safetensors", ".npz", ".parquet", ".arrow", ".feather", ".lance"]
BARE = [".npy", ".csv", ".jsonl", ".jsonl.gz"]


@pytest.mark.parametrize("block", [7, 8192])
@pytest.mark.parametrize("ending", [*STAMPED, *BARE])
def test_an_index_holds_what_the_file_holds(tmp_path, monkeypatch, ending, block):
    for module in (lines, matrices, tables):
        monkeypatch.setattr(module, "BLOCK", 8 * block if module is lines else block)
    path = tmp_path / f"x{ending}"
    if ending in STAMPED:
        ids, name = IDS, []
        nv.Embeddings(VECTORS, SPACE, IDS).save(path)
    else:
        ids, name = bare(path), NAMED
    found = said("index", "create", tmp_path / "a.nest", path, *name)
    assert found["rows"] == N
    index = nv.Index.open(tmp_path / "a.nest")
    held = index.get(ids)
    np.testing.assert_array_equal(np.array(held["vector"].to_pylist(), np.float32), VECTORS)
    assert held["id"].to_pylist() == ids
    assert index.space == nv.load(path, space=None if ending in STAMPED else "things").space


@pytest.mark.parametrize("kind", ["one batch", "many batches", "stream"])
def test_arrow_files_are_read_in_either_layout(tmp_path, kind):
    path = tmp_path / "x.arrow"
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=None if kind == "one batch" else 11)
    run("index", "create", tmp_path / "a.nest", path)
    rows = nv.Index.open(tmp_path / "a.nest").get(IDS, columns=["title", "year"])
    assert rows.to_pydict() == {"title": TITLES, "year": YEARS}


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".lance"])
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ([], ["title", "year"]),
        (["--column", "year"], ["year"]),
        (["--no-columns"], []),
    ],
    ids=["all", "some", "none"],
)
def test_the_columns_asked_for_are_kept(tmp_path, ending, options, kept):
    path = tmp_path / f"x{ending}"
    name = []
    if ending == ".jsonl":
        path.write_text(json_lines(title=TITLES, year=YEARS))
        name = NAMED
    elif ending == ".lance":
        import lance

        lance.write_dataset(table(), str(path))
    else:
        pq.write_table(table(), path)
    found = said("index", "create", tmp_path / "a.nest", path, *options, *name)
    assert found["columns"] == ["id", "vector", *kept]
    rows = said("index", "get", tmp_path / "a.nest", IDS[3])["rows"]
    whole = {"id": IDS[3], "title": TITLES[3], "year": YEARS[3]}
    assert rows == [{name: whole[name] for name in ("id", *kept)}]


def test_columns_of_other_names_are_said(tmp_path):
    pq.write_table(table().rename_columns(["key", "emb", "title", "year"]), tmp_path / "x.parquet")
    words = ["index", "create", tmp_path / "a", tmp_path / "x.parquet", *NAMED]
    run(*words, "--id", "key", "--vector", "emb")
    assert said("index", "get", tmp_path / "a", IDS[0])["rows"][0]["title"] == TITLES[0]


def test_keys_of_json_lines_get_the_type_that_fits_all_lines(tmp_path):
    mixed = [None, *range(N - 2), 0.5]
    (tmp_path / "x.jsonl").write_text(json_lines(ids=range(N), score=mixed, none=[None] * N))
    run("index", "create", tmp_path / "a", tmp_path / "x.jsonl", *NAMED)
    index = nv.Index.open(tmp_path / "a")
    assert [str(field.type) for field in index.schema][2:] == ["double", "string"]
    assert index.get(range(N), columns=["score"])["score"].to_pylist() == mixed


def test_ids_of_both_kinds_are_all_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", 80)  # so that the first blocks have numbers only
    (tmp_path / "x.jsonl").write_text(json_lines(ids=[*range(N - 1), "last"]))
    run("index", "create", tmp_path / "a", tmp_path / "x.jsonl", *NAMED)
    assert nv.Index.open(tmp_path / "a").get(["0", "last"])["id"].to_pylist() == ["0", "last"]


def test_ids_of_a_bare_matrix_come_from_a_file(tmp_path):
    np.save(tmp_path / "x.npy", VECTORS)
    (tmp_path / "ids.txt").write_text("\n".join(IDS))
    words = ["index", "create", tmp_path / "a", tmp_path / "x.npy", *NAMED]
    run(*words, "--ids", tmp_path / "ids.txt")
    assert len(nv.Index.open(tmp_path / "a").get(IDS)) == N


def test_vectors_that_are_not_of_length_one_are_declared_so(tmp_path):
    np.save(tmp_path / "x.npy", 3 * VECTORS)
    run("index", "create", tmp_path / "a", tmp_path / "x.npy", *NAMED)
    assert nv.Index.open(tmp_path / "a").space.normalisation == "none"


def test_float16_is_half_the_record(docs, made, tmp_path):
    run("index", "create", tmp_path / "h", docs, "--precision", "float16", "--no-columns")
    whole, half = (said("index", "stats", path)["record_bytes"] for path in (made, tmp_path / "h"))
    assert whole - half > N * DIM * 2


# --- writes ---------------------------------------------------------------------------------------


def test_rows_are_added_replaced_deleted_and_shown(made, tmp_path):
    pq.write_table(
        table(QUERIES[:2], ["new", IDS[0]], title=["n", "t"], year=[1, 2]), tmp_path / "x.parquet"
    )
    assert "exists" in refused("index", "add", made, tmp_path / "x.parquet")
    done = said("index", "upsert", made, tmp_path / "x.parquet")
    assert (done["inserted"], done["updated"], done["version"]) == (1, 1, 3)
    got = said("index", "get", made, "new", IDS[0], "--column", "year", "--column", "vector")
    assert [row["year"] for row in got["rows"]] == [1, 2]
    assert np.allclose([row["vector"] for row in got["rows"]], QUERIES[:2])
    assert "title" in run("index", "get", made, "new").stdout
    assert "1 deleted, version 4" in run("index", "delete", made, "new").stdout
    run("index", "delete", made, "-", stdin=f"{IDS[1]}\n\n{IDS[2]}\n")
    (tmp_path / "gone.txt").write_text(f"{IDS[2]}\n{IDS[3]}\n")
    gone = ["index", "delete", made, "--ids", tmp_path / "gone.txt"]
    assert "--missing-ok" in refused(*gone)
    assert said(*gone, "--missing-ok")["deleted"] == 1
    assert "nothing to do" in run(*gone, "--missing-ok").stdout
    pq.write_table(table(QUERIES[2:3], ["later"], title=["x"], year=[3]), tmp_path / "y.parquet")
    assert said("index", "add", made, tmp_path / "y.parquet")["inserted"] == 1
    assert len(nv.Index.open(made)) == N - 3 + 1


def test_whole_numbers_as_ids_stay_whole(tmp_path):
    np.save(tmp_path / "x.npy", VECTORS)
    run("index", "create", tmp_path / "a", tmp_path / "x.npy", *NAMED)
    assert said("index", "get", tmp_path / "a", "7", "3")["rows"] == [{"id": 7}, {"id": 3}]
    assert "integers" in refused("index", "get", tmp_path / "a", "seven")
    assert said("index", "delete", tmp_path / "a", "7")["deleted"] == 1


def test_row_numbers_never_stand_for_ids_of_an_index_that_has_rows(tmp_path):
    np.save(tmp_path / "x.npy", VECTORS)
    run("index", "create", tmp_path / "a", tmp_path / "x.npy", *NAMED)
    for how in ("add", "upsert"):
        assert "--ids FILE" in refused("index", how, tmp_path / "a", tmp_path / "x.npy", *NAMED)
    (tmp_path / "ids.txt").write_text("\n".join(str(1000 + i) for i in range(N)))
    more = said(
        "index", "add", tmp_path / "a", tmp_path / "x.npy", *NAMED, "--ids", tmp_path / "ids.txt"
    )
    assert more["inserted"] == N


def test_saved_row_numbers_are_no_ids_either(tmp_path):
    bare = nv.Embeddings(VECTORS, SPACE).save(tmp_path / "bare.safetensors")
    made = tmp_path / "a.nest"
    run("index", "create", made, bare)
    for how in ("add", "upsert"):
        assert "has no ids, and row numbers" in refused("index", how, made, bare)
    assert said("index", "stats", made)["version"] == 2


def test_compaction_frees_what_deleted_rows_took(made):
    run("index", "delete", made, *IDS[:60])
    freed = said("index", "compact", made)["bytes_freed"]
    after = said("index", "stats", made)
    assert freed > 60 * DIM * 4
    assert (after["rows"], after["versions"], after["dead_rows"]) == (60, 1, 0)


def test_check_names_what_is_damaged_and_exits_with_1(made):
    assert said("index", "check", made)["ok"]
    assert "ok" in run("index", "check", made).stdout
    file = max((made / "record" / "data").iterdir(), key=lambda path: path.stat().st_size)
    held = bytearray(file.read_bytes())
    held[500] ^= 8
    file.write_bytes(held)
    assert file.name in run("index", "check", made, code=1).stdout.replace("\n", "")
    found = json.loads(run("index", "check", made, "--json", code=1).stdout)
    assert not found["ok"]


def test_stats_tell_record_derived_and_resident_bytes_apart(made, asks):
    run("search", made, "--queries", asks)
    figures = said("index", "stats", made)
    assert figures["record_bytes"] > N * DIM * 4
    assert figures["derived_bytes"] > N * DIM * 4
    assert figures["resident_bytes"] < N * DIM * 4  # the full vectors stay on disk
    assert figures["durability"] == "power"
    shown = run("index", "stats", made).stdout
    for word in ("record", "derived", "resident", "power cut"):
        assert word in shown


# --- searching and planning -----------------------------------------------------------------------


def ids_of(found):
    return [[hit["id"] for hit in one["hits"]] for one in found["queries"]]


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ([], {}),
        (["-k", 3], {"k": 3}),
        (["--dims", 8], {"dims": 8}),
        (["--plan", "graph(ef=60) 16:int8@40 > 32@5"], {"plan": "graph(ef=60) 16:int8@40 > 32@5"}),
        (["--filter", "year > 2015"], {"filter": "year > 2015"}),
    ],
    ids=["exact", "k", "dims", "plan", "filter"],
)
def test_a_search_finds_what_the_library_finds(made, asks, options, more):
    found = said("search", made, "--queries", asks, *options)
    hits = nv.Index.open(made).search(QUERIES, **more)
    assert ids_of(found) == hits.ids.tolist()
    assert found["plan"] == str(hits.plan)
    scores = [[hit["score"] for hit in one["hits"]] for one in found["queries"]]
    np.testing.assert_allclose(scores, hits.scores, atol=1e-6)


def test_answers_bring_their_columns_and_explain_themselves(made, asks):
    words = ["search", made, "--queries", asks, "-k", 2, "--column", "title", "--column", "year"]
    plan = ["--plan", "exact 8:int8@60 > 32@2", "--explain"]
    for one in said(*words)["queries"]:
        for hit in one["hits"]:
            row = IDS.index(hit["id"])
            assert hit["columns"] == {"title": TITLES[row], "year": YEARS[row]}
    shown = run(*words, *plan)
    assert "[b]" in shown.stdout  # text is shown as it is
    assert "8:int8@60" in shown.stdout
    assert f"8:int8@60: {N} rows scored" in shown.stderr
    hits = said(*words, *plan)["queries"][0]["hits"]
    assert [hit["place"]["32@2"] for hit in hits] == [1, 2]


def test_a_cascade_is_a_plan_that_scans_every_row(made, docs, asks):
    stages = "16:int8@60 > 32@4"
    for gallery in (made, docs):
        by_plan = said("search", gallery, "--queries", asks, "--plan", f"exact {stages}")
        found = said("search", gallery, "--queries", asks, "--cascade", stages)
        assert (found["plan"], ids_of(found)) == (by_plan["plan"], ids_of(by_plan))
    words = ["search", made, "--queries", asks, "--cascade", stages]
    assert "--cascade and --dims say the same" in refused(*words, "--dims", 8)
    assert "leave out --plan, --cascade" in refused(*words, "--recall", 0.9)


def test_looking_at_a_new_index_derives_nothing(made):
    assert said("index", "stats", made)["structures"] == {}
    assert "none yet: the first search derives them" in run("index", "stats", made).stdout
    run("index", "check", made)
    assert not (made / "derived").exists()


def test_a_filter_that_nothing_passes_is_no_error(made, asks):
    words = ["search", made, "--queries", asks, "--filter", "year > 3000", "--column", "title"]
    assert ids_of(said(*words)) == [[]] * len(QUERIES)
    run(*words, "--explain")


def test_a_file_is_searched_as_before_and_lance_is_a_file(docs, asks, tmp_path):
    nv.load(docs).save(tmp_path / "x.lance")
    for path in (docs, tmp_path / "x.lance"):
        found = said("search", path, "--queries", asks, "--dims", 16, "-k", 4)
        assert found["plan"] == "exact 16@4"
        assert found["macs_per_query"] == N * 16
    assert "32@4" in run("search", docs, "--queries", asks, "--explain", "-k", 4).stdout


def test_words_find_rows_where_the_model_is_there(tmp_path):
    model = tiny_model.build(tmp_path / "model")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(tiny_model.WORDS, 8)) for _ in range(30)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    run("embed", tmp_path / "t.jsonl", "-o", tmp_path / "v.parquet", "--model", model)
    run("index", "create", tmp_path / "a.nest", tmp_path / "v.parquet")
    asked = f"{texts[3]}\nwing\n"
    found, file = (
        said("search", tmp_path / name, "-", "--model", model, stdin=asked)
        for name in ("a.nest", "v.parquet")
    )
    assert ids_of(found) == ids_of(file)
    assert [one["query"] for one in found["queries"]] == [texts[3], "wing"]


@pytest.fixture(scope="module")
def plannable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    nv.Embeddings(unit_rows(2000, 2), SPACE).save(folder / "v.npz")
    nv.Embeddings(unit_rows(400, 3), SPACE).save(folder / "asks.npz")
    run("index", "create", folder / "a.nest", folder / "v.npz", "--durability", "process")
    return folder


def test_a_plan_is_certified_stored_drawn_and_followed(plannable):
    words = ["plan", plannable / "a.nest", "--recall", 0.9, "--queries", plannable / "asks.npz"]
    words += ["--structures", "graph"]
    found = said(*words, "--plot", plannable / "p.svg")
    assert "at least 0.9 with 95% confidence" in found["sentence"]
    assert found["plan"] in {one["plan"] for one in found["frontier"]}
    assert (plannable / "p.svg").read_text().rstrip().endswith("</svg>")
    followed = said("search", plannable / "a.nest", "--queries", plannable / "asks.npz")
    assert followed["plan"] == found["plan"]
    figures = said("index", "stats", plannable / "a.nest")
    assert figures["plan"] == found["plan"]
    # the links that the plan walks are counted, though nothing has been searched yet
    assert figures["resident_bytes"] > 2000 * 4 * 32


def test_a_plan_is_shown_as_a_table(plannable):
    before = nv.Index.open(plannable / "a.nest").plan_stored
    done = run(
        "plan", plannable / "a.nest", "--recall", 0.5, "--dry-run", "--structures", "exact",
        "--n-queries", 100, "--plot", plannable / "p.png",
    )  # fmt: skip
    chosen = [line for line in done.stdout.splitlines() if line.rstrip().endswith("<-")]
    assert len(chosen) == 1
    assert "queries like the gallery's rows" in done.stdout
    assert (plannable / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert nv.Index.open(plannable / "a.nest").plan_stored == before


def test_where_nothing_is_certified_every_row_is_scored(plannable):
    words = ["plan", plannable / "a.nest", "--structures", "exact", "--n-queries", 40, "--dry-run"]
    done = run(*words, "--recall", 0.9999, "--json")
    assert json.loads(done.stdout)["plan"].count(">") == 0


def test_what_is_out_of_reach_exits_with_1_and_stores_nothing(plannable, tmp_path):
    before = nv.Index.open(plannable / "a.nest").plan_stored
    words = ["plan", plannable / "a.nest", "--structures", "exact", "--n-queries", 40]
    found = json.loads(run(*words, "--ms", 1e-9, "--json", code=1).stdout)
    assert found["plan"] is None
    assert found["sentence"].startswith("No plan answers in")
    assert nv.Index.open(plannable / "a.nest").plan_stored == before


# --- what is refused ------------------------------------------------------------------------------


def bad_rows(t):
    """File -> what is said when an index is to be made of it, or added to."""
    wrong = VECTORS.copy()
    wrong[83, 5] = np.nan
    zero = VECTORS.copy()
    zero[101] = 0
    pq.write_table(table(wrong), t / "nan.parquet")
    (t / "nan.jsonl").write_text(json_lines(vectors=wrong))
    np.save(t / "zero.npy", zero)
    (t / "empty.parquet").write_bytes(b"")
    (t / "empty.jsonl").write_text("\n\n")
    pq.write_table(table()[:0], t / "none.parquet")
    pq.write_table(table(), t / "whole.parquet")
    whole = (t / "whole.parquet").read_bytes()
    (t / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (t / "foreign.lance").mkdir()
    nv.Embeddings(VECTORS, SPACE).save(t / "whole.npz")
    held = bytearray((t / "whole.npz").read_bytes())
    held[3000] ^= 1
    (t / "flipped.npz").write_bytes(held)
    stamped = nv.Embeddings(VECTORS, SPACE).save(t / "w.safetensors").read_bytes()
    (t / "cut.safetensors").write_bytes(stamped[:2000])
    pq.write_table(table(ids=[*IDS[:-1], IDS[5]]), t / "twice.parquet")
    pq.write_table(table(ids=[*IDS[:-1], None]), t / "noid.parquet")
    pq.write_table(table().drop_columns("vector"), t / "novector.parquet")
    ragged = pa.table({"id": ["a", "b"], "vector": [[1.0] * DIM, [1.0]]})
    pq.write_table(ragged.replace_schema_metadata(table().schema.metadata), t / "ragged.parquet")
    (t / "ragged.jsonl").write_text('{"vector": [1, 0]}\n{"vector": [1]}\n')
    (t / "word.jsonl").write_text('{"vector": [1, 0]}\n{"vector": "one"}\n')
    (t / "lacks.jsonl").write_text('{"id": 1, "vector": [1, 0]}\n{"id": 2}\n')
    (t / "broken.jsonl").write_text('{"vector": [1, 0]}\n{"vector": [1, \n')
    (t / "kinds.jsonl").write_text('{"vector": [1, 0], "x": 1}\n{"vector": [0, 1], "x": "one"}\n')
    np.save(t / "flat.npy", VECTORS[0])
    return {
        "nowhere.parquet": "no such file",
        "x.txt": "not a format for vectors",
        "empty.parquet": "empty (0 bytes)",
        "empty.jsonl": "no rows",
        "none.parquet": "no rows",
        "cut.parquet": "truncated, damaged",
        "foreign.lance": "truncated, damaged",
        "flipped.npz": "truncated, damaged",
        "cut.safetensors": "truncated, damaged",
        "nan.parquet": "row 83 holds NaN",
        "nan.jsonl": "row 83 holds NaN",
        "zero.npy": "row 101 is all zeros",
        "twice.parquet": f"{IDS[5]!r} stands in rows 5 and 119",
        "noid.parquet": "row 119 of column 'id' is null",
        "novector.parquet": "--vector",
        "ragged.parquet": "row 1 has 1",
        "ragged.jsonl": "line 2 has 1 numbers",
        "word.jsonl": "line 2 has no list of numbers",
        "lacks.jsonl": "line 2 has no 'vector'",
        "broken.jsonl": "line 2 is not JSON",
        "kinds.jsonl": "of no one type",
        "flat.npy": "expected a matrix",
    }


def test_bad_files_are_one_sentence_that_names_the_row_and_leave_nothing(tmp_path):
    for name, says in bad_rows(tmp_path).items():
        words = ["index", "create", tmp_path / "a.nest", tmp_path / name]
        if not name.endswith((".parquet", ".npz", ".safetensors", ".lance")):
            words += NAMED
        sentence = refused(*words)
        assert says in sentence, name
        assert name in sentence
        assert not (tmp_path / "a.nest").exists(), name


def test_rows_are_named_where_they_stand_in_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK", 10)
    bad_rows(tmp_path)
    near = [IDS[81] if i == 85 else id_ for i, id_ in enumerate(IDS)]
    pq.write_table(table(ids=near), tmp_path / "near.parquet")
    for name, says in (
        ("near", f"{IDS[81]!r} stands in rows 81 and 85"),
        ("nan", "row 83 holds NaN"),
        ("noid", "row 119 of"),
        ("twice", f"{IDS[5]!r} stands in two batches"),
    ):
        assert says in refused("index", "create", tmp_path / "a", tmp_path / f"{name}.parquet")


def test_what_does_not_fit_an_index_is_refused_and_changes_nothing(made, docs, asks, tmp_path):
    t = tmp_path
    other = nv.Space.declared("other", dim=DIM)
    new = ["n1", "n2"]
    pq.write_table(table(QUERIES[:2], new, other, title=["a", "b"], year=[1, 2]), t / "o.parquet")
    pq.write_table(table(QUERIES[:2], new, title=["a", "b"]), t / "few.parquet")
    pq.write_table(table(QUERIES[:2], new, title=[1, 2], year=[1, 2]), t / "type.parquet")
    pq.write_table(table(QUERIES[:2], [1, 2], title=["a", "b"], year=[1, 2]), t / "ints.parquet")
    wide = unit_rows(3, 6)[:2, :1] * np.ones((1, 40), np.float32)
    np.save(t / "wide.npy", wide)
    (t / "wide.jsonl").write_text(json_lines(new, wide, title=new, year=[1, 2]))
    (t / "long.jsonl").write_text(json_lines(new, 2 * QUERIES[:2], title=new, year=[1, 2]))
    (t / "few.jsonl").write_text(json_lines(new, QUERIES[:2], title=new))
    (t / "one.txt").write_text("n1\n")
    (t / "d").mkdir()
    a = ["index", "add", made]
    s = ["search", made, "--queries", asks]
    version = nv.Index.open(made).version
    for words, says in [
        ([*a, t / "o.parquet"], "two spaces"),
        ([*a, t / "few.parquet"], "has no column 'year'"),
        ([*a, t / "few.jsonl", *NAMED], "no line of"),
        ([*a, t / "type.parquet"], "'title' does not fit string"),
        ([*a, t / "ints.parquet"], "ids of this index are strings"),
        ([*a, t / "wide.npy", *NAMED], "no column"),
        ([*a, t / "wide.jsonl", *NAMED], "40 dims given where 32 are expected"),
        ([*a, t / "long.jsonl", *NAMED], "row 0 does not have length 1"),
        ([*a, t / "few.jsonl"], "--model-name things"),
        ([*a, t / "few.jsonl", "--model-name", "other"], "two spaces"),
        ([*a, docs], "exists"),
        ([*a, docs, "--ids", t / "one.txt"], "1 ids are given for the 120 rows"),
        ([*a, docs, "--vector", "emb"], "has no column 'emb' for --vector"),
        ([*a, docs, "--id", "key"], "has no column 'key' for --id"),
        ([*a, docs, "--vector", "title"], "is string, not lists"),
        ([*a, asks, "--vector", "title"], "has no columns"),
        (["index", "add", t / "no.nest", docs], "nestvec index create makes one"),
        (["index", "stats", t / "d"], "empty folder"),
        (["index", "check", docs], "is a file"),
        (["index", "create", made, docs], "there is an index at"),
        (["index", "create", t, docs], "a folder stands there"),
        (["index", "create", t / "b", docs, "--column", "month"], "'month'; it has title, year"),
        (["index", "create", t / "b", docs, "--model-name", "other"], "its stamp says"),
        (["index", "create", t / "b", t / "wide.npy"], "--model-name"),
        (["index", "create", t / "b", docs, "--no-columns", "--column", "year"], "contradict"),
        (["index", "get", made, "nobody"], "unknown id 'nobody'"),
        (["index", "get", made, IDS[0], "--column", "month"], "month"),
        (["index", "delete", made], "no ids"),
        (["index", "delete", made, "a", "--ids", t / "one.txt"], "not both"),
        ([*s, "--filter", "month = 3"], "month"),
        ([*s, "--column", "month"], "month"),
        ([*s, "--dims", 12], "8, 16, 32"),
        ([*s, "--dims", 8, "--plan", "32@3"], "leave out one"),
        ([*s, "--plan", "tree 32@3"], "exact, graph, lists"),
        ([*s, "words"], "not both"),
        ([*s, "--texts", docs], "--texts is for files"),
        (["search", made, "words"], "stamped by name"),
        (["search", made, "--queries", t / "o.parquet"], "two spaces"),
        (["search", t / "d", "--queries", asks], "empty folder"),
        (["search", t / "one.txt", "--queries", asks], "not a format for vectors"),
        (["search", docs, "--queries", asks, "--filter", "id = 3"], "--filter is for an index"),
        (["search", docs, "--queries", asks, "--column", "year"], "--texts"),
        (["plan", t / "no.nest"], "no index"),
        (["plan", made, "--plot", t / "p.gif"], ".png"),
        (["plan", made, "--queries", asks], "too few"),
        (["plan", made, "--recall", 2], "is a share"),
        (["plan", made, "--structures", "exact,tree"], "no structure 'tree'"),
    ]:
        assert says in refused(*words), words
    assert nv.Index.open(made).version == version
    assert not (t / "b").exists()


def test_an_index_of_a_newer_format_is_refused(made, docs, asks):
    stamp = json.loads((made / "nestvec.json").read_text())
    (made / "nestvec.json").write_text(json.dumps({**stamp, "format": 99}))
    for words in (
        ["index", "add", made, docs],
        ["index", "stats", made],
        ["search", made, "--queries", asks],
        ["plan", made],
    ):
        assert "written by a newer nestvec" in refused(*words)


# --- interrupted ----------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into /proc")
@pytest.mark.parametrize("stopped", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_an_add_that_is_stopped_leaves_the_version_before(made, tmp_path, stopped):
    n = 40_000
    ids, titles = [f"n{i}" for i in range(n)], ["t"] * n
    (tmp_path / "x.jsonl").write_text(
        json_lines(ids, unit_rows(n, 5), title=titles, year=list(range(n)))
    )
    files = {path.relative_to(made) for path in made.rglob("*")}
    words = ["index", "add", made, tmp_path / "x.jsonl", *NAMED]
    child = subprocess.Popen(
        [sys.executable, "-m", "nestvec", *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not rows_under_way(child.pid, made):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(stopped)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == (130 if stopped == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in stderr
    index = nv.Index.open(made)
    assert (index.version, len(index)) == (2, N)
    assert index.check()["ok"]
    left = {path.relative_to(made) for path in made.rglob("*")} - files
    assert not {path for path in left if path.parts[0] not in ("derived", "readers")}
    assert said(*words)["inserted"] == n
    assert len(nv.Index.open(made)) == N + n


def rows_under_way(pid, folder):
    """Tell whether a process has written to a nameless file in the folder."""
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(folder / "#") in str(handle.readlink()) and handle.stat().st_size > 100_000:
                return True
        except OSError:
            pass
    return False
