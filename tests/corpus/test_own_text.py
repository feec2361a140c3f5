"""The user's own files become passages with ids that lead back to them; what is no text says so."""

import gzip
import json
from pathlib import Path

import pytest

from nestvec.corpus import read_texts
from nestvec.errors import DataError, FileFormatError, StorageError


def _get(path, **options) -> dict[str, str]:
    got = read_texts(path, **options)
    return dict(zip(got.ids, got.texts, strict=True))


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.rst", "README", "X.TXT", "notes.log"])
def test_files_of_text_become_numbered_passages(tmp_path, name):
    (tmp_path / name).write_text("one " * 90 + "\n\n" + "two " * 90)
    got = _get(tmp_path / name)
    assert list(got) == [f"{name}#1", f"{name}#2"]
    assert set(got[f"{name}#2"].split()) == {"two"}


def test_bytes_that_are_not_utf8_are_replaced(tmp_path):
    (tmp_path / "x.txt").write_bytes("\ufeffcaf\u00e9 ".encode() + b"caf\xe9")
    assert _get(tmp_path / "x.txt") == {"x.txt#1": "caf\u00e9 caf\ufffd"}


def test_halves_of_characters_are_replaced_in_texts_and_ids(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": "a\\udc00", "text": "hello \\ud83d world"}')
    assert _get(tmp_path / "x.jsonl") == {"a\ufffd": "hello \ufffd world"}


@pytest.mark.parametrize("whole_folder", [True, False])
@pytest.mark.parametrize("name", ["x.md", "x.jsonl", "x.csv"])
def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch, name, whole_folder):
    (tmp_path / "a.txt").write_text("readable")
    (tmp_path / name).write_text('{"text": "secret"}')
    opened = open

    def refuse(file, *args, **kwargs):  # root may read everything, so chmod would not do
        if str(file).endswith(name):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match=rf"cannot read .*{name}: Permission denied\.$"):
        read_texts(tmp_path if whole_folder else tmp_path / name)


def test_a_page_keeps_its_words_and_loses_its_code(tmp_path):
    (tmp_path / "x.html").write_text(
        "<html><head><title>Wings</title><style>p {}</style><script>var x = 1;</script></head>"
        "<body><p>Lift &amp; <b>dr</b>ag<br>rise.</p><div>Heat</div></body></html>"
    )
    assert _get(tmp_path / "x.html") == {"x.html#1": "Wings\nLift & drag\nrise.\nHeat"}


def test_python_files_give_their_docstrings_and_are_not_run(tmp_path):
    (tmp_path / "x.py").write_text('"""About wings."""\nraise SystemExit\n# "not this"\n')
    assert _get(tmp_path / "x.py") == {"x.py#1": "About wings."}
    (tmp_path / "x.py").write_text("def (:")
    with pytest.raises(FileFormatError, match="not Python"):
        read_texts(tmp_path / "x.py")


ROWS = [
    {"id": "r1", "title": "Wing", "text": "lift"},
    {"id": "r2", "title": "", "text": "w " * 300},
]


def _table(path, rows):
    name = path.name
    if name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow", reason="nestvec[index]")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ".jsonl" in name:
        data = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    else:
        between = "\t" if name.endswith("tsv") else ","
        lines = [list(rows[0]), *([str(v) for v in r.values()] for r in rows)]
        path.write_text("\n".join(between.join(line) for line in lines))


TABLES = ["x.jsonl", "x.jsonl.gz", "x.csv", "x.tsv", "x.parquet"]


@pytest.mark.parametrize("name", TABLES)
def test_rows_keep_their_ids_and_their_titles(tmp_path, name):
    _table(tmp_path / name, ROWS)
    got = _get(tmp_path / name)
    assert list(got) == ["r1", "r2#1", "r2#2"]
    assert got["r1"] == "Wing lift"


@pytest.mark.parametrize("name", TABLES)
def test_another_column_is_named_and_rows_without_id_are_numbered(tmp_path, name):
    _table(tmp_path / name, [{"note": "lift"}, {"note": "drag"}])
    with pytest.raises(
        FileFormatError, match=r"no column of text .* only 'note'; name the column: column="
    ):
        read_texts(tmp_path / name)
    assert _get(tmp_path / name, column="note") == {f"{name}#1": "lift", f"{name}#2": "drag"}


def test_tables_of_utf8_with_a_mark_are_read(tmp_path):
    (tmp_path / "x.jsonl").write_bytes('\ufeff{"id": "ä", "text": "Straße"}'.encode())
    (tmp_path / "x.csv").write_bytes("\ufeffid,text\nö,Straße 2".encode())
    assert _get(tmp_path) == {"ä": "Straße", "ö": "Straße 2"}


def test_texts_that_recur_are_kept_once(tmp_path):
    _table(tmp_path / "x.jsonl", [{"id": i, "text": t} for i, t in enumerate("abcab")])
    assert _get(tmp_path / "x.jsonl") == {"0": "a", "1": "b", "2": "c"}


def test_a_folder_is_read_in_order_without_what_is_hidden_or_no_text(tmp_path):
    for name in ("b.md", "a/z.txt", ".hidden.txt", ".git/x.txt", "a/code.js", "a/empty.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if "empty" in name else f"text of {name}")
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    _table(tmp_path / "rows.csv", [{"id": "r1", "text": "a row"}])
    assert list(_get(tmp_path)) == ["a/z.txt#1", "b.md#1", "r1"]


def test_a_huggingface_datasets_folder_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="only to write the folder")
    whole = datasets.Dataset.from_list([{"id": f"r{i}", "text": f"text {i}"} for i in range(5)])
    whole.save_to_disk(tmp_path / "one")
    assert list(_get(tmp_path / "one")) == ["r0", "r1", "r2", "r3", "r4"]
    splits = datasets.DatasetDict({"train": whole.select([4, 2]), "test": whole.select([0])})
    splits.save_to_disk(tmp_path / "two")
    assert list(_get(tmp_path / "two")) == ["r4", "r2", "r0"]
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(FileFormatError, match="cannot read the datasets folder"):
        read_texts(tmp_path / "one")


@pytest.mark.parametrize("data", [b"", b" \n\n\t"])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.html"])
def test_a_file_without_text_says_so(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"no text found in .*{name}"):
        read_texts(tmp_path / name)


def test_a_folder_without_text_says_what_is_read(tmp_path):
    with pytest.raises(DataError, match=r"no text found in .*\.txt, \.md"):
        read_texts(tmp_path)


def test_a_binary_file_says_so(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(DataError, match=r"x\.bin is a binary file"):
        read_texts(tmp_path / "x.bin")


def test_a_missing_path_says_so(tmp_path):
    with pytest.raises(StorageError, match="no such file or folder"):
        read_texts(tmp_path / "gone")


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_a_truncated_table_names_its_file(tmp_path, name):
    path = tmp_path / name
    _table(path, ROWS)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(FileFormatError, match=name) as caught:
        read_texts(path)
    assert "\n" not in str(caught.value)


def test_rows_that_share_an_id_are_refused(tmp_path):
    _table(tmp_path / "x.jsonl", [{"id": 1, "text": "a"}, {"id": 1, "text": "b"}])
    with pytest.raises(DataError, match="id '1' stands twice"):
        read_texts(tmp_path / "x.jsonl")
