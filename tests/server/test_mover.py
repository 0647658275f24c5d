"""When a server moves: who announced it, who waited, who stayed after all. Several movers share records here."""

import asyncio

import pytest

from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.errors import DownloadFailed, ModelNotFound, NetworkError
from swarm.routing.rebalancing import RebalancingPolicy
from swarm.server.mover import Mover

ONLINE, JOINING, DRAINING = ServerState.ONLINE, ServerState.JOINING, ServerState.DRAINING
NUM_BLOCKS = 8
DELAY = 0.2
EAGER = RebalancingPolicy(max_moving=1.0)


class Board:
    """The records of a swarm, and the servers that move in it."""

    def __init__(self):
        self.records = {}
        self.log = []
        self.broken = False

    def add(self, peer_id, start, end, state=ONLINE, throughput=10.0, fixed=False, policy=EAGER):
        info = ServerInfo(
            state=state,
            span=BlockSpan(start=start, end=end),
            throughput=throughput,
            numerics="x",
            cache_tokens_left=5,
            fixed=fixed,
        )
        self.records[peer_id] = ServerRecord(peer_id, info, expires=1e9)
        return FakeServer(self, peer_id, policy)

    def set(self, peer_id, **changes):
        record = self.records[peer_id]
        self.records[peer_id] = ServerRecord(peer_id, record.info.model_copy(update=changes), record.expires)

    def spans(self):
        return {peer_id: (record.info.span.start, record.info.span.end) for peer_id, record in self.records.items()}


class FakeServer:
    def __init__(self, board, peer_id, policy):
        self.board, self.peer_id = board, peer_id
        self.before_announcing = 0.0
        self.failure = None
        self.can_load = True
        self.fetches = None  # what happens while the weights of the blocks it moves to are fetched
        self.mover = Mover(self, NUM_BLOCKS, peer_id, policy, DELAY)

    @property
    def state(self):
        return self.board.records[self.peer_id].info.state

    async def records(self):
        if self.board.broken:
            raise NetworkError("nobody answers")
        return list(self.board.records.values())

    async def announce(self, state):
        if state is DRAINING:
            await asyncio.sleep(self.before_announcing)
        self.board.set(self.peer_id, state=state)
        self.board.log.append((self.peer_id, state))

    async def prepare(self, span):
        fetches, self.fetches = self.fetches, None
        if fetches is not None:
            fetches()
        return fetches is not None

    async def move(self, span):
        if self.failure is not None:
            raise self.failure
        self.board.log.append((self.peer_id, str(span)))
        self.board.set(self.peer_id, state=ONLINE, **({"span": span} if self.can_load else {}))
        return self.can_load


@pytest.fixture
def board():
    return Board()


async def test_a_spare_server_goes_where_nobody_is(board):
    spare, other = board.add("A", 0, 4), board.add("B", 0, 4)
    await spare.mover.check()
    await other.mover.check()
    assert sorted(board.spans().values()) == [(0, 4), (4, 8)]
    mover = next(peer for peer, span in board.spans().items() if span == (4, 8))
    assert [what for peer, what in board.log if peer == mover][:2] == [DRAINING, "4:8"]  # announced first


async def test_of_two_that_decide_at_once_on_the_same_records_one_stays(board):
    """Both would leave the same blocks, and nobody else holds them."""
    first, second = board.add("A", 0, 4), board.add("B", 0, 4)
    plan = {"A": BlockSpan(start=4, end=8), "B": BlockSpan(start=4, end=8)}
    for server in (first, second):
        server.mover._rebalancer.decide = lambda records, peer=server.peer_id: plan[peer]
    await asyncio.gather(first.mover.check(), second.mover.check())
    assert board.spans()["A"] == (0, 4)  # asked first, while the other was on its way too; whether that one then goes
    assert (first.state, second.state) == (ONLINE, ONLINE)
    gone = [what for _, what in board.log if what == "4:8"]
    assert len(gone) <= 1


async def test_who_took_too_long_to_announce_stays(board):
    """Others may have decided meanwhile, and waited, without having read of it."""
    slow, _ = board.add("A", 0, 4), board.add("B", 0, 4, fixed=True)
    slow.before_announcing = DELAY
    await slow.mover.check()
    assert board.spans()["A"] == (0, 4)
    assert slow.state is ONLINE


async def test_who_is_needed_again_stays(board):
    """While it waited, the other holder of its blocks went."""
    spare, _ = board.add("A", 0, 4), board.add("B", 0, 4, fixed=True)
    checking = asyncio.create_task(spare.mover.check())
    while spare.state is not DRAINING:
        await asyncio.sleep(0)
    del board.records["B"]
    await checking
    assert board.spans() == {"A": (0, 4)}
    assert spare.state is ONLINE


async def test_a_server_whose_blocks_its_owner_chose_is_not_counted_on(board):
    fixed, spare = board.add("A", 0, 4, fixed=True), board.add("B", 0, 4)
    await fixed.mover.check()
    await spare.mover.check()
    assert board.spans() == {"A": (0, 4), "B": (4, 8)}


@pytest.mark.parametrize("state", [JOINING, DRAINING, ServerState.OFFLINE])
async def test_who_does_not_serve_does_not_decide(board, state):
    spare, _ = board.add("A", 0, 4, state=state), board.add("B", 0, 4, fixed=True)
    await spare.mover.check()
    assert (board.spans()["A"], spare.state) == ((0, 4), state)


async def test_a_swarm_that_does_not_answer_decides_nothing(board):
    spare, _ = board.add("A", 0, 4), board.add("B", 0, 4, fixed=True)
    board.broken = True
    await spare.mover.check()
    assert (board.spans()["A"], spare.state) == ((0, 4), ONLINE)
    board.broken = False
    checking = asyncio.create_task(spare.mover.check())
    while spare.state is not DRAINING:
        await asyncio.sleep(0)
    board.broken = True  # in the middle of it
    await checking
    assert (board.spans()["A"], spare.state) == ((0, 4), ONLINE)


async def test_weights_are_fetched_before_anybody_is_told_to_leave(board):
    """And whether to move is decided anew afterwards: it may have taken an hour."""
    spare, _ = board.add("A", 0, 4, policy=RebalancingPolicy(check_period=36_000.0)), board.add("B", 0, 4, fixed=True)
    spare.fetches = lambda: board.log.append(("A", "fetched"))
    running = asyncio.create_task(spare.mover.keep_checking())
    spare.mover.look(await spare.records())
    async with asyncio.timeout(20):
        while board.spans()["A"] != (4, 8):
            await asyncio.sleep(0.01)
    running.cancel()
    assert [what for _, what in board.log][:3] == ["fetched", DRAINING, "4:8"]


async def test_who_is_not_needed_any_more_once_the_weights_are_there_stays(board):
    spare, _ = board.add("A", 0, 4), board.add("B", 0, 4, fixed=True)
    spare.fetches = lambda: board.add("C", 4, 8, fixed=True)
    await spare.mover.check()
    await spare.mover.check()
    assert board.spans()["A"] == (0, 4)
    assert board.log == []


async def test_weights_that_cannot_be_fetched_leave_everything_as_it_is(board):
    spare, _ = board.add("A", 0, 4), board.add("B", 0, 4, fixed=True)

    def fail():
        raise DownloadFailed("the hub is away")

    spare.fetches = fail
    await spare.mover.check()
    assert (board.spans()["A"], spare.state) == ((0, 4), ONLINE)


async def test_a_hole_is_not_waited_out(board):
    """A check is due in hours, but somebody has just gone."""
    spare = board.add("A", 0, 4, policy=RebalancingPolicy(check_period=36_000.0))
    board.add("B", 0, 4, fixed=True)
    running = asyncio.create_task(spare.mover.keep_checking())
    spare.mover.look(await spare.records())
    async with asyncio.timeout(20):
        while board.spans()["A"] != (4, 8):
            await asyncio.sleep(0.01)
    running.cancel()


async def test_who_loads_for_ever_hides_no_hole(board, monkeypatch):
    """In a small swarm nobody else may move while he is on his way."""
    spare = board.add("A", 0, 4)
    board.add("B", 0, 4, fixed=True)
    board.add("C", 4, 8, state=JOINING, throughput=0.0)
    spare.mover.look(await spare.records())
    assert not spare.mover._alarm.is_set()
    await spare.mover.check()
    assert board.spans()["A"] == (0, 4)
    monkeypatch.setattr("swarm.server.mover.LOADING_LIMIT", 0.0)
    spare.mover.look(await spare.records())
    assert spare.mover._alarm.is_set()
    await spare.mover.check()
    assert board.spans()["A"] == (4, 8)


async def test_no_hole_no_hurry(board):
    spare = board.add("A", 0, 4, policy=RebalancingPolicy(check_period=36_000.0))
    board.add("B", 4, 8, fixed=True)
    spare.mover.look(await spare.records())
    running = asyncio.create_task(spare.mover.keep_checking())
    await asyncio.sleep(0)
    assert not spare.mover._alarm.is_set()
    running.cancel()


async def test_a_move_that_fails_for_good_ends_the_server(board):
    spare, _ = board.add("A", 0, 4), board.add("B", 0, 4, fixed=True)
    spare.failure = ModelNotFound("the disk is gone")
    spare.mover.look(await spare.records())
    with pytest.raises(ModelNotFound, match="the disk is gone"):
        await spare.mover.keep_checking()


async def test_blocks_that_cannot_be_loaded_are_not_tried_again(board):
    """Each attempt costs the sessions of the blocks that it serves."""
    spare, _ = board.add("A", 0, 4), board.add("B", 0, 4, fixed=True)
    spare.can_load = False
    await spare.mover.check()
    await spare.mover.check()
    assert [what for _, what in board.log] == [DRAINING, "4:8"]
    assert (board.spans()["A"], spare.state) == ((0, 4), ONLINE)
