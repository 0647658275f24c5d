"""How predictions compare with what test requests took of late, so that the next ones are nearer to it.

Routing predicts from what servers announce, which they measured when they started: beside others that were loading, for
example. What is wrong with that is much the same for all chains through a model, so the ratio that test requests
through the best chain showed corrects the others, too.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from .report import TraceReport

#: Test requests of a model that count: the median of so many is not moved by one that met a busy moment.
_NUM_RATIOS = 5
#: Seconds for which a test request tells how things are.
_MAX_AGE = 600.0
#: A prediction is corrected by this much at most.
_MOST = 5.0
#: Models that are kept; of more, those that were tested last.
_MAX_MODELS = 256


class Calibration:
    """Keeps the ratios of measured to predicted times by fingerprint. For any thread.

    clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._ratios = OrderedDict[str, deque[tuple[float, float]]]()

    def observe(self, report: TraceReport) -> None:
        """Note a test request through the best chain. Its prediction must not be corrected yet."""
        if not report.predicted_step_time or not report.time_per_output_token:
            return
        ratio = report.time_per_output_token / report.predicted_step_time
        with self._lock:
            ratios = self._ratios.setdefault(report.fingerprint, deque(maxlen=_NUM_RATIOS))
            ratios.append((self._clock(), ratio))
            self._ratios.move_to_end(report.fingerprint)
            while len(self._ratios) > _MAX_MODELS:
                self._ratios.popitem(last=False)

    def factors(self) -> dict[str, float]:
        """What predicted times of each model have to be multiplied by, as far as test requests tell."""
        oldest = self._clock() - _MAX_AGE
        with self._lock:
            fresh = {
                fingerprint: [ratio for at, ratio in ratios if at >= oldest]
                for fingerprint, ratios in self._ratios.items()
            }
        return {
            fingerprint: min(_MOST, max(1 / _MOST, statistics.median(ratios)))
            for fingerprint, ratios in fresh.items()
            if ratios
        }
