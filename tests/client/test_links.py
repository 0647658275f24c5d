"""How hidden states travel over each cut of a chain."""

import pytest
import torch

from swarm.client.config import ClientConfig
from swarm.client.links import MAX_UPLOADS, Links
from swarm.codecs import Codec
from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.errors import PeerUnreachable
from swarm.line_rate import CONFIRMATIONS
from swarm.protocol import RowSlice

SLOW, FAST = 1e5, 1e9


class Rates:
    """What servers announce of their network, in bytes/s."""

    def __init__(self, **rates):
        self.rates = rates

    def info(self, peer_id):
        if peer_id not in self.rates:
            return None
        return ServerInfo(
            state=ServerState.ONLINE,
            span=BlockSpan(start=0, end=1),
            throughput=1.0,
            numerics="fp32",
            network_rate=self.rates[peer_id],
            cache_tokens_left=0,
        )


@pytest.fixture(autouse=True)
def known_choice(monkeypatch):
    """Slow links take bfloat16, which all whole numbers up to 256 survive; what is unknown counts as fast."""
    monkeypatch.setattr(
        "swarm.client.links.choose_codec",
        lambda rate, lossless: Codec.BFLOAT16 if rate is not None and rate <= SLOW else lossless,
    )


def test_the_slower_end_of_a_link_decides():
    links = Links(Rates(A=FAST, B=SLOW, C=FAST, D=None), ClientConfig())
    codecs = links.output_codecs(["C", "A", "B", "C", "D", "stranger"], Codec.FLOAT32)
    assert codecs == [Codec.FLOAT32, Codec.BFLOAT16, Codec.BFLOAT16, *[Codec.FLOAT32] * 3]
    assert [links.input_codec(name, Codec.FLOAT16) for name in "AB"] == [Codec.FLOAT16, Codec.BFLOAT16]
    for _ in range(CONFIRMATIONS):
        links.own_rate.add(SLOW)  # the client gets a copy of everything
    assert set(links.output_codecs(["C", "A", "B"], Codec.FLOAT32)) == {Codec.BFLOAT16}
    assert links.input_codec("A", Codec.FLOAT32) is Codec.BFLOAT16


@pytest.mark.parametrize(("setting", "codec"), [("none", Codec.FLOAT32), ("blockwise8", Codec.BLOCKWISE8)])
def test_settings_stand_above_what_was_measured(setting, codec):
    links = Links(Rates(A=SLOW, B=FAST), ClientConfig(compression=setting))
    assert links.output_codecs(["A", "B"], Codec.FLOAT32) == [codec] * 2
    assert links.input_codec("A", Codec.FLOAT32) is codec


async def test_our_line_is_as_fast_as_the_fastest_upload_over_it():
    links, asked = Links(Rates(), ClientConfig()), []

    async def upload_rate(peer_id):
        asked.append(peer_id)
        if peer_id == "dead":
            raise PeerUnreachable("gone")
        if peer_id == "late":
            raise TimeoutError
        return {"near": 3e6, "far": 1e6}[peer_id]

    await links.measure(["dead", "late"], upload_rate)
    assert links.own_rate.value is None
    for _ in range(CONFIRMATIONS):
        await links.measure(["near", "far"], upload_rate)
    assert links.own_rate.value == 3e6
    await links.measure(["dead"], upload_rate)
    assert links.own_rate.value == 3e6, "what was known is better than nothing"
    await links.measure([], upload_rate)
    asked.clear()
    await links.measure(["far"] * 50, upload_rate)
    assert len(asked) == MAX_UPLOADS


@pytest.fixture
def swarm(fake_swarm):
    """A chain A, B, C with B at a slow link, and fast spares E, F with another boundary for B."""
    for name, start, end, throughput, rate in (
        ("A", 0, 3, 100.0, FAST),
        ("B", 3, 6, 100.0, SLOW),
        ("C", 6, 8, 100.0, FAST),
        ("E", 2, 4, 1.0, FAST),
        ("F", 4, 7, 1.0, FAST),
        ("D", 0, 3, 1.0, FAST),
    ):
        fake_swarm.add(name, start, end, throughput=throughput, network_rate=rate)
    return fake_swarm


def output_codecs(user):
    return [hop.output_codec for hop in user.session._hops]


def input_codecs(user):
    return [hop.history.codec for hop in user.session._hops]


def test_outputs_travel_as_their_links_need_it(swarm, either_way):
    user = swarm.connect().user()
    user.step(3)
    assert output_codecs(user) == [Codec.BFLOAT16, Codec.BFLOAT16, Codec.FLOAT32]
    assert input_codecs(user) == [Codec.FLOAT32, Codec.BFLOAT16, Codec.BFLOAT16]
    assert [request.hidden.codec for name in "ABC" for request in swarm[name].requests] == input_codecs(user)


def test_a_replacement_keeps_the_codec_of_its_cut(swarm, either_way):
    """The history behind it holds bytes of one codec; cuts that are new take what their links need."""
    user = swarm.connect().user()
    user.step(3)
    swarm["B"].die()
    user.step()
    user.step()
    assert [peer_id for peer_id, _ in user.route] == ["A", "E", "F", "C"]
    assert output_codecs(user) == [Codec.BFLOAT16, Codec.FLOAT32, Codec.BFLOAT16, Codec.FLOAT32]
    swarm["C"].die()
    swarm.add("G", 6, 8)
    user.step()
    user.step()
    assert [peer_id for peer_id, _ in user.route][-1] == "G"
    assert input_codecs(user)[-1] is Codec.BFLOAT16


def test_a_replay_sends_the_bytes_that_travelled(swarm, either_way):
    user = swarm.connect().user()
    user.step(3)
    swarm["B"].die()
    user.step()
    assert swarm["E"].requests[0].hidden.codec is Codec.BFLOAT16


def test_input_travels_as_before_when_the_first_server_is_replaced(swarm, either_way):
    client = swarm.connect()
    for _ in range(CONFIRMATIONS):
        client.links.own_rate.add(SLOW)
    user = client.user()
    user.step(3)
    client.links.own_rate.add(FAST)
    swarm["A"].die()
    user.step()
    assert user.route[0] == ("D", "0:3")
    assert input_codecs(user)[0] is Codec.BFLOAT16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lossless_is_the_type_of_the_hidden_states(swarm, dtype):
    user = swarm.connect(compression="none").user()
    output = user.session.step(torch.ones(2, 4, dtype=dtype), [RowSlice(0, 0, 2)])
    assert output.dtype == dtype
    assert {codec.value for codec in output_codecs(user)} == {str(dtype).removeprefix("torch.")}
