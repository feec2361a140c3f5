"""The adaptor makes prefixes better, and its guard keeps it from making anything worse."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from nestvec.maps import MatryoshkaAdaptor, PrincipalRotation, load_map

QUICK = {"max_steps": 30, "batch_size": 64, "gallery_size": 256, "supervised_steps": 30}


@parametrize_with_checks(
    [MatryoshkaAdaptor(max_steps=3), MatryoshkaAdaptor(max_steps=3, kind="residual")]
)
def test_scikit_learn_accepts(estimator, check):
    check(estimator)
