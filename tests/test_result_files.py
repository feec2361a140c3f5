"""Result files keep to their keys, and tables show what stands in them, nothing averaged."""

import json
from pathlib import Path

import _frame
import pytest
import readme

ROOT = Path(__file__).parents[1]

ROWS = [
    {"dataset": "npl", "method": "full", "dim": 384, "metric": "nDCG@10", "value": 0.4},
    {"dataset": "npl", "method": "mrl", "dim": 64, "metric": "nDCG@10", "value": 0.25},
    {"dataset": "npl", "method": "mrl", "dim": 384, "metric": "nDCG@10", "value": 0.39},
    {"dataset": "npl", "method": "mrl", "dim": 384, "metric": "recall@10", "value": 0.5},
]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(_frame, "RESULTS", tmp_path)
    monkeypatch.setattr(_frame, "ROOT", tmp_path)
    return tmp_path


def filled(marker: str) -> str:
    return readme.MARKED.sub(lambda found: readme.filled(found, ROOT / "README.md"), marker)


@pytest.mark.parametrize("path", sorted(_frame.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_result_file_has_its_meta_and_no_unknown_keys(path):
    result = json.loads(path.read_text())
    assert {"command", "commit", "date", "machine", "threads", "seeds", "versions", "data"} <= set(
        result["meta"]
    )
    assert result["rows"]
    assert set().union(*result["rows"]) <= _frame.KEYS
    assert (ROOT / f"benchmarks/{path.stem}.py").is_file()


def test_what_is_written_is_read_back(results):
    _frame.write("fit", ROWS, {"seeds": [0]})
    assert _frame.read("fit") == {"meta": {"seeds": [0]}, "rows": ROWS}


def test_data_sets_that_are_not_renewed_keep_their_rows_and_where_they_came_from(results):
    first, again = (
        {"command": word, "commit": word, "date": word, "machine": word, "threads": 1}
        | {"load_before": 0.1, "versions": {}, "energy": {name: 1.0}}
        for word, name in (("first", "npl"), ("again", "cisi"))
    )
    _frame.write("fit", ROWS, first, renewed=["npl"])
    _frame.write("fit", [{**ROWS[0], "dataset": "cisi"}], again, renewed=["cisi"])
    found = _frame.read("fit")
    assert found["rows"] == [*ROWS, {**ROWS[0], "dataset": "cisi"}]
    assert {name: said["commit"] for name, said in found["meta"]["of"].items()} == {
        "npl": "first",
        "cisi": "again",
    }
    assert found["meta"]["energy"] == {"npl": 1.0, "cisi": 1.0}
    _frame.write("fit", ROWS[:1], again, renewed=["npl"])
    assert [row["dataset"] for row in _frame.read("fit")["rows"]] == ["cisi", "npl"]


def test_methods_that_are_not_renewed_keep_their_rows(results):
    about = {"command": "", "date": "", "machine": "", "threads": 1, "load_before": 0.1}
    first, again = ({**about, "versions": {}, "commit": word} for word in ("first", "again"))
    two = [{**ROWS[0], "method": method, "value": 1.0} for method in ("a", "b")]
    _frame.write("fit", two, first, renewed=["npl"])
    _frame.write("fit", [{**two[1], "value": 2.0}], again, renewed=["npl"], methods=["b", "c"])
    found = _frame.read("fit")
    assert [(row["method"], row["value"]) for row in found["rows"]] == [("a", 1.0), ("b", 2.0)]
    said = {name: one["commit"] for name, one in found["meta"]["of"].items()}
    assert said == {"npl": "first", "npl: b, c": "again"}


@pytest.mark.parametrize("row", [{"recal": 1.0}, {"recall": float("nan")}], ids=["key", "nan"])
def test_row_that_does_not_fit_is_refused(results, row):
    with pytest.raises(ValueError, match="recal"):
        _frame.write("fit", [row], {})
    assert not list(results.iterdir())


def test_table_puts_sizes_across(results):
    _frame.write("fit", ROWS, {"command": "benchmarks/fit.py"})
    text = filled("<!-- table: fit; metric=nDCG@10; rows=method; columns=dim --><!-- end -->")
    assert text.splitlines()[1:5] == [
        "| method | 64 | 384 |",
        "| --- | ---: | ---: |",
        "| full | - | 0.400 |",
        "| mrl | 0.250 | 0.390 |",
    ]
    assert filled(text) == text


def test_table_names_the_command_that_makes_it_again(results):
    marker = "<!-- table: fit; metric=recall@10; rows=method; columns=dim --><!-- end -->"
    about = dict.fromkeys(("commit", "date", "machine", "threads", "load_before", "versions"))
    meta = {**about, "command": "benchmarks/fit.py --seeds 0,1"}
    _frame.write("fit", ROWS, meta)
    assert '`make bench NAME=fit ARGS="--seeds 0,1"`' in filled(marker)
    _frame.write("fit", ROWS, meta, renewed=["npl"])  # rows of several runs: all are made anew
    assert "`make bench NAME=fit`" in filled(marker)


def test_number_stands_in_its_sentence(results):
    _frame.write("fit", ROWS, {})
    text = filled("it is <!-- number: fit; method=f* -->?<!-- end -->.")
    assert text == "it is <!-- number: fit; method=f* -->0.400<!-- end -->."


def test_two_rows_for_one_cell_are_refused_with_what_tells_them_apart(results):
    _frame.write("fit", ROWS, {})
    with pytest.raises(SystemExit, match=r"more than one row .* differ in .*metric"):
        filled("<!-- table: fit; method=mrl; rows=method; columns=dim --><!-- end -->")


def test_result_that_is_not_there_says_so(results):
    assert "Not measured yet" in filled("<!-- table: none; rows=method --><!-- end -->")
