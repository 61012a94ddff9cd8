"""A stand-in for the Hub: what `from_pretrained` and uploads ask of it, on folders."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


def handler(repositories: dict[str, Path], root: Path | None):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(has_body=False)

        def do_GET(self):
            self.answer(has_body=True)

        def do_POST(self):
            parts, body = self.path.partition("?")[0].strip("/").split("/"), self.body()
            if parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                repositories.setdefault(name, root / name).mkdir(parents=True, exist_ok=True)
                return self.say({"url": f"http://127.0.0.1/{name}", "name": name, "id": name})
            if parts == ["api", "validate-yaml"]:
                return self.say({"errors": [], "warnings": []})
            folder = repositories.get("/".join(parts[2:4]))
            if folder is None:
                return self.refuse("RepoNotFound")
            if parts[4] == "preupload":
                files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
                return self.say({"files": [f | {"shouldIgnore": False} for f in files], "commitOid": COMMIT})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.store(folder, line["value"])
            url = f"http://127.0.0.1/{'/'.join(parts[2:4])}/commit/{COMMIT}"
            return self.say({"commitUrl": url, "commitOid": COMMIT, "success": True})

        def store(self, folder, sent):
            file = folder / sent["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(base64.b64decode(sent["content"]))

        def body(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def say(self, answer):
            content = json.dumps(answer).encode()
            self.send(200, content, {"Content-Type": "application/json"}, len(content))

        def answer(self, has_body):
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts == ["api", "whoami-v2"]:
                return self.say({"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
            if parts[:2] == ["api", "models"]:
                return self.describe("/".join(parts[2:4]), parts[4:], has_body)
            # data sets have repositories of their own
            parts = parts[parts[:1] == ["datasets"] :]
            folder = repositories.get("/".join(parts[:2]))
            if folder is None:
                return self.refuse("RepoNotFound")
            file = folder / "/".join(parts[4:])
            return self.send_file(file, has_body) if parts[2:3] == ["resolve"] else self.refuse("EntryNotFound")

        def send_file(self, file, has_body, commit=COMMIT):
            if not file.is_file():
                return self.refuse("EntryNotFound")
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self.send(200, content if has_body else b"", {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, len(content))

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
def serve(repositories: dict[str, Path], root: Path | None = None, make=handler):
    """The address of a server of these folders, by the names of their repositories; new ones go below `root`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), make(repositories, root))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
