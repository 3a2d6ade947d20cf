#!/usr/bin/env bash
# Ranks ten generators of digits: diffusion at several qualities, GANs at several lengths, blurred and noisy controls.
# Writes bench/results/rank-digits.json and docs/rank.png. OUT (default runs/rank-digits) keeps everything that was made;
# the same command goes on where it was interrupted. About an hour and a half on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/rank-digits}
SYNTHFAST=${SYNTHFAST:-.venv/bin/synthfast}
N=${N:-4000}

sample() { # NAME, then options of synthfast sample
    "$SYNTHFAST" sample --out "$OUT/shards/$1" -n "$N" --shard-size "$N" "${@:2}"
}

sample diffusion
sample diffusion-4-steps --steps 4
sample guidance-4 --guidance 4
sample blurred --generator py:bench.experiments.controls:blurred
sample noisy --generator py:bench.experiments.controls:noisy
for steps in 150 400; do
    "$SYNTHFAST" train generator --steps $steps --out "$OUT/generators/diffusion-$steps"
    sample diffusion-trained-$steps --generator "$OUT/generators/diffusion-$steps"
done
for steps in ${GAN_STEPS:-500 1500 4000}; do
    "$SYNTHFAST" train generator --arch gan --steps "$steps" --out "$OUT/generators/gan-$steps"
    sample "gan-$steps" --generator "$OUT/generators/gan-$steps"
done

"$SYNTHFAST" rank "$OUT"/shards/* --samples "$N" --eps 0.15 --steps 400 --out "$OUT"
cp "$OUT/result.json" bench/results/rank-digits.json
cp "$OUT/rank.png" docs/rank.png
