"""What general-purpose compressors make of the validation text: the yardstick beside a model's bits per byte."""

import lzma
from collections.abc import Iterable
from typing import Any

import zstandard

ZSTD_LEVEL = 19


def compressed_bytes(texts: Iterable[str]) -> dict[str, int]:
    """Bytes of the concatenated texts (UTF-8) under `xz -9e` and `zstd -19 --long=27`, by compressor."""
    parameters = zstandard.ZstdCompressionParameters.from_level(ZSTD_LEVEL, window_log=27, enable_ldm=True)
    compressors: dict[str, Any] = {
        "xz": lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
        "zstd": zstandard.ZstdCompressor(compression_params=parameters).compressobj(),
    }
    sizes = dict.fromkeys(compressors, 0)
    for text in texts:
        data = text.encode("utf-8")
        for name, compressor in compressors.items():
            sizes[name] += len(compressor.compress(data))
    return {name: sizes[name] + len(compressor.flush()) for name, compressor in compressors.items()}
