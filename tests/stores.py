"""Servers on loopback that can be made to err, and keep a log: S3 (moto's), Google Cloud Storage, HTTP, HTTPS. Holds no test."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
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


def forbidden(_body: list[bytes]) -> tuple[str, list[bytes]]:
    return "403 Forbidden", [SLOW_DOWN.replace(b"SlowDown", b"AccessDenied")]


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


class Server:
    """Serves `app` until `close`. ``log``: (path, status) of each GET; ``faults[file]``: what its next GETs meet."""

    environment: dict[str, str]
    """What makes clients come here."""
    content = re.compile("")
    """Paths whose GETs give a file's content."""
    certificate: tuple[str, str] | None = None
    """Files of a certificate and its key: with them it speaks TLS."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.faults: dict[str, deque[Fault]] = {}
        self.delay = 0.0
        self._server: BaseWSGIServer | None = None
        self._port = 0
        self.start()

    def app(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        raise NotImplementedError

    def upload(self, data: Path, bucket: str) -> str:
        """Put a data set there; returns its URL."""
        raise NotImplementedError

    def start(self) -> None:
        """Serve, on the same port as before."""
        self._server = make_server(
            "127.0.0.1", self._port, self, threaded=True, request_handler=_Quiet, ssl_context=self.certificate
        )
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

    def downloads(self) -> Counter[str]:
        """Whole answers to GETs of shards, by bucket and file."""
        got = (path for path, status in self.log if path.endswith(".tar") and status.startswith("20"))
        return Counter(path for path in got if self.content.match(path))

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] != "GET":
            return self.app(environ, start_response)
        answer: list[Any] = []
        body = list(self.app(environ, lambda *args: answer.extend(args)))
        status, headers = answer[0], answer[1]
        waiting = self.content.match(path) and self.faults.get(path.rpartition("/")[2])
        if waiting:
            status, body = waiting.popleft()(body)
            if not status.startswith("200"):
                headers = [("Content-Length", str(len(body[0])))]
        self.log.append((path, status))
        time.sleep(self.delay)
        start_response(status, headers)
        return body


class Store(Server):
    """Amazon S3, by moto."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        super().__init__()
        self.environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}"}

    def upload(self, data: Path, bucket: str) -> str:
        client = boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], **_client_keys())
        client.create_bucket(Bucket=bucket)
        for path in data.rglob("*"):
            if path.is_file():
                client.put_object(Bucket=bucket, Key=f"sets/{path.relative_to(data)}", Body=path.read_bytes())
        return f"s3://{bucket}/sets"


def _client_keys() -> dict[str, str]:
    return {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}


class Web(Server):
    """A web server, with ranges."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        super().__init__()
        self.environment = {}

    def upload(self, data: Path, bucket: str) -> str:
        self.files |= {
            f"/{bucket}/sets/{path.relative_to(data)}": path.read_bytes() for path in data.rglob("*") if path.is_file()
        }
        return f"http://127.0.0.1:{self._port}/{bucket}/sets"

    def app(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        data = self.files.get(environ["PATH_INFO"])
        if data is None:
            return _answer(start_response, "404 Not Found", b"")
        return _content(environ, start_response, data)


class SecureWeb(Web):
    """The same over TLS, with a certificate of its own, which `environment` makes new processes trust."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.certificate = _made_certificate(Path(self._folder.name))
        super().__init__()
        self.environment = {"SSL_CERT_FILE": self.certificate[0]}

    def upload(self, data: Path, bucket: str) -> str:
        return super().upload(data, bucket).replace("http:", "https:")


def _made_certificate(folder: Path) -> tuple[str, str]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(1)
    )
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    return str(files[0]), str(files[1])


class Google(Server):
    """Google Cloud Storage: of its JSON interface what reading needs, an object's metadata and its content."""

    content = re.compile("/download/")

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        super().__init__()
        self.environment = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self._port}"}

    def upload(self, data: Path, bucket: str) -> str:
        self.files |= {
            f"{bucket}/o/sets/{path.relative_to(data)}": path.read_bytes() for path in data.rglob("*") if path.is_file()
        }
        return f"gs://{bucket}/sets"

    def app(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        _, _, name = environ["PATH_INFO"].partition("/storage/v1/b/")
        data = self.files.get(name)
        if data is None:
            return _answer(start_response, "404 Not Found", b'{"error": {"code": 404, "message": "No such object"}}')
        if self.content.match(environ["PATH_INFO"]):
            return _content(environ, start_response, data)
        bucket, _, key = name.partition("/o/")
        link = (
            f"{self.environment['STORAGE_EMULATOR_HOST']}/download/storage/v1/b/{bucket}/o/{quote(key, '')}?alt=media"
        )
        about = {"kind": "storage#object", "bucket": bucket, "name": key, "size": str(len(data)), "mediaLink": link}
        return _answer(start_response, "200 OK", json.dumps(about).encode(), "application/json")


def _answer(
    start_response: Callable[..., Any], status: str, body: bytes, kind: str = "application/octet-stream"
) -> list[bytes]:
    start_response(status, [("Content-Length", str(len(body))), ("Content-Type", kind)])
    return [body]


def _content(environ: dict[str, Any], start_response: Callable[..., Any], data: bytes) -> list[bytes]:
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", environ.get("HTTP_RANGE", ""))
    if not asked:
        return _answer(start_response, "200 OK", data)
    return _answer(start_response, "206 Partial Content", data[int(asked[1]) : int(asked[2] or len(data)) + 1])
