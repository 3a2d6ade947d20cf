"""ARC of sampled digits with 8 radii against 8 discriminators trained from scratch, one after the other, in plain PyTorch.

    python -m bench.pipeline.arc [--device cuda] [--threads 2] [--rounds 3] [--radii 8] [--count 1297] [--steps 600]

Ours is the library's `arc` with the defaults of `synthfast score arc`: it finds its radii, starts each discriminator from that of
the nearest smaller radius, a radius a thread, stops each by its validation, and ends with the curve and its interval.

The peer is told the radii, and for each trains a fresh network of the same architecture on the same images with the same attack,
batches and averaging of weights, then validates and measures with the same attacks: plain PyTorch in channels_last, all threads
on each batch. It is told as well what ours reached: it stops at the first validation that is as good as the one ours kept, or at
--steps. It does so with two schedules of the learning rate, and the one that is faster over all radii counts. Two more endings
follow from the same runs: the first validation within a standard error of ours, and the one at which ours would have lost
patience.

Ours runs before, between and after the peer's schedules; its rounds must give the same curve. Before the clock one step of
the peer's attack must give the images that one of ours gives. At the end the peer's ARC, from the states at which it was stopped,
must be inside the interval of ours or ours inside the peer's; if not, the report says so and the exit status is 1.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import harness
from synthfast.attacks.losses import cw_margin
from synthfast.attacks.pgd import pgd_maximize
from synthfast.config import SampleConfig
from synthfast.data import ImageSet, open_images
from synthfast.distributed import Ranks
from synthfast.models.frozen import freeze
from synthfast.sampling import generate
from synthfast.scoring.arc import ArcCurve, ArcSettings, arc
from synthfast.scoring.arc_curve import Area, measure_area
from synthfast.scoring.arc_measure import Outcomes, measure
from synthfast.scoring.arc_sets import ArcSets, split_sets
from synthfast.scoring.discriminator import DiscriminatorSettings, make_network
from synthfast.training.batches import EpochOrder

SAMPLES = Path("runs/bench/arc-samples")
SAMPLE_COUNT = 2000  # the same command makes them anew
WARMUP = 20
# Highest learning rate, and whether it falls to 0 by half a cosine over --steps. The first is what ours does.
SCHEDULES = {"constant 0.002": (0.002, False), "cosine 0.004": (0.004, True)}


def samples(device: torch.device) -> ImageSet:
    with Ranks(device.type) as ranks:
        generate(SampleConfig(n=SAMPLE_COUNT, out=str(SAMPLES), device=device.type), ranks)
    return open_images(str(SAMPLES))


class Clock:
    """Seconds of what is run under it; what lies between is not counted."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def __enter__(self) -> Clock:
        self._wait()
        self.begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds += time.perf_counter() - self.begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def unit(images: Tensor) -> Tensor:
    return (images.permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=torch.channels_last)


def pgd(
    model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, steps: int, start: Tensor | None = None
) -> Tensor:
    """The attack of the discriminators as it is commonly written: up the margin, from a uniform point of the ball."""
    if eps == 0:
        return x
    step = min(1.0, 2.5 / steps) * eps
    if start is not None:
        moved = start
    elif norm == "linf":
        moved = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    else:
        direction = torch.randn_like(x)
        length = eps * torch.rand(len(x), 1, 1, 1, device=x.device) ** (1 / x[0].numel())
        moved = (x + direction / l2(direction) * length).clamp(0, 1)
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        logits = model(moved)
        margin = logits.gather(1, 1 - y[:, None]) - logits.gather(1, y[:, None])
        (gradient,) = torch.autograd.grad(margin.sum(), moved)
        with torch.no_grad():
            if norm == "linf":
                moved = torch.min(torch.max(moved + step * gradient.sign(), x - eps), x + eps).clamp(0, 1)
            else:
                offset = moved + step * gradient / l2(gradient) - x
                moved = (x + offset * (eps / l2(offset)).clamp(max=1)).clamp(0, 1)
    return moved.detach()


def l2(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)


@dataclass
class Target:
    """A radius on pixels in [0, 1], and the robust accuracy on validation images that ours kept a state for."""

    eps: float
    validation: float


@dataclass
class Trained:
    """A discriminator of the peer.

    log: of each validation: step, seconds until then, robust accuracy.
    to_ours, nearly, patience: the rows of the log at which each ending comes; None if it does not.
    state: at ``to_ours``, or the best of all; state_step: its step.
    """

    log: list[tuple[int, float, float]]
    to_ours: int | None
    nearly: int | None
    patience: int | None
    state: dict[str, Tensor]
    state_step: int

    def seconds(self, ending: str) -> float:
        """Seconds to an ending, or all of the training if it does not come."""
        row = getattr(self, ending)
        return self.log[-1 if row is None else row][1]


def train(sets: ArcSets, target: Target, settings: DiscriminatorSettings, schedule: tuple[float, bool]) -> Trained:
    """From scratch, until every ending has come or ``settings.steps`` are done."""
    training, device = sets.training, sets.real.device
    clock = Clock(device)
    with clock:
        model = make_network(training, settings)
        average = copy.deepcopy(model).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        half = settings.batch_size // 2
        y = torch.arange(2, device=device).repeat_interleave(half)
        orders = [EpochOrder(len(part), settings.seed, k) for k, part in enumerate((training.synthetic, training.real))]
        validation = unit(torch.cat([training.synthetic_validation, training.real_validation]))
        validation_y = torch.arange(2, device=device).repeat_interleave(len(training.real_validation))
    spread = math.sqrt(target.validation * (1 - target.validation) / len(validation))
    log: list[tuple[int, float, float]] = []
    endings: dict[str, int | None] = {"to_ours": None, "nearly": None, "patience": None}
    best, waited, state, state_step = -1.0, 0, {}, 0
    rate, falls = schedule
    for step in range(1, settings.steps + 1):
        with clock:
            share = (1 + math.cos(math.pi * step / settings.steps)) / 2 if falls else 1.0
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, step / WARMUP) * share
            rows = [torch.from_numpy(order[(step - 1) * half : step * half]).to(device) for order in orders]
            x = unit(torch.cat([training.synthetic[rows[0]], training.real[rows[1]]]))
            model.eval()
            x = pgd(model, x, y, settings.norm, target.eps, settings.attack_steps)
            model.train()
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                decay = min(settings.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
                for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
                    mine.copy_(theirs)
            if step % settings.validate_every and step < settings.steps:
                continue
            moved = pgd(average, validation, validation_y, settings.norm, target.eps, 2 * settings.attack_steps)
            with torch.no_grad():
                accuracy = (average(moved).argmax(1) == validation_y).float().mean().item()
        log.append((step, clock.seconds, accuracy))
        row = len(log) - 1
        waited = 0 if accuracy > best else waited + 1
        if accuracy >= best and endings["to_ours"] is None:
            state, state_step = copy.deepcopy(average.state_dict()), step
        best = max(best, accuracy)
        if endings["to_ours"] is None and accuracy >= target.validation - 1e-6:
            endings["to_ours"] = row
        if endings["nearly"] is None and accuracy >= target.validation - spread:
            endings["nearly"] = row
        if endings["patience"] is None and waited >= settings.patience:
            endings["patience"] = row
        if None not in endings.values():
            break
    return Trained(log, **endings, state=state, state_step=state_step)


def check(sets: ArcSets, settings: DiscriminatorSettings, radii: list[float]) -> None:
    """One step of the peer's attack and one of ours give the same images, but for a few whose gradient is almost 0."""
    network = make_network(sets.training, settings)
    x = unit(sets.training.real[:64])
    with torch.no_grad():
        for _ in range(20):
            network(x)  # batch norm's statistics, without which all logits are alike
    network.eval()
    frozen, y = freeze(network), torch.ones(len(x), dtype=torch.int64, device=x.device)
    for eps in radii:
        ours = pgd_maximize(
            lambda images: cw_margin(frozen(images), y), x, x, norm=settings.norm, eps=eps, step_size=eps, steps=1
        )
        theirs = pgd(network, x, y, settings.norm, eps, 1, x)
        close = ((ours - theirs).abs() <= 1e-3 * max(eps, 1e-3)).float().mean().item()
        assert close > 0.99, f"eps {eps:g}: one step of the attacks agrees in only {close:.2%} of the pixels"


@dataclass
class Peer:
    """The peer with one schedule: a discriminator and its outcomes on held-out images for each radius."""

    schedule: str
    trained: list[Trained]
    outcomes: list[Outcomes]
    measuring: list[float]  # seconds

    def total(self, ending: str) -> float:
        return sum(one.seconds(ending) for one in self.trained) + sum(self.measuring)


def run_peer(sets: ArcSets, targets: list[Target], settings: ArcSettings, schedule: str) -> Peer:
    peer = Peer(schedule, [], [], [])
    for target in targets:
        found = train(sets, target, settings.training, SCHEDULES[schedule])
        model = make_network(sets.training, settings.training)
        model.load_state_dict(found.state)
        model.eval().requires_grad_(False)
        with Clock(sets.real.device) as clock:
            outcomes = measure(model, sets.real, sets.synthetic, target.eps, settings.training.norm, settings.measuring)
        peer.trained.append(found)
        peer.outcomes.append(outcomes)
        peer.measuring.append(clock.seconds)
        line = {
            "eps": target.eps,
            "schedule": schedule,
            "seconds": found.seconds("to_ours"),
            "measuring": clock.seconds,
        }
        print(
            json.dumps({**line, "steps": found.state_step, "held_out": outcomes.success()}), file=sys.stderr, flush=True
        )
    return peer


def area_of(curve: ArcCurve, targets: list[Target], outcomes: list[Outcomes], settings: ArcSettings) -> Area:
    """ARC of the peer: its outcomes at the radii that it was trained at, 1/2 at those of the curve that nobody trains at."""
    by_eps = {target.eps: found for target, found in zip(targets, outcomes, strict=True)}
    size = len(outcomes[0].real)
    rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for eps in curve.eps:
        found = by_eps.get(near(eps * settings.unit, by_eps))
        for kind in range(2):
            rows[kind].append(np.full(size, 0.5) if found is None else found.right()[kind].astype(float))
    return measure_area(
        curve.eps, np.stack(rows[0]), np.stack(rows[1]), draws=settings.draws, seed=settings.training.seed
    )


def near(eps: float, radii: dict[float, Any]) -> float | None:
    return next((radius for radius in radii if math.isclose(radius, eps, abs_tol=1e-9)), None)


def targets_of(curve: ArcCurve, settings: ArcSettings) -> list[Target]:
    """The radii at which the peer trains: those of ours, in a given grid also those that ours left out beyond chance."""
    pairs = zip(curve.eps, curve.measured, strict=True)
    measured = {eps * settings.unit: one for eps, one in pairs if one is not None or settings.radii is not None}
    return [
        Target(eps, 0.5) if one is None else Target(one.eps, one.validation_accuracy) for eps, one in measured.items()
    ]


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--radii", type=int, default=8, help="that the automatic grid measures, 0 included")
    parser.add_argument("--count", type=int, help="images of each kind; by default all of digits:test")
    parser.add_argument("--steps", type=int, default=DiscriminatorSettings().steps, help="at most, for a radius")
    parser.add_argument("--norm", choices=("l2", "linf"), default="l2")
    parser.set_defaults(rounds=len(SCHEDULES) + 1)
    options = parser.parse_args()
    device = harness.prepare(options)
    real, synthetic = open_images("digits:test"), samples(device)
    training = DiscriminatorSettings(norm=options.norm, steps=options.steps)
    settings = ArcSettings(training=training, most=options.radii, n=options.count)
    sets = split_sets(real, synthetic, n=settings.n, held_out=settings.held_out, seed=training.seed, device=device)
    check(sets, training, [0.0, 0.1, 1.0] if options.norm == "l2" else [0.0, 4 / 255, 32 / 255])

    rounds: list[tuple[ArcCurve, float]] = []

    def ours() -> None:
        with Clock(device) as clock:
            curve = arc(real, synthetic, settings, device)
        rounds.append((curve, clock.seconds))
        print(
            json.dumps({"round": len(rounds), "arc": curve.value, "seconds": clock.seconds}),
            file=sys.stderr,
            flush=True,
        )

    ours()
    curve = rounds[0][0]
    if curve.area is None:
        sys.exit(f"no ARC to compare: {curve.warnings[0]}")
    targets = targets_of(curve, settings)
    peers = []
    for schedule in SCHEDULES:
        torch.manual_seed(0)
        peers.append(run_peer(sets, targets, settings, schedule))
        ours()
    while len(rounds) < options.rounds:
        ours()
    for other, _ in rounds[1:]:
        assert other.value == curve.value or device.type == "cuda", f"ARC {curve.value}, then {other.value}"

    best = min(peers, key=lambda peer: peer.total("to_ours"))
    theirs = area_of(curve, targets, best.outcomes, settings)
    seconds = statistics.median(taken for _, taken in rounds)
    agree = inside(theirs.value, curve.area.ci) or inside(curve.area.value, theirs.ci)
    report = {
        **harness.heading("arc", options),
        "settings": dataclasses.asdict(settings),
        "images": curve.counts,
        "synthfast": {
            "seconds": [taken for _, taken in rounds],
            "arc": area_json(curve.area),
            "eps": list(curve.eps),
            "radii": [radius_json(one) for one in curve.measured],
            "warnings": list(curve.warnings),
        },
        "peers": [peer_json(peer, area_of(curve, targets, peer.outcomes, settings), targets) for peer in peers],
        "best_schedule": best.schedule,
        "times_ours": {ending: min(peer.total(ending) for peer in peers) / seconds for ending in ENDINGS},
        "agree": agree,
    }
    harness.write(report, table(report), options)
    if not agree:
        sys.exit("the two ARCs are not within their intervals of each other")


ENDINGS = {
    "to_ours": "validated as well as ours",
    "nearly": "within a standard error of that",
    "patience": "no patience left, whatever it reached",
}


def inside(value: float, interval: tuple[float, float]) -> bool:
    return interval[0] <= value <= interval[1]


def area_json(area: Area) -> dict[str, Any]:
    return {
        "value": area.value,
        "ci": list(area.ci),
        "accuracy": area.accuracy.tolist(),
        "accuracy_ci": area.accuracy_ci.tolist(),
        "isotonic": area.fitted.tolist(),
    }


def radius_json(one: Any) -> dict[str, Any] | None:
    if one is None:
        return None
    keys = ("eps", "validation_accuracy", "steps", "best_step", "seconds")
    return {key: getattr(one, key) for key in keys} | {"held_out": one.outcomes.success()}


def peer_json(peer: Peer, area: Area, targets: list[Target]) -> dict[str, Any]:
    rows = zip(targets, peer.trained, peer.outcomes, peer.measuring, strict=True)
    return {
        "schedule": peer.schedule,
        "seconds": {ending: peer.total(ending) for ending in ENDINGS},
        "measuring_seconds": sum(peer.measuring),
        "arc": area_json(area),
        "radii": [
            {
                "eps": target.eps,
                "target": target.validation,
                "reached": found.to_ours is not None,
                "seconds": {ending: found.seconds(ending) for ending in ENDINGS},
                "measuring_seconds": measuring,
                "state_step": found.state_step,
                "steps": found.log[-1][0],
                "held_out": outcomes.success(),
                "log": found.log,
            }
            for target, found, outcomes, measuring in rows
        ],
    }


def table(report: dict[str, Any]) -> str:
    ours, best = report["synthfast"], next(p for p in report["peers"] if p["schedule"] == report["best_schedule"])
    found, theirs = ours["arc"], best["arc"]
    radii = [radius for radius in ours["radii"] if radius is not None]
    lines = [
        f"### ARC with {len(radii)} radii on {report['device']}, {report['threads']} threads",
        "",
        "| | seconds | ARC | 95% interval |",
        "| --- | --- | --- | --- |",
        f"| **synthfast** | {statistics.median(ours['seconds']):.1f} (rounds {', '.join(f'{s:.1f}' for s in ours['seconds'])}) "
        f"| {found['value']:.4f} | {found['ci'][0]:.4f} to {found['ci'][1]:.4f} |",
    ]
    for peer in report["peers"]:
        low, high = peer["arc"]["ci"]
        lines.append(
            f"| from scratch, {peer['schedule']} | {peer['seconds']['to_ours']:.1f} (of these {peer['measuring_seconds']:.1f} "
            f"measuring) | {peer['arc']['value']:.4f} | {low:.4f} to {high:.4f} |"
        )
    lines += ["", f"the ARCs agree: {'yes' if report['agree'] else 'NO'}", "", "| the peer ends when | time / ours |"]
    lines += ["| --- | --- |", *(f"| {text} | {report['times_ours'][key]:.2f} |" for key, text in ENDINGS.items())]
    lines += [
        "",
        f"By radius, the peer with {report['best_schedule']}:",
        "",
        "| eps | ours: s, steps | validated | held out | peer: s to ours, steps | reached | held out | s nearly | s patience |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    by_eps = {radius["eps"]: radius for radius in radii}
    for other in best["radii"]:
        radius, seconds = by_eps.get(other["eps"]), other["seconds"]
        mine = "not trained | 1/2 | 1/2"
        if radius is not None:
            mine = f"{radius['seconds']:.1f}, {radius['steps']} | {radius['validation_accuracy']:.3f} | {radius['held_out']:.3f}"
        lines.append(
            f"| {other['eps']:.4g} | {mine} | {seconds['to_ours']:.1f}, {other['state_step']} "
            f"| {'yes' if other['reached'] else 'no'} | {other['held_out']:.3f} | {seconds['nearly']:.1f} "
            f"| {seconds['patience']:.1f} |"
        )
    return "\n".join([*lines, "", f"ARC from scratch against ours: {theirs['value'] - found['value']:+.4f}"])


if __name__ == "__main__":
    main()
