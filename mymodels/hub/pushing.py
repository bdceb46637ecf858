"""Push a folder to a Hub repo: private by default, verified first, only changed files, and checked afterwards."""

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..checkpoints.safetensors_files import read_json
from ..messages import printable
from ..tables import print_table
from .push_files import (
    LOADED,
    PICKLES,
    LocalFile,
    check_manifest,
    check_no_secret_inside,
    hash_file,
    kind_of,
    scan,
)
from .remote import REPO_ID, STATUS_MESSAGES, HubError, Remote, status_of
from .testing import failures
from .verifying import Verification
from .verifying import verify as standard_verify

NEW, CHANGED, UNCHANGED, REMOVED, KEPT = "new", "changed", "unchanged", "removed", "only there, kept"
_DOWNLOAD_LIMIT = 10_000_000  # bytes; larger files are compared by the Hub's SHA-256 without a download
_COMMIT = re.compile(r"[0-9a-f]{40}")


class FileState(NamedTuple):
    """A file of the folder or the repo, and what a push does to it."""

    name: str
    size: int
    state: str


class PushResult(NamedTuple):
    """The result of a push.

    Attributes:
        commit: SHA of the commit that holds the folder; None after a dry run.
        files: every file of the folder and the repo, as compared before the upload.
        uploaded: names of the uploaded files.
        pr_url: address of the pull request, if one was created.
        snippet: Python code that loads exactly this commit.
    """

    repo_id: str
    commit: str | None
    files: list[FileState]
    uploaded: list[str]
    pr_url: str | None
    snippet: str


def push(
    path: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = True,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    tag: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    no_verify: bool = False,
    verify: Callable[[Path], Verification] | None = None,
    allow: Iterable[str] = (),
    endpoint: str | None = None,
    console: Console | None = None,
) -> PushResult:
    """Upload the folder `path` to the repo `repo_id`, and check the result.

    The folder is verified first. Files that the repo has already, also from an interrupted push, are not uploaded
    again. Files that only the repo has are removed if a loader would read them (older shards, code, tokenizer files),
    and kept otherwise. All changes are one commit on top of the state that was compared. Afterwards every file's hash
    in the repo is compared with the folder's; files of up to 10 MB are downloaded for this.

    Args:
        path: a folder as `build_repo` writes it; only known kinds of files, see `mymodels.hub.push_files`.
        private: True creates a private repo and rejects an existing public one, False the opposite; None accepts an
            existing repo of either kind, and creates a private one.
        revision: a branch, created if it does not exist; default `main`.
        create_pr: commit to a new pull request instead.
        dry_run: compare only; nothing is created or uploaded.
        tag: name of a tag for the commit.
        token: as in `huggingface_hub`: None reads HF_TOKEN or the login of `hf auth login`.
        commit_message: default "Push with mymodels <version>".
        no_verify: skip the verification; this is added to the commit message.
        verify: function that verifies the folder; default `mymodels.hub.verify`.
        allow: patterns of further file names to push; pickles and secrets are never allowed.
        endpoint: address of the Hub; default HF_ENDPOINT or huggingface.co.
        console: where the files are listed before the upload, and the snippet after it; None prints nothing.

    Raises:
        ValueError: the folder or the arguments are invalid, or the verification failed.
        HubError: the Hub rejected a request, failed or could not be reached, or the uploaded files differ.

    Examples:
        >>> push("my-model", "me/my-model").snippet
    """
    branch = _check_arguments(repo_id, revision, create_pr, tag)
    folder = Path(path).expanduser()
    remote = Remote(repo_id, token=token, endpoint=endpoint)
    files = scan(folder, allow)
    check_manifest(folder, files)
    check_no_secret_inside(files, remote.secrets)
    if not no_verify:
        _verify(folder, verify)
    snippet = load_snippet(folder, repo_id, "COMMIT")  # also raises for a damaged config before the upload
    info = _repo_info(remote)
    if info is not None:
        _check_visibility(remote, info.private, private)
    start = None if info is None else _branch_head(remote, branch) or info.sha
    tag_is_there = tag is not None and info is not None and _tag_target(remote, tag)
    states = compare(files, _tree(remote, start) if start else {})
    todo = [state for state in states if state.state in (NEW, CHANGED, REMOVED)]
    if tag_is_there and (todo or tag_is_there != start):
        raise HubError(f"the tag {tag} of {repo_id} points to another commit, {tag_is_there[:12]}: choose another name")
    if console is not None:
        show_files(states, repo_id, console)
    if dry_run:
        return PushResult(repo_id, None, states, [], None, snippet)
    if info is None:
        start = _create(remote, private is not False)
    if _branch_head(remote, branch) is None:
        remote.request(lambda: remote.api.create_branch(repo_id, branch=branch, revision=start, exist_ok=True))
    assert start is not None
    commit, pr_url = start, None
    if todo:
        message = _message(commit_message, no_verify)
        commit, pr_url = _upload(remote, files, todo, branch, start, create_pr, message)
    verify_upload(remote, commit, files)
    if tag is not None:
        remote.request(lambda: remote.api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
    snippet = load_snippet(folder, repo_id, commit)
    if console is not None:
        what = "every hash compared" if todo else "nothing had changed, every hash compared"
        pull_request = f"\npull request: {pr_url}" if pr_url else ""
        text = f"{repo_id} holds this folder at commit {commit}: {what}{pull_request}\n\n{snippet}"
        console.print(Text(text), soft_wrap=True)
    sent = [state.name for state in todo if state.state != REMOVED]
    return PushResult(repo_id, commit, states, sent, pr_url, snippet)


def compare(files: dict[str, LocalFile], tree: dict[str, Any]) -> list[FileState]:
    """The state of every file of the folder and of the repo, whose `RepoFile`s are `tree`."""
    states = []
    for name in sorted(set(files) | set(tree)):
        if name not in files:
            state = REMOVED if _is_loaded(name) else KEPT
        elif name not in tree:
            state = NEW
        else:
            state = CHANGED if _difference(files[name], tree[name]) else UNCHANGED
        states.append(FileState(name, files[name].size if name in files else tree[name].size, state))
    return states


def show_files(states: list[FileState], repo_id: str, console: Console) -> None:
    """Print the comparison as a table, and the number and size of the files to upload."""
    table = Table(
        "file", "size", "on the Hub", title=Text(f"push to {printable(repo_id)}"), title_justify="left", box=None
    )
    table.columns[1].justify = "right"
    styles = {NEW: "green", CHANGED: "yellow", REMOVED: "red"}
    for name, size, state in states:
        table.add_row(Text(printable(name)), f"{size:,}", Text(state, style=styles.get(state, "dim")))
    print_table(table, console)
    sent = [state.size for state in states if state.state in (NEW, CHANGED)]
    console.print(Text(f"{len(sent)} files to upload, {sum(sent):,} bytes" if sent else "no files to upload"))


def load_snippet(folder: Path, repo_id: str, commit: str) -> str:
    """Python code that loads the model, and the tokenizer if there is one, pinned to a commit."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    auto_map, listed = config.get("auto_map"), config.get("architectures")
    auto_map = auto_map if isinstance(auto_map, dict) else {}
    architecture = str(listed[0]) if isinstance(listed, list) and listed else ""
    head = re.search(r"For[A-Z]\w+$", architecture)
    candidates = [name for name, target in auto_map.items() if str(target).endswith(f".{architecture}")]
    candidates += [f"AutoModel{head[0]}"] if head and not auto_map else []
    candidates = [name for name in candidates if re.fullmatch(r"Auto\w+", name) and hasattr(transformers, name)]
    auto_class = (candidates or ["AutoModel"])[0]
    pins = f'"revision": "{commit}"'
    if auto_map:
        pins += f', "code_revision": "{commit}", "trust_remote_code": True'
    parts = [("tokenizer", "AutoTokenizer")] if (folder / "tokenizer_config.json").is_file() else []
    parts.append(("model", auto_class))
    imports = ", ".join(sorted(name for _, name in parts))
    calls = "".join(f'{variable} = {name}.from_pretrained("{repo_id}", **pinned)\n' for variable, name in parts)
    return f"from transformers import {imports}\n\npinned = {{{pins}}}\n{calls}"


def verify_upload(remote: Remote, commit: str, files: dict[str, LocalFile]) -> None:
    """Compare the repo at `commit` with the folder: sizes and hashes, and small files after a download.

    Raises:
        HubError: a file is missing or differs, or a file was not removed.
    """
    tree = _tree(remote, commit)
    problems = {}
    for name, file in files.items():
        problems[name] = "is missing" if name not in tree else _difference(file, tree[name])
    with tempfile.TemporaryDirectory(prefix="mymodels-push-") as scratch:
        for name, file in files.items():
            if problems[name] or file.size > _DOWNLOAD_LIMIT:
                continue
            problems[name] = _content_difference(remote, commit, name, file, scratch)
    found = [f"{printable(name)} {problem}" for name, problem in problems.items() if problem]
    leftover = [name for name in tree if name not in files and _is_loaded(name)]
    found += [f"{printable(name)} was not removed" for name in leftover]
    if found:
        raise HubError(
            f"{remote.repo_id} at {commit} differs from what was pushed: {'; '.join(found)}: do not use this commit, "
            "push again"
        )


def _content_difference(remote: Remote, commit: str, name: str, file: LocalFile, scratch: str) -> str:
    try:
        copy = remote.request(
            lambda: remote.api.hf_hub_download(remote.repo_id, name, revision=commit, cache_dir=scratch),
            what=f"downloading {printable(name)}",
        )
    except HubError as error:
        return f"could not be downloaded again ({error})"
    found = hash_file(Path(copy))
    return (
        ""
        if found.sha256 == file.sha256
        else f"was downloaded with SHA-256 {found.sha256[:16]}…, not {file.sha256[:16]}…"
    )


def _difference(file: LocalFile, there: Any) -> str:
    """How the repo's listing of a file differs from the folder's file; "" if it does not."""
    if there.size != file.size:
        return f"has {there.size:,} bytes, not {file.size:,}"
    kind, found, expected = ("git hash", there.blob_id, file.git_oid)
    if there.lfs is not None:
        kind, found, expected = "SHA-256", there.lfs.sha256, file.sha256
    return "" if found == expected else f"has the {kind} {str(found)[:16]}…, not {expected[:16]}…"


def _is_loaded(name: str) -> bool:
    """Whether a loader could read a file that only the repo has, and so load another model than the folder's."""
    if "/" in name:
        return kind_of(name) == "code"
    return kind_of(name) in LOADED or any(name.endswith(pattern[1:]) for pattern in PICKLES)


def _check_arguments(repo_id: str, revision: str | None, create_pr: bool, tag: str | None) -> str:
    named = re.fullmatch(REPO_ID, repo_id, re.ASCII) and "/" in repo_id
    if not named or re.search(r"--|\.\.|\.git$", repo_id):
        raise ValueError(f"{printable(repo_id)} is not the name of a Hub repo: write it as user/name")
    if revision is not None and _COMMIT.fullmatch(revision):
        raise ValueError(f"a push makes a new commit and cannot go to {revision}: name a branch")
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"a pull request is always to main, not to {revision}: leave out one of the two")
    if create_pr and tag is not None:
        raise ValueError(f"a pull request cannot be tagged: set the tag {tag} when it is merged")
    return revision or "main"


def _verify(folder: Path, verify: Callable[[Path], Verification] | None) -> None:
    found = (verify or standard_verify)(folder)
    if not found.passed:
        lines = "".join(f"\n  {line}" for line in failures(found))
        raise ValueError(f"{folder} is not pushed, its verification failed ({len(found.failed)} checks):{lines}")
    for _, check in found.skipped:
        warnings.warn(f"{folder}: the verification skipped {check.name}, {check.what}", stacklevel=3)


def _repo_info(remote: Remote) -> Any:
    """The Hub's information on the repo, None if the repo does not exist."""

    def call() -> Any:
        try:
            return remote.api.repo_info(remote.repo_id)
        except RepositoryNotFoundError as error:
            if status_of(error) != 404:  # without a valid token the Hub answers 401 for missing repos too
                raise
            return None

    return remote.request(call)


def _branch_head(remote: Remote, revision: str) -> str | None:
    def call() -> str | None:
        try:
            return remote.api.repo_info(remote.repo_id, revision=revision).sha
        except RevisionNotFoundError:
            return None

    return remote.request(call)


def _tree(remote: Remote, commit: str) -> dict[str, Any]:
    return remote.request(lambda: _entries(remote, commit), attempts=2)  # most releases of huggingface_hub retry too


def _entries(remote: Remote, commit: str) -> dict[str, Any]:
    entries = remote.api.list_repo_tree(remote.repo_id, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}  # folders have none


def _tag_target(remote: Remote, tag: str) -> str | None:
    refs = remote.request(lambda: remote.api.list_repo_refs(remote.repo_id))
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)


def _check_visibility(remote: Remote, is_private: bool | None, private: bool | None) -> None:
    if private is None or bool(is_private) == private:
        return
    if private:
        raise HubError(
            f"{remote.repo_id} is public on the Hub, but a push is private by default: nothing was uploaded; pass "
            "--public (private=False), or make the repo private in its settings"
        )
    raise HubError(
        f"{remote.repo_id} is private on the Hub, and a push does not make it public: nothing was uploaded; push "
        "without --public (private=True), or make the repo public in its settings"
    )


def _create(remote: Remote, private: bool) -> str:
    remote.request(
        lambda: remote.api.create_repo(remote.repo_id, private=private, exist_ok=True), what="creating the repo"
    )
    info = _repo_info(remote)
    if info is None:
        raise HubError(f"{remote.repo_id} was created, but this token cannot read it: check its permissions")
    _check_visibility(
        remote, info.private, private
    )  # another process may have created it, or the Hub ignored `private`
    return info.sha


def _message(commit_message: str | None, no_verify: bool) -> str:
    from .. import __version__

    return (commit_message or f"Push with mymodels {__version__}") + (
        " (not verified: --no-verify)" if no_verify else ""
    )


def _upload(
    remote: Remote,
    files: dict[str, LocalFile],
    todo: list[FileState],
    branch: str,
    start: str,
    create_pr: bool,
    message: str,
) -> tuple[str, str | None]:
    """Upload the changed files and commit on top of `start`; returns the commit and the pull request's address."""
    api, repo_id = remote.api, remote.repo_id
    additions = [CommitOperationAdd(s.name, str(files[s.name].path)) for s in todo if s.state != REMOVED]
    deletions = [CommitOperationDelete(state.name) for state in todo if state.state == REMOVED]
    remote.request(
        lambda: api.preupload_lfs_files(
            repo_id, additions, revision=branch, create_pr=create_pr, free_memory=False, num_threads=4
        ),
        attempts=1,  # huggingface_hub retries each of its requests
        what="uploading",
    )

    def commit() -> tuple[str, str | None]:
        head = api.repo_info(repo_id, revision=branch).sha or ""
        if head != start:
            states = compare(files, _entries(remote, head))
            if not create_pr and all(state.state in (UNCHANGED, KEPT) for state in states):
                return head, None  # committed by an earlier attempt whose answer was lost
            raise HubError(STATUS_MESSAGES[412].format(repo_id=repo_id))
        info = api.create_commit(
            repo_id,
            [*additions, *deletions],
            commit_message=message,
            revision=branch,
            parent_commit=start,
            create_pr=create_pr,
        )
        return info.oid, info.pr_url

    # a retry after a lost answer would create a second pull request
    return remote.request(commit, what="committing", **({"attempts": 1} if create_pr else {}))
