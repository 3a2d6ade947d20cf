"""Training generators and classifiers."""

from synthfast.training.classifier import train_classifier
from synthfast.training.generator import train_generator
from synthfast.training.loop import Progress, Trained

__all__ = ["Progress", "Trained", "train_classifier", "train_generator"]
