"""`synthfast sample` against the bare network: what the loop, the solver, the writing and the Python between cost.

    python -m bench.pipeline.sample [--device cuda] [--threads 2] [--images 3840]

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


def make_case(generator: str, images: int, device: torch.device, scratch: Path) -> harness.Case:
    batch_size = 128 if device.type == "cpu" else 1024
    config = SampleConfig(n=images, generator=generator, device=device.type, batch_size=batch_size)
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
        for _ in range(images // batch_size):
            one_batch()

    def bare_batch_a_thread() -> None:
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for future in [pool.submit(one_batch) for _ in range(images // batch_size)]:
                future.result()
        torch.set_num_threads(threads)

    def check() -> None:
        out = whole()
        index = torch.arange(batch_size, device=device)
        expected = ops.quantize_uint8(loaded.sample(index, labels, config.seed)).cpu().numpy()
        assert np.array_equal(ShardSet(out).read(np.arange(batch_size)), expected), "shards differ from sample()"

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
    parser.add_argument("--images", type=int, default=3840)
    parser.set_defaults(rounds=7)
    options = parser.parse_args()
    device = harness.prepare(options)
    with tempfile.TemporaryDirectory() as scratch:
        harness.run("sample", [make_case(options.generator, options.images, device, Path(scratch))], options)


if __name__ == "__main__":
    main()
