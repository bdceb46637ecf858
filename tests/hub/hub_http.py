"""The HTTP side of `hub_server.Hub`: faults on demand, bodies, ranges; what a request means is told by a table of routes."""

import json
import re
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Fault:
    """What happens to a request instead of its answer.

    `kind` is a status, or "cut": the connection is closed after half of the body was read; "lost": the request is
    carried out, and the connection closed without an answer; "hold": as "cut", but first `Hub.held` is set and
    `Hub.release` awaited.
    """

    route: str
    kind: int | str
    times: int
    message: str
    headers: dict[str, str]


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        self.status, self.message, self.code, self.headers = status, message, code, headers


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any  # the Hub
    routes: list[tuple[str, re.Pattern, str]]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        with self.server.lock:
            self.server.requests.append((self.command, self.path, length))
            fault = next((f for f in self.server.faults if re.search(f.route, f"{self.command} {self.path}")), None)
            if fault:
                fault.times -= 1
                self.server.faults = [f for f in self.server.faults if f.times > 0]
        if fault and fault.kind in ("cut", "hold"):
            self.rfile.read(length // 2)
            if fault.kind == "hold":
                self.server.held.set()
                self.server.release.wait(60)
            return self.hang_up()
        self.body = self.read_body(length)
        try:
            if fault and fault.kind != "lost":
                raise Refusal(int(fault.kind), fault.message or f"made to fail with {fault.kind}", **fault.headers)
            for verb, pattern, name in self.routes:
                match = pattern.fullmatch(url.path)
                if match and verb == method:
                    with self.server.lock:
                        status, headers, body = getattr(self, name)(**{k: v for k, v in match.groupdict().items() if v})
                    break
            else:
                raise Refusal(404, f"no route for {method} {url.path}")
        except Refusal as refusal:
            status, headers, body = refusal.status, dict(refusal.headers), {"error": refusal.message}
            headers |= {"X-Error-Message": refusal.message.splitlines()[0]}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
        if fault and fault.kind == "lost":
            return self.hang_up()
        self.answer(status, headers, body)

    do_HEAD = do_POST = do_PUT = do_GET

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def read_body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status: int, headers: dict[str, str], body: object) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and status == 200 and isinstance(body, bytes):
            first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
            status, content = (206, content[first : last + 1]) if first < len(content) else (416, b"")
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
