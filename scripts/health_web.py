"""`swarm health` as a web server: the node, the monitor and uvicorn in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swarm.errors import PortInUse, UsageError

from .health_node import end_with_daemon
from .logs import adopt_loggers, say

if TYPE_CHECKING:
    from swarm.monitor.monitor import Monitor
    from swarm.monitor.watcher import WatchSettings
    from swarm.node import Node, NodeConfig

#: Seconds that answers on their way may take when the monitor stops.
_FAREWELL = 3


@dataclass(frozen=True)
class Listener:
    """A port that is ours: whoever connects waits until he is served. host: as the user wrote it."""

    host: str
    socket: socket.socket

    @classmethod
    def open(cls, host: str, port: int) -> Listener:
        """port: 0 for any free one. Raises PortInUse, or UsageError for a host that is none of this machine's."""
        bare = host.strip("[]")
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)[0]
        except (socket.gaierror, UnicodeError) as error:
            raise UsageError(f"--host {host} is neither an address nor a name that can be found: {error}") from error
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(128)
        except OSError as error:
            listening.close()
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(
                    f"another program listens on port {port} of {host} already: choose another --port, or 0 for any"
                ) from error
            raise UsageError(f"cannot listen on port {port} of {host}: {error.strerror}; see --host, --port") from error
        return cls(host, listening)

    @property
    def port(self) -> int:
        port: int = self.socket.getsockname()[1]
        return port

    @property
    def is_loopback(self) -> bool:
        from ipaddress import ip_address

        return ip_address(self.socket.getsockname()[0]).is_loopback

    @property
    def url(self) -> str:
        """One that a browser on this machine can open."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host.strip("[]"), self.host.strip("[]"))
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"


class WebMonitor:
    """A `serving.Peer`: joins the swarm, watches it, and shows it to browsers."""

    def __init__(
        self,
        config: NodeConfig,
        settings: WatchSettings,
        listener: Listener,
        *,
        wanted: tuple[str, ...],
        show_addresses: bool,
        probe_period: float,
    ):
        """wanted: models that should be there. probe_period: seconds, 0 for no probes."""
        self._config = config
        self._settings = settings
        self._listener = listener
        self._wanted = wanted
        self._show_addresses = show_addresses
        self._probe_period = probe_period
        self._stop = asyncio.Event()
        self._node: Node
        self._monitor: Monitor
        self._server: Any

    async def start(self) -> str:
        """The address of the page. Raises what `Node.start` raises."""
        from swarm.monitor.api import make_app
        from swarm.monitor.monitor import Monitor, MonitorConfig
        from swarm.monitor.reachable import Reachability
        from swarm.monitor.trace import Tracer
        from swarm.monitor.watcher import Watcher
        from swarm.monitor.web_settings import WebSettings
        from swarm.node import Node

        if not self._listener.is_loopback:
            say(f"whoever reaches {self._listener.host} port {self._listener.port} can look at this monitor")
        self._node = node = await Node.start(self._config)
        try:
            watcher = Watcher(node, self._settings)
            reachability = Reachability(node, show_addresses=self._show_addresses)
            self._monitor = Monitor(
                watcher,
                Tracer(node),
                lambda peer_id: reachability.check(watcher.picture, peer_id),
                MonitorConfig(self._wanted, self._show_addresses, self._probe_period),
            )
            app = make_app(self._monitor, WebSettings(hosts=WebSettings.hosts_for(self._listener.host)))
            self._server = _make_server(app)
        except BaseException:
            await node.stop()
            raise
        adopt_loggers()
        return self._listener.url

    def stop(self) -> None:
        self._stop.set()

    async def serve_until_stopped(self) -> None:
        """Raises NetworkError if p2pd dies."""
        try:
            await end_with_daemon(self._node, self._serve_web(), self._monitor.run())
        finally:
            await self._node.stop()

    async def _serve_web(self) -> None:
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener.socket]))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            self._monitor.close()  # ends streams that would go on for ever
            self._server.should_exit = True
            while not serving.done():  # it takes _FAREWELL seconds at most, and nothing may be cut off below it
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({serving})
        serving.result()


def _make_server(app: Any) -> Any:
    """uvicorn without its own signals, logs and processes. It takes nobody's word for where a request comes from."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # `serving.run_until_stopped` has them

    return Server(
        uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_FAREWELL,
        )
    )
