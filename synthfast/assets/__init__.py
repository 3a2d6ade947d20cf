"""Data that ships with the package: the handwritten digits, and a generator and a classifier trained on 500 of them.

See README.md here.
"""

from pathlib import Path

DIGITS = Path(__file__).parent / "digits.npz"
DIGITS_GENERATOR = Path(__file__).parent / "digits"
DIGITS_CLASSIFIER = Path(__file__).parent / "digits_classifier"
