"""A Hub for tests: on 127.0.0.1, with repositories on disk, for the real huggingface_hub client to talk to.

It knows who may see what, and can be told to fail: with a status, by cutting the connection, or by letting somebody
else push first. Start it with :func:`running_hub`, which also points the client at it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import shutil
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

OWNER_TOKEN, OTHER_TOKEN = "hf_owner", "hf_other"
LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class Request:
    """What the server was asked; `body` is its length, `range` its header, `token` whether it had one."""

    method: str
    path: str
    body: int
    range: str = ""
    token: bool = False


@dataclass
class Fault:
    """What is to happen to the next `times` requests of a method on a path.

    Attributes:
        status: answer with it, and do nothing.
        cut: break the connection in the middle: of the request's body, or of the answer's if it has none; a number is
            how many bytes of the answer go out before.
        after: carry out the request first, then answer with `status` (or cut): the answer is lost.
        call: run this first, then carry on.
        headers: of the answer, in the place of its own.
        whole: ignore that a range is asked for, and answer with the whole file.
    """

    method: str
    path: re.Pattern[str]
    times: int
    status: int | None = None
    cut: bool | int = False
    after: bool = False
    call: Callable[[], object] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    whole: bool = False


class HubServer:
    """State of the Hub, and what tests do with it beside the client's back."""

    def __init__(self, root: Path) -> None:
        self.root, self.lock = root, threading.RLock()
        self.users = {OWNER_TOKEN: "owner", OTHER_TOKEN: "other"}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.store: str | None = None  # address of another server, to which downloads of large files are redirected
        self.sent = 0  # bytes of files
        self._oids: dict[tuple[Path, int, int], str] = {}
        (root / "lfs").mkdir(parents=True)

    def fail(self, method: str, path: str, *, times: int = 1, **fault: Any) -> None:
        """Let the next `times` requests whose path matches the pattern `path` go wrong as :class:`Fault` says."""
        self.faults.append(Fault(method, re.compile(path), times, **fault))

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None

    # --- repositories: <root>/repos/<user>/<name>/{refs.json, commits/<sha>/files…} ---

    def place(self, repo_id: str) -> Path:
        return self.root / "repos" / repo_id

    def exists(self, repo_id: str) -> bool:
        return (self.place(repo_id) / "refs.json").is_file()

    def refs(self, repo_id: str) -> dict[str, Any]:
        return dict(json.loads((self.place(repo_id) / "refs.json").read_text()))

    def create(self, repo_id: str, *, private: bool = False) -> None:
        self.place(repo_id).mkdir(parents=True)
        self.save_refs(repo_id, {"private": private, "heads": {}, "tags": {}, "count": 0})
        self.commit(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})

    def save_refs(self, repo_id: str, refs: dict[str, Any]) -> None:
        (self.place(repo_id) / "refs.json").write_text(json.dumps(refs))

    def resolve(self, repo_id: str, revision: str) -> str | None:
        """The commit that a branch, tag, or commit id (in full or its beginning) means."""
        refs = self.refs(repo_id)
        if sha := refs["heads"].get(revision) or refs["tags"].get(revision):
            return str(sha)
        commits = [p.name for p in (self.place(repo_id) / "commits").iterdir()]
        return next((c for c in commits if len(revision) >= 7 and c.startswith(revision)), None)

    def oid(self, file: Path) -> str:
        """The ETag of a file, which is computed again when the file has changed."""
        key = (file, file.stat().st_mtime_ns, file.stat().st_size)
        if key not in self._oids:
            self._oids[key] = oid(file.name, file.read_bytes())
        return self._oids[key]

    def head(self, repo_id: str, branch: str = "main") -> str:
        return str(self.refs(repo_id)["heads"][branch])

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        sha = self.resolve(repo_id, revision)
        assert sha is not None, f"{repo_id} has no {revision}"
        tree = self.place(repo_id) / "commits" / sha
        return {p.relative_to(tree).as_posix(): p.read_bytes() for p in sorted(tree.rglob("*")) if p.is_file()}

    def commit(self, repo_id: str, changes: dict[str, bytes | None], branch: str = "main") -> str:
        """A new commit on a branch; None takes a file away."""
        with self.lock:
            refs = self.refs(repo_id)
            parent = refs["heads"].get(branch) or refs["heads"].get("main")
            refs["count"] += 1
            sha = hashlib.sha1(f"{repo_id} {parent} {refs['count']}".encode()).hexdigest()
            tree = self.place(repo_id) / "commits" / sha
            if parent:
                shutil.copytree(tree.parent / parent, tree)
            for path, content in changes.items():
                (tree / path).parent.mkdir(parents=True, exist_ok=True)
                (tree / path).unlink(missing_ok=True)
                if content is not None:
                    (tree / path).write_bytes(content)
            refs["heads"][branch] = sha
            self.save_refs(repo_id, refs)
            return sha

    def tags(self, repo_id: str) -> list[str]:
        """Tags of the card, with those that the Hub derives from its base models."""
        text = self.files(repo_id).get("README.md", b"").decode()
        match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        data = (yaml.safe_load(match[1]) if match else None) or {}
        bases = data.get("base_model") or []
        return [*data.get("tags", []), *(f"base_model:{b}" for b in ([bases] if isinstance(bases, str) else bases))]


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message or code or "refused by the test"}


class Handler(BaseHTTPRequestHandler):
    """One request: authorise, find its route, answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body go out in two writes: with it, each answer waits for 40 ms
    hub: HubServer  # set on a subclass by running_hub

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent; `hub.log` has it."""

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        fault = self.hub.fault_for(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        ranged, token = self.headers.get("Range", ""), "Authorization" in self.headers
        self.hub.log.append(Request(self.command, path, length, ranged, token))
        self.whole = bool(fault and fault.whole)
        if fault and fault.cut is not False and not fault.after and length:
            self.rfile.read(length // 2)
            return self.hang_up()
        self.body = self.read_body(length)
        if fault and fault.call:
            fault.call()
        status, headers, content = (200, {}, b"")
        try:
            if fault and fault.status and not fault.after:
                raise Refusal(fault.status)
            with self.hub.lock:
                status, headers, content = self.route(url.path)
            if fault and fault.status and fault.after:
                raise Refusal(fault.status)
        except Refusal as e:
            status, headers, content = e.status, e.headers, b'{"error": "refused"}'
        if fault:
            headers = {**headers, **fault.headers}
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            if fault and fault.cut is not False:
                content = content[: len(content) // 2 if fault.cut is True else fault.cut]
            self.hub.sent += len(content) if "/resolve/" in path or path.startswith("/store/") else 0
            self.wfile.write(content)
        if fault and fault.cut is not False:
            self.hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(length)
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    # --- who may do what ---

    def user(self) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.hub.users:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return self.hub.users.get(given)

    def check_access(self, repo_id: str, write: bool) -> None:
        user, owner = self.user(), repo_id.split("/")[0]
        if not self.hub.exists(repo_id) or (self.hub.refs(repo_id)["private"] and user != owner):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != owner:
            raise Refusal(403 if user else 401, message="You are not allowed to write here")

    # --- routes ---

    def route(self, path: str) -> tuple[int, dict[str, str], bytes]:
        for methods, pattern, answer in ROUTES:
            if self.command in methods and (match := re.fullmatch(pattern, path)):
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if "repo" in groups:
                    self.check_access(groups["repo"], write=answer in WRITES and "create_pr" not in self.query)
                result = answer(self, **groups)
                return result if isinstance(result, tuple) else (200, {}, json.dumps(result).encode())
        raise Refusal(404, message=f"no route for {self.command} {path}")

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def commit_of(self, repo: str, revision: str) -> str:
        sha = self.hub.resolve(repo, revision)
        if sha is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def whoami(self) -> Any:
        if (user := self.user()) is None:
            raise Refusal(401, message="log in")
        return {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_yaml(self) -> Any:
        return {"errors": [], "warnings": []}

    def create_repo(self) -> Any:
        asked = json.loads(self.body)
        user = self.user()
        repo_id = f"{asked.get('organization') or user}/{asked['name']}"
        if user is None or repo_id.split("/")[0] != user:
            raise Refusal(403 if user else 401, message="You are not allowed to create this")
        url = {"url": f"{self.base}/{repo_id}", "name": repo_id, "id": repo_id}
        if self.hub.exists(repo_id):
            return 409, {}, json.dumps({"error": "You already created this model repo", **url}).encode()
        self.hub.create(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return url

    def list_models(self) -> Any:
        wanted, author = set(self.query.get("filter", [])), self.query.get("author", [None])[0]
        user, found = self.user(), []
        for path in sorted((self.hub.root / "repos").glob("*/*/refs.json")):
            repo_id = path.parent.relative_to(self.hub.root / "repos").as_posix()
            private, tags = self.hub.refs(repo_id)["private"], self.hub.tags(repo_id)
            owner = repo_id.split("/")[0]
            if wanted <= set(tags) and author in (None, owner) and (not private or user == owner):
                found.append({"id": repo_id, "modelId": repo_id, "private": private, "tags": tags, "downloads": 0})
        return found[: int(self.query.get("limit", ["1000"])[0])]

    def info(self, repo: str, revision: str = "main") -> Any:
        sha = self.commit_of(repo, revision)
        facts = {"id": repo, "modelId": repo, "sha": sha, "private": self.hub.refs(repo)["private"]}
        files = self.hub.files(repo, sha)
        blobs = "blobs" in self.query
        siblings = [{"rfilename": f, **(sibling(f, data) if blobs else {})} for f, data in files.items()]
        return {**facts, "tags": self.hub.tags(repo), "siblings": siblings}

    def list_refs(self, repo: str) -> Any:
        refs = self.hub.refs(repo)

        def entries(kind: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in refs[kind].items()]

        heads = [e for e in entries("heads") if not e["name"].startswith("refs/pr/")]
        return {"branches": heads, "tags": entries("tags"), "converts": []}

    def tree(self, repo: str, revision: str, folder: str = "") -> Any:
        files = self.hub.files(repo, self.commit_of(repo, revision))
        return [entry(path, data) for path, data in files.items() if path.startswith(folder)]

    def create_branch(self, repo: str, name: str) -> Any:
        refs = self.hub.refs(repo)
        if name.startswith("refs/"):
            raise Refusal(400, message=f"Invalid reference for a branch: {name}")
        if name in refs["heads"]:
            raise Refusal(409, message=f"Reference already exists: {name}")
        refs["heads"][name] = self.commit_of(repo, json.loads(self.body or b"{}").get("startingPoint") or "main")
        self.hub.save_refs(repo, refs)
        return {}

    def create_tag(self, repo: str, revision: str) -> Any:
        refs, name = self.hub.refs(repo), json.loads(self.body)["tag"]
        if name in refs["tags"]:
            raise Refusal(409, message=f"Tag reference exists already: {name}")
        refs["tags"][name] = self.commit_of(repo, revision)
        self.hub.save_refs(repo, refs)
        return {}

    def preupload(self, repo: str, revision: str) -> Any:
        old = self.hub.files(repo, self.commit_of(repo, revision))
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            known = {"oid": oid(path, old[path])} if path in old else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": answers}

    def lfs_batch(self, repo: str) -> Any:
        def answer(o: dict[str, Any]) -> dict[str, Any]:
            known = (self.hub.root / "lfs" / o["oid"]).exists()
            actions = {"upload": {"href": f"{self.base}/lfs/{o['oid']}"}, "verify": {"href": f"{self.base}/lfs-verify"}}
            return {"oid": o["oid"], "size": o["size"], **({} if known else {"actions": actions})}

        if self.user() is None:  # whoever is logged in may upload, as a pull request needs it; the commit decides
            raise Refusal(401, message="log in")
        return {"transfer": "basic", "objects": [answer(o) for o in json.loads(self.body)["objects"]]}

    def lfs_put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, message="the bytes do not have this digest")
        (self.hub.root / "lfs" / oid).write_bytes(self.body)
        return {}

    def lfs_verify(self) -> Any:
        if not (self.hub.root / "lfs" / json.loads(self.body)["oid"]).exists():
            raise Refusal(404)
        return {}

    def push(self, repo: str, revision: str) -> Any:
        changes, header = dict[str, bytes | None](), dict[str, Any]()
        for line in self.body.splitlines():
            op = json.loads(line)
            value = op["value"]
            if op["key"] == "header":
                header = value
            elif op["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif op["key"] == "lfsFile":
                changes[value["path"]] = (self.hub.root / "lfs" / value["oid"]).read_bytes()
            elif op["key"] == "deletedFile":
                changes[value["path"]] = None
            else:
                raise Refusal(400, message=f"unknown operation {op['key']}")
        parent = self.commit_of(repo, revision)
        if header.get("parentCommit") not in (None, parent):
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        pull = "create_pr" in self.query
        sha = self.hub.commit(repo, changes, "refs/pr/1" if pull else revision)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.base}/{repo}/commit/{sha}"}
        return {**answer, **({"pullRequestUrl": f"{self.base}/{repo}/discussions/1"} if pull else {})}

    def download(self, repo: str, revision: str, path: str) -> Any:
        sha = self.commit_of(repo, revision)
        file = self.hub.place(repo) / "commits" / sha / path
        if not file.is_file():
            raise Refusal(404, "EntryNotFound", "Entry not found")
        etag, size = self.hub.oid(file), file.stat().st_size
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if path.endswith(LFS_SUFFIXES):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(size)}
            if self.hub.store is not None:
                return 302, {**headers, "Location": f"{self.hub.store}/store/{repo}/{sha}/{path}"}, b""
        return self.answer(file, headers)

    def fetch(self, repo: str, revision: str, path: str) -> Any:
        """A large file from the store, which knows neither commits nor tokens, and has ETags of its own."""
        file = self.hub.place(repo) / "commits" / revision / path
        return self.answer(file, {"ETag": '"of the store"', "Content-Type": "application/octet-stream"})

    def answer(self, file: Path, headers: dict[str, str]) -> Any:
        """The file, or the range of it that is asked for."""
        size = file.stat().st_size
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or self.whole:
            return 200, headers, file.read_bytes()
        begin, end = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
        if begin >= size:
            raise Refusal(416, message="Range Not Satisfiable")
        with open(file, "rb") as f:
            f.seek(begin)
            return 206, {**headers, "Content-Range": f"bytes {begin}-{end}/{size}"}, f.read(end + 1 - begin)


def oid(path: str, data: bytes) -> str:
    """Git's id of a file, or for LFS its digest."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sibling(path: str, data: bytes) -> dict[str, Any]:
    """What a repository's facts say of a file, where asked for blobs."""
    lfs = {"lfs": {"sha256": oid(path, data), "size": len(data), "pointerSize": 134}}
    return {"size": len(data), "blobId": oid("", data), **(lfs if path.endswith(LFS_SUFFIXES) else {})}


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file in a listing."""
    lfs = (
        {"lfs": {"oid": oid(path, data), "size": len(data), "pointerSize": 134}} if path.endswith(LFS_SUFFIXES) else {}
    )
    return {"type": "file", "path": path, "size": len(data), "oid": oid("", data), **lfs}


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_AT = r"/(?P<revision>[^/]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Any]]] = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/validate-yaml", Handler.validate_yaml),
    (("POST",), "/api/repos/create", Handler.create_repo),
    (("GET",), "/api/models", Handler.list_models),
    (("GET",), f"/api/models/{_REPO}", Handler.info),
    (("GET",), f"/api/models/{_REPO}/revision{_AT}", Handler.info),
    (("GET",), f"/api/models/{_REPO}/refs", Handler.list_refs),
    (("GET",), f"/api/models/{_REPO}/tree{_AT}(?:/(?P<folder>.+))?", Handler.tree),
    (("POST",), f"/api/models/{_REPO}/branch/(?P<name>[^/]+)", Handler.create_branch),
    (("POST",), f"/api/models/{_REPO}/tag{_AT}", Handler.create_tag),
    (("POST",), f"/api/models/{_REPO}/preupload{_AT}", Handler.preupload),
    (("POST",), f"/api/models/{_REPO}/commit{_AT}", Handler.push),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    (("POST",), "/lfs-verify", Handler.lfs_verify),
    (("GET", "HEAD"), f"/{_REPO}/resolve{_AT}/(?P<path>.+)", Handler.download),
    (("GET",), f"/store/{_REPO}{_AT}/(?P<path>.+)", Handler.fetch),
]
WRITES = (Handler.create_branch, Handler.create_tag, Handler.preupload, Handler.push)


@contextlib.contextmanager
def running_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub in `root`, and the client of this process pointed at it: logged in as ``owner``, with an empty cache.

    The settings are those that huggingface_hub reads from the environment when it is imported.
    """
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    from lowbit_format import remote

    hub = HubServer(root / "hub")
    with serving(hub) as url:
        settings = {
            "ENDPOINT": url,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(root / "cache"),
            "HF_TOKEN_PATH": str(root / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        for key, value in settings.items():
            monkeypatch.setattr(constants, key, value)
        monkeypatch.setattr(hf_api.api, "endpoint", url)
        monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
        for variable in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(variable, "127.0.0.1")
        at_once = types.SimpleNamespace(**{**vars(time), "sleep": lambda _: None})  # retries do not wait
        for module in (_http, file_download, remote):
            monkeypatch.setattr(module, "time", at_once)
        forget_clients()
        try:
            yield hub
        finally:
            forget_clients()


@contextlib.contextmanager
def serving(hub: HubServer) -> Iterator[str]:
    """A server of `hub`, at the address that is given; a second one may be its store (``hub.store``)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def forget_clients() -> None:
    """Close the client's connections, and drop the one that transformers keeps for the address it first saw."""
    import huggingface_hub

    huggingface_hub.close_session()
    if transformers_hub := sys.modules.get("transformers.utils.hub"):
        transformers_hub._hf_api = None  # type: ignore[attr-defined]
