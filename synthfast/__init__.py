"""synthfast: train generators, sample from them, select, train classifiers on real plus synthetic images, and score.

The stages exchange files (see README.md); this package is the library behind the ``synthfast`` command.
"""

__version__ = "0.1.0"
