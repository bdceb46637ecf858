"""A Hub on 127.0.0.1 for the tests: the protocol that `huggingface_hub` speaks, on the standard library alone.

Large files go through Git LFS (basic and multipart) to a "storage" that has another origin (`localhost`), as the Hub's
own has. There is no Xet: clients set HF_HUB_DISABLE_XET=1.
`fail` makes the next requests of a kind fail, `requests` lists every request, `leaks` those that sent a token to storage.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import ThreadingHTTPServer
from itertools import count
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_http import Answering, Fault, Refusal
from hub_repos import Blob, Repo, git_oid

LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".gguf", ".pt", ".h5")


def _slashes(name: str) -> list[int]:
    return [match.start() for match in re.finditer("/", name)]


class Hub(ThreadingHTTPServer):
    """`with Hub() as hub:` serves at `hub.url` until the block ends."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage_url = f"http://localhost:{self.server_port}"
        self.tokens = {"hf_writer_of_me_0123456789": ("me", "write"), "hf_reader_of_me_0123456789": ("me", "read")}
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []  # method, path, length of the body
        self.leaks: list[str] = []
        self.part_size: int | None = None  # larger files are uploaded in parts of this size
        self.page_size = 1000
        self.held, self.release, self.lock = threading.Event(), threading.Event(), threading.RLock()

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, address: object) -> None:
        pass  # a client that went away

    def fail(self, route: str, kind: int | str, times: int = 1, message: str = "", **headers: str) -> None:
        """The next `times` requests in whose `"METHOD /path?query"` the pattern `route` is found fail, see `Fault`."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(route, kind, times, message, names))

    def asked(self, route: str) -> list[tuple[str, str, int]]:
        return [request for request in self.requests if re.search(route, f"{request[0]} {request[1]}")]

    def create(self, repo_id: str, private: bool = True) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.commit(
            "refs/heads/main", {".gitattributes": Blob.regular(b"*.safetensors filter=lfs\n")}, "initial commit"
        )
        return repo


ROUTES = [  # {repo}: user/name, {rev}: one quoted segment
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/complete_multipart", "complete_multipart"),
    ("GET", r"/api/models/{repo}", "repo_info"),
    ("GET", r"/api/models/{repo}/revision/{rev}", "repo_info"),
    ("GET", r"/api/models/{repo}/refs", "list_refs"),
    ("GET", r"/api/models/{repo}/tree/{rev}(?:/(?P<path>.+))?", "tree"),
    ("POST", r"/api/models/{repo}/paths-info/{rev}", "paths_info"),
    ("POST", r"/api/models/{repo}/branch/{rev}", "create_branch"),
    ("POST", r"/api/models/{repo}/tag/{rev}", "create_tag"),
    ("POST", r"/api/models/{repo}/preupload/{rev}", "preupload"),
    ("POST", r"/api/models/{repo}/commit/{rev}", "commit"),
    ("POST", r"/{repo}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", r"/{repo}\.git/info/lfs/objects/verify", "lfs_verify"),
    ("PUT", r"/storage/{repo}/(?P<oid>\w{64})(?:/(?P<part>\d+))?", "store"),
    ("GET", r"/storage/{repo}/(?P<oid>\w{64})", "fetch"),
    ("GET", r"/{repo}/resolve/{rev}/(?P<path>.+)", "resolve"),
]
_NAMES = {"repo": r"(?P<repo>[\w.-]+/[\w.-]+?)", "rev": r"(?P<rev>[^/]+)"}
_COMPILED = [(m, re.compile(re.sub(r"\{(repo|rev)\}", lambda n: _NAMES[n[1]], path)), name) for m, path, name in ROUTES]


class Handler(Answering):
    server: Hub
    routes = _COMPILED

    # who asks, and what for

    def user(self) -> tuple[str, str]:
        header = self.headers.get("Authorization", "")
        if not header:
            return "", ""
        if header.removeprefix("Bearer ") not in self.server.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server.tokens[header.removeprefix("Bearer ")]

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        name, role = self.user()
        repo, owner = self.server.repos.get(repo_id), repo_id.split("/")[0]
        if repo is None or (repo.private and name != owner):
            # the client recognises the Hub's 401 for a private or missing repo by its https address; here by the code
            raise Refusal(
                404 if name else 401,
                "Repository not found" if name else "Invalid username or password.",
                "RepoNotFound",
            )
        if write and (name != owner or role != "write"):
            raise Refusal(403, "Forbidden: you need a token with write permission")
        return repo

    def at(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
        sha = repo.resolve(unquote(revision))
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {unquote(revision)}", "RevisionNotFound")
        return sha, repo.commits[sha]

    def whoami(self):
        name, role = self.user()
        if not name:
            raise Refusal(401, "Invalid username or password.")
        return 200, {}, {"type": "user", "name": name, "auth": {"accessToken": {"role": role}}}

    # repos and refs

    def create_repo(self):
        name, role = self.user()
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or name}/{asked['name']}"
        if not name:
            raise Refusal(401, "Invalid username or password.")
        if repo_id.split("/")[0] != name or role != "write":
            raise Refusal(
                403, f"You don't have the rights to create a model under the namespace {repo_id.split('/')[0]}"
            )
        if repo_id in self.server.repos:
            return 409, {}, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo_id}"}
        self.server.create(repo_id, asked.get("visibility") == "private" or asked.get("private") is True)
        return 200, {}, {"url": f"{self.server.url}/{repo_id}", "id": repo_id}

    def repo_info(self, repo: str, rev: str = "main"):
        found = self.repo(repo)
        sha, files = self.at(found, rev)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return (
            200,
            {},
            {"id": repo, "modelId": repo, "sha": sha, "private": found.private, "tags": [], "siblings": siblings},
        )

    def list_refs(self, repo: str):
        kinds: dict[str, list] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, sha in self.repo(repo).refs.items():
            kind = {"heads": "branches", "tags": "tags"}.get(ref.split("/")[1], "pullRequests")
            kinds[kind].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": sha})
        return 200, {}, kinds

    def new_ref(self, repo: Repo, ref: str, revision: str):
        if ref in repo.refs:
            raise Refusal(409, f"Reference already exists: {ref}")
        repo.refs[ref] = self.at(repo, revision)[0]
        return 200, {}, {}

    def create_branch(self, repo: str, rev: str):
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        return self.new_ref(self.repo(repo, write=True), f"refs/heads/{unquote(rev)}", start)

    def create_tag(self, repo: str, rev: str):
        return self.new_ref(self.repo(repo, write=True), f"refs/tags/{json.loads(self.body)['tag']}", rev)

    # reading

    def entry(self, path: str, blob: Blob) -> dict:
        entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        large = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.content)}}
        return {**entry, **(large if blob.sha256 else {})}

    def tree(self, repo: str, rev: str, path: str = ""):
        sha, files = self.at(self.repo(repo), rev)
        inside = f"{unquote(path)}/" if path else ""
        below = [name for name in sorted(files) if name.startswith(inside)]
        if inside and not below:
            raise Refusal(404, f"{path} does not exist on {rev}", "EntryNotFound", **{"X-Repo-Commit": sha})
        folders = {name[:end] for name in below for end in _slashes(name) if end >= len(inside)}
        entries = [self.entry(name, files[name]) for name in below]
        entries += [{"type": "directory", "path": name, "oid": git_oid(name.encode()), "size": 0} for name in folders]
        if self.query.get("recursive", "").lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(inside)]
        entries.sort(key=lambda entry: entry["path"])
        start = int(self.query.get("cursor", 0))
        stop = start + self.server.page_size
        following = f"{self.server.url}{urlsplit(self.path).path}?recursive={self.query.get('recursive')}&cursor={stop}"
        links = {"Link": f'<{following}>; rel="next"'} if stop < len(entries) else {}
        return 200, links, entries[start:stop]

    def paths_info(self, repo: str, rev: str):
        _, files = self.at(self.repo(repo), rev)
        paths = parse_qs(self.body.decode()).get("paths", [])
        return 200, {}, [self.entry(path, files[path]) for path in paths if path in files]

    def resolve(self, repo: str, rev: str, path: str):
        found = self.repo(repo)
        sha, files = self.at(found, rev)
        headers, path = {"X-Repo-Commit": sha}, unquote(path)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        blob = files[path]
        if not blob.sha256:
            return 200, {**headers, "ETag": f'"{blob.oid}"'}, blob.content
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        return (
            302,
            {**headers, "Location": f"{self.server.storage_url}/storage/{quote(repo)}/{blob.sha256}?signed=1"},
            b"",
        )

    # writing

    def validate_yaml(self):
        self.user()
        if not json.loads(self.body)["content"].startswith("---\n"):
            return 200, {}, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        if "license: 7" in json.loads(self.body)["content"]:
            return 400, {}, {"errors": [{"message": '"license" must be a string'}], "warnings": []}
        return 200, {}, {"errors": [], "warnings": []}

    def preupload(self, repo: str, rev: str):
        found = self.repo(repo, write="create_pr" not in self.query)
        _, files = self.at(found, rev)
        plan = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10_000_000
            there = files.get(file["path"])
            oid = None if there is None else there.sha256 or there.oid
            plan.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        return 200, {}, {"files": plan}

    def lfs_batch(self, repo: str):
        found = self.repo(repo)
        address = f"{self.server.storage_url}/storage/{repo}"
        objects = []
        for item in json.loads(self.body)["objects"]:
            if item["oid"] not in found.lfs:
                upload: dict = {"href": f"{address}/{item['oid']}?signed=1"}
                part = self.server.part_size
                if part and item["size"] > part:
                    parts = range(1, -(-item["size"] // part) + 1)
                    upload["header"] = {"chunk_size": str(part)} | {
                        str(n): f"{address}/{item['oid']}/{n}?signed=1" for n in parts
                    }
                    upload["href"] = f"{self.server.url}/api/complete_multipart?repo={repo}"
                verify = {"href": f"{self.server.url}/{repo}.git/info/lfs/objects/verify"}
                item = {**item, "actions": {"upload": upload, "verify": verify}}
            objects.append(item)
        return 200, {}, {"transfer": "basic", "objects": objects}

    def store(self, repo: str, oid: str, part: str = ""):
        self.refuse_token()
        found = self.server.repos[repo]
        if part:
            found.parts[oid, int(part)] = self.body
        elif hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "BadDigest")
        else:
            found.lfs[oid] = self.body
        return 200, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}, b""

    def complete_multipart(self):
        asked = json.loads(self.body)
        repo, oid = self.server.repos[self.query["repo"]], asked["oid"]
        content = b"".join(repo.parts[oid, part["partNumber"]] for part in asked["parts"])
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the parts are not the file")
        repo.lfs[oid] = content
        return 200, {}, {}

    def lfs_verify(self, repo: str):
        asked = json.loads(self.body)
        if len(self.repo(repo).lfs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "object not found")
        return 200, {}, {}

    def fetch(self, repo: str, oid: str):
        self.refuse_token()
        return 200, {"ETag": f'"{hashlib.md5(oid.encode()).hexdigest()}"'}, self.server.repos[repo].lfs[oid]

    def refuse_token(self) -> None:
        if "Authorization" in self.headers:
            self.server.leaks.append(f"{self.command} {self.path}")

    def commit(self, repo: str, rev: str):
        as_pr = "create_pr" in self.query
        found = self.repo(repo, write=not as_pr)
        head, files = self.at(found, rev)
        files, header = dict(files), {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                header = value
                if value.get("parentCommit", head) != head:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = Blob.regular(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in found.lfs:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = Blob.pointer(value["oid"], len(found.lfs[value["oid"]]))
            elif files.pop(value["path"], None) is None:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        number = next(n for n in count(1) if f"refs/pr/{n}" not in found.refs)
        sha = found.commit(f"refs/pr/{number}" if as_pr else f"refs/heads/{unquote(rev)}", files, header["summary"])
        pr = {"pullRequestUrl": f"{self.server.url}/{repo}/discussions/{number}"} if as_pr else {}
        return 200, {}, {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}", **pr}
