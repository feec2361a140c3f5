"""Measure: what vectors are worth at every size, beside every baseline that might win."""

from nestvec.measurement.baselines import NAMES as BASELINE_NAMES
from nestvec.measurement.curve import Curve
from nestvec.measurement.run import measure
from nestvec.measurement.tasks import ClassificationTask, LabelFreeTask, RetrievalTask, STSTask

__all__ = [
    "BASELINE_NAMES",
    "ClassificationTask",
    "Curve",
    "LabelFreeTask",
    "RetrievalTask",
    "STSTask",
    "measure",
]
