"""The house stands: one version, one list of names, a light import, a core that works alone."""

import re
import statistics
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import nestvec
from nestvec.space.nesting import KNOWN_NESTED

ROOT = Path(__file__).parents[1]

EXTRAS = (
    "PIL accelerate bm25s datasets faiss ir_measures jinja2 joblib lance matplotlib numba onnx "
    "onnxruntime pandas peft pyarrow sentence_transformers sklearn torch transformers"
).split()


def python(code: str, executable: str = sys.executable, cwd: Path | None = None) -> str:
    """Run code in a fresh interpreter, return what it printed."""
    done = subprocess.run(
        [executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_version_is_the_newest_in_the_changelog():
    headings = re.findall(
        r"^## \[(.+?)\] - (?:Unreleased|\d{4}-\d{2}-\d{2})$",
        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert headings[0] == nestvec.__version__


def test_version_is_the_one_that_is_cited():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {nestvec.__version__}\n" in citation


def test_public_names_are_sorted():
    assert list(nestvec.__all__) == sorted(set(nestvec.__all__))


@pytest.mark.parametrize("name", nestvec.__all__)
def test_public_name_can_be_imported_and_says_what_it_is(name):
    found = getattr(nestvec, name)
    assert callable(found)
    assert found.__doc__
    assert name in dir(nestvec)


@pytest.mark.parametrize("order", ["sorted", "reversed"])
def test_function_is_not_hidden_by_the_package_of_its_name(order):
    code = f"""
import nestvec
for name in {order}(nestvec.__all__): getattr(nestvec, name)
print([name for name in nestvec.__all__ if not callable(getattr(nestvec, name))])
"""
    assert python(code) == "[]"


def test_every_preset_stands_in_the_docs():
    page = (ROOT / "docs/spaces.md").read_text(encoding="utf-8")
    for model, dims in KNOWN_NESTED.items():
        assert f"| {model} | {', '.join(map(str, dims))} |" in page


def test_every_public_name_has_its_reference_entry():
    reference = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    entries = re.findall(r"^::: nestvec\.(?:\w+\.)*(\w+)$", reference, flags=re.MULTILINE)
    assert set(nestvec.__all__) <= set(entries)


def test_import_loads_no_extra():
    loaded = python("import sys, nestvec; print(*{m.partition('.')[0] for m in sys.modules})")
    assert not set(EXTRAS) & set(loaded.split())


def test_import_takes_less_than_150_ms():
    code = "from time import perf_counter as now; t = now(); import nestvec; print(now() - t)"
    seconds = [float(python(code)) for _ in range(5)]
    assert min(seconds) < 0.15, f"median {statistics.median(seconds):.3f} s"


def test_tables_are_what_the_result_files_say():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/readme.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


CORE_ALONE = """
import sys
import numpy as np
import nestvec as nv

space = nv.Space.declared("text-embedding-3-small", dim=1536)
vectors = np.random.default_rng(0).normal(size=(50, 1536))
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
docs = nv.Embeddings(vectors, space, [f"doc{i}" for i in range(50)])
docs.save("docs.npz")
again = nv.load("docs.npz")
assert again.space == space and (again.array == docs.array).all()
found = nv.cascade_search(again[:5], again, "512@20 > 1536@10")
assert found.rows[:, 0].tolist() == [0, 1, 2, 3, 4], found.rows
assert "torch" not in sys.modules
print("searched")
"""


def test_core_alone_reads_writes_and_searches(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    alone = tmp_path / "venv/bin"
    subprocess.run([alone / "pip", "install", "--quiet", ROOT], check=True)
    assert python(CORE_ALONE, executable=str(alone / "python"), cwd=tmp_path) == "searched"
    installed = python(
        "from importlib.metadata import distributions as d; print(*(x.name for x in d()))",
        executable=str(alone / "python"),
    )
    assert not {"torch", "scikit-learn", "faiss-cpu", "pyarrow"} & set(installed.split())
    shown = subprocess.run(
        [alone / "nestvec", "--help"], capture_output=True, text=True, check=True
    )
    assert "search" in shown.stdout
