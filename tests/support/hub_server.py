"""A small Hugging Face hub on 127.0.0.1, with the faults of a real one on demand."""

import hashlib
import json
import re
import socket
import threading
import time
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories as {name: {file: bytes}}; the attributes switch faults on; `log` has (method, path, headers)."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commit = COMMIT
        self.token: str | None = None  # demanded of everyone, if set
        self.refuse: tuple[int, str] | None = None  # status and X-Error-Code of every answer
        self.drop_after: list[int] = []  # for one body each: bytes sent before the connection is cut
        self.bytes_per_second: float | None = None
        self.ignore_range = False
        self.spoil = False  # send other bytes than announced
        self.cdn = False  # bodies come from another host name, as large files do
        self.etags: dict[str, str] = {}
        self.redirects: list[dict[str, str]] = []  # before each file: {"to": address, "says": names of headers}
        self.git: set[str] = set()  # files that are kept by git: their ETag is its sha1, and nothing is said as linked
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.url = ""

    def bodies(self):
        return [entry for entry in self.log if entry[0] == "GET" and ("/resolve/" in entry[1] or "/cdn/" in entry[1])]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer(self):
        hub = self.hub
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.log.append((self.command, path, dict(self.headers)))
        on_cdn = path.startswith("/cdn/")
        if on_cdn and "Authorization" in self.headers:
            return self.reply(400)
        if hub.refuse:
            return self.reply(hub.refuse[0], X_Error_Code=hub.refuse[1])
        if hub.token and not on_cdn and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.reply(401, X_Error_Code="GatedRepo")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path):
            if match[1] not in hub.repos:
                return self.reply(404, X_Error_Code="RepoNotFound")
            siblings = [{"rfilename": name} for name in hub.repos[match[1]]]
            answer = {"id": match[1], "sha": hub.commit, "siblings": siblings}
            return self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")
        match = re.fullmatch(r"(?:/cdn|/hop\d)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if not match or match[1] not in hub.repos:
            return self.reply(404, X_Error_Code="RepoNotFound")
        if match[2] not in hub.repos[match[1]]:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=hub.commit)
        data = hub.repos[match[1]][match[2]]
        etag = hub.etags.get(match[2], hashlib.sha256(data).hexdigest())
        about = {"X_Repo_Commit": hub.commit, "X_Linked_ETag": f'"{etag}"', "X_Linked_Size": len(data)}
        if match[2] in hub.git:
            etag = hub.etags.get(match[2], hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
            about = {"X_Repo_Commit": hub.commit}
        hop = int(path.startswith("/hop")) and int(path[4])
        if hop < len(hub.redirects):
            known = {"X_Repo_Commit": hub.commit, "ETag": f'"{etag}"', "X_Linked_Size": len(data)}
            rules = hub.redirects[hop]
            said = {name: value for name, value in known.items() if name in rules["says"].split()}
            to = f"{rules['to']}/hop{hop + 1}/{match[1]}/resolve/main/{match[2]}?etag=%22{etag}%22"
            return self.reply(307, b"Temporary Redirect. Redirecting to " + to.encode(), Location=to, **said)
        if hub.cdn and not on_cdn:
            port = self.server.server_address[1]
            return self.reply(302, Location=f"http://localhost:{port}/cdn{self.path}", **about)
        return self.body(data, about | {"ETag": f'"{etag}"', "Accept_Ranges": "bytes"})

    def body(self, data, headers):
        hub, start, status = self.hub, 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and not hub.ignore_range:
            start, status = int(asked[1]), 206
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        if self.command == "HEAD":
            return self.reply(status, Content_Length=len(rest), **headers)
        if hub.spoil:
            rest = bytes(byte ^ 1 for byte in rest)
        self.reply(status, Content_Length=len(rest), **headers)
        end = hub.drop_after.pop(0) if hub.drop_after else len(rest)
        step = int(hub.bytes_per_second / 20) if hub.bytes_per_second else 1 << 16
        for at in range(0, min(end, len(rest)), step):
            self.wfile.write(rest[at : min(at + step, end)])
            self.wfile.flush()
            if hub.bytes_per_second:
                time.sleep(0.05)
        if end < len(rest):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # a client that was killed, or a connection cut on purpose


@contextmanager
def serve():
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def black_hole(trickle: bytes = b""):
    """A port that accepts and never answers, or sends `trickle` over and over, slowly. Yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop, held = threading.Event(), []

    def drip(connection):
        try:
            while not stop.wait(0.1):
                connection.sendall(trickle)
        except OSError:
            pass

    def accept():
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            if trickle:
                threading.Thread(target=drip, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        listener.close()
        for connection in held:
            connection.close()
