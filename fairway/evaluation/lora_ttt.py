"""Document-wise test-time training of low-rank adapters, with phases of global SGD.

Documents are visited in batches of like length, longest first (document_batches.py). All documents of a batch advance
together, a chunk of targets at a time: the chunk is scored, then the adapters take one AdamW step on the loss it was
scored with. Every document has adapters of its own. From batch to batch their second factors are set back to zero,
while the first ones keep what they have learned. After a number of batches the network itself is trained with SGD on
the documents done, in ascending length, and all adapters are drawn anew; this is called a phase.

Every target is scored before any update that used it. But the order is that of lengths, not of the stream: an early
short document is scored by weights that have seen later long ones. So the score is causal only in the order of visits,
and to know that order one must know the lengths of all documents.

Source: PR #1855. There a GPU takes the next batch when it is done with one, so that the result depends on timing. Ours:
batches are dealt to lanes in turn; a phase begins after the same batches as in the record's logs.

Legend: N targets, B documents of a batch, C targets of a chunk, V vocabulary.
"""

import copy
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fairway.adaptation.lanes import sum_gradients
from fairway.adaptation.trainable import RoundedWeights
from fairway.evaluation.document_batches import Cut, Document, by_length, documents, phase_ends, up_to_wanted
from fairway.evaluation.evaluator import Evaluator, EvaluatorSettings
from fairway.evaluation.lora_adapters import Factors, LoraAdapters, adapted_logits, draw_factors
from fairway.evaluation.passes import Pass, Prediction, State
from fairway.evaluation.ttt import cosine
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World
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
    # Batches of documents under way at a time: the GPUs of a record. Processes do not change the result.
    lanes: int = Field(gt=0)
    # Of the adapters' first factors; the generator's seed is this times 10^9 and a bit (evaluation/lora_ttt.py).
    seed: int = Field(ge=0, lt=2**32)

    @model_validator(mode="after")
    def _phases(self) -> "LoraTttSettings":
        if self.phases > self.prefix_documents:
            raise ValueError(f"phases ({self.phases}) exceed prefix_documents ({self.prefix_documents})")
        return self

    def check(self, *, section: str, model: ModelConfig, processes: int) -> None:
        """A chunk is at most a row, and a step of global training is whole rows on every lane."""
        if self.chunk_tokens > model.seq_len:
            raise ValueError(f"{section}.chunk_tokens ({self.chunk_tokens}) exceeds model.seq_len ({model.seq_len})")
        if self.global_chunk_tokens % (self.lanes * model.seq_len):
            raise ValueError(
                f"{section}.global_chunk_tokens ({self.global_chunk_tokens}) must be a multiple of "
                f"{section}.lanes * model.seq_len ({self.lanes * model.seq_len})"
            )


# Of the adapters' AdamW, which has no momentum (PR #1855).
BETA1, EPS = 0.0, 1e-10
# Segment bounds are padded to a multiple of this.
BOUNDS = 64

# Draws new first factors for a chunk of the pass, a lane and a number of documents.
Draw = Callable[[int, int, int], Factors]
# A generator of predictions. Sent True, it makes the last one again, from the tokens as they then stand.
Predictions = Generator[Prediction, bool | None, None]


@dataclass(frozen=True)
class LoraTttEvaluator(Evaluator):
    """Adapters for each document, on a copy of the network that is itself trained in phases."""

    settings: LoraTttSettings

    def begin(self, model: GPT, tokens_N1: Tensor, world: World) -> Pass:
        """A pass whose chunks end where phases begin."""
        s = self.settings

        def draw(chunk: int, lane: int, rows: int) -> Factors:
            # A seed of its own for every draw of a pass: there are fewer than 1000 lanes and documents in a batch.
            seed = ((s.seed * 1000 + chunk) * 1000 + lane) * 1000 + rows
            return draw_factors(model.config, rows, s.rank, torch.Generator().manual_seed(seed))

        return LoraTttPass(copy.deepcopy(model), tokens_N1, world, s, draw)


class LoraTttPass(Pass):
    """A pass over chunks of batches of documents; between two chunks `model` is trained, in place, for a phase."""

    def __init__(self, model: GPT, tokens_N1: Tensor, world: World, settings: LoraTttSettings, draw: Draw) -> None:
        self.model, self.tokens_N1, self.world, self.settings, self.draw = model, tokens_N1, world, settings, draw
        self._rounded = RoundedWeights(model)
        self.batches = by_length(documents(tokens_N1.cpu()), settings.batch_documents)
        ends = phase_ends(self.batches, settings.prefix_documents, settings.phases, settings.lanes)
        self.bounds = [0, *ends, len(self.batches)]
        self.chunks = len(self.bounds) - 1

    def predict(self, chunk: int, wanted: Tensor | None = None) -> Predictions:
        """The predictions of this process's lanes, of each up to its last batch with a wanted position.

        No batch before that one is left out, because the adapters of the later ones have learned from it.
        """
        self.model.requires_grad_(False)
        for lane in range(self.world.rank, self.settings.lanes, self.world.size):
            mine = range(self.bounds[chunk], self.bounds[chunk + 1])
            batches = up_to_wanted([self.batches[i] for i in mine if i % self.settings.lanes == lane], wanted)
            yield from self._lane(batches, lambda rows, lane=lane: self.draw(chunk, lane, rows))  # type: ignore[misc]

    def _lane(self, batches: list[list[Document]], draw: Callable[[int], Factors]) -> Predictions:
        """One lane's batches. Those of the usual size use the same adapters one after the other, an odd one its own."""
        by_size: dict[int, LoraAdapters] = {}
        for batch in batches:
            if len(batch) not in by_size:
                by_size[len(batch)] = self._adapters(draw(len(batch)))
            adapters = by_size[len(batch)]
            adapters.forget()
            yield from self._batch(batch, adapters)

    def _adapters(self, factors: Factors) -> LoraAdapters:
        scale = self.settings.alpha / self.settings.rank
        return LoraAdapters(self.model.config, factors, scale=scale, device=self.tokens_N1.device)

    def _batch(self, batch: list[Document], adapters: LoraAdapters) -> Predictions:
        """Score a cut of the documents and fit the adapters to it, cut by cut, until the longest document ends."""
        s = self.settings
        optimizer = torch.optim.AdamW(
            adapters.parameters(), lr=s.lr, betas=(BETA1, s.beta2), eps=EPS, weight_decay=s.weight_decay
        )
        for index in range(-(-max(document.targets for document in batch) // s.chunk_tokens)):
            again: bool | None = True
            while again:
                cut = Cut(self.tokens_N1, batch, index * s.chunk_tokens, s.chunk_tokens, self.model.config.seq_len)
                with torch.set_grad_enabled(bool(cut.goes_on_B.any())):
                    hid_BCD = self.model.hidden(cut.tokens_BT, adapters=adapters, wanted=s.chunk_tokens)
                    logits_BCV = adapted_logits(self.model, cut.scored(hid_BCD), adapters)
                again = yield cut.positions_BC[cut.inside_BC], logits_BCV[cut.inside_BC].detach()
            if logits_BCV.requires_grad:
                self._fit(cut, logits_BCV, optimizer)

    def _fit(self, cut: Cut, logits_BCV: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step on the sum of the documents' mean losses in the cut; those that end with it are left out."""
        nats = F.cross_entropy(logits_BCV.flatten(0, 1), cut.targets_BC.flatten(), reduction="none")
        optimizer.zero_grad()
        (nats.view_as(cut.targets_BC).mean(1) * cut.goes_on_B).sum().backward()
        optimizer.step()

    def learn(self, chunk: int) -> None:
        """The phase after a chunk, unless that is the last: SGD without memory of earlier phases."""
        if chunk == self.chunks - 1:
            return
        s = self.settings
        self.model.requires_grad_(True)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=s.global_lr, momentum=s.global_momentum)
        tokens = self.phase_tokens(chunk)
        chunks = -(-(len(tokens) - 1) // s.global_chunk_tokens)
        for index in range(chunks - 1):
            begin = index * s.global_chunk_tokens
            optimizer.param_groups[0]["lr"] = s.global_lr * cosine(index, chunks)
            self._global_step(tokens[begin : begin + s.global_chunk_tokens + 1], optimizer)

    def phase_tokens(self, chunk: int) -> Tensor:
        """What the phase after a chunk trains on: the shortest prefix·(chunk+1)/phases documents done, one by one."""
        done = [document for batch in reversed(self.batches[: self.bounds[chunk + 1]]) for document in batch]
        count = self.settings.prefix_documents * (chunk + 1) // self.settings.phases
        return torch.cat([self.tokens_N1[d.begin : d.begin + d.targets + 1] for d in done[:count]])

    def _global_step(self, tokens: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step on global_chunk_tokens + 1 tokens. Each lane packs its share into one row of separate documents."""
        s, parameters = self.settings, list(self.model.parameters())
        share = s.global_chunk_tokens // s.lanes

        def gradients(lane: int) -> Sequence[Tensor | None]:
            row = tokens[lane * share : (lane + 1) * share + 1]
            bounds = document_bounds(row[:-1].cpu().numpy(), cut=self.model.config.seq_len, bucket=BOUNDS)
            segments = torch.from_numpy(bounds).to(row.device)
            loss = self.model(row[None, :-1], row[None, 1:], segments=segments) / s.lanes
            return torch.autograd.grad(loss, parameters, allow_unused=True)

        sum_gradients(parameters, s.lanes, gradients, self.world)
        clip_grad_norm_(parameters, s.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        self._rounded.round()

    def state(self) -> State:
        """The weights of the network. Adapters are drawn anew after a phase, so that none need be kept."""
        return {name: value.detach() for name, value in self.model.named_parameters()}

    @property
    def updates(self) -> int:
        """Steps of the adapters, of which all documents of a batch take one at a time, and phases of global SGD."""
        cuts = [-(-batch[-1].targets // self.settings.chunk_tokens) for batch in self.batches]
        return sum(cuts) - len(cuts) + self.chunks - 1

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Put the weights back."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[name])
