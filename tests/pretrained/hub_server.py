"""A small server that speaks as much of the hub's protocol as a download needs, and misbehaves."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A hub of one model. A context manager; `url` is its address.

    Attributes:
      files: the model's files, by name.
      commit: the latest, that of "main".
      mode: "sound"; "close", "hang", "html": what the network may do; "broken": lists that arrive
        and files that do not; "wrong": files that are not as announced; or a status such as "404"
        or "403 GatedRepo", the second word being the hub's code.
      asked: the names of the files that were downloaded.
    """

    def __init__(self, repo, files):
        self.repo = repo
        self.files = files
        self.commit = COMMIT
        self.mode = "sound"
        self.asked = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        mode = self.hub.mode
        if mode == "close":
            self.close_connection = True
        elif mode == "hang":
            time.sleep(1)
            self.close_connection = True
        elif mode == "html":
            self._send(200, b"<!DOCTYPE html><title>Sign in to our network</title>", "text/html")
        elif mode[0].isdigit():
            status, _, code = mode.partition(" ")
            self._send(int(status), b"{}", headers={"X-Error-Code": code} if code else {})
        else:
            self._serve()

    def _serve(self):
        path = self.path.partition("?")[0]
        api = f"/api/models/{self.hub.repo}"
        if path.startswith(f"{api}/tree/"):
            entries = [self._entry(name) for name in self.hub.files]
            self._send(200, json.dumps(entries).encode())
        elif path == api or path.startswith(f"{api}/revision/"):
            revision = path.removeprefix(f"{api}/revision/")
            if path != api and revision not in ("main", self.hub.commit):
                self._send(404, b"{}", headers={"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": name} for name in self.hub.files]
            info = {"id": self.hub.repo, "sha": self.hub.commit, "siblings": siblings}
            self._send(200, json.dumps(info).encode())
        elif path.startswith(f"/{self.hub.repo}/resolve/"):
            self._send_file(path.rpartition("/")[2])
        else:
            self._send(404, b"{}", headers={"X-Error-Code": "RepoNotFound"})

    def _entry(self, name):
        content = self.hub.files[name]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def _send_file(self, name):
        content = self.hub.files.get(name)
        if content is None:
            self._send(404, b"{}", headers={"X-Error-Code": "EntryNotFound"})
            return
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": self.hub.commit,
            "Accept-Ranges": "none",
        }
        if self.command == "GET" and self.hub.mode == "broken":
            self.close_connection = True
            return
        if self.command == "GET":
            self.hub.asked.append(name)
            if self.hub.mode == "wrong":
                content = content[:-1]
        self._send(200, content, "application/octet-stream", headers)

    def _send(self, status, content, kind="application/json", headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass
