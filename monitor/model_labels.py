"""What models are called in metrics: names come from strangers, so there is a bound on how many there are."""

from __future__ import annotations

from collections.abc import Iterable

from .report import ModelReport

#: Models that have a label of their own.
MAX_LABELS = 64
#: The label of all the rest.
OTHER = "other"


class ModelLabels:
    """Gives every model a label and keeps it, so that a time series stays that of one model.

    A model is called by its name; where several share it, by name and fingerprint, but for one that had the name
    before the others came. Models that are gone keep their label until others need the room.
    """

    def __init__(self, most: int = MAX_LABELS):
        self._most = most
        self._labels = dict[str, str]()

    def update(self, models: Iterable[ModelReport]) -> dict[str, str]:
        """The labels of `models` and of those that had one before, by fingerprint. Whoever is missing is `OTHER`.

        If there is not room for all, those with most servers that serve come first.
        """
        by_fingerprint = {model.fingerprint: model for model in models}
        names = [model.name for model in by_fingerprint.values()]
        new = [model for model in by_fingerprint.values() if model.fingerprint not in self._labels]
        new.sort(key=lambda model: (-sum(server.serving for server in model.servers), model.fingerprint))
        gone = [fingerprint for fingerprint in self._labels if fingerprint not in by_fingerprint]
        for model in new:
            if len(self._labels) >= self._most:
                if not gone:
                    break
                del self._labels[gone.pop(0)]
            label = self._free_label(model, shared=names.count(model.name) > 1)
            if label is not None:
                self._labels[model.fingerprint] = label
        return dict(self._labels)

    def _free_label(self, model: ModelReport, shared: bool) -> str | None:
        """None: somebody named models after the labels that this one could have."""
        candidates = [f"{model.name} ({model.fingerprint[:12]})", f"{model.name} ({model.fingerprint})"]
        if model.name and not shared:
            candidates.insert(0, model.name)
        taken = {OTHER, *self._labels.values()}
        return next((label for label in candidates if label not in taken), None)
