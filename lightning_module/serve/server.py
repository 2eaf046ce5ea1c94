"""`triton-gru-predict --serve`: a local page that shows the gates during typing.

It serves the user of this machine and listens on 127.0.0.1 alone. Other web pages in the same
browser must not read what is typed: requests whose Host or Origin is not this server's are refused,
which also prevents DNS rebinding, and requests must be JSON, which no form of another page can send
without a preflight.
"""

import json
import os
import signal
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lightning_module.data.tokenizers import Tokenizer
from lightning_module.errors import DataError, InspectionError
from lightning_module.inspect.inspection import MAX_CHARACTERS, check_gates, inspect_text
from lightning_module.inspect.page import page, page_data
from lightning_module.model import SentencePredictor
from lightning_module.terminal.signals import Interrupted

ADDRESS = "127.0.0.1"
TITLE = "What the GRU keeps and forgets"
# Every character may take six bytes in JSON (\\u4e00) or twelve (a surrogate pair).
MAX_BODY = 12 * MAX_CHARACTERS + 1000


class Refusal(Exception):
    """A request without an inspection: an HTTP status and the reason, for the user."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class InspectionServer(ThreadingHTTPServer):
    """Serves one model's inspections on 127.0.0.1.

    Args:
        model: in evaluation mode, with GRU layers.
        tokenizer: the one that the model was trained with.
        checkpoint: displayed name of the model.
        port: 0 for any that is free.
        text: initial text of the page.
        k: number of likeliest next tokens.

    Raises:
        InspectionError: the layers are not GRU layers, or the text cannot be shown.
        OSError: the port cannot be bound.
    """

    daemon_threads = True
    request_queue_size = 128  # not accepted yet; with 5, the default, some of 18 were reset
    allow_reuse_address = os.name == "posix"  # elsewhere it would share the port with other servers

    def __init__(
        self,
        model: SentencePredictor,
        tokenizer: Tokenizer,
        *,
        checkpoint: str,
        port: int,
        text: str = "",
        k: int = 5,
    ) -> None:
        check_gates(model)
        self.model, self.tokenizer, self.checkpoint, self.k = model, tokenizer, checkpoint, k
        self._one_at_a_time = threading.Lock()
        start = {
            "served": True,
            "text": text,
            "most_characters": MAX_CHARACTERS,
            "inspection": self.inspect(text, 1),
        }
        self.page, self.policy = page(start, TITLE)
        super().__init__((ADDRESS, port), _Handler)

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """The values of Host for this server, without a port if that is 80."""
        port = "" if self.server_port == 80 else f":{self.server_port}"
        return tuple(f"{name}{port}" for name in (ADDRESS, "localhost"))

    def inspect(self, text: str, layer: int) -> dict[str, Any]:
        """An inspection as data of the page's script, see `inspect.page.page_data`."""
        with self._one_at_a_time:
            found = inspect_text(self.model, self.tokenizer, text, layer=layer, k=self.k)
        return page_data(found, self.checkpoint)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent if the browser closed the connection, which is not an error; else as usual."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: InspectionServer
    timeout = 30  # seconds for a request to arrive
    server_version = "triton-gru"
    sys_version = ""

    def do_GET(self) -> None:
        try:
            self._check_origin()
            if self.path.partition("?")[0] != "/":
                raise Refusal(HTTPStatus.NOT_FOUND, "the only page is /")
        except Refusal as refusal:
            self._answer_json(refusal.status, {"error": str(refusal)})
            return
        self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)

    def do_POST(self) -> None:
        try:
            body = self._body()  # first: a browser gets no response before its request was read
            self._check_origin()
            if self.path != "/inspect":
                raise Refusal(HTTPStatus.NOT_FOUND, "send requests to /inspect")
            found = self.server.inspect(*self._question(body))
        except Refusal as refusal:
            self._answer_json(refusal.status, {"error": str(refusal)})
        except (DataError, InspectionError) as error:
            self._answer_json(HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)})
        else:
            self._answer_json(HTTPStatus.OK, found)

    def _check_origin(self) -> None:
        hosts = self.server.hosts
        if self.headers.get_all("Host", []) not in [[host] for host in hosts]:
            raise Refusal(HTTPStatus.FORBIDDEN, f"Host must be {' or '.join(hosts)}")
        origins = self.headers.get_all("Origin", [])
        if any(origin not in [f"http://{host}" for host in hosts] for origin in origins):
            raise Refusal(HTTPStatus.FORBIDDEN, "requests of other pages are refused")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "the request must have a Content-Length")
        if len(length) > 9 or int(length) > MAX_BODY:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a text must have at most {MAX_CHARACTERS:,} characters",
            )
        return self.rfile.read(int(length))

    def _question(self, body: bytes) -> tuple[str, int]:
        """Text and layer."""
        if self.headers.get_content_type() != "application/json":
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the request must be application/json")
        try:
            question = json.loads(body)
            text, layer = question["text"], question["layer"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, _EXPECTED) from error
        if not isinstance(text, str) or not isinstance(layer, int) or isinstance(layer, bool):
            raise Refusal(HTTPStatus.BAD_REQUEST, _EXPECTED)
        return text, layer

    def _answer_json(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self._answer(status, "application/json", json.dumps(content))

    def _answer(self, status: HTTPStatus, kind: str, content: str) -> None:
        body = content.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", f"{self.server.policy}; frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Request logging is off: there is a request per key press."""


_EXPECTED = 'expected {"text": "...", "layer": 1}'


def serve(server: InspectionServer) -> None:
    """Answers until Ctrl-C, the normal end; SIGTERM raises."""
    with server:
        print(f"{server.url} shows the model as you type; Ctrl-C ends it.", flush=True)
        try:
            server.serve_forever()
        except Interrupted as interrupted:
            if interrupted.signal != signal.SIGINT:
                raise
            print("\nStopped.")
