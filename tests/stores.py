"""A real S3 server on loopback (moto's) that can be made to err, and keeps a log. Holds no test."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
Fault = Callable[[list[bytes]], tuple[str, list[bytes]]]
"""Body → status and body that are sent instead; the content length stays."""
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


def throttled(_body: list[bytes]) -> tuple[str, list[bytes]]:
    return "503 Slow Down", [SLOW_DOWN]


def broken(_body: list[bytes]) -> tuple[str, list[bytes]]:
    return "500 Internal Server Error", [SLOW_DOWN.replace(b"SlowDown", b"InternalError")]


def truncated(body: list[bytes]) -> tuple[str, list[bytes]]:
    data = b"".join(body)
    return "200 OK", [data[: len(data) // 2]]


def flipped(body: list[bytes]) -> tuple[str, list[bytes]]:
    data = bytearray(b"".join(body))
    data[len(data) // 3] ^= 4
    return "200 OK", [bytes(data)]


class _Quiet(WSGIRequestHandler):
    def log(self, *_args: Any) -> None:
        """Nothing: the log is kept by Store."""


class Store:
    """Serves until `close`. ``log``: (path, status) of each GET; ``faults[path suffix]``: what its next GETs meet."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self.log: list[tuple[str, str]] = []
        self.faults: dict[str, deque[Fault]] = {}
        self.delay = 0.0
        self._server: BaseWSGIServer | None = None
        self._port = 0
        self.start()

    def start(self) -> None:
        """Serve, on the same port as before."""
        self._server = make_server("127.0.0.1", self._port, self, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True
        self._port = self._server.port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Refuse all connections."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def die_for(self, seconds: float) -> None:
        """Refuse all connections for a while."""
        self.close()

        def back() -> None:
            time.sleep(seconds)
            self.start()

        threading.Thread(target=back, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What makes clients come here."""
        return {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}"}

    def upload(self, data: Path, bucket: str) -> str:
        """Put a data set into a bucket; returns its URL."""
        client = boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], **_client_keys())
        client.create_bucket(Bucket=bucket)
        for path in data.rglob("*"):
            if path.is_file():
                client.put_object(Bucket=bucket, Key=f"sets/{path.relative_to(data)}", Body=path.read_bytes())
        return f"s3://{bucket}/sets"

    def downloads(self) -> Counter[str]:
        """Whole answers to GETs of shards, by bucket and file."""
        return Counter(path for path, status in self.log if path.endswith(".tar") and status.startswith("20"))

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] != "GET":
            return self._app(environ, start_response)
        answer: list[Any] = []
        body = list(self._app(environ, lambda *args: answer.extend(args)))
        status, headers = answer[0], answer[1]
        waiting = self.faults.get(path.rpartition("/")[2]) or self.faults.get("*")
        if waiting:
            status, body = waiting.popleft()(body)
            if not status.startswith("200"):
                headers = [("Content-Length", str(len(body[0])))]
        self.log.append((path, status))
        time.sleep(self.delay)
        start_response(status, headers)
        return body


def _client_keys() -> dict[str, str]:
    return {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
