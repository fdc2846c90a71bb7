"""The IOI study: how a model finds the indirect object, and whether the circuit that is found holds.

After "Interpretability in the Wild" (Wang et al. 2022, arXiv 2211.00593): path patching from the logits backwards, what
every head does in numbers, names for those that do what a class of that paper does, the circuit and its three scores, and
the movers knocked out. Nothing is assumed to be there: a class that no head is of is said to be missing, with the head
that comes nearest, and heads that no class is of are described by what they do.
"""

from __future__ import annotations

import time
from pathlib import Path

from patchkit.model import PatchModel
from patchkit.results.evaluation import Evaluation
from patchkit.results.ioi import IoiStudy
from patchkit.results.manifest import CHECKPOINT
from patchkit.runtime import Progress
from patchkit.studies._finished_parts import Checkpoint
from patchkit.studies._ioi_circuit import head_circuit, head_edges, traced_circuit
from patchkit.studies._ioi_examples import attention_examples, prompt_examples
from patchkit.studies._ioi_findings import findings, notes
from patchkit.studies._ioi_heads import NAME_MOVER, Known, members, rules
from patchkit.studies._ioi_material import study_pairs
from patchkit.studies._ioi_options import IoiOptions as IoiOptions
from patchkit.studies._ioi_paths import chosen_heads, groups_of, movers, trace_heads
from patchkit.studies._ioi_published import compare
from patchkit.studies._ioi_rows import head_rows, known_heads, takes_over
from patchkit.studies._ioi_work import Protocols, Watched, Work

MODEL = "ioi-gpt2"

QUESTION = (
    "A prompt names two people, then one of them again, who passes something on: for example `Mary and John ... , John "
    "gave a book to`. The answer is the other one, the indirect object (IO), and not the repeated subject (S; S1 and S2 "
    "are its two mentions). Which attention heads find it, from the end of the prompt (END) back to the names, and what "
    "does each of them do?"
)
# Prompts shown in words.
_SHOWN = 2


def run_ioi(
    model: PatchModel,
    out: Path,
    options: IoiOptions | None = None,
    *,
    command: str = "patchkit study ioi",
    model_card: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> IoiStudy:
    """Runs the study and writes `ioi.json` into `out`; the report is made from it.

    A study that was interrupted goes on after what was finished in `out/journal`.

    Raises:
        InputError: a model without a tokenizer or with one that the task cannot be written for, or the checkpoint of a
            study of another model or with other options.
    """
    options = options or IoiOptions()
    started = time.monotonic()
    kept = Checkpoint(out / CHECKPOINT, f"{model.content_key()} {options}")
    work = Work(model, options, kept, progress or (lambda stage, done, total: None))
    pairs = {one: study_pairs(model, options.pairs, options.seed, one) for one in options.corruptions}
    clean = pairs[options.corruptions[0]]
    watched = kept.part("heads", Watched, lambda: work.watch(clean))
    paths = trace_heads(
        model.dims,
        lambda corruption, *stage: work.stage(pairs[corruption], corruption, *stage),
        options.corruptions,
        most=options.most,
        share=options.share,
        groups=options.groups,
    )
    chosen, groups = chosen_heads(paths.values()), groups_of(paths.values())
    alone = {head: Known(one, watched.even) for head, one in watched.heads.items()}
    name_movers = members(NAME_MOVER, alone, options.thresholds)
    group, group_words = movers(paths.values(), name_movers)
    whole, traced = head_circuit(model.dims, chosen), traced_circuit(model.dims, list(paths.values()))
    evaluation = kept.part("evaluation", Evaluation, lambda: work.judge(whole, group))
    protocols = kept.part("protocols", Protocols, lambda: work.protocols(whole, traced)).scores
    known = known_heads(watched.heads, watched.even, paths, evaluation, name_movers, group)
    rows = head_rows(known, paths, chosen, takes_over(evaluation, group), options.thresholds)
    ruled = rules(known, options.thresholds)
    asked = {row.head: row.looks.query for row in rows if row.in_circuit}
    study = IoiStudy(
        question=QUESTION,
        model=model.name,
        model_card=model_card or {},
        examples=prompt_examples(pairs, _SHOWN),
        convention=evaluation.convention,
        pairs=options.pairs,
        seeds={"pairs for paths and heads": options.seed, "pairs for the circuit": options.seed + 1},
        parameters=options.described,
        accuracy=watched.accuracy,
        even=watched.even,
        paths=paths,
        groups=groups,
        heads=rows,
        rules=ruled,
        attention=attention_examples(model, min(clean, key=lambda pair: len(pair.clean_ids)), asked),
        circuit_nodes=[name for name in whole.node_names if name != "input"],
        traced_edges=head_edges(traced),
        evaluation=evaluation,
        protocols=protocols,
        knocked_out=group_words,
        comparison=compare(model, ruled, evaluation, protocols),
        findings=findings(
            rows,
            ruled,
            groups,
            watched.accuracy,
            watched.even,
            evaluation,
            protocols,
            group_words,
            options.thresholds,
        ),
        notes=notes(evaluation, paths),
        command=command,
        seconds=time.monotonic() - started,
    )
    study.save(out)
    return study
