"""What the processes other than the main one do: open the model that it names, take batches, hand back what they gave."""

from __future__ import annotations

import os
import sys
from typing import Any

from patchkit.errors import InputError, PatchkitError, RunError
from patchkit.model import PatchModel
from patchkit.runtime.processes import Group, join, placement
from patchkit.runtime.queue import CloseWork, End, ModelSource, OpenWork, Prepare, RunStep, deliver, hear
from patchkit.runtime.sharing import unclaimed
from patchkit.runtime.work import BatchRunner, failed_part


def serve(model: PatchModel | None = None, *, group: Group) -> None:
    """Works for the main process of a group until that ends.

    Args:
        model: one that is open here already; without it, or where the main process uses another, the model is opened by
            the name that the main process gives.

    Raises:
        RunError: the main process has gone without a word.
    """
    worker = _Worker(group, model)
    number = 0
    try:
        while not isinstance(message := hear(group, number), End):
            worker.take(message)
            number += 1
    finally:
        group.close()


class _Worker:
    """The works that are open, and the model."""

    def __init__(self, group: Group, model: PatchModel | None) -> None:
        self.group, self.model = group, model
        self.opened: dict[str, Any] | None = None
        self.works: dict[int, BatchRunner | Exception] = {}

    def take(self, message: Any) -> None:
        match message:
            case Prepare():
                try:
                    self._open(message.opening)
                except Exception:
                    # Said when it is needed, to the main process.
                    self.model = None
            case OpenWork():
                try:
                    self.works[message.number] = BatchRunner(
                        self._model(message.model), message.opener, message.items
                    )
                except Exception as error:
                    self.works[message.number] = error
            case CloseWork():
                self.works.pop(message.number, None)
            case RunStep():
                self._run(message)

    def _run(self, message: RunStep) -> None:
        work = self.works[message.work]
        for batch in unclaimed(self.group, message.number, len(message.batches)):
            try:
                if isinstance(work, Exception):
                    raise work
                step = work.opener if message.step is None else message.step
                part = work.run(step, batch, message.batches[batch], message.budget)
            except Exception as error:
                part = failed_part(batch, error)
            deliver(self.group, message.number, part)

    def _model(self, source: ModelSource) -> PatchModel:
        """The model that the main process uses."""
        model = self.model
        if model is None or model.content_key() != source.content:
            if source.opening is None:
                raise InputError(
                    f"model '{source.name}' was made in the main process, and process {self.group.rank} cannot open it; "
                    "save it to a directory and load it by that name, or serve with the same model in every process"
                )
            model = self._open(source.opening)
        if model.content_key() != source.content:
            raise RunError(
                f"process {self.group.rank} found another model under the name '{source.name}' than the main process: "
                "their weights differ. Give every process the same files"
            )
        return model

    def _open(self, opening: dict[str, Any]) -> PatchModel:
        if self.model is None or self.opened != opening:
            from transformers.utils import logging

            from patchkit.zoo.load import load

            logging.disable_progress_bar()
            # Room for the new one.
            self.model = None
            given = {name: value for name, value in opening.items() if name != "source"}
            self.model = load(opening["source"], **placement(self.group, given.pop("device_map")), **given)
            self.opened = opening
        return self.model


def main() -> None:
    """Entry point of a process that `started_processes` has started, with its arguments."""
    try:
        serve(group=join(float(sys.argv[1]), int(sys.argv[2])))
    except (PatchkitError, KeyboardInterrupt) as error:
        sys.stderr.write(f"patchkit, process {os.environ.get('RANK')}: {error}\n")
        sys.exit(1)
