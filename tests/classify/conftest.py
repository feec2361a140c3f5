"""Small fits: more threads than one only wait for each other."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_blas_thread():
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):
        yield
