"""Tokens to bits and bits to tokens: range coding with integer counts (Martin 1979), from the constriction library.

Distributions are rounded to counts first. Both sides must round the same numbers, for which they compute them in the
same way; what differs in the last digit may give another count, and from there on other tokens.

Legend: M tokens coded together, V vocabulary, W words of code.
"""

from typing import Any

import constriction
import numpy as np
from torch import Tensor

# Counts of a distribution add up to 2 to this power, the precision of the library's coder.
PRECISION = 24


def counts(log_probs_MV: Tensor) -> np.ndarray:
    """Distributions as integers (M, V), each at least 1, that sum to 2**PRECISION; the largest gets what is left."""
    probs_MV = np.exp(log_probs_MV.double().numpy())
    shares_MV = probs_MV / probs_MV.sum(1, keepdims=True)
    counts_MV = 1 + np.floor(shares_MV * (2**PRECISION - shares_MV.shape[1])).astype(np.int64)
    counts_MV[np.arange(len(counts_MV)), counts_MV.argmax(1)] += 2**PRECISION - counts_MV.sum(1)
    return counts_MV


def _models() -> Any:
    """The library's family of models, which is given a row of counts for each token."""
    return constriction.stream.model.Categorical(lazy=True)


class Encoder:
    """Takes tokens; `words` are the code so far, (W,) uint32."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def push(self, tokens_M: np.ndarray, log_probs_MV: Tensor) -> None:
        """Code tokens (M,), each of its own distribution."""
        self._coder.encode(tokens_M.astype(np.int32), _models(), counts(log_probs_MV).astype(np.float64))

    def words(self) -> np.ndarray:
        """The code."""
        code: np.ndarray = self._coder.get_compressed()
        return code


class NoCode(ValueError):
    """The words are no code by the distributions that were given for them."""


class Decoder:
    """Gives the tokens back, if it is given the same distributions."""

    def __init__(self, words: np.ndarray) -> None:
        self._coder = constriction.stream.queue.RangeDecoder(words)

    def pop(self, log_probs_MV: Tensor) -> np.ndarray:
        """The next tokens, (M,) int32. Raises NoCode if these are no distributions, or the words no code by them."""
        if bool(log_probs_MV.isnan().any()):
            raise NoCode("a probability is not a number")
        try:
            tokens_M: np.ndarray = self._coder.decode(_models(), counts(log_probs_MV).astype(np.float64))
        except AssertionError as error:
            raise NoCode(str(error)) from None
        return tokens_M
