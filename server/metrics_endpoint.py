"""http://HOST:PORT/metrics: a server's figures, answered by threads of their own."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app

from swarm.errors import PortInUse, UsageError

from .metrics import ServerCollector, ServerFigures
from .tally import Tally

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

logger = logging.getLogger(__name__)

#: Seconds for somebody who connected to ask, and to take each part of the answer.
_PATIENCE = 10.0
#: Connections at the same time, since each takes a thread; more are turned away.
_MAX_CONNECTIONS = 32
#: Seconds for the server's event loop to say how the server is; then it is told to be stuck.
_FIGURES_TIMEOUT = 5.0


class MetricsEndpoint:
    """Listens from its beginning to `close`, both on the server's event loop."""

    def __init__(self, host: str, port: int, tally: Tally, figures: Callable[[], ServerFigures | None]):
        """port: 0 takes any free one. figures: see `ServerCollector`, but called on the event loop: its thread alone
        knows what is in the registry of adapters, say.

        Raises PortInUse, UsageError for a host that is none of this machine.
        """
        loop = asyncio.get_running_loop()

        async def ask() -> ServerFigures | None:
            return figures()

        def figures_in_time() -> ServerFigures | None:
            question = ask()
            try:
                answer = asyncio.run_coroutine_threadsafe(question, loop)
            except RuntimeError:  # the loop has ended
                question.close()
                raise TimeoutError from None
            return answer.result(_FIGURES_TIMEOUT)

        registry = CollectorRegistry(auto_describe=False)  # else it would ask at once, from this very thread
        registry.register(ServerCollector(tally, figures_in_time))
        ProcessCollector(registry=registry)
        self._server = _listen(host, port)
        self._server.set_app(_patient(make_wsgi_app(registry)))
        address: tuple[Any, ...] = self._server.server_address
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        self.url = f"http://{shown}:{address[1]}/metrics"
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    async def close(self) -> None:
        """The port is free afterwards. Takes up to half a second; answers on their way still go out."""
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()


class _HttpServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # The library's choice in newer Pythons, and then two servers would share a port without noticing.
    allow_reuse_port = False

    def __init__(self, *args: Any):
        self._places = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(*args)

    def server_bind(self) -> None:
        """Without asking a name server who we are, as the library does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # there is no thread for it
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Mostly somebody who went away before he was answered."""
        logger.info("could not answer a request for metrics", exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = _PATIENCE

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody wants a line for every request."""


def _listen(host: str, port: int) -> _HttpServer:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        kind = type("_HttpServer", (_HttpServer,), {"address_family": family})
        return kind((host, port), _Handler)
    except (OSError, UnicodeError) as error:  # the latter for what is no name of a host
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"cannot serve metrics on port {port} of {host}: another program listens there already; choose another "
                "--metrics-port, or 0 for any free one"
            ) from error
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot serve metrics on port {port} of {host}: {reason}; change --metrics-host or --metrics-port"
        ) from error


def _patient(app: Callable[..., Any]) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
    """The application, with an answer where the server does not say in time how it is, or an error of ours is in it."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            found: Iterable[bytes] = app(environ, start_response)
            return found
        except TimeoutError:
            status, words = "503 Service Unavailable", "the server is too busy to say how it is; try again later"
        except Exception:
            logger.exception("could not tell the figures of this server")
            status, words = "500 Internal Server Error", "the server cannot say how it is: its log says why"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{words}\n".encode()]

    return answer
