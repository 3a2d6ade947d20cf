"""ARC of Gaussians against its closed form, with the discriminator that is the best there is between them.

    python -m bench.experiments.closed_form [--count 40000] [--radii 12] [--seeds 3] [--threads 2]

Between N(m - d, s^2 I) and N(m + d, s^2 I), without pixel bounds, the best robust success at radius eps is Phi(r(eps) / s),
where r is what the balls leave of half the distance: |d| - eps in l2, and in l-infinity the l2 norm of max(|d_i| - eps, 0). ARC
is the integral of what is above 1/2. The discriminator is linear, its radii are found by the automatic grid. Of each case several
sets are drawn: 5,000 held-out images of a kind leave a sampling error of 2 to 4%, which the mean over them makes smaller.
"""

from __future__ import annotations

import math
import sys
import time

import numpy as np
import torch

from bench import harness
from synthfast.data import ArrayImages
from synthfast.scoring.arc import ArcSettings, arc
from synthfast.scoring.arc_measure import MeasureSettings
from synthfast.scoring.discriminator import DiscriminatorSettings

SIGMA = 0.06  # so narrow that no pixel meets its bounds
# Shape, pattern of the difference, half of its length in SIGMA, norm.
CASES = (
    ((4, 4, 1), "ramp", 1.5, "l2"),
    ((8, 8, 1), "flat", 1.0, "l2"),
    ((8, 8, 3), "flat", 2.5, "l2"),
    ((16, 16, 3), "ramp", 2.0, "l2"),
    ((4, 4, 1), "ramp", 1.5, "linf"),
    ((8, 8, 1), "flat", 2.0, "linf"),
    ((8, 8, 1), "one", 1.5, "linf"),
    ((16, 16, 3), "flat", 2.0, "linf"),
)
PATTERNS = {
    "flat": lambda d: np.ones(d),
    "ramp": lambda d: np.linspace(-1, 1, d),
    "one": lambda d: np.eye(1, d, d // 2)[0],
}


def closed_form(half: np.ndarray, norm: str) -> float:
    """In units of the norm: 1 in l2, 1/255 in l-infinity, on pixels in [0, 1]."""
    half = np.abs(half).ravel()
    last = np.linalg.norm(half) if norm == "l2" else half.max()
    eps = np.linspace(0, last, 20_001)
    left = last - eps if norm == "l2" else np.linalg.norm(np.maximum(half - eps[:, None], 0), axis=1)
    success = torch.special.ndtr(torch.from_numpy(left / SIGMA)).numpy()
    return float(np.trapezoid(success - 0.5, eps)) * (1 if norm == "l2" else 255)


def run(case: tuple, count: int, radii: int, seed: int) -> dict:
    shape, pattern, height, norm = case
    half = PATTERNS[pattern](math.prod(shape))
    half = (half / np.linalg.norm(half) * height * SIGMA).reshape(shape)
    random = np.random.default_rng(seed)
    sets = [
        ArrayImages(
            name,
            [np.rint(255 * (0.5 + sign * half + SIGMA * random.standard_normal((count, *shape)))).astype(np.uint8)],
        )
        for name, sign in (("minus", -1), ("plus", 1))
    ]
    training = DiscriminatorSettings(
        architecture="linear",
        norm=norm,
        steps=1500,
        batch_size=512,
        lr=0.005,
        ema=0.99,
        validate_every=50,
        patience=6,
        warm_patience=6,
        weight_decay=0.0,
        attack_steps=3,
        seed=seed,
    )
    # One run of a few steps finds the worst point of a ball for a linear network.
    measuring = MeasureSettings(steps=5, restarts=1, batch_size=2000)
    settings = ArcSettings(training=training, measuring=measuring, most=radii, held_out=0.4)
    begin = time.perf_counter()
    found = arc(*sets, settings, torch.device("cpu"))
    truth = closed_form(half, norm)
    assert found.area is not None
    return {
        "shape": list(shape),
        "pattern": pattern,
        "half_distance_in_sigma": height,
        "norm": norm,
        "seed": seed,
        "closed_form": truth,
        "arc": found.area.value,
        "ci": list(found.area.ci),
        "error": found.area.value / truth - 1,
        "eps": list(found.eps),
        "accuracy": found.area.accuracy.tolist(),
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40_000, help="images of each kind")
    parser.add_argument("--radii", type=int, default=12, help="that the automatic grid measures")
    parser.add_argument("--seeds", type=int, default=3, help="sets drawn of each case")
    options = parser.parse_args()
    harness.prepare(options)
    cases = []
    for case in CASES:
        runs = [run(case, options.count, options.radii, seed) for seed in range(options.seeds)]
        mean = sum(found["arc"] for found in runs) / len(runs)
        cases.append({"error": mean / runs[0]["closed_form"] - 1, "arc": mean, "runs": runs})
        print(f"{case}: {cases[-1]['error']:+.2%}", file=sys.stderr, flush=True)
    report = {**harness.heading("closed-form", options), "count": options.count, "cases": cases}
    harness.write(report, table(report), options)


def table(report: dict) -> str:
    lines = [
        "| shape | difference | norm | closed form | ARC, mean | error | error by set |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in report["cases"]:
        first, errors = case["runs"][0], ", ".join(f"{run['error']:+.1%}" for run in case["runs"])
        distance = f"{first['pattern']}, {2 * first['half_distance_in_sigma']:g} s"
        lines.append(
            f"| {'x'.join(map(str, first['shape']))} | {distance} | {first['norm']} | {first['closed_form']:.4f} "
            f"| {case['arc']:.4f} | {case['error']:+.1%} | {errors} |"
        )
    worst = max(abs(case["error"]) for case in report["cases"])
    return "\n".join([*lines, "", f"largest error: {worst:.1%}"])


if __name__ == "__main__":
    main()
