"""
A Hub for tests: a local server that speaks the routes which `huggingface_hub` asks for models, files in memory.

Set `HF_ENDPOINT` to its `url` and `HF_HUB_DISABLE_XET=1` before `huggingface_hub` is imported.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".png", ".pt")
WRITER = {"name": "me", "orgs": [{"name": "lab", "roleInOrg": "write"}], "auth": {"accessToken": {"role": "write"}}}


@dataclass
class Repository:
    """One model repository."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)

    def head(self, branch: str = "main") -> str:
        """The commit of a branch."""
        return hashlib.sha1(f"{len(self.commits)}{id(self)}{branch}".encode()).hexdigest()

    def branch_of(self, revision: str) -> str:
        """The branch that a commit belongs to; any other revision as it is."""
        return next((branch for branch in self.branches if self.head(branch) == revision), revision)


class Reply(Exception):
    """An answer that ends a request early."""

    def __init__(self, status, content=None, **headers):
        self.status, self.content, self.headers = status, content or {}, headers


class HubStub:
    """The server's state; `users` maps a token to what `whoami` tells of it."""

    def __init__(self):
        self.users = {"hf_writer": WRITER}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[list] = []
        self.lock = threading.RLock()

    def fail(self, pattern, status=500, times=10**6, after=0):
        """Answer requests whose `METHOD path` matches with a status, from the one after `after` others on."""
        self.faults.append([pattern, status, times, after])

    def asked(self, pattern):
        """Number of requests that match."""
        return sum(re.search(pattern, request) is not None for request in self.requests)

    def files(self, repo_id, branch="main"):
        return self.repositories[repo_id].branches[branch]

    def check_faults(self, request):
        for fault in self.faults:
            if re.search(fault[0], request) and fault[2] > 0:
                if fault[3] > 0:
                    fault[3] -= 1
                    continue
                fault[2] -= 1
                raise Reply(fault[1], {"error": "the stub was told to fail"})

    # routes: (method, pattern, handler); handlers get the match, the body and the user

    def answer(self, method, path, body, token):
        self.requests.append(f"{method} {path}")
        self.check_faults(self.requests[-1])
        user = self.users.get(token)
        for wanted, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and wanted == method:
                return handler(self, match, body, user)
        raise Reply(404, {"error": f"no route {method} {path}"})

    def whoami(self, match, body, user):
        if user is None:
            raise Reply(401, {"error": "Invalid credentials"})
        return user

    def create(self, match, body, user):
        wanted = json.loads(body)
        if user is None or user["auth"]["accessToken"]["role"] == "read":
            raise Reply(403, {"error": "you may not create this"})
        repo_id = f"{wanted.get('organization') or user['name']}/{wanted['name']}"
        if repo_id in self.repositories:
            raise Reply(409, {"url": f"{self.url}/{repo_id}", "error": "You already created this model repo"})
        self.repositories[repo_id] = Repository(private=wanted.get("visibility") == "private")
        return {"url": f"{self.url}/{repo_id}"}

    def repository(self, repo_id, user, branch="main"):
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and user is None):
            raise Reply(401, {"error": "not found"}, **{"X-Error-Code": "RepoNotFound"})
        branch = repository.branch_of(branch)
        if branch not in repository.branches:
            raise Reply(404, {"error": "no branch"}, **{"X-Error-Code": "RevisionNotFound"})
        return repository, repository.branches[branch]

    def branch(self, match, body, user):
        repository, _ = self.repository(match["id"], user)
        if match["rev"] in repository.branches:
            raise Reply(409, {"error": "Reference already exists"})
        repository.branches[match["rev"]] = dict(repository.branches["main"])
        return {}

    def validate(self, match, body, user):
        text = json.loads(body)["content"]
        found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        try:
            data = yaml.safe_load(found.group(1)) if found else {}
        except yaml.YAMLError as error:
            raise Reply(400, {"errors": [{"message": str(error)}], "warnings": []}) from None
        for name in ("base_model", "datasets"):
            values = data.get(name) or []
            for value in [values] if isinstance(values, str) else values:
                if not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
                    raise Reply(400, {"errors": [{"message": f'"{name}" must be ids, got {value}'}], "warnings": []})
        return {"errors": [], "warnings": []}

    def preupload(self, match, body, user):
        _, files = self.repository(match["id"], user, match["rev"])
        wanted = json.loads(body)
        ignored = [line for line in wanted.get("gitIgnore", "").splitlines() if line and not line.startswith("#")]
        return {
            "files": [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": any(_is_ignored(one["path"], pattern) for pattern in ignored),
                    "oid": _oid(one["path"], files[one["path"]]) if one["path"] in files else None,
                }
                for one in wanted["files"]
            ]
        }

    def batch(self, match, body, user):
        objects = []
        for one in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.url}/lfs/{one['oid']}"},
                "verify": {"href": f"{self.url}/verify/{one['oid']}"},
            }
            known = one["oid"] in self.objects
            objects.append({"oid": one["oid"], "size": one["size"], **({} if known else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    def put(self, match, body, user):
        if hashlib.sha256(body).hexdigest() != match["oid"]:
            raise Reply(400, {"error": "the content has another hash"})
        self.objects[match["oid"]] = body
        return {}

    def verify(self, match, body, user):
        if match["oid"] not in self.objects:
            raise Reply(404, {"error": "not uploaded"})
        return {}

    def commit(self, match, body, user):
        repository, files = self.repository(match["id"], user, match["rev"])
        if user is None or user["auth"]["accessToken"]["role"] == "read":
            raise Reply(403, {"error": "you may not write here"})
        for line in body.decode().splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                repository.commits.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        commit = repository.head(match["rev"])
        return {"commitUrl": f"{self.url}/{match['id']}/commit/{commit}", "commitOid": commit}

    def info(self, match, body, user):
        repository, files = self.repository(match["id"], user, match["rev"] or "main")
        card = files.get("README.md", b"").decode()
        found = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
        return {
            "id": match["id"],
            "sha": repository.head(repository.branch_of(match["rev"] or "main")),
            "private": repository.private,
            "cardData": yaml.safe_load(found.group(1)) if found else {},
            "siblings": [{"rfilename": name} for name in files],
        }

    def tree(self, match, body, user):
        _, files = self.repository(match["id"], user, match["rev"])
        under = f"{match['path']}/" if match["path"] else ""
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
            if name.startswith(under)
        ]

    def resolve(self, match, body, user):
        repository, files = self.repository(match["id"], user, match["rev"])
        name = unquote(match["path"])
        headers = {"X-Repo-Commit": repository.head(repository.branch_of(match["rev"]))}
        if name not in files:
            raise Reply(404, {"error": "no file"}, **{"X-Error-Code": "EntryNotFound", **headers})
        etag = hashlib.sha256(files[name]).hexdigest()
        raise Reply(200, files[name], ETag=f'"{etag}"', **headers)


def _is_ignored(path, pattern):
    """The simple patterns of git: a name at any depth, a folder with everything in it."""
    *folders, name = path.split("/")
    return pattern[:-1] in folders if pattern.endswith("/") else fnmatch(name, pattern)


def _oid(path, data):
    """What git calls the content: the hash of the blob, or of the file for a large one."""
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


_ID, _REV = r"(?P<id>[\w.-]+/[\w.-]+)", r"(?P<rev>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", HubStub.whoami),
    ("POST", "/api/repos/create", HubStub.create),
    ("POST", "/api/validate-yaml", HubStub.validate),
    ("POST", f"/api/models/{_ID}/branch/{_REV}", HubStub.branch),
    ("POST", f"/api/models/{_ID}/preupload/{_REV}", HubStub.preupload),
    ("POST", f"/{_ID}.git/info/lfs/objects/batch", HubStub.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", HubStub.put),
    ("POST", r"/verify/(?P<oid>\w+)", HubStub.verify),
    ("POST", f"/api/models/{_ID}/commit/{_REV}", HubStub.commit),
    ("GET", f"/api/models/{_ID}(?:/revision/{_REV})?", HubStub.info),
    ("GET", f"/api/models/{_ID}/tree/{_REV}(?:/(?P<path>.*))?", HubStub.tree),
    ("HEAD", f"/{_ID}/resolve/{_REV}/(?P<path>.+)", HubStub.resolve),
    ("GET", f"/{_ID}/resolve/{_REV}/(?P<path>.+)", HubStub.resolve),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _handle(self):
        stub = self.server.stub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        headers = {}
        try:
            with stub.lock:
                status, content = 200, stub.answer(self.command, urlsplit(self.path).path, body, token)
        except Reply as reply:
            status, content, headers = reply.status, reply.content, reply.headers
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def log_message(self, *args):
        """Silence."""


@contextmanager
def hub_stub():
    """A running stub; its `url` goes to `HF_ENDPOINT`."""
    stub = HubStub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.stub, stub.url = stub, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
