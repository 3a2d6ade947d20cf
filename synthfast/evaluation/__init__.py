"""Evaluation of classifiers, clean and under attack, and the result files that scores are written to."""

from synthfast.evaluation.accuracy import accuracy, predict
from synthfast.evaluation.inflection import inflection_result
from synthfast.evaluation.interval import mean_interval, wilson_interval
from synthfast.evaluation.result import result_json
from synthfast.evaluation.robust import run_attacks, scores
from synthfast.evaluation.score import score_accuracy, score_robust

__all__ = [
    "accuracy",
    "inflection_result",
    "mean_interval",
    "predict",
    "result_json",
    "run_attacks",
    "score_accuracy",
    "score_robust",
    "scores",
    "wilson_interval",
]
