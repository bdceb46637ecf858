"""The repos of `hub_server.Hub`, in memory: commits are tables of path → `Blob`."""

import hashlib
from dataclasses import dataclass, field


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Blob:
    """A file of a commit: `content` of a regular one, the pointer of a large one, whose bytes are in `Repo.lfs[sha256]`."""

    content: bytes
    size: int
    sha256: str = ""

    def __post_init__(self) -> None:
        self.oid = git_oid(self.content)

    @classmethod
    def regular(cls, content: bytes) -> "Blob":
        return cls(content, len(content))

    @classmethod
    def pointer(cls, sha256: str, size: int) -> "Blob":
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return cls(text.encode(), size, sha256)


@dataclass
class Repo:
    id: str
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" → commit
    lfs: dict[str, bytes] = field(default_factory=dict)  # sha256 → content
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, Blob], message: str) -> str:
        listing = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(files.items()))
        sha = hashlib.sha1(f"{self.refs.get(ref)}{len(self.commits)}{message}{listing}".encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.refs[ref] = files, message, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return revision if revision in self.commits else next((self.refs[n] for n in names if n in self.refs), None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """For the tests: what is there, the bytes of large files included."""
        tree = self.commits[self.resolve(revision)]
        return {path: self.lfs[blob.sha256] if blob.sha256 else blob.content for path, blob in tree.items()}
