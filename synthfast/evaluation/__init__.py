"""Evaluation of classifiers, and the result files that scores are written to."""

from synthfast.evaluation.accuracy import accuracy, predict
from synthfast.evaluation.interval import wilson_interval
from synthfast.evaluation.result import result_json
from synthfast.models.classifiers import load_classifier

__all__ = ["accuracy", "load_classifier", "predict", "result_json", "wilson_interval"]
