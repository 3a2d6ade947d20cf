"""Training generators and classifiers."""

from synthfast.training.classifier import train_classifier
from synthfast.training.generator import Progress, Trained, train_generator

__all__ = ["Progress", "Trained", "train_classifier", "train_generator"]
