"""A reverse proxy that counts the requests to an HTTP server, delays them, and lets some fail by a plan."""

import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>As the test has planned.</Message></Error>"
ANSWERS = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}
FAULTS = ("500", "503", "reset", "hang", "cut")  # of the last two one costs a time-out of the client


@dataclass(frozen=True)
class Request:
    """A request as it came: number (from 1), method, path with its query, who asked, and what was done to it."""

    number: int
    method: str
    path: str
    client: str
    fault: str | None

    @property
    def kind(self) -> str:
        """LIST, GET, HEAD, DELETE or PUT, as S3 charges them: an upload in parts is several of the last."""
        if self.method == "GET" and "list-type=" in self.path:
            return "LIST"
        if self.method == "POST":
            return "DELETE" if "delete" in self.path.partition("?")[2] else "PUT"
        return self.method


@dataclass
class Plan:
    """What happens to requests, in turn: `fault(number, method, path)` names one of `ANSWERS` or `FAULTS`, or None."""

    fault: Callable[[int, str, str], str | None] = lambda number, method, path: None
    latency_s: float = 0.0
    hang_s: float = 60.0


def every(k: int, faults: Iterable[str]) -> Callable[[int, str, str], str | None]:
    """Every k-th request fails, by these faults in turn."""
    faults = tuple(faults)
    return lambda number, method, path: None if number % k else faults[number // k % len(faults)]


@dataclass
class FaultProxy:
    """Stands on a port of its own from the start, so that processes can be told its address; `serve` opens it.

    at_once: the most requests that were under way at the same time.
    """

    host: str = "127.0.0.1"
    port: int = 0
    plan: Plan = field(default_factory=Plan)
    requests: list[Request] = field(default_factory=list)
    at_once: int = 0

    def __post_init__(self):
        self._lock, self._server, self._ended, self._under_way = threading.Lock(), None, threading.Event(), 0
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((self.host, self.port))
        self.url = f"http://{self.host}:{self._socket.getsockname()[1]}"

    def serve(self, upstream: tuple[str, int]) -> None:
        """Pass requests on to a server from now on, in threads."""
        proxy = self

        class Handler(_Handler):
            def setup(self):
                super().setup()
                self.proxy, self.upstream = proxy, http.client.HTTPConnection(*upstream, timeout=60)

        self._server = _Server(self._socket.getsockname(), Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = self._socket
        self._server.server_activate()
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """End it; who still waits for an answer gets none."""
        self._ended.set()
        if self._server is not None:
            self._server.shutdown()
        self._socket.close()

    def reset(self, plan: Plan | None = None) -> None:
        """Forget what was asked, and disturb by this plan from now on."""
        with self._lock:
            self.plan, self.requests, self.at_once = plan or Plan(), [], 0

    def counted(self) -> Counter:
        """Requests by kind."""
        return Counter(request.kind for request in list(self.requests))

    def disturbed(self) -> list[Request]:
        """The requests that failed by the plan."""
        return [request for request in list(self.requests) if request.fault]

    def note(self, method: str, path: str, client: str) -> Request:
        """Count a request, and decide what becomes of it."""
        with self._lock:
            number = len(self.requests) + 1
            self.requests.append(Request(number, method, path, client, self.plan.fault(number, method, path)))
            return self.requests[-1]

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """While a request is answered."""
        with self._lock:
            self._under_way += 1
            self.at_once = max(self.at_once, self._under_way)
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1

    def wait(self, seconds: float) -> None:
        """Let a request wait, unless the proxy ends."""
        self._ended.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):  # a client that was killed, or a fault: expected here
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16

    def log_message(self, *arguments):
        pass

    def _answer(self):
        with self.proxy.under_way():
            self._answered()

    def _answered(self):
        request = self.proxy.note(self.command, self.path, self.client_address[0])
        if request.fault == "reset":  # before the body is read: with data unread, closing sends a TCP reset
            self.close_connection = True
            return self.connection.close()
        body = self._body()
        if self.proxy.plan.latency_s:
            time.sleep(self.proxy.plan.latency_s)
        if request.fault == "hang":
            self.proxy.wait(self.proxy.plan.hang_s)
            self.close_connection = True
        elif request.fault in ANSWERS:
            text = ERROR.format(ANSWERS[request.fault])
            self._send(int(request.fault), [("Content-Type", "application/xml")], text.encode())
        else:
            self._pass_on(body, cut=request.fault == "cut")

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()  # clients wait for it a second before they send what they have
        return True

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _pass_on(self, body: bytes, cut: bool) -> None:
        skipped = ("transfer-encoding", "connection", "expect", "content-length")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
        if body or self.command in ("PUT", "POST"):
            headers["Content-Length"] = str(len(body))
        for attempt in (1, 2):  # the server may have closed a connection that was idle
            try:
                self.upstream.request(self.command, self.path, body, headers)
                answer = self.upstream.getresponse()
                break
            except (http.client.HTTPException, OSError):
                self.upstream.close()
                if attempt == 2:
                    raise
        content = answer.read()
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in skipped]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self._send(answer.status, kept, content, cut=cut, length=length)

    def _send(self, status: int, headers: list, content: bytes, cut: bool = False, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.wfile.flush()
        if cut:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815
