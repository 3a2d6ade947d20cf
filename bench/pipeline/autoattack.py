"""AutoAttack standard against torchattacks' components, at the published iterations, on an adversarially trained classifier.

    python -m bench.pipeline.autoattack [--device cuda] [--threads 2] [--images 1297]

Both run APGD-CE (100 steps), APGD-T (9 targets, 100 steps), FAB-T (9 targets, 100 steps) and Square (5,000 queries), each on
what its own predecessors left standing. The images are cut into groups; each group goes through both, one component after the
other in turn, so that a slow moment of the machine hits both, and the ratios by group say how much the times scatter. Ours
attacks a batch a thread on a CPU; torchattacks has the whole group in one batch and all threads, which suits it best, and the
plain network in channels_last. There is no check before the clock, because the work is minutes long: the verdicts of
both are compared at the end, and a difference for more than 2% of the images is an error.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench import harness
from synthfast import attacks
from synthfast.config import ClassifierConfig
from synthfast.data import open_images
from synthfast.distributed import Ranks
from synthfast.models.classifiers import load_classifier
from synthfast.models.frozen import freeze
from synthfast.parallel import in_order
from synthfast.training import train_classifier
from synthfast.training.batches import read_batch, to_unit

EPS = 0.15
BATCH = 128
RUN = Path("runs/bench/autoattack-classifier")
# Adversarially trained on the 500 real digits; the same command makes it anew.
TRAINING = ClassifierConfig(method="pgd", eps=EPS, steps=600, out=str(RUN), device="cpu")


def classifier(device: torch.device) -> nn.Module:
    with Ranks("cpu") as ranks:
        train_classifier(TRAINING, ranks)
    return load_classifier(RUN, device)[0]


class Theirs:
    """torchattacks' four components in the order of AutoAttack."""

    def __init__(self, model: nn.Module) -> None:
        import torchattacks

        self.model = model
        common: dict[str, Any] = {"norm": "Linf", "eps": EPS, "n_restarts": 1, "seed": 0}
        self.attacks = {
            "apgd-ce": torchattacks.APGD(model, steps=100, loss="ce", **common),
            "apgd-t": torchattacks.APGDT(model, steps=100, n_classes=10, **common),
            "fab-t": torchattacks.FAB(model, steps=100, multi_targeted=True, n_classes=10, **common),
            "square": torchattacks.Square(model, n_queries=5000, **common),
        }

    def fooled(self, name: str, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        adversarial = self.attacks[name](x, y)
        with torch.inference_mode():
            return self.model(adversarial).argmax(1) != y


class Ours:
    def __init__(self, model: nn.Module) -> None:
        self.model = freeze(model)
        self.attacks = dict(attacks.standard("linf", EPS, 10, seed=0))

    def fooled(self, name: str, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        threads = torch.get_num_threads() if x.device.type == "cpu" else 1
        # As run_attacks does: whole batches to threads, here cut so that each thread has one.
        size = max(1, min(BATCH, -(-len(x) // threads))) if x.device.type == "cpu" else len(x)
        parts = [slice(first, first + size) for first in range(0, len(x), size)]
        attack = self.attacks[name]
        return torch.cat(
            [
                result.fooled
                for result in in_order(lambda p: attack.run(self.model, x[p], y[p], index[p]), parts, threads)
            ]
        )


def timed(side: Ours | Theirs, name: str, x: Tensor, y: Tensor, index: Tensor) -> tuple[Tensor, float]:
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    fooled = side.fooled(name, x, y, index)
    if x.is_cuda:
        torch.cuda.synchronize()
    return fooled, time.perf_counter() - start


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1297, help="of digits:test")
    parser.add_argument("--group", type=int, help="images that take turns; default a batch a thread, on a GPU 512")
    options = parser.parse_args()
    device = harness.prepare(options)
    model = classifier(device)
    digits = open_images("digits:test")
    group = options.group or (BATCH * options.threads if device.type == "cpu" else 512)
    count = min(options.images, len(digits))
    items = np.arange(count)
    pixels, labels = read_batch(digits, items)
    x, y, index = to_unit(pixels, device), labels.to(device), torch.arange(count, device=device)

    sides: dict[str, Ours | Theirs] = {"synthfast": Ours(model), "torchattacks": Theirs(model)}
    names = list(sides["synthfast"].attacks)
    with torch.inference_mode():
        right = model(x).argmax(1) == y
    standing = {side: right.clone() for side in sides}
    groups: list[dict[str, Any]] = []
    for number, first in enumerate(range(0, count, group)):
        entry: dict[str, Any] = {"images": min(group, count - first), "components": {}}
        for name in names:
            order = list(sides.items()) if number % 2 == 0 else list(reversed(sides.items()))
            entry["components"][name] = {}
            for side, attack in order:
                rows = first + standing[side][first : first + group].nonzero()[:, 0]
                if len(rows) == 0:
                    continue
                fooled, seconds = timed(attack, name, x[rows], y[rows], index[rows])
                standing[side][rows[fooled]] = False
                entry["components"][name][side] = {
                    "attacked": len(rows),
                    "broken": int(fooled.sum()),
                    "seconds": seconds,
                }
        groups.append(entry)
        print(json.dumps({"group": number, **entry}), file=sys.stderr, flush=True)

    same = float((standing["synthfast"] == standing["torchattacks"]).float().mean())
    if same < 0.98:
        sys.exit(f"verdicts are the same for {same:.1%} of the images, expected 98% or more")
    report = {
        **harness.heading("autoattack", options),
        "training": dataclasses.asdict(TRAINING),
        "eps": EPS,
        "images": count,
        "same_verdicts": same,
        "accuracy": float(right.float().mean()),
        "robust_accuracy": {side: float(standing[side].float().mean()) for side in sides},
        "summary": summary(groups, names),
        "groups": groups,
    }
    harness.write(report, table(report), options)


def summary(groups: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Seconds of each side and their ratio, over all groups and by group, for each component and the whole."""

    def seconds(entry: dict[str, Any], side: str, chosen: list[str]) -> float:
        return sum(entry["components"][name].get(side, {"seconds": 0.0})["seconds"] for name in chosen)

    found = {}
    for title, chosen in [*((name, [name]) for name in names), ("all", names)]:
        ours, theirs = ([seconds(entry, side, chosen) for entry in groups] for side in ("synthfast", "torchattacks"))
        ratios = [b / a for a, b in zip(ours, theirs, strict=True) if a > 0]
        found[title] = {
            "synthfast_seconds": sum(ours),
            "torchattacks_seconds": sum(theirs),
            "times_ours": sum(theirs) / sum(ours),
            "times_ours_by_group": [min(ratios), statistics.median(ratios), max(ratios)],
        }
    return found


def table(report: dict[str, Any]) -> str:
    robust = report["robust_accuracy"]
    lines = [
        f"### AutoAttack standard on {report['images']} digits, {report['device']}, {report['threads']} threads",
        "",
        f"accuracy {report['accuracy']:.4f}; robust accuracy: synthfast {robust['synthfast']:.4f}, torchattacks "
        f"{robust['torchattacks']:.4f}; same verdict for {report['same_verdicts']:.2%} of the images",
        "",
        "| component | synthfast s | torchattacks s | ratio | ratio by group: lowest, median, highest |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, entry in report["summary"].items():
        low, middle, high = entry["times_ours_by_group"]
        lines.append(
            f"| {name} | {entry['synthfast_seconds']:.1f} | {entry['torchattacks_seconds']:.1f} "
            f"| {entry['times_ours']:.2f} | {low:.2f}, {middle:.2f}, {high:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
