"""Measured speeds and costs of adapters, kept in the cache folder: files for each kind of span on a kind of device."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import torch
from pydantic import Field, ValidationError

from swarm.cache_folder import cache_folder, replace_file
from swarm.data_structures import DecodeTimes, Fingerprint, Frozen, NumericsTag, Rate
from swarm.processor import processor_name
from swarm.protocol import explain

from .adapters.cost_model import MeasuredCosts

logger = logging.getLogger(__name__)

Entry = TypeVar("Entry", bound=Frozen)

#: Seconds that a server waits for others to measure; a measurement takes one or two.
PATIENCE = 10.0
_TRY_AGAIN = 0.02


class Speed(Frozen):
    """How fast a span runs: see the fields of the same names of `ServerInfo`. At least one row was measured."""

    decode_times: Annotated[DecodeTimes, Field(min_length=1)]
    forward_rate: Rate | None

    @property
    def throughput(self) -> float:
        """Tokens/s of single-row decoding."""
        return 1.0 / self.decode_times[0]


class SpeedKey(Frozen):
    """What a speed depends on. device: the processor's or GPU's name. threads: of a forward pass on a CPU."""

    fingerprint: Fingerprint
    numerics: NumericsTag
    num_blocks: int
    device: str
    threads: int

    @classmethod
    def here(cls, fingerprint: str, numerics: str, num_blocks: int, device: torch.device) -> SpeedKey:
        """For a span on a device of this machine, with torch's present number of threads."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
        return cls(
            fingerprint=fingerprint,
            numerics=numerics,
            num_blocks=num_blocks,
            device=name,
            threads=torch.get_num_threads(),
        )


class _Entry(Frozen):
    key: SpeedKey
    speed: Speed


class _CostsEntry(Frozen):
    key: SpeedKey
    costs: MeasuredCosts


def recall(key: SpeedKey) -> Speed | None:
    """The stored speed; None if there is none, or its file is damaged (the log says so)."""
    entry = _read(_path(key), _Entry)
    return entry.speed if entry is not None and entry.key == key else None


def remember(key: SpeedKey, speed: Speed) -> None:
    """Store a speed. A folder that cannot be written only costs time at the next start, so that is no error."""
    _write(_path(key), _Entry(key=key, speed=speed))


def recall_costs(key: SpeedKey) -> MeasuredCosts | None:
    """The same for costs of adapters."""
    entry = _read(_path(key, ".costs"), _CostsEntry)
    return entry.costs if entry is not None and entry.key == key else None


def remember_costs(key: SpeedKey, costs: MeasuredCosts) -> None:
    _write(_path(key, ".costs"), _CostsEntry(key=key, costs=costs))


def _read(path: Path, kind: type[Entry]) -> Entry | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = explain(error) if isinstance(error, ValidationError) else error
        logger.warning("%s is damaged, so the speed is measured again: %s", path, reason)
        return None


def _write(path: Path, entry: Frozen) -> None:
    try:
        replace_file(path, entry.model_dump_json(indent=1))
    except OSError as error:
        logger.warning("cannot store the measured speed: %s", error)


@contextmanager
def device_to_ourselves(device: torch.device, patience: float = PATIENCE) -> Iterator[None]:
    """Keep other servers of this machine from measuring on the same device meanwhile: they would measure each other.
    After so many seconds, or where the cache folder cannot be written, go on all the same."""
    path = cache_folder() / "speeds" / f".{device}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        logger.warning("cannot keep others from measuring at the same time: %s", error)
        yield
        return
    with file:  # closing it gives the lock back
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_TRY_AGAIN)
        yield


def _path(key: SpeedKey, kind: str = "") -> Path:
    digest = hashlib.sha256(key.model_dump_json().encode()).hexdigest()
    return cache_folder() / "speeds" / f"{digest[:32]}{kind}.json"
