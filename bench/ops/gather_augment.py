"""gather_augment against PyTorch by hand (eager in three ways, torch.compile) and torchvision's transforms.

    python -m bench.ops.gather_augment [--device cuda] [--threads 2]

Batches of random images out of a set of 50,000. Ours draws crops and flips inside; the peers get them drawn beforehand, which
favours them. torchvision's transforms work on one image at a time, because a call on a batch crops all images alike; they and
the loop over images are left out on a GPU, where they are hundreds of launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from bench import harness
from synthfast import ops
from synthfast.ops import reference_data as reference

COUNT = 50_000  # 154 MB of bytes: CIFAR-10's training set
SHAPE = (32, 32, 3)
SEED = 1
Peer = Callable[[], Tensor]


def _finish(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, H, W, C] bytes to [N, C, H, W] in [0, 1], channels_last."""
    return (pixels.float() / 255).to(dtype).permute(0, 3, 1, 2)


def make_peers(
    images: Tensor, items: Tensor, crops: tuple[Tensor, Tensor, Tensor], padding: int, dtype: torch.dtype
) -> dict[str, Peer]:
    """Name to function. Without padding and flips all of them are a gather and a scaling."""
    top, left, mirrored = crops
    _, h, w, c = images.shape
    n, device = len(items), images.device
    sample = torch.arange(n, device=device)

    def plain() -> Tensor:
        return _finish(images[items], dtype)

    def windows() -> Tensor:
        """Every possible crop as a view of the padded batch; indexing copies one of each image."""
        padded = F.pad(images[items], (0, 0, padding, padding, padding, padding))
        crop = padded.unfold(1, h, 1).unfold(2, w, 1)[sample, top, left]  # [N, C, H, W]
        crop = torch.where(mirrored[:, None, None, None], crop.flip(3), crop)
        return _finish(crop.permute(0, 2, 3, 1).contiguous(), dtype)

    def indices() -> Tensor:
        """Where each pixel comes from, and whether it is padding."""
        column = torch.arange(w, device=device).expand(n, w)
        x = torch.where(mirrored[:, None], w - 1 - column, column) + left[:, None] - padding
        y = torch.arange(h, device=device) + top[:, None] - padding
        inside = ((y >= 0) & (y < h))[:, :, None] & ((x >= 0) & (x < w))[:, None, :]
        pixels = images[items[:, None, None], y.clamp(0, h - 1)[:, :, None], x.clamp(0, w - 1)[:, None, :]]
        return _finish(pixels * inside[..., None], dtype)

    where = list(zip(items.tolist(), top.tolist(), left.tolist(), mirrored.tolist(), strict=True))

    def loop() -> Tensor:
        """One slice an image; the rest for the whole batch."""
        batch = images.new_zeros((n, h, w, c))
        for k, (item, down, right, flip) in enumerate(where):
            y, x = down - padding, right - padding
            target = batch[k, max(-y, 0) : h - max(y, 0), max(-x, 0) : w - max(x, 0)]
            target.copy_(images[item, max(y, 0) : h + min(y, 0), max(x, 0) : w + min(x, 0)])
            if flip:
                batch[k] = batch[k].flip(1)
        return _finish(batch, dtype)

    def torchvision() -> Tensor:
        batch = []
        for item, down, right, flip in where:
            image = images[item].permute(2, 0, 1)
            image = transforms.crop(image, down - padding, right - padding, h, w)
            batch.append(transforms.horizontal_flip(image) if flip else image)
        scaled = transforms.to_dtype(torch.stack(batch), torch.float32, scale=True)
        return scaled.to(dtype).contiguous(memory_format=torch.channels_last)

    if padding == 0 and not mirrored.any():
        return {"eager": plain, "torch.compile": torch.compile(plain, fullgraph=True)}
    peers = {
        "eager windows": windows,
        "eager indices": indices,
        "torch.compile": torch.compile(indices, fullgraph=True),
    }
    if device.type == "cpu":
        peers |= {"eager loop over images": loop, "torchvision transforms.v2, image by image": torchvision}
    return peers


def make_case(device: torch.device, n: int, padding: int, flip: bool, dtype: torch.dtype) -> harness.Case:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, *SHAPE), generator=generator, dtype=torch.uint8).to(device)
    items = torch.randint(0, COUNT, (n,), generator=generator).to(device)
    index = torch.arange(n, device=device)
    name = f"{'crop and flip' if flip else 'gather and scale'}, {harness.describe((n, *SHAPE), (dtype,))}"
    peers = make_peers(images, items, reference.draw_crops(index, SEED, padding, flip), padding, dtype)

    def ours() -> Tensor:
        return ops.gather_augment(images, items, index, SEED, padding=padding, flip=flip, dtype=dtype)

    def check() -> None:
        batch = ours()
        expected = reference.gather_augment(images, items, index, SEED, padding=padding, flip=flip, dtype=dtype)
        harness.close(batch, expected, 0, f"{name}: against the reference")
        # Compilers, and PyTorch on CUDA, multiply by 1/255 instead of dividing: a unit in the last place.
        tolerance = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23
        for peer, function in peers.items():
            exact = peer.startswith("eager") and device.type == "cpu"
            harness.close(batch, function(), 0 if exact else tolerance, f"{name}: {peer}")
            assert function().is_contiguous(memory_format=torch.channels_last), f"{name}: layout of {peer}"

    moved = images[0].numel() * n * (1 + dtype.itemsize)  # a byte read, an element written
    return harness.Case(name, "gather_augment", {"gather_augment": ours, **peers}, check, moved, n)


def cases(device: torch.device) -> Iterator[harness.Case]:
    kinds = [
        (512, 4, True, torch.float32),
        (512, 4, True, torch.bfloat16),
        (512, 0, False, torch.float32),
    ]
    if device.type == "cuda":
        kinds += [(16384, 4, True, torch.float32), (16384, 4, True, torch.bfloat16)]
    for kind in kinds:
        yield make_case(device, *kind)


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    harness.run("gather_augment", cases(harness.prepare(options)), options)


if __name__ == "__main__":
    main()
