"""A second model that a Program reads beside the one it runs on, as it travels to other processes: by name and content.

A Program that puts activations of one model into another carries a `SecondModel`. In the process that made it the model
is there already; another process opens it once, on the devices where the first model lies, and keeps one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from patchkit.errors import InputError, RunError
from patchkit.model import PatchModel

#: Models of this process by content; they live as long as whoever made them holds them.
_HERE: WeakValueDictionary[str, PatchModel] = WeakValueDictionary()
#: The one that was opened here for another process's Program.
_OPENED: dict[str, PatchModel] = {}


@dataclass(frozen=True, eq=False)
class SecondModel:
    """Which model it is.

    Attributes:
        content: its `content_key`, by which finished work is known again.
        name: as the user called it.
        opening: how another process opens it; None for a module that was made here.
    """

    content: str
    name: str = field(compare=False)
    opening: dict[str, Any] | None = field(compare=False)

    @classmethod
    def of(cls, model: PatchModel) -> SecondModel:
        """The model as a Program carries it.

        Raises:
            InputError: a model that stays on its host: its activations would have to travel through here.
        """
        if model.hosted is not None:
            raise InputError(
                f"{model.name} is hosted at {model.hosted.url}, and activations of one hosted model cannot be put into "
                "another; load both models here"
            )
        content = model.content_key()
        _HERE[content] = model
        return cls(content, model.name, model.opening)

    def open(self, beside: PatchModel) -> PatchModel:
        """The model itself.

        Args:
            beside: the model that the Program runs on; in another process the second one goes to its devices.

        Raises:
            InputError: it was made in another process, from which it cannot be opened.
            RunError: another model lies under its name here.
        """
        found = _HERE.get(self.content)
        if found is None and beside.content_key() == self.content:
            found = beside
        if found is None:
            found = _OPENED.get(self.content)
        if found is None:
            # Room for the new one.
            _OPENED.clear()
            found = _OPENED[self.content] = self._load(beside)
        return found

    def _load(self, beside: PatchModel) -> PatchModel:
        from patchkit.zoo.load import load

        if self.opening is None:
            raise InputError(
                f"model '{self.name}' was made in the main process, and another one cannot open it; save it to a "
                "directory and load it by that name"
            )
        spread = getattr(beside.hf, "hf_device_map", None)
        where = {"device": beside.embed_device} if spread is None else {"device_map": spread}
        given = {name: value for name, value in self.opening.items() if name not in ("source", "device_map")}
        model = load(self.opening["source"], **where, **given)
        if model.content_key() != self.content:
            raise RunError(
                f"another model lies under the name '{self.name}' in this process than in the main one: their weights "
                "differ. Give every process the same files"
            )
        return model
