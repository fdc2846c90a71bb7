"""Programs in which something is planted that a method misses: saturation, cancellation, redundancy, a backup."""

from __future__ import annotations

import random
from dataclasses import replace

from patchkit.zoo.programs.language import (
    KEYS,
    START,
    VALUES,
    At,
    Head,
    Match,
    Mlp,
    Move,
    Neuron,
    Program,
    Prompt,
)
from patchkit.zoo.programs.neurons import constant, linear, step
from patchkit.zoo.programs.parts import (
    GRADED,
    IDLE,
    NEXT_RESULT,
    RESULT,
    SATURATED,
    TOKEN_KEYS,
    TOKEN_VALUES,
    copier,
    idle_parts,
    lookup,
    owners,
)
from patchkit.zoo.programs.simple import LOOKUP, bound

#: Why a method may miss a node or an edge.
ATTENTION, BEHIND = "saturated attention", "behind saturated attention"
MLP, CANCELLATION = "saturated MLP", "cancellation"
REDUNDANCY, BACKUP, OPPOSED = "redundancy", "backup", "works against"
#: Why each of them makes a method miss.
KINDS: dict[str, str] = {
    ATTENTION: "attention is one-hot, so the gradient through its softmax is 0 at queries and keys; the QK fix takes the "
    "finite change of the attention instead",
    BEHIND: "what feeds the queries and keys of one-hot attention from further up: the QK fix corrects queries and keys "
    "themselves (and edges straight into them), while the score of a node above them goes through the same softmax and "
    "stays 0; integrated gradients that pass through the middle of the way see it",
    MLP: "the MLP is flat at both prompts and steep between: no gradient at either run shows it, the QK fix is about "
    "attention alone, and GradDrop takes gradients at the same point; integrated gradients and finite patches see it",
    CANCELLATION: "a direct and an indirect path have gradients that cancel where the prompts are, and not between; "
    "dropping the layer in which the indirect one runs leaves the other",
    OPPOSED: "the effect has the other sign: a ranking by signed scores puts it last (here sizes are ranked)",
    REDUNDANCY: "others do the same work, so that patching one of them changes nothing, and its exact effect is 0",
    BACKUP: "it waits for another to find nothing, and under resampling the other always finds something: its "
    "exact effect is 0, and so is every estimate of it",
}

_FOUND = At("found", VALUES)


def _three_back(rng: random.Random) -> Prompt:
    words = [rng.choice(VALUES) for _ in range(5)]
    return Prompt(tuple(words), words[-3])


SATURATED_LOOKUP = replace(
    LOOKUP,
    name="saturated-lookup",
    shows="the lookup's attention is one-hot: its queries and keys, and what feeds them, have no gradient",
    parts=(
        owners(),
        lookup(1, 2, TOKEN_KEYS, At("owner", KEYS), TOKEN_VALUES, _FOUND, SATURATED),
        Mlp(2, linear(_FOUND, NEXT_RESULT)),
        *idle_parts(3, mlp=0),
    ),
    planted={"a1.h2<q>": ATTENTION, "a1.h2<k>": ATTENTION, "a0.h1": BEHIND, "a0.h1<v>": BEHIND},
)


SATURATED_MLP = Program(
    name="saturated-mlp",
    task="the digit two before the last: `5 1 7 0 3` -> `7`",
    shows="an MLP of steps between 0.4 and 0.6: at 0 and at 1, where every prompt is, it has no gradient",
    layers=2,
    spaces={"carried": VALUES, "result": VALUES, **IDLE},
    parts=(
        copier(0, 1, 2, TOKEN_VALUES, At("carried", VALUES)),
        Mlp(1, tuple(n for v in VALUES for n in step(("carried", v), 0.4, 0.6, [("result", v, 1.0)]))),
        *idle_parts(2),
    ),
    answers=VALUES,
    sample=_three_back,
    planted={"a0.h1": MLP, "a0.h1<v>": MLP, "->m1": MLP},
)


def _against(v: str) -> tuple[Neuron, ...]:
    """-1 times what is at 0 and at 1 as steep as x, and rises by 0.2 between: min(x, 0.1) + relu(x - 0.9)."""
    read = (("carried", v, 1.0),)
    return (
        Neuron(read, 1.0, (("result", v, -1.0),)),
        Neuron(read, -0.1, (("result", v, 1.0),)),
        Neuron(read, -0.9, (("result", v, -1.0),)),
    )


CANCELLING_GRADIENT = Program(
    name="cancelling-gradient",
    task="the digit two before the last: `5 1 7 0 3` -> `7`",
    shows="a head writes to the logits, and an MLP that reads it takes the same away at 0 and at 1, but not "
    "between: the gradients cancel and the effects do not",
    layers=3,
    spaces={"carried": VALUES, "result": VALUES, **IDLE},
    parts=(
        Head(
            0,
            1,
            copier(0, 1, 2, TOKEN_VALUES, RESULT).looks,
            (Move(TOKEN_VALUES, RESULT), Move(TOKEN_VALUES, At("carried", VALUES))),
        ),
        Mlp(
            1,
            (
                *(neuron for v in VALUES for neuron in _against(v)),
                constant([("result", v, 1.0) for v in VALUES]),
            ),
        ),
        *idle_parts(3),
    ),
    answers=VALUES,
    sample=_three_back,
    planted={"a0.h1": CANCELLATION, "a0.h1<v>": CANCELLATION},
)


CANCELLING_PAIR = Program(
    name="cancelling-pair",
    task="the digit two before the last: `5 1 7 0 3` -> `7`",
    shows="two heads of one layer that write the same with opposite signs, beside the head that answers: each matters "
    "alone, both together do nothing",
    layers=2,
    spaces={"result": VALUES, **IDLE},
    parts=(
        copier(0, 0, 2, TOKEN_VALUES, RESULT),
        copier(0, 1, 2, TOKEN_VALUES, RESULT, 0.75),
        copier(0, 2, 2, TOKEN_VALUES, RESULT, -0.75),
        *idle_parts(2, mlp=1),
    ),
    answers=VALUES,
    sample=_three_back,
    planted={"a0.h2": OPPOSED, "a0.h2<v>": OPPOSED, "a0.h2->": OPPOSED},
)


NEGATIVE = replace(
    LOOKUP,
    name="negative",
    shows="a second head looks up the same digit and writes against it: its effect has the other sign",
    parts=(
        owners(),
        lookup(1, 2, TOKEN_KEYS, At("owner", KEYS), TOKEN_VALUES, _FOUND, GRADED),
        lookup(1, 0, TOKEN_KEYS, At("owner", KEYS), TOKEN_VALUES, _FOUND, GRADED, -0.4),
        Mlp(2, linear(_FOUND, NEXT_RESULT)),
        *idle_parts(3, mlp=0),
    ),
    planted={name: OPPOSED for name in ("a1.h0", "a1.h0<q>", "a1.h0<k>", "a1.h0<v>", "a1.h0->")},
)


MAJORITY = Program(
    name="majority",
    task="the digit two before the last: `5 1 7 0 3` -> `7`",
    shows="three heads bring the same digit and an MLP takes the vote: no single head is missed",
    layers=2,
    spaces={"votes": VALUES, "result": VALUES, **IDLE},
    parts=(
        *(copier(0, head, 2, TOKEN_VALUES, At("votes", VALUES)) for head in range(3)),
        Mlp(1, tuple(n for v in VALUES for n in step(("votes", v), 1.0, 2.0, [("result", v, 1.0)]))),
        *idle_parts(2),
    ),
    answers=VALUES,
    sample=_three_back,
    silent=("a0.h0", "a0.h1", "a0.h2"),
    planted={
        name: REDUNDANCY for head in range(3) for name in (f"a0.h{head}", f"a0.h{head}<v>", f"a0.h{head}->")
    },
)


BACKUP_HEAD = Program(
    name="backup",
    task="the digit bound to the last letter, plus one modulo 8: `a = 3 , b = 7 , c = 0 , d = 1 , b` -> `0`",
    shows="a head looks the digit up again if the first found nothing, and attends to the start if it found any",
    layers=4,
    spaces={"owner": KEYS, "found": VALUES, "result": VALUES, **IDLE},
    parts=(
        owners(),
        lookup(1, 2, TOKEN_KEYS, At("owner", KEYS), TOKEN_VALUES, _FOUND, 3 * GRADED),
        Head(
            2,
            1,
            (
                Match(TOKEN_KEYS, At("owner", KEYS), SATURATED),
                # Whatever was found makes the start the place to look at.
                Match(_FOUND, At("token", (START,) * len(VALUES)), 4 * SATURATED),
            ),
            (Move(TOKEN_VALUES, _FOUND),),
        ),
        Mlp(3, linear(_FOUND, NEXT_RESULT)),
        *idle_parts(4, mlp=1),
    ),
    answers=VALUES,
    sample=bound,
    silent=("a2.h1",),
    planted={name: BACKUP for name in ("a2.h1", "a2.h1<q>", "a2.h1<k>", "a2.h1<v>", "a2.h1->")},
)
