"""The matrix step of FID at 2,048 features: from two means and covariances to the distance.

    python -m bench.pipeline.frechet [--device cuda] [--threads 2] [--dim 2048]

- scipy's sqrtm: `scipy.linalg.sqrtm(S1 @ S2)`, the trace of which pytorch-fid and older torch-fidelity take.
- numpy's eigvals: the eigenvalues of S1 @ S2, which torch-fidelity takes from version 0.4 on.

The covariances are of 10,000 random features each, with eigenvalues over three decades. The check: all agree to 1e-6 relative.
"""

from __future__ import annotations

import numpy as np
import torch

from bench import harness
from synthfast.scoring.frechet import frechet_distance
from synthfast.scoring.moments import Moments

IMAGES = 10_000


def moments(dim: int, seed: int) -> Moments:
    random = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1.5, dim, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=random)).Q
    return Moments.of((torch.randn(IMAGES, dim, dtype=torch.float64, generator=random) * scale) @ rotation)


def make_case(device: torch.device, dim: int) -> harness.Case:
    from scipy.linalg import sqrtm

    sides = [(side.mean, side.covariance) for side in (moments(dim, seed) for seed in (0, 1))]
    arrays = [(mean.numpy(), covariance.numpy()) for mean, covariance in sides]
    ours = [tensor.to(device) for side in sides for tensor in side]
    found: dict[str, float] = {}

    def remaining(trace: float) -> float:
        (mean1, covariance1), (mean2, covariance2) = arrays
        return float(((mean1 - mean2) ** 2).sum() + np.trace(covariance1) + np.trace(covariance2) - 2 * trace)

    def synthfast() -> None:
        found["synthfast"] = frechet_distance(*ours)

    def scipy() -> None:
        found["scipy sqrtm"] = remaining(np.trace(sqrtm(arrays[0][1] @ arrays[1][1])).real)

    def numpy() -> None:
        values = np.linalg.eigvals(arrays[0][1] @ arrays[1][1])
        found["numpy eigvals"] = remaining(np.sqrt(values.astype(complex)).real.sum())

    variants = {"synthfast": synthfast, "scipy sqrtm": scipy, "numpy eigvals": numpy}

    def check() -> None:
        for run in variants.values():
            run()
        for name, value in found.items():
            assert abs(value / found["scipy sqrtm"] - 1) < 1e-6, f"{name}: {value}, scipy {found['scipy sqrtm']}"

    return harness.Case(f"FID from means and covariances of {dim} features", "synthfast", variants, check, warm=True)


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=2048)
    parser.set_defaults(rounds=5)
    options = parser.parse_args()
    device = harness.prepare(options)
    harness.run("frechet", [make_case(device, options.dim)], options)


if __name__ == "__main__":
    main()
