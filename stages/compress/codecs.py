"""Bytes to fewer bytes and back, one small class per compressor.

Decoding is for files that anyone may have written: `decode` is told how many bytes to expect, never makes more, and
raises ValueError on anything but exactly that many.
"""

from typing import Protocol

import brotli
import numpy as np


class Codec(Protocol):
    """A lossless compressor."""

    def encode(self, data: bytes) -> bytes:
        """Compress."""

    def decode(self, data: bytes, size: int) -> bytes:
        """Decompress to exactly `size` bytes. Raises ValueError if that is not what `data` holds."""


class Brotli:
    """RFC 7932 at quality 11 and its largest standard window, which holds 16 MB of codes."""

    def encode(self, data: bytes) -> bytes:
        """Compress."""
        return brotli.compress(data, quality=11, lgwin=24)

    def decode(self, data: bytes, size: int) -> bytes:
        """Decompress to exactly `size` bytes, in steps, so that a bomb is met before it goes off."""
        decoder = brotli.Decompressor()
        parts: list[bytes] = []
        made, rest = 0, data
        try:
            while made <= size and not decoder.is_finished():
                part = decoder.process(rest, output_buffer_limit=min(size + 1 - made, 1 << 24))
                rest = b""
                if not part and not decoder.is_finished():
                    raise ValueError("the stream ends early")
                parts.append(part)
                made += len(part)
        except brotli.error as error:
            raise ValueError(str(error)) from None
        if made != size:
            raise ValueError(f"expected {size} bytes, the stream holds {'more' if made > size else made}")
        return b"".join(parts)


class Shuffled:
    """Another codec on float16 data: all low bytes first, then all high bytes (r1172's byte shuffle with stride 2)."""

    def __init__(self, inner: Codec) -> None:
        self.inner = inner

    def encode(self, data: bytes) -> bytes:
        """Compress an even number of bytes."""
        return self.inner.encode(np.frombuffer(data, np.uint8).reshape(-1, 2).T.tobytes())

    def decode(self, data: bytes, size: int) -> bytes:
        """Decompress to exactly `size` bytes. Raises ValueError if that is not what `data` holds."""
        return np.frombuffer(self.inner.decode(data, size), np.uint8).reshape(2, -1).T.tobytes()


CODECS: dict[str, Codec] = {"brotli": Brotli()}
