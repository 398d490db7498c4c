"""What all layers of one forward pass are given, and none of them can change.

Whatever runs the network in another way (packed documents, a key/value cache, overlapping windows, low-rank adapters)
puts an object of its own into the context. The network's modules call that object, and stay as they are.

Depth recurrence applies a layer several times in a pass. An application is one of these times, and applications are
counted from 0 over the whole pass, in the order in which they are computed.

Legend: B rows, T tokens, X wanted places at the end of a row, U rows of x0, D model width, H query heads, K key/value
heads, E width of a head, C channels that a gate reads, R rotated pairs, O outputs of a matrix, r numbers that an
adapter reads.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor


class Attend(Protocol):
    """A way to attend."""

    def __call__(self, q_BXHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, application: int, /) -> Tensor:
        """Attention o_BXHE of queries at the last X of T places, all normed and rotated; X = T but in the last layer.

        `application` tells apart the layers, and the several applications of a layer, for those that keep something.
        """


class Projection(NamedTuple):
    """What attention makes of its input: heads as Attend wants them, and what else it reads of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    # The channels of the input that the gate reads, at the last X or all T places.
    gate_BTC: Tensor | None
    # What the adapter beside the output matrix has read (Adapters.read); it reads this input too, not the heads'
    # outputs as the matrix does (PR #1855).
    read_BXr: Tensor | None = None


# The outputs in a layer to which adapters may add: queries, keys and values before their norm and rotation, and the
# outputs of attention and MLP.
Site = Literal["q", "k", "v", "o", "mlp"]


class Adapters(Protocol):
    """Something that adds to what the matrices of a layer put out.

    An adapter makes a few numbers of its input first, and of them what it adds: (B, T, r), as low-rank adapters do.
    """

    def projections(
        self,
        x_BTD: Tensor,
        weights: tuple[Tensor, Tensor, Tensor],
        gain_H: Tensor,
        rope: tuple[Tensor, Tensor],
        application: int,
        *,
        wanted: int | None,
        channels: int,
    ) -> Projection:
        """What attention makes of its input, with what is added to its queries, keys and values.

        Its matrices are those of queries, keys and values; a head's queries are multiplied by its gain. `wanted`: X, or
        None for all T places. All comes from one call so that the gradient of x is added up in one place.
        """

    def read(self, x_BTD: Tensor, site: Site, application: int) -> Tensor:
        """The few numbers that a site's adapter makes of its input, (B, T, r)."""

    def onto(self, y_BTO: Tensor, site: Site, application: int, read_BTr: Tensor, scale_O: Tensor) -> Tensor:
        """`y` and what the site adds, given what it has read; that is scaled per channel, as `y` is already.

        It may be added in place: `y` is the output of a product that nobody else reads.
        """


@dataclass(frozen=True, eq=False)
class Context:
    """How to attend, what adapters add, and what depends on the tokens alone."""

    # The embedded tokens (B, T, D), from which the first layer starts and which every layer mixes in again.
    x0_BTD: Tensor
    # Cosines and sines (rope.rotary_table) of the places, (T, 1, R) each; there may be more places than T.
    rope: tuple[Tensor, Tensor]
    # What is added to the values, (B, T, K·E) each, for the layers that have an entry.
    value_embeddings: dict[int, Tensor]
    attend: Attend
    adapters: Adapters | None = None
    # Rows of a batch may have embedded tokens in common, as overlapping windows have. Then x0 is (1, U, D) with U > T,
    # and these (B, T) int64 say which row of it each place reads. The first layer's queries, keys and values are
    # computed from x0 by row as well.
    rows_BT: Tensor | None = None


def by_row(x: Tensor, rows_BT: Tensor | None) -> bool:
    """Whether `x` is still (1, U, ...), as x0 then is, and not (B, T, ...)."""
    return rows_BT is not None and x.size(1) > rows_BT.size(1)


def placed(x: Tensor, rows_BT: Tensor | None) -> Tensor:
    """(B, T, ...): each place's own row of `x`, if that is by row."""
    return x[0][rows_BT] if by_row(x, rows_BT) else x


def last_places(x: Tensor, wanted: int | None) -> Tensor:
    """The last `wanted` places of each row of (B, T, ...); all if that is None."""
    return x if wanted is None else x[:, -wanted:]
