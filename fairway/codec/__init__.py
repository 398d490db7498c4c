"""From integer codes to bytes and back: codecs, the container model.bin, and networks made of it."""
