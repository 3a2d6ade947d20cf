"""Images of one size to and from files of one kind, png or jpg, by a thread a CPU."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from synthfast.data.formats.png import Bytes, decode_png, encode_png, head, is_whole
from synthfast.data.machine import in_slices
from synthfast.errors import SynthfastError

CODECS = ("png", "jpg")
DEFAULT_QUALITY = 95
MOST_SIDE = 16384  # of an image; a hostile manifest must not choose how much memory one takes
_FULL_COLOUR = 90  # the quality from which colours are stored in full resolution (4:4:4), below it in half (4:2:0)
_MODES = {1: "L", 3: "RGB"}
_LEAST = {"png": 1 << 16, "jpg": 1 << 13}  # pixel bytes that are worth a thread
# What Pillow raises on damaged files, beyond the OSError that it promises.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


@dataclass(frozen=True)
class Codec:
    """How images are stored.

    Attributes:
        name: "png" (lossless) or "jpg"; also the extension of files.
        shape: (H, W, C) of every image, C 1 (grey) or 3 (RGB).
        quality: of jpg, 1 to 100; from 90 on colours are not subsampled.
    """

    name: str
    shape: tuple[int, int, int]
    quality: int = DEFAULT_QUALITY

    @property
    def most_bytes(self) -> int:
        """No file that ``encode`` makes is larger."""
        height, width, channels = self.shape
        return 4096 + 2 * height * (1 + width * channels)

    @property
    def start(self) -> bytes:
        """What every file begins with."""
        return head(self.shape) if self.name == "png" else b"\xff\xd8\xff"

    def encode(self, images: np.ndarray) -> list[bytes]:
        """``images``, uint8 [k, H, W, C], as files in their order. Their bytes do not depend on k or the threads."""
        one = encode_png if self.name == "png" else partial(_encode_jpg, quality=self.quality)
        parts = in_slices(lambda part: one(images[part]), len(images), self._least)
        return [file for part in parts for file in part]

    def decode(self, files: Sequence[Bytes], name: Callable[[int], str]) -> np.ndarray:
        """The images of ``files``, uint8 [k, H, W, C]. ``name(i)`` is what errors call the i-th.

        Raises SynthfastError that names the first file that is damaged or of another size, mode or kind.
        """
        out = np.empty((len(files), *self.shape), np.uint8)

        def decode(part: slice) -> None:
            chosen = range(part.start, part.stop)
            if self.name == "png":
                chosen = [part.start + place for place in decode_png(files[part], out[part])]
            for place in chosen:
                out[place] = self._decode(files[place], lambda place=place: name(place))

        in_slices(decode, len(files), self._least)
        return out

    @property
    def _least(self) -> int:
        return -(-_LEAST[self.name] // int(np.prod(self.shape)))

    def _decode(self, file: Bytes, name: Callable[[], str]) -> np.ndarray:
        """Any valid file of the kind, shape and mode."""
        from PIL import Image

        if self.name == "png" and not is_whole(file):
            raise SynthfastError(f"{name()}: not a readable png (cut short or changed); restore or remake the folder")
        height, width, channels = self.shape
        kind = "PNG" if self.name == "png" else "JPEG"
        try:
            with Image.open(io.BytesIO(file), formats=[kind]) as image:
                found, wanted = (image.mode, *image.size), (_MODES[channels], width, height)
                if found != wanted or "transparency" in image.info:
                    note = " with transparency" if "transparency" in image.info else ""
                    raise SynthfastError(
                        f"{name()}: expected {_words(*wanted)}, found {_words(*found)}{note}; restore or remake the folder"
                    )
                return np.asarray(image).reshape(self.shape)
        except (*BROKEN, Image.DecompressionBombError) as error:
            reason = str(error).partition("<")[0].strip()  # Pillow's words, without the address of the buffer
            raise SynthfastError(
                f"{name()}: not a readable {self.name} ({reason}); restore or remake the folder"
            ) from error


def _encode_jpg(images: np.ndarray, quality: int) -> list[bytes]:
    from PIL import Image

    subsampling = "4:4:4" if quality >= _FULL_COLOUR else "4:2:0"
    files = []
    for pixels in images:
        buffer = io.BytesIO()
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
        files.append(buffer.getvalue())
    return files


def _words(mode: str, width: int, height: int) -> str:
    kinds = {"L": "grey", "RGB": "RGB"}
    return f"{kinds.get(mode, f'mode {mode}')} {width}x{height}"
