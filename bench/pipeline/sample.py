"""`synthfast sample` against the bare network: what the loop, the solver, the writing and the Python between cost.

    python -m bench.pipeline.sample [--device cuda] [--threads 2] [--images N]

The peer is the network alone, called as often and on batches of the same size, with nothing around it: an upper bound that no
sampler with this network can pass. On a CPU it runs in two ways: all threads share each batch, or, as synthfast does it, each
thread has a batch of its own. The check: the shards hold what the library's `sample` gives for the same indices.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from bench import harness
from synthfast import ops
from synthfast.config import SampleConfig
from synthfast.data import ShardSet
from synthfast.distributed import Ranks
from synthfast.sampling import generate, load_generator

# As many as make a run of some seconds with the embedded generator; all batches are full, and one shard holds them.
IMAGES = {"cpu": 3840, "cuda": 16384}
BATCH_SIZES = {"cpu": 128, "cuda": 1024}


def make_case(generator: str, images: int, device: torch.device, scratch: Path) -> harness.Case:
    batch_size = min(BATCH_SIZES[device.type], images)
    batches = images // batch_size
    images = batches * batch_size  # so that the network alone sees as many
    config = SampleConfig(n=images, generator=generator, device=device.type, batch_size=batch_size, shard_size=images)
    loaded = load_generator(config, device)
    height, width, channels = loaded.shape
    times = torch.from_numpy(loaded.table.conditioning).to(device, torch.float32).unbind()
    x = torch.randn(batch_size, channels, height, width, device=device).contiguous(memory_format=torch.channels_last)
    labels = None if loaded.classes is None else torch.arange(batch_size, device=device) % loaded.classes
    number = itertools.count()

    def whole() -> Path:
        out = scratch / str(next(number))
        with Ranks(device.type) as ranks:
            generate(SampleConfig(**{**vars(config), "out": str(out)}), ranks)
        return out

    def one_batch() -> None:
        with torch.inference_mode():
            for t in times:
                loaded.unet(x, t, labels)

    def bare() -> None:
        for _ in range(batches):
            one_batch()

    def bare_batch_a_thread() -> None:
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for future in [pool.submit(one_batch) for _ in range(batches)]:
                future.result()
        torch.set_num_threads(threads)

    def check() -> None:
        out = whole()
        index = torch.arange(batch_size, device=device)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as a batch of synthfast has; the bits of convolutions depend on it
        expected = ops.quantize_uint8(loaded.sample(index, labels, config.seed)).cpu().numpy()
        torch.set_num_threads(threads)
        found = ShardSet(out).read(np.arange(batch_size))
        shutil.rmtree(out)
        # A GPU's convolutions may add up in another order the second time.
        levels = np.abs(found.astype(int) - expected).max()
        assert levels <= (0 if device.type == "cpu" else 1), f"shards differ from sample() by {levels} levels"

    def timed_whole() -> None:
        shutil.rmtree(whole())

    name = f"{loaded.name}: {images} images, {loaded.table.config.name} {loaded.table.config.steps} steps"
    variants = {"synthfast sample": timed_whole, "bare network": bare}
    if device.type == "cpu":
        variants["bare network, a batch a thread"] = bare_batch_a_thread
    return harness.Case(name, "synthfast sample", variants, check, items=images)


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--generator", default="digits")
    parser.add_argument("--images", type=int, help="rounded down to whole batches; default 3,840, on a GPU 16,384")
    parser.set_defaults(rounds=7)
    options = parser.parse_args()
    device = harness.prepare(options)
    images = options.images or IMAGES[options.device]
    with tempfile.TemporaryDirectory() as scratch:
        harness.run("sample", [make_case(options.generator, images, device, Path(scratch))], options)


if __name__ == "__main__":
    main()
