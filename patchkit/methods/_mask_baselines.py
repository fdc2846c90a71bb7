"""The held-out scores of a chosen set, and of everything it has to be compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from patchkit.methods._mask_evaluate import answers_to_sets, evaluate_mask, random_sets, share_by_name
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_prepared import Prepared
from patchkit.methods._mask_triples import Splits
from patchkit.results.mask import Carried, DesideratumScores, SetScores
from patchkit.runtime import Progress


@dataclass(frozen=True)
class Scorer:
    """Scores sets of components on the test triples; a set that was scored before is not run again."""

    layout: Layout
    test: Prepared
    trained: tuple[str, ...]
    random_count: int
    say: Progress
    _seen: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def see(self, sets: Iterable[Sequence[int]]) -> None:
        """Runs these sets, which will be asked for: together, which is much faster where every step is a job."""
        keys = dict.fromkeys(tuple(sorted(patched)) for patched in sets)
        fresh = [key for key in keys if key not in self._seen]
        found = answers_to_sets(self.layout, self.test, fresh)
        for done, key in enumerate(fresh):
            self.say("testing", done, len(fresh))
            self._seen[key] = next(found)
        self.say("testing", len(fresh), len(fresh))

    def score(self, patched: Sequence[int]) -> dict[str, float]:
        """Accuracy by desideratum when exactly these components are patched."""
        return share_by_name(self.test, self._answers(patched) == self.test.target)

    def moved(self, patched: Sequence[int]) -> dict[str, float]:
        """The fraction of triples whose answer is then no longer the unpatched one, by desideratum."""
        return share_by_name(self.test, self._answers(patched) != self.test.original_answer)

    def _answers(self, patched: Sequence[int]) -> Tensor:
        key = tuple(sorted(patched))
        if key not in self._seen:
            (self._seen[key],) = answers_to_sets(self.layout, self.test, [key])
        return self._seen[key]

    def names(self, components: Sequence[int]) -> list[str]:
        every = self.layout.names
        return [every[i] for i in sorted(components)]

    def complement(self, patched: Sequence[int]) -> list[int]:
        return sorted(set(range(self.layout.size)) - set(patched))

    def compared(self, chosen: Sequence[int], seed: int = 0) -> list[Sequence[int]]:
        """A set and what it is compared with: nothing, everything, all the others, random sets of its size."""
        random = random_sets(self.layout.size, len(chosen), self.random_count, seed)
        return [chosen, [], list(range(self.layout.size)), self.complement(chosen), *random]

    def desiderata(
        self,
        chosen: Sequence[int],
        soft_values: Float[Tensor, " n"],
        splits: Splits,
        train_accuracy: Mapping[str, float],
        descriptions: Mapping[str, str],
    ) -> list[DesideratumScores]:
        """Every desideratum with the scores of the chosen set and of its baselines."""
        own, empty, every, complement, *random = map(self.score, self.compared(chosen))
        soft = evaluate_mask(self.test, soft_values)
        return [
            DesideratumScores(
                name=name,
                kind=kind,
                description=descriptions.get(name, ""),
                trained=name in self.trained,
                n_train=len(splits.train.get(name, ())) + len(splits.validation.get(name, ())),
                n_test=size,
                train_accuracy=train_accuracy.get(name),
                test=SetScores(
                    chosen=own[name],
                    soft=soft[name],
                    empty=empty[name],
                    all=every[name],
                    complement=complement[name],
                    random=[scores[name] for scores in random],
                ),
            )
            for name, kind, size in zip(self.test.names, self.test.kinds, self.test.sizes, strict=True)
        ]

    def joint(self, desiderata: Sequence[DesideratumScores]) -> dict[str, float]:
        """The minimum over the trained desiderata, for each set; for random sets the mean of their minima."""
        tested = [d.test for d in desiderata if d.trained]
        random = self.random_joint(desiderata)
        return {
            kind: min(getattr(scores, kind) for scores in tested)
            for kind in ("chosen", "soft", "empty", "all", "complement")
        } | {"random": sum(random) / len(random) if random else float("nan")}

    def random_joint(self, desiderata: Sequence[DesideratumScores]) -> list[float]:
        """The minimum over the trained desiderata, for each random set."""
        tested = [d.test.random for d in desiderata if d.trained]
        return [min(values) for values in zip(*tested, strict=True)]

    def carried(self, components: Sequence[int], chosen: Sequence[int]) -> list[Carried]:
        """For each component: the answers it changes alone, and what the chosen set loses without it."""
        whole = self.score(chosen)
        table = []
        for component in components:
            without = self.score(_without(chosen, component))
            table.append(
                Carried(
                    component=self.names([component])[0],
                    alone=self.moved([component]),
                    missed={name: whole[name] - without[name] for name in whole},
                )
            )
        return table

    def carried_sets(self, components: Sequence[int], chosen: Sequence[int]) -> list[Sequence[int]]:
        """The sets that `carried` asks for."""
        return [chosen, *([c] for c in components), *(_without(chosen, c) for c in components)]


def _without(chosen: Sequence[int], component: int) -> list[int]:
    return [c for c in chosen if c != component]
