"""The test Hub speaks to the unchanged `huggingface_hub` as the real one does; else the tests built on it prove little."""

import hashlib
import subprocess
from pathlib import Path

import pytest
from conftest import TOKEN
from hub_repos import git_oid
from hub_server import Hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

READER = "hf_reader_of_me_0123456789"
WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def repo(hub: Hub, api: HfApi) -> str:
    api.create_repo("me/x", private=True)
    files = {"config.json": b"{}", "a/b.txt": b"text", "model.safetensors": WEIGHTS}
    api.create_commit("me/x", [CommitOperationAdd(name, data) for name, data in files.items()], commit_message="first")
    return "me/x"


def status(call) -> int:
    with pytest.raises(HfHubHTTPError) as error:
        call()
    return error.value.response.status_code


def test_who_and_what(hub, api, repo) -> None:
    assert api.whoami()["name"] == "me"
    info = api.repo_info(repo)
    assert info.private and info.sha == hub.repos[repo].refs["refs/heads/main"]
    assert api.list_repo_files(repo) == [".gitattributes", "a/b.txt", "config.json", "model.safetensors"]
    hub.page_size = 2
    tree = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True)}
    assert set(tree) == {".gitattributes", "a", "a/b.txt", "config.json", "model.safetensors"}
    assert [entry.path for entry in api.list_repo_tree(repo)] == [
        ".gitattributes",
        "a",
        "config.json",
        "model.safetensors",
    ]
    assert [entry.path for entry in api.list_repo_tree(repo, "a")] == ["a/b.txt"]
    large, (small,) = tree["model.safetensors"], api.get_paths_info(repo, ["config.json", "none"])
    assert (large.size, large.lfs.size, large.lfs.sha256) == (102400, 102400, hashlib.sha256(WEIGHTS).hexdigest())
    assert small.blob_id == git_oid(b"{}") and small.lfs is None


def test_git_itself_names_blobs_so(tmp_path: Path) -> None:
    named = subprocess.run(["git", "hash-object", "--stdin"], input=b"some\n", capture_output=True, check=True).stdout
    assert named.decode().strip() == git_oid(b"some\n")


def test_downloads_whole_in_ranges_and_after_a_break(hub, api, repo, tmp_path, waits) -> None:
    folder = Path(api.snapshot_download(repo, cache_dir=tmp_path / "cache"))
    assert (
        folder.name == hub.repos[repo].refs["refs/heads/main"]
        and (folder / "model.safetensors").read_bytes() == WEIGHTS
    )
    assert (folder / "a" / "b.txt").read_bytes() == b"text"
    url = hub.repos[repo].commits[folder.name]["model.safetensors"].sha256
    from huggingface_hub.utils import get_session

    for wanted, found in (("bytes=5-9", WEIGHTS[5:10]), ("bytes=102390-", WEIGHTS[-10:])):
        part = get_session().get(f"{hub.storage_url}/storage/{repo}/{url}", headers={"Range": wanted})
        assert part.status_code == 206 and part.content == found
    assert not hub.leaks


def test_branches_tags_pull_requests_and_conflicts(hub, api, repo) -> None:
    first = api.repo_info(repo).sha
    api.create_branch(repo, branch="next")
    api.create_tag(repo, tag="v1", revision="next")
    assert status(lambda: api.create_tag(repo, tag="v1")) == 409
    done = api.create_commit(
        repo, [CommitOperationDelete("a/b.txt")], commit_message="less", revision="next", parent_commit=first
    )
    late = [CommitOperationAdd("late.txt", b"x")]
    call = lambda: api.create_commit(repo, late, commit_message="late", revision="next", parent_commit=first)  # noqa: E731
    assert status(call) == 412
    asked = api.create_commit(repo, late, commit_message="asked", create_pr=True)
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in (*refs.branches, *refs.tags)} == {
        "main": first,
        "next": done.oid,
        "v1": first,
    }
    assert asked.pr_revision == "refs/pr/1" and "late.txt" in api.list_repo_files(repo, revision="refs/pr/1")
    assert "late.txt" not in api.list_repo_files(repo) and "a/b.txt" not in api.list_repo_files(repo, revision="next")


def test_multipart_upload(hub, api, repo) -> None:
    hub.part_size = 30_000
    api.upload_file(path_or_fileobj=WEIGHTS[1:], path_in_repo="other.safetensors", repo_id=repo)
    assert hub.repos[repo].files()["other.safetensors"] == WEIGHTS[1:] and len(hub.asked(r"PUT .*/\d\?signed")) == 4


def test_refusals(hub, api, repo, tmp_path) -> None:
    stranger, reader = HfApi(endpoint=hub.url, token=False), HfApi(endpoint=hub.url, token=READER)
    with pytest.raises(RepositoryNotFoundError, match="401 Client Error"):
        stranger.repo_info(repo)
    with pytest.raises(RepositoryNotFoundError, match="404 Client Error"):
        api.repo_info("me/none")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(repo, revision="none")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(repo, "none.json", cache_dir=tmp_path)
    assert status(lambda: HfApi(endpoint=hub.url, token="hf_wrong").whoami()) == 401
    assert status(lambda: api.create_repo(repo)) == 409 and api.create_repo(repo, exist_ok=True)
    assert status(lambda: api.create_repo("other/x")) == 403
    assert reader.repo_info(repo).private and status(lambda: reader.create_branch(repo, branch="mine")) == 403
    assert (
        reader.create_commit(repo, [CommitOperationAdd("a", b"b")], commit_message="asked", create_pr=True).pr_num == 1
    )
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.upload_file(path_or_fileobj=b"---\nlicense: 7\n---\n", path_in_repo="README.md", repo_id=repo)


def test_faults_happen_as_often_as_asked_for(hub, api, repo, waits, tmp_path) -> None:
    hub.fail("GET .*/tree", 503, times=2)
    assert len(api.list_repo_files(repo)) == 4 and waits == [1, 2]
    hub.fail("GET .*/tree", 429, times=1, Retry_After="3")
    assert len(api.list_repo_files(repo)) == 4 and waits[-1] == 4
    hub.fail("GET .*/tree", "cut")
    assert len(api.list_repo_files(repo)) == 4 and not hub.faults
    hub.fail("POST .*/branch", "lost")
    with pytest.raises(Exception, match="disconnected"):
        api.create_branch(repo, branch="made")
    assert "refs/heads/made" in hub.repos[repo].refs
    hub.fail("HEAD", 500, times=9, message="broken")
    with pytest.raises(LocalEntryNotFoundError):
        api.hf_hub_download(repo, "config.json", cache_dir=tmp_path)
