"""From what the monitor knows of a swarm to what it says about it. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from types import MappingProxyType

from swarm.data_structures import DECODE_ROWS
from swarm.dht import ServerRecord
from swarm.routing.chain import Chain
from swarm.routing.snapshot import format_blocks

from .hiding import hide_addresses
from .outlook import SearchBudget, best_chain, departures, describe_chain
from .picture import ModelPicture, Picture
from .report import AdapterReport, Departure, ModelReport, ServerReport, SwarmReport

#: Links of a server in a report. Servers announce up to 64, which would be nine tenths of a large swarm's report.
MOST_LINKS = 16


def summarize(
    picture: Picture,
    wanted: Iterable[str] = (),
    *,
    show_addresses: bool = False,
    corrections: Mapping[str, float] = MappingProxyType({}),
) -> SwarmReport:
    """wanted: names of models, or starts of their fingerprints, that should be there.

    corrections: of predictions, by fingerprint, see `calibration`.
    """
    found = problems(picture, wanted)
    addresses = picture.addresses if show_addresses else None
    return SwarmReport(
        healthy=not found,
        problems=tuple(found),
        trouble=picture.trouble if show_addresses else hide_addresses(picture.trouble),
        revision=picture.revision,
        made_at=picture.made_at,
        read_at=picture.read_at,
        models=_describe_models(picture.models, addresses, corrections),
    )


def problems(picture: Picture, wanted: Iterable[str] = ()) -> list[str]:
    """What is wrong with the swarm, a sentence each: models that are incomplete, or absent though wanted."""
    found = []
    if not picture.models:
        found.append("no server of this swarm serves any model")
    for one in picture.models:
        if not one.complete:
            found.append(
                f"{one.model.name} (fingerprint {one.model.fingerprint[:12]}) is incomplete: no server that "
                f"answers holds blocks {format_blocks(one.missing_blocks)} of {one.model.num_blocks}"
            )
    for name in wanted:
        if picture.model(name) is None:
            found.append(f"no server of this swarm serves {name}")
    return found


def _describe_models(
    models: Sequence[ModelPicture], addresses: Mapping[str, tuple[str, ...]] | None, corrections: Mapping[str, float]
) -> tuple[ModelReport, ...]:
    """One for each, in their order."""
    budget, reports = SearchBudget(), dict[int, ModelReport]()
    for number in sorted(range(len(models)), key=lambda number: -len(models[number].serving)):
        model = models[number]
        reports[number] = _describe_model(model, addresses, corrections.get(model.model.fingerprint), budget)
    return tuple(reports[number] for number in range(len(models)))


def _describe_model(
    model: ModelPicture,
    addresses: Mapping[str, tuple[str, ...]] | None,
    correction: float | None,
    budget: SearchBudget,
) -> ModelReport:
    best: Chain | None = None
    leaving: Mapping[str, Departure] = {}
    if not model.complete:
        leaving = departures(model, None)
    elif budget.take(model.model.num_blocks):
        best = best_chain(model)
        leaving = departures(model, best, correction, budget)
    return ModelReport(
        name=model.model.name,
        fingerprint=model.model.fingerprint,
        num_blocks=model.model.num_blocks,
        hidden_size=model.model.hidden_size,
        complete=model.complete,
        missing_blocks=model.missing_blocks,
        weakest_blocks=model.weakest_blocks,
        replicas=model.replicas,
        best_chain=None if best is None else describe_chain(model, best, correction),
        servers=tuple(
            _describe_server(
                model,
                server,
                leaving.get(server.peer_id),
                None if addresses is None else addresses.get(server.peer_id, ()),
            )
            for server in model.snapshot.servers
        ),
    )


def _describe_server(
    model: ModelPicture, server: ServerRecord, departure: Departure | None, addresses: tuple[str, ...] | None
) -> ServerReport:
    info, peer_id = server.info, server.peer_id
    # "dtype/quantisation/device/..." of peers as we are; a stranger may write anything
    dtype, quantization, device = (*(part or None for part in info.numerics.split("/")), None, None, None)[:3]
    if quantization is None:
        dtype = None
    answers = model.answers(peer_id)
    return ServerReport(
        peer_id=peer_id,
        public_name=info.public_name,
        software=info.software,
        span=(info.span.start, info.span.end),
        state=info.state,
        answers=answers,
        serving=model.serves(server),
        dtype=dtype,
        quantization=quantization,
        device=device,
        numerics=info.numerics,
        throughput=info.throughput,
        decode_times=dict(zip(map(str, DECODE_ROWS), info.decode_times, strict=False)),
        forward_rate=info.forward_rate,
        network_rate=info.network_rate,
        running_rows=info.running_rows,
        waiting_rows=info.waiting_rows,
        session_rows=info.session_rows,
        cache_tokens=info.cache_tokens,
        cache_tokens_left=info.cache_tokens_left,
        adapters=tuple(AdapterReport(name=one.name, kind=one.kind, digest=one.digest) for one in info.adapters),
        fetches_adapters=info.fetches_adapters,
        relayed=info.relayed,
        relays=info.relays,
        fixed=info.fixed,
        round_trip=model.snapshot.pings[peer_id] if answers else None,
        links=dict(heapq.nsmallest(MOST_LINKS, info.next_pings.items(), key=itemgetter(1))),
        started_at=info.started_at,
        announced_at=info.announced_at,
        expires_at=server.expires,
        addresses=addresses,
        departure=departure,
    )
