"""The shape of a network: the `model` section of params.yaml, typed.

A mechanism is present or absent by its key here (null means absent) and nowhere else: the four records are four
values of this class. Mechanisms and their letters: see the file named beside each key.
"""

from typing import Literal

from pydantic import Field, model_validator

from fairway.runtime.settings import Section


class Rope(Section):
    """Rotary position embedding on the first `dims` channels of each head (attention.py)."""

    dims: int = Field(gt=0, multiple_of=2)
    base: float = Field(gt=0)
    # Rows longer than this stretch the base (NTK style); null never stretches.
    reference_len: int | None
    # PR #1855 rounds the frequencies to bfloat16 once and for all.
    bf16_frequencies: bool


class Bigram(Section):
    """Hashed (previous, current) token table added to the embedding (embedding.py)."""

    buckets: int = Field(gt=1)
    width: int = Field(gt=0)
    # Factor on the orthogonal start of the projection: 1, or 1/sqrt(2 layers) in PR #1488.
    proj_init: float = Field(gt=0)


class ValueEmbedding(Section):
    """Token table added to the values of some layers (embedding.py)."""

    width: int = Field(gt=0)
    layers: list[int] = Field(min_length=1)
    proj_init: float = Field(gt=0)


class Smear(Section):
    """Blend of each token with its predecessor: static per channel after the norm, or gated per token before it."""

    kind: Literal["static", "gated"]
    # Channels read by the gate; only "gated" has one.
    window: int = Field(ge=0)


class AttnGate(Section):
    """Per-head output gate read from the first `window` channels of the block's normed input (attention.py)."""

    window: int = Field(gt=0)
    scale: float = Field(gt=0)


class Loop(Section):
    """Depth recurrence: layers first..last (inclusive) are applied `repeats` more times (residual.py)."""

    first: int = Field(ge=0)
    last: int = Field(ge=0)
    repeats: int = Field(gt=0, le=64)


class ModelConfig(Section):
    """Everything that decides a network's parameters and forward pass. Raises ValidationError on contradictions."""

    vocab_size: int = Field(gt=3, le=65536)
    layers: int = Field(gt=1, le=1024)
    width: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    mlp_hidden: int = Field(gt=0)
    seq_len: int = Field(gt=1, le=2**20)
    softcap: float = Field(gt=0)
    embed_init_std: float = Field(gt=0)
    # Storage of the token, bigram and value tables, which the records train in bfloat16, and of the skip gates.
    table_dtype: Literal["float32", "bfloat16"]
    skip_gate_dtype: Literal["float32", "bfloat16"]
    qk_gain: float
    rope: Rope
    xsa_last_layers: int = Field(ge=0)
    skip: Literal["plain", "gated"]
    smear: Smear | None
    bigram: Bigram | None
    value_embedding: ValueEmbedding | None
    value_residual: bool
    attn_gate: AttnGate | None
    # First layer with two residual lanes; null keeps one stream.
    lanes_from: int | None
    loop: Loop | None

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    def layer_order(self, looped: bool) -> tuple[list[int], list[int]]:
        """Layers in order of application: the encoder (its outputs are saved), then the decoder (it takes them back).

        `looped` repeats the layers of `loop`, where there is one. The halves split the applications, not the layers.
        """
        order = list(range(self.layers))
        # The compiler cannot tell whether a section is true, but it can tell whether there is one.
        if looped and self.loop is not None:
            first, end = self.loop.first, self.loop.last + 1
            order = order[:first] + order[first:end] * (self.loop.repeats + 1) + order[end:]
        half = len(order) // 2
        return order[:half], order[half:]

    @property
    def skips(self) -> int:
        """Encoder outputs that the decoder takes back, with looping on if there is any."""
        return len(self.layer_order(looped=True)[0])

    @model_validator(mode="after")
    def _shapes_agree(self) -> "ModelConfig":
        _need(self.width % self.heads == 0, f"heads ({self.heads}) must divide width ({self.width})")
        _need(self.heads % self.kv_heads == 0, f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        _need(self.rope.dims <= self.head_dim, f"rope.dims ({self.rope.dims}) exceeds the head width ({self.head_dim})")
        stretched = self.rope.reference_len is not None
        _need(self.rope.dims > 2 or not stretched, "rope.dims must exceed 2 where rope.reference_len is set")
        if self.smear:
            gated, window = self.smear.kind == "gated", self.smear.window
            _need((window > 0) == gated, "smear.window counts the gate's channels: above 0 exactly when kind is gated")
            _need(window <= self.width, f"smear.window ({window}) exceeds width ({self.width})")
        if self.attn_gate:
            window = self.attn_gate.window
            _need(window <= self.width, f"attn_gate.window ({window}) exceeds width ({self.width})")
        return self

    @model_validator(mode="after")
    def _layers_exist(self) -> "ModelConfig":
        last = self.layers - 1
        _need(self.xsa_last_layers <= self.layers, f"xsa_last_layers ({self.xsa_last_layers}) exceeds layers")
        if self.value_embedding:
            listed = self.value_embedding.layers
            bad = [i for i in listed if not 0 <= i <= last]
            _need(not bad, f"value_embedding.layers {bad} not in 0..{last}")
            _need(len(set(listed)) == len(listed), f"value_embedding.layers {listed} repeats a layer")
        if self.loop:
            first, end = self.loop.first, self.loop.last
            _need(first <= end <= last, f"loop {first}..{end} must lie in 0..{last}")
        if self.lanes_from is not None:
            earliest = max(self.layers // 2, self.loop.last + 1 if self.loop else 0)
            behind = f"{earliest}..{last}, behind the encoder and the loop"
            _need(earliest <= self.lanes_from <= last, f"lanes_from ({self.lanes_from}) not in {behind}")
        return self


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)
