"""A server on this machine that speaks the requests with which ``huggingface_hub`` pushes.

Repositories are branches of files; a commit replaces a branch's files at once. ``fail`` makes the
next requests of a kind fail.
"""

import base64
import collections
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

TOKEN = "hf_a_secret_that_nobody_may_see"
SMALL = 1024
"""Files of fewer bytes travel in the commit, others as LFS objects."""


class HubServer(http.server.ThreadingHTTPServer):
    """The server; ``url`` is its address.

    Attributes:
        repositories: Name -> branch -> path -> content.
        commits: (name, branch, message, changed paths, deleted paths), in order.
        created: What each request to create a repository asked for.
        requests: "METHOD path" of every request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.reset()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}).start()

    def reset(self):
        self.repositories = {}
        self.commits, self.created, self.requests = [], [], []
        self.objects, self.revisions = {}, {}
        self.faults = collections.defaultdict(collections.deque)
        self.user = "ada"

    def fail(self, kind, *faults):
        """Make the next requests whose path contains ``kind`` fail, one for each fault.

        A fault is a status, a pair of status and headers, "drop" to close the connection, an Event
        to wait for before an answer, or None for a good answer.
        """
        self.faults[kind].extend(faults)

    def files(self, name, branch="main"):
        return self.repositories[name][branch]

    def handle_error(self, request, client_address):
        """Connections that are dropped on purpose are no errors."""

    def close(self):
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def _answer(self, body=b"", status=200, **headers):
        if not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.server.requests.append(f"{self.command} {path}")
        for kind, faults in self.server.faults.items():
            if kind in path and faults and self._fails(faults.popleft()):
                return
        # LFS objects are stored elsewhere, at addresses that need no token.
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/objects/" not in path:
            self._answer({"error": "Invalid credentials"}, 401)
            return
        for pattern, handle in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                handle(self, content, *match.groups())
                return
        self._answer({"error": f"no such request: {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _fails(self, fault):
        if fault is None:
            return False
        if isinstance(fault, threading.Event):
            fault.wait(60)
            return False
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return True
        status, headers = fault if isinstance(fault, tuple) else (fault, {})
        self._answer(
            {"error": f"a failure for {self.headers.get('Authorization')}"}, status, **headers
        )
        return True

    # --- requests -------------------------------------------------------------------------------

    def _whoami(self, content):
        self._answer({"name": self.server.user, "type": "user", "orgs": []})

    def _create(self, content):
        asked = json.loads(content)
        self.server.created.append(asked)
        name = f"{asked.get('organization') or self.server.user}/{asked['name']}"
        if asked.get("organization") == "forbidden":
            self._answer({"error": "You have no rights here"}, 403)
            return
        known = name in self.server.repositories
        self.server.repositories.setdefault(name, {"main": {}})
        self._answer({"url": f"{self.server.url}/{name}", "name": name}, 409 if known else 200)

    def _branch(self, content, name, branch):
        branches = self.server.repositories[name]
        known = branch in branches
        branches.setdefault(branch, dict(branches["main"]))
        self._answer({}, 409 if known else 200)

    def _preupload(self, content, name, branch):
        files = json.loads(content)["files"]
        there = self.server.repositories[name][branch]
        self._answer({"files": [
            {
                "path": file["path"],
                "uploadMode": "regular" if file["size"] < SMALL else "lfs",
                "shouldIgnore": False,
                "oid": _blob(there[file["path"]]) if file["path"] in there else None,
            }
            for file in files
        ]})  # fmt: skip

    def _batch(self, content, name):
        objects = []
        for one in json.loads(content)["objects"]:
            if one["oid"] not in self.server.objects:
                upload = {"href": f"{self.server.url}/objects/{one['oid']}"}
                one["actions"] = {"upload": upload}
            objects.append(one)
        self._answer({"transfer": "basic", "objects": objects})

    def _object(self, content, oid):
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content
        self._answer()

    def _commit(self, content, name, branch):
        header, *changes = [json.loads(line) for line in content.splitlines()]
        if branch not in self.server.repositories[name]:
            self._answer({"error": "no such revision"}, 404, X_Error_Code="RevisionNotFound")
            return
        files = dict(self.server.repositories[name][branch])
        changed, deleted = [], []
        for change in changes:
            value = change["value"]
            if change["key"] == "deletedFile":
                files.pop(value["path"])
                deleted.append(value["path"])
                continue
            lfs = change["key"] == "lfsFile"
            files[value["path"]] = (
                self.server.objects[value["oid"]] if lfs else base64.b64decode(value["content"])
            )
            changed.append(value["path"])
        self.server.repositories[name][branch] = files
        message = header["value"]["summary"]
        self.server.commits.append((name, branch, message, changed, deleted))
        oid = _commit_id(files)
        self._answer({"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def _info(self, content, name, branch="main"):
        if name not in self.server.repositories:
            self._answer({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
            return
        files = self.server.repositories[name][branch]
        self.server.revisions[_commit_id(files)] = files
        self._answer({"id": name, "sha": _commit_id(files), "siblings": []})

    def _at(self, name, revision):
        branches = self.server.repositories[name]
        return branches[revision] if revision in branches else self.server.revisions[revision]

    def _tree(self, content, name, revision):
        self._answer([
            {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
            for path, data in self._at(name, revision).items()
        ])  # fmt: skip

    def _resolve(self, content, name, revision, path):
        data = self._at(name, revision).get(path)
        if data is None:
            self._answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")
            return
        commit = _commit_id(self._at(name, revision))
        self._answer(data, ETag=f'"{_blob(data)}"', X_Repo_Commit=commit)


def _blob(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _commit_id(files):
    return hashlib.sha1(json.dumps([(n, _blob(d)) for n, d in files.items()]).encode()).hexdigest()


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET /api/whoami-v2", _Handler._whoami),
    ("POST /api/repos/create", _Handler._create),
    ("POST /api/validate-yaml", lambda self, content: self._answer({"warnings": [], "errors": []})),
    (rf"POST /api/models/{NAME}/branch/(.+)", _Handler._branch),
    (rf"POST /api/models/{NAME}/preupload/([^/]+)", _Handler._preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", _Handler._batch),
    (r"PUT /objects/(\w+)", _Handler._object),
    (rf"POST /api/models/{NAME}/commit/([^/]+)", _Handler._commit),
    (rf"GET /api/models/{NAME}", _Handler._info),
    (rf"GET /api/models/{NAME}/revision/([^/]+)", _Handler._info),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", _Handler._tree),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", _Handler._resolve),
]
