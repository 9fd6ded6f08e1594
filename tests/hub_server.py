"""A Hub on the loopback interface that knows as much of the protocol as pushing and loading a model or a data set need.

Files are kept in memory, every commit is a whole snapshot, uploads are asked for in "regular" mode (no LFS, no Xet).
"""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"
# Kind and name of a repository, in a pattern.
API = "/api/(models|datasets)/([^/]+/[^/]+)"


class HubServer(ThreadingHTTPServer):
    """`repositories[repo_id]` is `{"branches": {name: oid}, "commits": {oid: {path: bytes}}, "private": bool}`.

    A data set's repo_id begins with "datasets/", as in its address.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories = {}

    def files(self, repo_id, revision="main"):
        """`{path: bytes}` at a branch or commit."""
        repository = self.repositories[repo_id]
        return repository["commits"][repository["branches"].get(revision, revision)]

    def commit(self, repo_id, revision, files):
        repository = self.repositories[repo_id]
        oid = hashlib.sha1(f"{repo_id} {len(repository['commits'])}".encode()).hexdigest()
        repository["commits"][oid] = files
        repository["branches"][revision] = oid
        return oid


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Unauthorized"}, 401)
        elif path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'user'}/{request['name']}"
            repo_id = f"datasets/{name}" if request.get("type") == "dataset" else name
            exists = repo_id in self.server.repositories
            if not exists:
                private = request.get("visibility") == "private" or request.get("private", False)
                self.server.repositories[repo_id] = {"branches": {}, "commits": {}, "private": private}
                self.server.commit(repo_id, "main", {".gitattributes": b""})
            self.answer({"url": f"{self.server.endpoint}/{repo_id}"}, 409 if exists else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(f"{API}/branch/(.+)", path):
            branches = self.server.repositories[repository_of(match)]["branches"]
            exists = match[3] in branches
            branches.setdefault(match[3], branches["main"])
            self.answer({}, 409 if exists else 200)
        elif match := re.fullmatch(f"{API}/preupload/(.+)", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer({"files": modes})
        elif match := re.fullmatch(f"{API}/commit/(.+)", path):
            files = dict(self.server.files(repository_of(match), match[3]))
            for operation in map(json.loads, body.splitlines()):
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "deletedFile":
                    del files[value["path"]]
            oid = self.server.commit(repository_of(match), match[3], files)
            self.answer({"commitUrl": f"{self.server.endpoint}/{repository_of(match)}/commit/{oid}", "commitOid": oid})
        else:
            self.answer({"error": f"unknown endpoint {path}"}, 404)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        patterns = {
            "file": "/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)",
            "tree": f"{API}/tree/([^/]+)/?(.*)",
            "info": f"{API}(?:/revision/([^/]+))?()",
        }
        kind, match = next(((k, m) for k, p in patterns.items() if (m := re.fullmatch(p, path))), (None, None))
        if match is None or repository_of(match) not in self.server.repositories:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        repo_id, revision, name = repository_of(match), match[3] or "main", match[4]
        repository = self.server.repositories[repo_id]
        oid = repository["branches"].get(revision, revision)
        if oid not in repository["commits"]:
            return self.answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = repository["commits"][oid]
        if kind == "info":
            return self.answer({"id": match[2], "sha": oid, "siblings": [{"rfilename": file} for file in files]})
        if kind == "tree" and (names := [file for file in files if file.startswith(name)]):
            rows = [{"type": "file", "path": n, "size": len(files[n]), "oid": blob_id(files[n])} for n in names]
            return self.answer(rows)
        headers = {"X-Repo-Commit": oid}
        if name not in files:
            return self.answer({"error": "Entry not found"}, 404, headers | {"X-Error-Code": "EntryNotFound"})
        self.answer(files[name], 200, headers | {"ETag": f'"{blob_id(files[name])}"'})

    do_HEAD = do_GET

    def answer(self, content, status=200, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def repository_of(match):
    """The repo_id of an address, from its kind and name."""
    return f"datasets/{match[2]}" if match[1] in ("datasets", "datasets/") else match[2]


def blob_id(content):
    """The name git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub():
    """A `HubServer` that answers for the duration of the `with` block."""
    with HubServer() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
