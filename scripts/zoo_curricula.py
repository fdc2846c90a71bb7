"""What the embedded models are trained on: streams of (ids, labels) batches that get harder as accuracy
rises.

In-context binding trained directly sits at the chance of guessing among the values in context. Repeated
random sequences first (the model learns to look up what followed a token) let recall transfer within a
hundred steps.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from patchkit.tasks import ioi_language, language

IGNORED = -100  # the label of positions that carry no loss


def pad_right(rows: list[list[int]], labels: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as [B T] tensors; padding is on the right, where a causal model cannot
    see it.
    """
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    targets = torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels])
    return ids, targets


def repeated_sequences(
    rng: random.Random, batch: int, first_id: int, vocab_size: int, bos_id: int, lengths: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`<s>` and a random sequence twice; the loss is on the second copy, all but its first token.
    [B 1+2n].
    """
    n = rng.randint(*lengths)
    rows = [[rng.randrange(first_id, vocab_size) for _ in range(n)] for _ in range(batch)]
    ids = torch.tensor([[bos_id, *row, *row] for row in rows])
    labels = torch.full_like(ids, IGNORED)
    labels[:, n + 1 : -1] = ids[:, n + 2 :]
    return ids, labels


class InductionStream:
    """Repeated random sequences only, until the running accuracy passes `target`."""

    def __init__(self, seed: int, vocab_size: int, *, batch: int = 32, lengths: tuple[int, int] = (8, 24)):
        self.rng = random.Random(seed)
        self.vocab_size, self.batch, self.lengths = vocab_size, batch, lengths
        self.stage, self.running = "induction", 0.0

    def next(self) -> tuple[Tensor, Tensor]:
        return repeated_sequences(self.rng, self.batch, 2, self.vocab_size, 1, self.lengths)

    def feedback(self, accuracy: float) -> None:
        self.running = 0.95 * self.running + 0.05 * accuracy

    def ready(self, target: float) -> bool:
        return self.running > target


class BindingStream:
    """The language of `patchkit.tasks.language` in three stages: induction, recall, all operations.

    Contexts carry eight queries, each with its answer after it, in a random mix of forms; the loss is on
    the answers alone. In the recall stage the number of variables goes up as the running accuracy passes
    0.95. Only bindings of the train split are drawn. 15 % of the later batches stay induction.
    `operations` is what the queries of the last stage are drawn from; naming plus and minus several times
    makes up for their being the slowest to be learned.
    """

    QUERIES = 8

    def __init__(
        self,
        seed: int,
        *,
        operations: Sequence[str] = language.OPERATIONS,
        batch: int = 16,
        induction_batch: int = 24,
        lengths: tuple[int, int] = (8, 20),
    ):
        self.rng = random.Random(seed)
        self.operations = operations
        self.batch, self.induction_batch, self.lengths = batch, induction_batch, lengths
        self.ids = {word: index for index, word in enumerate(language.VOCABULARY)}
        self.stage, self.max_variables, self.running = "induction", language.MIN_VARIABLES, 0.0
        self._counted = True

    def next(self) -> tuple[Tensor, Tensor]:
        """The next batch [B T], labels [B T]: the token that should follow, IGNORED elsewhere."""
        induction = self.stage == "induction" or self.rng.random() < 0.15
        self._counted = not induction or self.stage == "induction"
        if induction:
            first = len((language.PAD, language.BOS, language.UNK))
            bos = self.ids[language.BOS]
            return repeated_sequences(self.rng, self.induction_batch, first, len(self.ids), bos, self.lengths)
        rows, labels = zip(*(self._context() for _ in range(self.batch)), strict=True)
        return pad_right(list(rows), list(labels), self.ids[language.PAD])

    def _context(self) -> tuple[list[int], list[int]]:
        rng, forms = self.rng, tuple(language.FORMS)
        n_variables = rng.randint(language.MIN_VARIABLES, self.max_variables)
        context = language.sample_context(rng, n_variables=n_variables, form=rng.choice(forms), split="train")
        words, answers = [language.BOS, *language.context_words(context)], {}
        for _ in range(self.QUERIES):
            operation = rng.choice(self.operations) if self.stage == "operations" else "recall"
            query = language.sample_query(rng, context, operation=operation, form=rng.choice(forms))
            words += language.query_words(query)
            answers[len(words) - 1] = language.answer(context, query)
            words += [answers[len(words) - 1], ";"]
        labels = [self.ids[answers[i]] if i in answers else IGNORED for i in range(len(words))]
        return [self.ids[word] for word in words], labels

    def feedback(self, accuracy: float) -> None:
        """Take in one batch's accuracy; move to the next stage when the running mean is high enough."""
        if not self._counted:
            return
        self.running = 0.95 * self.running + 0.05 * accuracy
        if self.stage == "induction" and self.running > 0.9:
            self.stage, self.running = "recall", 0.0
        elif self.stage == "recall" and self.running > 0.95:
            if self.max_variables < language.MAX_VARIABLES:
                self.max_variables, self.running = self.max_variables + 1, 0.5
            else:
                self.stage, self.running = "operations", 0.0

    def ready(self, target: float) -> bool:
        return self.stage == "operations" and self.running > target


class IndirectObjectStream:
    """Induction, then stories of `patchkit.tasks.ioi_language`, each with several continuations.

    Stages: induction; `reunions` (two pairs of names, every continuation is `soon beside John`,
    completed by the partner); `pairs` (two pairs, continuations are givings or reunions); `stories`
    (one to three pairs, up to two bystanders). The loss is on the partners' names; in the last
    stage a third of the batches carries it on every word, as plain language modelling. 15 % of the
    batches stay induction. The pairs that are asked about are always in the train split.
    """

    CONTINUATIONS = 5
    STAGES = ("induction", "reunions", "pairs", "stories")

    def __init__(
        self, seed: int, *, batch: int = 16, induction_batch: int = 24, lengths: tuple[int, int] = (8, 24)
    ):
        self.rng = random.Random(seed)
        self.batch, self.induction_batch, self.lengths = batch, induction_batch, lengths
        self.ids = {word: index for index, word in enumerate(ioi_language.VOCABULARY)}
        self.stage, self.running = self.STAGES[0], 0.0
        self._counted = True

    def next(self) -> tuple[Tensor, Tensor]:
        """The next batch [B T], labels [B T]."""
        draw = self.rng.random()
        induction = self.stage == "induction" or draw < 0.15
        every_word = self.stage == "stories" and draw > 2 / 3
        self._counted = self.stage == "induction" or not (induction or every_word)
        if induction:
            first = len((ioi_language.PAD, ioi_language.BOS, ioi_language.UNK))
            bos = self.ids[ioi_language.BOS]
            return repeated_sequences(self.rng, self.induction_batch, first, len(self.ids), bos, self.lengths)
        rows, labels = zip(*(self._story(every_word) for _ in range(self.batch)), strict=True)
        return pad_right(list(rows), list(labels), self.ids[ioi_language.PAD])

    def _story(self, every_word: bool) -> tuple[list[int], list[int]]:
        rng, full = self.rng, self.stage == "stories"
        story = ioi_language.sample_story(
            rng, n_pairs=None if full else 2, n_bystanders=None if full else 0, split="train"
        )
        words, partners = [ioi_language.BOS, *ioi_language.sentence_words(story)], set[int]()
        for _ in range(self.CONTINUATIONS):
            story = ioi_language.resample_giving(rng, story)
            reunion = self.stage == "reunions" or rng.random() < 0.2
            words += ioi_language.reunion_words(story) if reunion else ioi_language.closing_words(story)
            partners.add(len(words))
            words += [ioi_language.answer(story), "."]
        row = [self.ids[word] for word in words]
        wanted = [every_word or index + 1 in partners for index in range(len(row) - 1)]
        return row, [*(row[i + 1] if keep else IGNORED for i, keep in enumerate(wanted)), IGNORED]

    def feedback(self, accuracy: float) -> None:
        """Take in one batch's accuracy; move to the next stage when the running mean is high enough."""
        if not self._counted:
            return
        self.running = 0.95 * self.running + 0.05 * accuracy
        if self.running > 0.9 and self.stage != self.STAGES[-1]:
            self.stage, self.running = self.STAGES[self.STAGES.index(self.stage) + 1], 0.0

    def ready(self, target: float) -> bool:
        return self.stage == self.STAGES[-1] and self.running > target
