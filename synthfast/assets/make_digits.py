"""Build ``digits.npz``, the embedded data set, from scikit-learn's handwritten digits.

Run ``python -m synthfast.assets.make_digits``; the file comes out byte for byte the same every time.
"""

from __future__ import annotations

import io

import numpy as np

from synthfast.artifacts import atomic_write_bytes
from synthfast.assets import DIGITS

TRAIN_PER_CLASS = 50
SEED = 0


def build_digits() -> dict[str, np.ndarray]:
    """The four arrays of ``digits.npz``.

    ``image`` uint8 [1797, 8, 8] in [0, 255], ``label`` int64 [1797], and the stratified split as sorted row numbers:
    ``train`` int64 [500], fifty of each class drawn with a fixed seed, and ``test`` int64 [1297], the others.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    image = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    label = raw.target.astype(np.int64)
    # RandomState, not default_rng: numpy promises that its stream never changes.
    random = np.random.RandomState(SEED)
    chosen = [random.permutation(np.flatnonzero(label == digit))[:TRAIN_PER_CLASS] for digit in range(10)]
    train = np.sort(np.concatenate(chosen)).astype(np.int64)
    test = np.setdiff1d(np.arange(len(label), dtype=np.int64), train)
    return {"image": image, "label": label, "train": train, "test": test}


def digits_bytes() -> bytes:
    """The content of ``digits.npz``: stored, not deflated, so that it does not depend on the zlib version."""
    buffer = io.BytesIO()
    np.savez(buffer, **build_digits())
    return buffer.getvalue()


def main() -> None:
    atomic_write_bytes(DIGITS, digits_bytes())
    print(f"{DIGITS}: {DIGITS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
