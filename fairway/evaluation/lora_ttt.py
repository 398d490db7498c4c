"""Document-wise test-time training of low-rank adapters, with phases of global SGD.

Documents are visited in batches of like length, longest first (document_batches.py). All documents of a batch advance
together, a chunk of targets at a time: the chunk is scored, then the adapters take one AdamW step on the loss it was
scored with. Every document has adapters of its own. From batch to batch their second factors are set back to zero,
while the first ones keep what they have learned. After a number of batches the network itself is trained with SGD on
the documents done, in ascending length, and all adapters are drawn anew; this is called a phase.

Every target is scored before any update that used it. But the order is that of lengths, not of the stream: an early
short document is scored by weights that have seen later long ones. So the score is causal only in the order of visits,
and to know that order one must know the lengths of all documents.

Without phases and with `carry_factors: false` all documents begin with the same adapters and the same network, and no
document depends on another. The order of visits then decides nothing but the speed, and the score is causal in the
order of the stream: whoever decodes takes one document after the other.

Source: PR #1855. There a GPU takes the next batch when it is done with one, so that the result depends on timing. Ours:
batches are dealt to lanes in turn, or by their work where that changes no result; a phase begins after the same batches
as in the record's logs; and adapters that are drawn anew get the same numbers each time.

Legend: N targets, places of a cut, or tokens of a phase, B documents of a batch, S segment bounds, V vocabulary, P
numbers of a document's adapters.
"""

import copy
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fairway.adaptation.trainable import RoundedWeights, sum_gradients
from fairway.evaluation.adapter_steps import AdamW, AdapterSets, AdapterSteps
from fairway.evaluation.cuda_graph import as_cuda_graph
from fairway.evaluation.document_batches import (
    Cut,
    Document,
    by_length,
    documents,
    lanes_of,
    phase_ends,
    row_groups,
    wanted_batches,
    window_length,
)
from fairway.evaluation.evaluator import Evaluator, EvaluatorSettings
from fairway.evaluation.lora_adapters import Factors, LoraAdapters, draw_factors, numbers_of_a_set
from fairway.evaluation.passes import Pass, Prediction, State
from fairway.evaluation.scoring import sent
from fairway.evaluation.ttt import cosine
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World, too_few_lanes
from fairway.tokens.data_orders import document_bounds


class LoraTttSettings(EvaluatorSettings):
    """Low-rank adapters fitted to each document as it is scored, and phases of global SGD (PR #1855)."""

    # Targets scored between two steps of the adapters, and documents side by side.
    chunk_tokens: int = Field(gt=0)
    batch_documents: int = Field(gt=0)
    rank: int = Field(gt=0)
    alpha: float = Field(gt=0)
    lr: float = Field(gt=0)
    beta2: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    # After so many documents, in so many phases, the network itself is trained on the documents done.
    prefix_documents: int = Field(ge=0)
    phases: int = Field(ge=0)
    global_chunk_tokens: int = Field(gt=0)
    global_lr: float = Field(gt=0)
    global_momentum: float = Field(ge=0, lt=1)
    grad_clip: float = Field(gt=0)
    # Whether a batch begins with the first factors that the batch before it has left behind, as in the record.
    carry_factors: bool
    # Batches of documents under way at a time: the GPUs of a record. Processes do not change the result.
    # Where documents depend on no other, there are as many as processes.
    lanes: int = Field(gt=0)
    # Of the adapters' first factors.
    seed: int = Field(ge=0, lt=2**32)

    @property
    def independent(self) -> bool:
        """Whether documents depend on no other: neither adapters nor the network are handed on from one to the next."""
        return not self.phases and not self.carry_factors

    @model_validator(mode="after")
    def _phases(self) -> "LoraTttSettings":
        if self.phases > self.prefix_documents:
            raise ValueError(f"phases ({self.phases}) exceed prefix_documents ({self.prefix_documents})")
        return self

    def check(self, *, section: str, model: ModelConfig, processes: int) -> None:
        """A chunk is at most a row, a step of global training is whole rows on every lane, and no process idles."""
        if self.chunk_tokens > model.seq_len:
            raise ValueError(f"{section}.chunk_tokens ({self.chunk_tokens}) exceeds model.seq_len ({model.seq_len})")
        if self.global_chunk_tokens % (self.lanes * model.seq_len):
            raise ValueError(
                f"{section}.global_chunk_tokens ({self.global_chunk_tokens}) must be a multiple of "
                f"{section}.lanes * model.seq_len ({self.lanes * model.seq_len})"
            )
        if not self.independent and processes > self.lanes:
            raise ValueError(too_few_lanes(section, self.lanes, processes))


# New first factors for a number of documents.
Draw = Callable[[int], Factors]
# A generator of predictions. Sent True, it makes the last one again, from the tokens as they then stand.
Predictions = Generator[Prediction, bool | None, None]


@dataclass(frozen=True)
class LoraTttEvaluator(Evaluator):
    """Adapters for each document, on a copy of the network that is itself trained in phases."""

    settings: LoraTttSettings

    def begin(self, model: GPT, tokens_N1: Tensor, world: World) -> Pass:
        """A pass whose chunks end where phases begin, or after some batches where documents depend on no other."""
        s = self.settings
        if not s.independent:
            world.need_lanes(s.lanes, "lora_ttt")

        @cache
        def drawn() -> Factors:
            """Drawn once, and used again whenever adapters are drawn anew: a GPU would wait for every draw."""
            factors = draw_factors(model.config, s.batch_documents if s.carry_factors else 1, s.rank, s.seed)
            return {site: A.to(tokens_N1.device) for site, A in factors.items()}

        def draw(rows: int) -> Factors:
            # A document that is to depend on no other must not depend on its place among them either.
            return {site: A[:, :rows] if s.carry_factors else A.expand(-1, rows, -1, -1) for site, A in drawn().items()}

        return LoraTttPass(copy.deepcopy(model), tokens_N1, world, s, draw)


# Batches of a chunk where documents depend on no other. It ends only so that a run that was killed can go on there.
CHUNK_BATCHES = 32


class LoraTttPass(Pass):
    """A pass over chunks of batches of documents; between two chunks `model` is trained, in place, for a phase.

    With `independent` settings no document's predictions depend on another document, and nothing is learned between
    chunks.

    Documents are scored by a copy of the model in the compute dtype, so that its weights are cast once a phase.
    """

    def __init__(self, model: GPT, tokens_N1: Tensor, world: World, settings: LoraTttSettings, draw: Draw) -> None:
        self.model, self.tokens_N1, self.world, self.settings, self.draw = model, tokens_N1, world, settings, draw
        self.batches = by_length(documents(tokens_N1.cpu()), settings.batch_documents)
        ends = phase_ends(self.batches, settings.prefix_documents, settings.phases, settings.lanes)
        # How many phases there are. Each follows a chunk, and one more chunk follows the last of them.
        self.phases = len(ends)
        if settings.independent:
            ends = list(range(CHUNK_BATCHES, len(self.batches), CHUNK_BATCHES))
        self.bounds = [0, *ends, len(self.batches)]
        self.chunks = len(self.bounds) - 1
        # Where documents depend on no other, every process has a lane.
        self.lanes = world.size if settings.independent else settings.lanes
        self._lane_of = lanes_of(
            self.batches, self.lanes, independent=settings.independent, seq_len=model.config.seq_len
        )
        self._sgd = GlobalSgd(model, settings, world)
        self._scorer = copy.deepcopy(model).to(model.compute_dtype).requires_grad_(False)
        self.steps = AdapterSteps(
            self._scorer, tokens_N1, most=settings.batch_documents, rank=settings.rank, scale=self._scale
        )

    @property
    def _scale(self) -> float:
        return self.settings.alpha / self.settings.rank

    def predict(self, chunk: int, wanted: Tensor | None = None) -> Predictions:
        """The predictions of this process's lanes, of each up to its last batch with a wanted position.

        Batches before that one are left out only where no later one learns from them.
        """
        for lane in range(self.world.rank, self.lanes, self.world.size):
            of_chunk = range(self.bounds[chunk], self.bounds[chunk + 1])
            batches = [self.batches[index] for index in of_chunk if self._lane_of[index] == lane]
            yield from self._lane(wanted_batches(batches, wanted, independent=self.settings.independent))

    def _lane(self, batches: list[list[Document]]) -> Predictions:
        """One lane's batches. Those of the usual size use the same adapters one after the other, an odd one its own."""
        warm = self.new_sets(self.settings.batch_documents) if self.settings.carry_factors else None
        for batch in batches:
            usual = len(batch) == self.settings.batch_documents
            sets = warm if usual and warm else self.new_sets(len(batch))
            sets.forget()
            yield from self._batch(batch, sets)

    def new_sets(self, rows: int) -> AdapterSets:
        """Adapters of so many documents, from which nothing has been learned yet."""
        s, factors = self.settings, self.draw(rows)
        first, numbers = numbers_of_a_set(self.model.config, s.rank)
        numbers_BP = torch.zeros(rows, numbers, device=self.tokens_N1.device)
        LoraAdapters(self.model.config, numbers_BP, s.rank, scale=self._scale).set_first(factors)
        return AdapterSets(numbers_BP, first, AdamW(s.lr, s.beta2, s.weight_decay))

    def _batch(self, batch: list[Document], sets: AdapterSets) -> Predictions:
        """Score a cut of the documents and fit the adapters to it, cut by cut, until the longest document ends."""
        size, seq_len, device = self.settings.chunk_tokens, self.model.config.seq_len, self.tokens_N1.device
        cuts = -(-batch[-1].targets // size)
        # All adapters take a step at every cut but the last; here a group takes those in which it learns.
        missed_B = torch.full((len(batch),), cuts - 1)
        for index in range(cuts):
            begin = index * size
            for rows in row_groups(batch, begin, window_length(batch, begin + size, seq_len)):
                cut, again = Cut(batch[rows], begin, size, seq_len, ends_known=not self.settings.independent), True
                while again:
                    logits_NV = self.steps.score(cut, sets.numbers_BP[rows]).flatten(0, 1)
                    again = bool((yield sent(cut.positions_M, device), logits_NV[sent(cut.scored_M, device)]))
                if cut.learns:
                    sets.step(rows, self.steps.gradients(cut), index + 1)
                    missed_B[rows] -= 1
        sets.decay(missed_B)

    def learn(self, chunk: int) -> None:
        """The phase after a chunk, if there is one: SGD without memory of earlier phases."""
        if chunk < self.phases:
            self._sgd.train(self.phase_tokens(chunk))
            self._refresh()

    def learns(self, chunk: int) -> bool:
        """Whether there is a phase after a chunk with tokens enough for a step."""
        return chunk < self.phases and len(self.phase_tokens(chunk)) - 1 > self.settings.global_chunk_tokens

    def phase_tokens(self, chunk: int) -> Tensor:
        """What the phase after a chunk trains on: the shortest prefix·(chunk+1)/phases documents done, one by one."""
        done = [document for batch in reversed(self.batches[: self.bounds[chunk + 1]]) for document in batch]
        count = self.settings.prefix_documents * (chunk + 1) // self.settings.phases
        return torch.cat([self.tokens_N1[d.begin : d.begin + d.targets + 1] for d in done[:count]])

    @torch.no_grad()
    def _refresh(self) -> None:
        """Bring the weights that score to those that are trained."""
        for scoring, trained in zip(self._scorer.parameters(), self.model.parameters(), strict=True):
            scoring.copy_(trained)

    def state(self) -> State:
        """The weights of the network, if it learns. Adapters are drawn anew after a phase: none need be kept."""
        return {name: value.detach() for name, value in self.model.named_parameters()} if self.phases else {}

    @property
    def updates(self) -> int:
        """Steps of the adapters, of which all documents of a batch take one at a time, and phases of global SGD."""
        cuts = [-(-batch[-1].targets // self.settings.chunk_tokens) for batch in self.batches]
        return sum(cuts) - len(cuts) + self.phases

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Put the weights back, if they have learned."""
        parameters = dict(self.model.named_parameters())
        for name, value in state.items():
            parameters[name].copy_(value)
        self._refresh()


# Segment bounds are padded to a multiple of this.
BOUNDS = 64


class GlobalSgd:
    """Trains all weights of `model` on documents that have been scored, in place (PR #1855).

    Weights in bfloat16 become float32 and are rounded after every step.
    """

    def __init__(self, model: GPT, settings: LoraTttSettings, world: World) -> None:
        self.settings, self.world = settings, world
        self._rounded = RoundedWeights(model)
        self._parameters = list(model.requires_grad_(True).parameters())
        self._cut, self._share = model.config.seq_len, settings.global_chunk_tokens // settings.lanes
        self._gradients = as_cuda_graph(lane_gradients(model, self._share, settings.lanes), world.device)

    def train(self, tokens_N: Tensor) -> None:
        """One phase, without memory of earlier ones. What is left over behind the last whole step is not used."""
        s = self.settings
        optimizer = torch.optim.SGD(self._parameters, lr=s.global_lr, momentum=s.global_momentum)
        chunks = -(-(len(tokens_N) - 1) // s.global_chunk_tokens)
        for index in range(chunks - 1):
            begin = index * s.global_chunk_tokens
            optimizer.param_groups[0]["lr"] = s.global_lr * cosine(index, chunks)
            self._step(tokens_N[begin : begin + s.global_chunk_tokens + 1], optimizer)

    def _step(self, tokens: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step on global_chunk_tokens + 1 tokens. Each lane packs its share into one row of separate documents."""
        sizes = [parameter.numel() for parameter in self._parameters]

        def gradients(lane: int) -> Sequence[Tensor]:
            row = tokens[lane * self._share : (lane + 1) * self._share + 1]
            bounds = document_bounds(row[:-1].cpu().numpy(), cut=self._cut, bucket=BOUNDS)
            found = self._gradients(torch.cat([row, torch.from_numpy(bounds).to(row)])).split(sizes)
            return [piece.view_as(parameter) for piece, parameter in zip(found, self._parameters, strict=True)]

        sum_gradients(self._parameters, self.settings.lanes, gradients, self.world)
        clip_grad_norm_(self._parameters, self.settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        self._rounded.round()


def lane_gradients(model: GPT, share: int, lanes: int) -> Callable[[Tensor], Tensor]:
    """A lane's part of the gradient, all parameters one after the other, from `share` + 1 tokens and then S bounds."""

    @torch.enable_grad()
    def gradients(row_and_bounds: Tensor) -> Tensor:
        row, segments = row_and_bounds[: share + 1], row_and_bounds[share + 1 :].int()
        loss = model(row[None, :-1], row[None, 1:], segments=segments) / lanes
        found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found])

    return gradients
