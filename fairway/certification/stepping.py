"""An evaluation asked for one target at a time while the tokens behind it are not known yet: what a decoder needs.

A pass is begun on a buffer of tokens, which is filled in as they become known. A Stepper says what the pass would
predict at a target with the tokens as they stand, and computes no more for it than it must. Nothing is learned by that.
Shapes do not depend on what is known by then, so that the encoder, who knows everything, gets the same bits.
A Follower (follower.py) goes through a whole stream so, and lets the pass learn from each chunk that lies behind.

A RowReader goes through a row of tokens, a few at a time, while the tokens behind them are not known yet.

There are cheap steppers for the evaluators of this project, and for windows with a PlaceHead, as long as predictions do
not depend on anything else in the batch. Of any other pass, subclasses included, the whole batch with the target is
predicted anew.

Legend: B windows, T tokens of a window, S tokens of a step, M scored places, N targets, P tokens before the scored
ones, X tokens from there on, D model width, V vocabulary.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.evaluation.document_batches import Cut, Document, documents
from fairway.evaluation.kv_cache import Cache, cached_hidden
from fairway.evaluation.lora_ttt import LoraTttPass
from fairway.evaluation.passes import Pass, Prediction
from fairway.evaluation.scoring import Batch, PlaceHead, WindowPass, make_batch, plain_head
from fairway.evaluation.slot import OffsetHead, Places
from fairway.evaluation.slot_carried import CarriedPass
from fairway.evaluation.slot_offsets import products
from fairway.evaluation.streaming import StreamingPass
from fairway.evaluation.ttt import TttPass
from fairway.evaluation.windows import Windows, in_groups
from fairway.model.embedding import LOOK_BACK, softcap
from fairway.model.gpt import GPT

# Tokens of a step. So few cost little more than one token, and where all are known already, fewer steps are needed.
STEP = 4


class NotPredicted(Exception):
    """A pass, as it knows the stream by then, does not predict a position in the chunk in which it was asked for it."""


class RowReader:
    """Goes through a row in steps of STEP tokens, and again through those whose tokens have changed since.

    `asked_X` (X,) bool marks the places of the row from `first` on that will be asked for. What comes before the first
    of them, and what lies between steps with such a place, is read in one go. So runs begin and end at the same places
    whatever is known, and a decoder computes on the same shapes as the encoder and gets the same bits. The tokens
    before a step are in the key/value cache, and are computed again only if they have changed. `begin` and `cache` say
    where the row starts, if tokens before it are cached already.
    """

    def __init__(self, model: GPT, asked_X: Tensor, *, first: int = 0, begin: int = 0, cache: Cache = ()) -> None:
        self.model, self._ends = model, _ends_of_runs(asked_X, first)
        self._start = (begin, cache)
        # The tokens read before the last step and with it, and what both left in the cache.
        self._before = self._after = (torch.empty(0), cache)

    def step(self, row: Tensor, begin: int) -> Tensor:
        """Hidden states (S, D) at places begin ... of a row."""
        known, cache = self._read_before(row, begin)
        ends = self._ends[bisect_right(self._ends, known) : bisect_left(self._ends, begin)]
        for end in [*ends, begin] if known < begin else []:
            cache = self._run(row, known, end, cache)[1]
            known = end
        hid_SD, cache_after = self._run(row, begin, begin + STEP, cache)
        # With what a step reads beyond the end of the row, since that is in the cache as well.
        read = F.pad(row, (0, max(begin + STEP - len(row), 0)))[: begin + STEP]
        self._before, self._after = (row[:begin].clone(), cache), (read.clone(), cache_after)
        return hid_SD

    def take_model(self, model: GPT) -> bool:
        """Go on with another network, if it has the same weights; whether it has."""
        pairs = zip(self.model.state_dict().values(), model.state_dict().values(), strict=True)
        same = all(torch.equal(mine, other) for mine, other in pairs)
        if same:
            self.model = model
        return same

    def _read_before(self, row: Tensor, begin: int) -> tuple[int, Cache]:
        """How many of the tokens before `begin` are cached and still the same, and the cache behind them."""
        for tokens, cache in (self._after, self._before):
            if 0 < len(tokens) <= begin and torch.equal(row[: len(tokens)], tokens):
                return len(tokens), cache
        return self._start

    def _run(self, row: Tensor, begin: int, end: int, cache: Cache) -> tuple[Tensor, Cache]:
        """Hidden states of the places begin ... end - 1; beyond the row's end tokens are 0."""
        tokens = F.pad(row, (0, max(end - len(row), 0)))[begin - (LOOK_BACK if begin else 0) : end]
        hid_1SD, cache = cached_hidden(self.model, tokens[None], begin, cache)
        return hid_1SD[0], cache


class Stepper:
    """For any pass: the whole batch with the target is predicted anew. `asked_N` (N,) bool are all targets to come."""

    # Whether predictions have the bits that they have in an ordinary pass.
    exact = True

    def __init__(self, evaluation: Pass, asked_N: Tensor) -> None:
        self.evaluation, self.asked_N = evaluation, asked_N

    def at(self, chunk: int, position: int) -> Prediction:
        """The prediction of a position in a chunk, with those made together with it.

        The pass must have learned from all chunks before that one. Raises NotPredicted if it does not predict it there.
        """
        wanted = torch.zeros_like(self.asked_N)
        wanted[position] = True
        try:
            predictions = self.evaluation.predict(chunk, wanted) if chunk < self.evaluation.chunks else ()
            for positions_M, logits_MV in predictions:
                if bool((positions_M == position).any()):
                    return positions_M, logits_MV
        except (LookupError, ValueError) as error:
            # Some evaluator of one's own may trip over the tokens that stand for those not known yet.
            raise NotPredicted(f"position {position} in chunk {chunk}: {error}") from error
        raise NotPredicted(f"position {position} is not predicted in chunk {chunk}")

    def take_over(self, other: "Stepper") -> None:
        """Go on with what the stepper of another pass over the same buffer has computed, if the weights are the same.

        Both passes should be in the same state. But what beginning a pass does to its weights is up to the evaluator.
        """


class WindowStepper(Stepper):
    """For windows whose predictions depend on nothing but the window, by a head that reads the scored places alone."""

    exact = False

    def __init__(self, evaluation: WindowPass, asked_N: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__(evaluation, asked_N)
        self.windows, self.head, self._where = evaluation, head, (-1, -1, -1)

    def at(self, chunk: int, position: int) -> Prediction:
        """A step of the window that scores the position."""
        window, _ = _window(self.windows, chunk, position)
        start, first, length = (int(column) for column in (window.start, window.first, window.length))
        first = first if first >= LOOK_BACK else 0
        if self._where != (chunk, start, first):
            # Passes learn between chunks, so that what was cached before belongs to other weights; and each window has
            # places of its own that are read at once.
            self._where = (chunk, start, first)
            self._reader = RowReader(self.windows.model, self.asked_N[start + first :], first=first)
        begin = first + (position - start - first) // STEP * STEP
        row = self.windows.tokens_N1[start : start + length]
        positions_S = torch.arange(start + begin, min(start + begin + STEP, start + length), device=row.device)
        with torch.no_grad():
            # The head is given all places of a step, also behind a document's end, which a decoder does not know yet.
            return positions_S, self.head(self._reader.step(row, begin))[: len(positions_S)]

    def take_over(self, other: Stepper) -> None:
        """The cache of the window last asked for."""
        if isinstance(other, WindowStepper) and other._where[0] >= 0 and other._reader.take_model(self.windows.model):
            self._where, self._reader = other._where, other._reader


class OffsetStepper(Stepper):
    """For SLOT with an offset for each window (evaluation/slot.py), which is fitted anew for each token."""

    exact = False

    def __init__(self, evaluation: WindowPass, asked_N: Tensor, head: OffsetHead) -> None:
        super().__init__(evaluation, asked_N)
        self.windows, self.head = evaluation, head
        self._chunk = -1
        self._context: Tensor | None = None

    def at(self, chunk: int, position: int) -> Prediction:
        """The window that scores the position."""
        if chunk != self._chunk:
            # As above: what was cached belongs to other weights.
            self._chunk, self._context = chunk, None
        window, group = _window(self.windows, chunk, position)
        batch = _batch_alone(self.windows, window)
        with torch.no_grad():
            hid_1TD = self._hidden(batch.tokens_BT, int(window.first))
            logits_MV = self._alone(window, group)(self.windows.model, batch, hid_1TD)
            return batch.positions_M, logits_MV[: len(batch.positions_M)]

    def _hidden(self, tokens_1T: Tensor, first: int) -> Tensor:
        """The hidden states of a window; those before the first scored place are kept while its tokens stay."""
        model = self.windows.model
        if first < LOOK_BACK:
            return cached_hidden(model, tokens_1T, 0, ())[0]
        context = tokens_1T[:, :first]
        if self._context is None or not torch.equal(context, self._context):
            self._context = context.clone()
            self._before_1PD, self._cache = cached_hidden(model, context, 0, ())
        behind_1XD, _ = cached_hidden(model, tokens_1T[:, first - LOOK_BACK :], first, self._cache)
        return torch.cat([self._before_1PD, behind_1XD], 1)

    def _alone(self, window: Windows, group: Windows) -> OffsetHead:
        """A head for this window alone, in which places have the weight that they have in the window's batch.

        The fit depends on the weights, because the optimizer's eps is not scale-free.
        """
        # Within documents, the weight is the same in every batch.
        share = 1.0 if self.windows.stretch else max(self._fitted(window), 1) / max(self._fitted(group), 1)

        def places(batch: Batch) -> Places:
            found = self.head.places(batch)
            return replace(found, weight_GP=found.weight_GP * share)

        return OffsetHead(self.head.settings, self.windows.tokens_N1.device, places)

    def _fitted(self, windows: Windows) -> int:
        """On how many places offsets of these windows are fitted."""
        context = self.head.settings.fitted_on == "context"
        return int((windows.first if context else windows.length - windows.first).sum())


class DocumentWindowStepper(Stepper):
    """For windows within documents with any head: the window by itself. Whole batches depend on later documents."""

    exact = False

    def __init__(self, evaluation: WindowPass, asked_N: Tensor) -> None:
        super().__init__(evaluation, asked_N)
        self.windows = evaluation

    def at(self, chunk: int, position: int) -> Prediction:
        """The window that scores the position."""
        batch = _batch_alone(self.windows, _window(self.windows, chunk, position)[0])
        with torch.no_grad():
            logits_MV = self.windows.head(self.windows.model, batch, self.windows.model.hidden(batch.tokens_BT))
            return batch.positions_M, logits_MV[: len(batch.positions_M)]


class LaneStepper(Stepper):
    """For the lanes of a streaming evaluation, each with what it has cached in the chunks before."""

    exact = False

    def __init__(self, evaluation: StreamingPass, asked_N: Tensor) -> None:
        super().__init__(evaluation, asked_N)
        self.lanes, self._where = evaluation, (-1, -1)

    def at(self, chunk: int, position: int) -> Prediction:
        """A step of the lane that the position lies in."""
        bounds, first = self.lanes.bounds, chunk * self.lanes.settings.block_tokens
        lane = next(index for index, end in enumerate(bounds[1:]) if position < end)
        if self._where != (chunk, lane):
            cache = tuple(of_lanes[lane : lane + 1] for of_lanes in self.lanes.state().values())
            asked_X = self.asked_N[bounds[lane] + first : bounds[lane + 1]]
            self._where = (chunk, lane)
            self._reader = RowReader(self.lanes.model, asked_X, first=first, begin=first, cache=cache)
        begin = first + (position - bounds[lane] - first) // STEP * STEP
        row = self.lanes.tokens_N1[bounds[lane] : bounds[lane + 1]]
        # A decoder comes to the next block in another chunk, and so a step ends where its block does.
        end = min(begin + STEP, first + self.lanes.settings.block_tokens, len(row))
        positions_S = bounds[lane] + torch.arange(begin, end, device=row.device)
        with torch.no_grad():
            hid_SD = self._reader.step(row, begin)
            return positions_S, self.lanes.model.logits(hid_SD)[: len(positions_S)]

    def take_over(self, other: Stepper) -> None:
        """The cache of the lane last asked for."""
        if isinstance(other, LaneStepper) and other._where[0] >= 0 and other._reader.take_model(self.lanes.model):
            self._where, self._reader = other._where, other._reader


class DocumentStepper(Stepper):
    """For documents whose adapters learn on the way, from cut to cut, each time from the tokens as they then stand."""

    def __init__(self, evaluation: LoraTttPass, asked_N: Tensor) -> None:
        super().__init__(evaluation, asked_N)
        self.documents, self._chunk = evaluation, -1
        self._going: Generator[Prediction, bool | None, None]

    def at(self, chunk: int, position: int) -> Prediction:
        """The cut with the position: on from the cut last asked for, or else from the beginning of the chunk again."""
        if chunk == self._chunk:
            found: Prediction | None = self._going.send(True)
            while found is not None and not bool((found[0] == position).any()):
                found = next(self._going, None)
            if found is not None:
                return found
        if chunk < self.documents.chunks:
            self._chunk, self._going = chunk, self.documents.predict(chunk, self.asked_N)
            for cut in self._going:
                if bool((cut[0] == position).any()):
                    return cut
        raise NotPredicted(f"position {position} is not predicted in chunk {chunk}")


class IndependentDocumentStepper(Stepper):
    """For documents that depend on no other: the one with the target by itself, as far as it is known.

    A document is taken to go on to the end of each cut, since a decoder learns only there that it has ended. What the
    encoder finds behind the end cannot be seen from before it, and shapes are the same for both.
    """

    exact = False

    def __init__(self, evaluation: LoraTttPass, asked_N: Tensor) -> None:
        super().__init__(evaluation, asked_N)
        self.documents, self._begin, self._index = evaluation, -1, 0

    def at(self, chunk: int, position: int) -> Prediction:
        """The cut with the position, after a step of the adapters on each cut of the document before it."""
        # As far as document starts are known by now; the last document begins before the position or at it.
        document = [found for found in documents(self.documents.tokens_N1) if found.begin <= position][-1]
        size = self.documents.settings.chunk_tokens
        index = (position - document.begin) // size
        if document.begin != self._begin or index < self._index:
            self._begin, self._index, self._sets = document.begin, 0, self.documents.new_sets(1)
        while self._index < index:
            cut, _ = self._score()
            self._index += 1
            self._sets.step(slice(0, 1), self.documents.steps.gradients(cut), self._index)
        first, end = self._begin + index * size, self._begin + document.targets
        _, logits_SV = self._score()
        positions_S = torch.arange(first, min(first + size, end), device=logits_SV.device)
        return positions_S, logits_SV[: len(positions_S)]

    def _score(self) -> tuple[Cut, Tensor]:
        """The cut that the adapters have come to, and its logits (C, V), of which the next call may take the memory."""
        size, steps = self.documents.settings.chunk_tokens, self.documents.steps
        goes_on = Document(self._begin, (self._index + 1) * size + 1)
        cut = Cut([goes_on], self._index * size, size, self.documents.model.config.seq_len, ends_known=False)
        return cut, steps.score(cut, self._sets.numbers_BP)[0]


def make_stepper(evaluation: Pass, asked_N: Tensor) -> Stepper:
    """The cheapest stepper for a pass, of which the targets (N,) bool will be asked for."""
    kind = type(evaluation)
    if isinstance(evaluation, LoraTttPass) and kind is LoraTttPass:
        return (IndependentDocumentStepper if evaluation.settings.independent else DocumentStepper)(evaluation, asked_N)
    if isinstance(evaluation, StreamingPass) and kind is StreamingPass:
        return LaneStepper(evaluation, asked_N)
    if isinstance(evaluation, CarriedPass) and kind is CarriedPass:
        return WindowStepper(evaluation, asked_N, lambda hid_MD: _carried_logits(evaluation, hid_MD))
    if isinstance(evaluation, WindowPass) and kind in (WindowPass, TttPass):
        if evaluation.head is plain_head:
            return WindowStepper(evaluation, asked_N, evaluation.model.logits)
        if isinstance(evaluation.head, PlaceHead):
            return WindowStepper(evaluation, asked_N, partial(evaluation.head.logits, evaluation.model))
        if isinstance(evaluation.head, OffsetHead) and evaluation.head.settings.fitted_on != "batch":
            return OffsetStepper(evaluation, asked_N, evaluation.head)
        if evaluation.stretch:
            return DocumentWindowStepper(evaluation, asked_N)
    return Stepper(evaluation, asked_N)


def _ends_of_runs(asked_X: Tensor, first: int) -> list[int]:
    """Where runs of a row end: before and behind each step with a marked place. `asked_X` (X,) begins with `first`."""
    places = asked_X.nonzero()[:, 0] // STEP * STEP + first
    return torch.cat([places, places + STEP]).unique().tolist()


def _window(evaluation: WindowPass, chunk: int, position: int) -> tuple[Windows, Windows]:
    """The first window that scores a position, and the batch it belongs to.

    It is looked for in the chunk first. While later tokens are not known, windows that depend on where documents start
    may be dealt out to chunks otherwise than in the end.
    """
    for w in chain(evaluation.windows[chunk : chunk + 1], evaluation.windows):
        found = ((w.start + w.first <= position) & (position < w.start + w.length)).nonzero()
        if len(found):
            index = int(found[0])
            return w[index : index + 1], in_groups(w, evaluation.batch_windows)[index // evaluation.batch_windows]
    raise NotPredicted(f"position {position} is scored by no window")


def _batch_alone(evaluation: WindowPass, window: Windows) -> Batch:
    """A batch of one window, with all its places from the first scored one on as scored ones.

    So it has the same shapes whether or not it is known yet where the document ends. Behind the positions of the batch
    come places that are not scored.
    """
    seq_len = evaluation.model.config.seq_len
    batch = make_batch(evaluation.tokens_N1, window, seq_len=seq_len)
    return replace(batch, rows_M=torch.arange(int(window.first), seq_len, device=batch.rows_M.device))


def _carried_logits(evaluation: CarriedPass, hid_MD: Tensor) -> Tensor:
    """The logits of a carried offset. Unlike the pass's own head this notes no places to fit the offset on."""
    model = evaluation.model
    return softcap(products(hid_MD, model) + evaluation.offsets.logit_shift(model), model.config.softcap)
