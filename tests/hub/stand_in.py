"""A stand-in for the Hub that serves folders: what `from_pretrained` asks of it."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


def _handler(repositories: dict[str, Path]):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(has_body=False)

        def do_GET(self):
            self.answer(has_body=True)

        def answer(self, has_body):
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                return self.describe("/".join(parts[2:4]), parts[4:], has_body)
            folder = repositories.get("/".join(parts[:2]))
            if folder is None:
                return self.refuse("RepoNotFound")
            file = folder / "/".join(parts[4:])
            if parts[2:3] != ["resolve"] or not file.is_file():
                return self.refuse("EntryNotFound")
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self.send(200, content if has_body else b"", {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, len(content))

        def describe(self, name, rest, has_body):
            folder = repositories.get(name)
            if folder is None:
                return self.refuse("RepoNotFound")
            files = sorted(folder.iterdir())
            if rest[:1] == ["tree"]:
                if rest[2:]:
                    return self.refuse("EntryNotFound")
                answer = [{"type": "file", "path": f.name, "oid": COMMIT, "size": f.stat().st_size} for f in files]
            else:
                siblings = [{"rfilename": file.name} for file in files]
                answer = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            content = json.dumps(answer).encode()
            self.send(200, content if has_body else b"", {"Content-Type": "application/json"}, len(content))

        def refuse(self, code):
            self.send(404, b"", {"X-Error-Code": code}, 0)

        def send(self, status, content, headers, length):
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(length)}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    return Handler


@contextmanager
def serve(repositories: dict[str, Path]):
    """The address of a server of these folders, by the names of their repositories."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repositories))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
