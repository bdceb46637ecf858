"""`push` against a Hub on this machine: private, verified, only what changed, read again, and no token in any text."""

import json
import logging
import os
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TOKEN
from hub_repos import Blob
from hub_server import Hub
from rich.console import Console
from tiny import mygpt2_config

from mymodels import MyGPT2ForCausalLM
from mymodels.checkpoints import write_manifest
from mymodels.hub import build_repo
from mymodels.hub.checks import Check
from mymodels.hub.pushing import HubError, load_snippet, push
from mymodels.hub.verifying import Verification
from mymodels.training.tokenizers import train_gpt2_tokenizer

REPO = "me/private-model"
ROOT = str(Path(__file__).parents[2])
CARD = "---\nlicense: apache-2.0\n---\n\n# card\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_gpt2_tokenizer(["the cat sat on the mat", "a dog"], vocab_size=300, model_max_length=64)
    torch.manual_seed(0)
    model = MyGPT2ForCausalLM(mygpt2_config(vocab_size=len(tokenizer)))
    return build_repo(
        model, tokenizer, tmp_path_factory.mktemp("push") / "built", card=CARD, golden=False, max_shard_size="60KB"
    )


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "built"))


@pytest.fixture
def send(hub: Hub, folder: Path):
    """`push(folder, REPO)` as me, unverified unless `verify` is given."""

    def call(path: Path = folder, repo_id: str = REPO, **options):
        options = {"token": TOKEN, "endpoint": hub.url, "no_verify": "verify" not in options, **options}
        return push(path, repo_id, **options)

    return call


def local(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def remote(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    return {name: data for name, data in hub.repos[REPO].files(revision).items() if name != ".gitattributes"}


def uploads(hub: Hub) -> int:
    return len(hub.asked("PUT /storage"))


# the way it goes


def test_a_private_repo_holds_the_folder(hub, send, folder) -> None:
    result = send()
    assert hub.repos[REPO].private and remote(hub) == local(folder)
    assert result.commit == hub.repos[REPO].refs["refs/heads/main"] and set(result.uploaded) == set(local(folder))
    assert not hub.leaks  # the storage is another host, it never saw the token


def test_it_loads_elsewhere_with_the_token_alone_and_by_the_snippet(hub, send, folder, client) -> None:
    """In a process without mymodels, from an empty cache."""
    result = send()
    assert f'"revision": "{result.commit}", "code_revision": "{result.commit}"' in result.snippet
    code = f"""
import os, sys
sys.modules["mymodels"] = None
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModel
try:
    AutoModel.from_pretrained({REPO!r}, trust_remote_code=True)
except OSError as error:
    print("refused:", error)
private = AutoModel.from_pretrained({REPO!r}, trust_remote_code=True, token={TOKEN!r})
os.environ["HF_TOKEN"] = {TOKEN!r}
{result.snippet}
stored = {{}}
for shard in Path({str(folder)!r}).glob("*.safetensors"):
    stored.update(load_file(shard))
assert type(model).__module__.startswith("transformers_modules") and len(stored) > 20
assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items()), "other weights"
assert all(torch.equal(stored["model." + name], tensor) for name, tensor in private.state_dict().items())
print("the same", type(private).__name__, type(model).__name__, tokenizer("the cat").input_ids)
"""
    process = client(code)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"refused: {REPO} is not a local folder and is not a valid model identifier" in output
    assert "the same MyGPT2Model MyGPT2ForCausalLM [" in output and not hub.leaks


def test_a_second_push_sends_nothing_and_a_changed_file_alone(hub, send, folder) -> None:
    first = send()
    hub.requests.clear()
    second = send()
    assert second.commit == first.commit and second.uploaded == []
    assert {state.state for state in second.files} == {"unchanged", "only there, kept"}
    assert not hub.asked("preupload|/commit/|PUT|batch")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\1")
    write_manifest(folder)
    third = send()
    assert third.uploaded == ["manifest.json", shard.name] and uploads(hub) == 1 and remote(hub) == local(folder)


def test_what_a_loader_would_still_read_is_removed_and_the_rest_kept(hub, send, folder) -> None:
    repo = hub.create(REPO)
    old = ("model.safetensors", "pytorch_model.bin", "old.py", "added_tokens.json", "sub/old.py")
    kept = ("picture.png", "onnx/model.onnx", "notes.pdf")
    repo.commit("refs/heads/main", {name: Blob.regular(b"old") for name in (*old, *kept)}, "earlier")
    states = {state.name: state.state for state in send().files}
    assert [states[name] for name in old] == ["removed"] * 5
    assert [states[name] for name in kept] == ["only there, kept"] * 3
    assert set(remote(hub)) == {*local(folder), *kept}


def test_dry_run_changes_nothing(hub, send) -> None:
    console = Console(record=True, width=100)
    result = send(dry_run=True, console=console)
    text = console.export_text()
    assert not hub.repos and result.commit is None and not result.uploaded
    assert "modeling_mygpt2.py" in text and "new" in text and "files to upload" in text
    assert all(method == "GET" for method, _, _ in hub.requests)
    repo = hub.create(REPO)
    repo.commit("refs/heads/main", {"\x1b[31m[red]evil.png": Blob.regular(b"x")}, "hostile")
    send(dry_run=True, console=console)
    assert len(repo.commits) == 2 and r"\x1b[31m[red]evil.png" in console.export_text()


def test_branch_tag_pull_request_and_message(hub, send, folder) -> None:
    first = send(tag="v1", commit_message="First")
    repo = hub.repos[REPO]
    assert repo.refs["refs/tags/v1"] == first.commit
    assert repo.messages[first.commit] == "First (not verified: --no-verify)"
    send(tag="v1")  # the same commit: nothing to complain of
    (folder / "README.md").write_text(CARD + "more")
    write_manifest(folder)
    with pytest.raises(HubError, match="the tag v1 of me/private-model points to another commit"):
        send(tag="v1")
    asked = send(create_pr=True)
    assert asked.pr_url == f"{hub.url}/{REPO}/discussions/1" and repo.refs["refs/pr/1"] == asked.commit
    assert repo.refs["refs/heads/main"] == first.commit and remote(hub, "refs/pr/1") == local(folder)
    branch = send(revision="next")
    assert repo.refs["refs/heads/next"] == branch.commit and repo.refs["refs/heads/main"] == first.commit
    for options, reason in (
        ({"revision": first.commit}, "a push makes a new commit and cannot go to"),
        ({"create_pr": True, "revision": "next"}, "a pull request is always to main, not to next"),
        ({"create_pr": True, "tag": "v2"}, "a pull request cannot be tagged"),
    ):
        with pytest.raises(ValueError, match=reason):
            send(**options)


def test_large_files_go_in_parts_and_long_listings_in_pages(hub, send, folder) -> None:
    hub.part_size, hub.page_size = 20_000, 3
    send()
    assert remote(hub) == local(folder) and hub.asked("PUT .*/2.signed") and hub.asked("GET .*cursor=9")


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, 'AutoModelForCausalLM.from_pretrained("me/x", **pinned)'),
        ({"architectures": ["BertModel"]}, 'AutoModel.from_pretrained("me/x", **pinned)'),
        ({"architectures": ["XForNothing"]}, 'AutoModel.from_pretrained("me/x", **pinned)'),
        ({}, 'AutoModel.from_pretrained("me/x", **pinned)'),
        (
            {"architectures": ["A"], "auto_map": {"AutoModelForMaskedLM": "m.A", "AutoModel": "m.B"}},
            "= AutoModelForMaskedLM",
        ),
        ({"architectures": ["A"], "auto_map": {"AutoModel;evil": "m.A"}}, "= AutoModel.from_pretrained("),
        ({"architectures": 3, "auto_map": "x"}, "= AutoModel.from_pretrained("),
    ],
)
def test_the_snippet_names_the_class_and_only_a_class(tmp_path, config: dict, line: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    snippet = load_snippet(tmp_path, "me/x", "a" * 40)
    compile(snippet, "snippet", "exec")
    assert line in snippet and "evil" not in snippet and "AutoTokenizer" not in snippet
    assert ("code_revision" in snippet) == isinstance(config.get("auto_map"), dict)


def test_a_damaged_config_is_refused_before_anything_is_sent(hub, send, folder) -> None:
    (folder / "config.json").write_text("{")
    write_manifest(folder)
    with pytest.raises(ValueError, match=r"config\.json: it is not valid JSON"):
        send()
    assert not hub.requests


# verification first


def test_a_failed_verification_is_shown_and_nothing_is_sent(hub, send) -> None:
    failed = Check("auto_map", "failed", "modeling_x.py has no class X", "config.json", "name the right class")
    found = Verification("folder", [Check("weights", "ok"), failed], {}, [])
    with pytest.raises(
        ValueError,
        match=r"verification failed \(1 checks\):\n  auto_map: modeling_x.py has no class X \(config.json\); name",
    ):
        send(verify=lambda path: found)
    assert not hub.requests


def test_a_passed_verification_leaves_no_remark(hub, send, folder) -> None:
    seen = []
    result = send(verify=lambda path: seen.append(path) or Verification(str(path), [], {}, []))
    assert seen == [folder] and hub.repos[REPO].messages[result.commit].startswith("Push with mymodels 0")
    assert "not verified" not in hub.repos[REPO].messages[result.commit]


# what does not leave the house


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("training_args.bin", "a pickle"),
        ("optimizer.pt", "a pickle"),
        ("rng.PKL", "a pickle"),
        (".env", "the name of a secret"),
        ("id_rsa", "the name of a secret"),
        ("credentials.json", "the name of a secret"),
        ("my_secrets.py", "the name of a secret"),
        ("hf_token.txt", "the name of a secret"),
        ("notes.txt", "not a known kind of model file"),
        ("data.parquet", "not a known kind of model file"),
        ("explore.ipynb", "a temporary file"),
        (".ipynb_checkpoints/base.py", "a temporary file"),
        ("__pycache__/layers.cpython-311.pyc", "a temporary file"),
        ("checkpoint-500/model.safetensors", "a temporary file"),
        ("model\x1b[31m.safetensors", "a name with control characters"),
    ],
)
def test_strays_are_refused_by_name(hub, send, folder, name: str, reason: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=reason) as refused:
        send(allow=["*.pkl", ".env"])
    assert (name if name.isprintable() else repr(name)[1:-1]) in str(refused.value) and "\x1b" not in str(refused.value)
    assert not hub.requests


def test_links_are_refused_and_all_strays_named_at_once(hub, send, folder, tmp_path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "LICENSE").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "private" / "LICENSE")
    (folder / "assets").symlink_to(tmp_path / "private")
    (folder / "a.pt").write_bytes(b"x")
    os.mkfifo(folder / "vocab.txt")
    with pytest.raises(
        ValueError, match=r"a\.pt \(a pickle.*LICENSE \(a link or|LICENSE \(a link or.*a\.pt \(a pickle"
    ) as e:
        send()
    assert "assets (a link or no regular file)" in str(e.value) and "vocab.txt (a link or" in str(e.value)
    assert not hub.requests


def test_a_kind_can_be_allowed_and_git_and_cache_stay_out(hub, send, folder) -> None:
    (folder / "labels.txt").write_text("a")
    write_manifest(folder)
    for name in (".git", ".cache"):
        (folder / name).mkdir()
        (folder / name / "x.py").write_text("x")
    send(allow=["labels.txt"])
    assert remote(hub)["labels.txt"] == b"a" and not [
        name for name in remote(hub) if name.startswith((".git/", ".cache"))
    ]


def test_the_own_token_in_a_file_is_refused(hub, send, folder) -> None:
    (folder / "README.md").write_text(CARD + TOKEN)
    write_manifest(folder)
    with pytest.raises(ValueError, match=r"README\.md contains your Hub token") as refused:
        send()
    assert TOKEN not in str(refused.value) and not hub.requests


def test_a_folder_that_is_not_its_manifest_is_refused(hub, send, folder) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"\1")
    with pytest.raises(ValueError, match=rf"manifest.json records another {shard.name}"):
        send()
    shard.unlink()
    with pytest.raises(ValueError, match=rf"manifest.json lists {shard.name}, which is missing"):
        send()
    shard.write_bytes(content)
    (folder / "LICENSE").write_text("x")
    with pytest.raises(ValueError, match=r"manifest.json does not list LICENSE"):
        send()
    assert not hub.requests


# public and private


def test_a_public_repo_is_refused_unless_asked_for_and_the_other_way_round(hub, send) -> None:
    repo = hub.create(REPO, private=False)
    with pytest.raises(HubError, match=r"me/private-model is public on the Hub, but a push is private by default"):
        send()
    assert not hub.asked("POST|PUT") and len(repo.commits) == 1
    send(private=False)
    repo.private = True
    with pytest.raises(HubError, match=r"me/private-model is private on the Hub, and a push does not make it public"):
        send(private=False)
    send(private=None)


def test_a_hub_that_makes_a_public_repo_gets_no_file(hub, send, monkeypatch) -> None:
    create = hub.create
    monkeypatch.setattr(hub, "create", lambda repo_id, private: create(repo_id, False))
    with pytest.raises(HubError, match="is public on the Hub"):
        send()
    assert not hub.asked("preupload|PUT|commit")


# what goes wrong on the way


def test_a_killed_push_resumes_with_what_had_not_arrived(hub, send, folder, client) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    last = json.loads((folder / "manifest.json").read_text())["files"][shards[-1].name]["sha256"]
    hub.fail(f"PUT .*{last}", "hold")
    code = f"from mymodels.hub.pushing import push; push({str(folder)!r}, {REPO!r}, no_verify=True)"
    process = client(code, token=TOKEN, path=ROOT)
    assert hub.held.wait(60), process.communicate(timeout=5)
    deadline = time.monotonic() + 30
    while len(hub.repos[REPO].lfs) < len(shards) - 1 and time.monotonic() < deadline:
        time.sleep(0.01)  # the others are on their way
    process.kill()
    assert TOKEN not in process.communicate()[0]
    hub.release.set()
    arrived = set(hub.repos[REPO].lfs)
    assert len(arrived) == len(shards) - 1 and set(hub.repos[REPO].files()) == {".gitattributes"}
    hub.requests.clear()
    send()
    assert uploads(hub) == 1 and hub.asked(f"PUT .*{last}") and remote(hub) == local(folder)


ROUTES = ("PUT /storage", "batch", "preupload", "/commit/", "repos/create", "GET .*/tree", "/tag/")
KINDS = (503, 429, "cut", "lost")
FIRST = {("PUT /storage", "cut"), ("batch", 429), ("preupload", 503), ("/commit/", "lost"), ("/commit/", 429)}
FIRST |= {("repos/create", "lost"), ("GET .*/tree", 503), ("/tag/", "cut")}


@pytest.mark.parametrize(
    ("route", "kind"),
    [
        pytest.param(route, kind, marks=[] if (route, kind) in FIRST else pytest.mark.slow)
        for route in ROUTES
        for kind in KINDS
    ],
)
def test_overload_faults_and_dropped_connections_are_overcome(hub, send, folder, waits, route: str, kind) -> None:
    hub.fail(route, kind, times=1 if kind == "lost" else 2, **({"Retry_After": "7"} if kind == 429 else {}))
    result = send(tag="v1")
    assert not hub.faults and remote(hub) == local(folder) and hub.repos[REPO].refs["refs/tags/v1"] == result.commit
    assert len(hub.repos[REPO].commits) == 2  # the answer that was lost did not lead to a second commit
    assert len(waits) >= (1 if kind == "lost" else 2) and max(waits) <= 10 and (kind != 429 or min(waits) >= 7)


def test_an_upload_cut_in_the_middle_of_a_part_goes_on(hub, send, folder, waits) -> None:
    hub.part_size = 20_000
    hub.fail("PUT .*/2.signed", "cut", times=3)
    send()
    assert remote(hub) == local(folder) and not hub.faults


@pytest.mark.parametrize(
    ("route", "status", "sentence"),
    [
        ("GET /api/models", 401, "needs a token that the Hub accepts: log in with `hf auth login`, or set HF_TOKEN"),
        ("repos/create", 403, "use one with write permission for it"),
        ("preupload", 404, "does not exist or is not visible to this token"),
        ("/commit/", 409, "has this already, or is being changed by someone else"),
        ("/commit/", 412, "was changed by someone else in the meantime, nothing was committed"),
        ("batch", 413, "save the model in smaller shards"),
        ("/commit/", 429, "or by this account: wait 3 seconds, and try again"),
        ("/commit/", 500, "the Hub had repeated server errors for me/private-model: try again later"),
        ("PUT /storage", 503, "the Hub had repeated server errors for me/private-model: try again later"),
        ("validate-yaml", 502, "the Hub had repeated server errors for me/private-model: try again later"),
        ("/commit/", "cut", "failed: check it and try again; uploaded files are kept"),
        ("PUT /storage", "cut", "failed: check it and try again; uploaded files are kept"),
    ],
)
def test_every_status_is_one_sentence_without_the_token(
    hub, send, waits, capfd, caplog, route, status, sentence
) -> None:
    message = f"no, {TOKEN}!\n\x1b[31mand hf_otherSecret123456 too"
    hub.fail(route, status, times=100, message=message, Retry_After="3", X_HF_Warning=f"topic{route}{status}; {TOKEN}")
    with (
        caplog.at_level(logging.DEBUG),
        warnings.catch_warnings(record=True) as warned,
        pytest.raises(HubError) as error,
    ):
        warnings.simplefilter("always")
        send()
    text = str(error.value)
    assert sentence in text and REPO in text and text.isprintable()
    assert error.value.__cause__ is None and error.value.__context__ is None
    output = "".join((text, *capfd.readouterr(), caplog.text, *(str(warning.message) for warning in warned)))
    assert TOKEN not in output and "hf_otherSecret" not in output
    asked = [path for _, path, _ in hub.asked(route)]
    assert all(asked.count(path) <= 6 for path in asked)  # bounded


def test_a_token_of_another_form_is_hidden_too(hub, send, monkeypatch) -> None:
    token = "eyJhbGci.eyJzdWIi.c2lnbmF0dXJl"
    monkeypatch.setenv("HF_TOKEN", token)
    hub.fail("GET", 403, message=f"{token} may not")
    with pytest.raises(HubError, match="403: hf_… may not"):
        send(token=None)
    hub.tokens[token] = ("me", "write")
    send(token=None)  # it is the one that was sent


def test_real_refusals_of_the_server(hub, send) -> None:
    with pytest.raises(HubError, match="someone/else: use one with write permission for it"):
        send(repo_id="someone/else")
    with pytest.raises(HubError, match="use one with write permission"):
        send(token="hf_reader_of_me_0123456789")
    with pytest.raises(HubError, match="log in with `hf auth login`"):
        send(token=False)
    with pytest.raises(HubError, match="log in with `hf auth login`") as refused:
        send(token="hf_unknown_token_99999")
    assert "hf_unknown_token_99999" not in str(refused.value)
    for name in ("gpt2", "me/../x", "me/a--b", "me/x.git", "https://me/x"):
        with pytest.raises(ValueError, match="is not the name of a Hub repo"):
            send(repo_id=name)
    assert not hub.repos


def test_a_card_that_the_hub_refuses(hub, send, folder) -> None:
    (folder / "README.md").write_text("---\nlicense: 7\n---\n")
    write_manifest(folder)
    with pytest.raises(HubError, match='"license" must be a string'):
        send()


@pytest.mark.parametrize("when", ["lfs_batch", "validate_yaml"])  # before and after the last look at the branch
def test_someone_else_commits_meanwhile(hub, send, monkeypatch, when: str) -> None:
    repo = hub.create(REPO)
    verb = getattr(hub.RequestHandlerClass, when)

    def interrupt(handler, **arguments):
        repo.commit("refs/heads/main", {"theirs.md": Blob.regular(b"x")}, "theirs")
        return verb(handler, **arguments)

    monkeypatch.setattr(hub.RequestHandlerClass, when, interrupt)
    with pytest.raises(HubError, match="was changed by someone else in the meantime, nothing was committed"):
        send()
    assert set(repo.files()) == {"theirs.md"}


# reading again


@pytest.mark.parametrize("damage", ["content", "large content", "listing", "large listing", "missing", "size"])
def test_corruption_on_the_hub_is_found_by_reading_again(hub, send, waits, monkeypatch, damage: str) -> None:
    verb = hub.RequestHandlerClass.commit

    def corrupt(handler, repo: str, rev: str):
        answer = verb(handler, repo, rev)
        found = hub.repos[repo]
        files = found.commits[answer[2]["commitOid"]]
        large = next(name for name in files if name.endswith(".safetensors"))
        if damage == "content":  # the listing still has the old hash
            files["config.json"].content = files["config.json"].content.replace(b"silu", b"gelu").replace(b"0", b"1")
        elif damage == "large content":
            content = found.lfs[files[large].sha256]
            found.lfs[files[large].sha256] = content[:-1] + bytes([content[-1] ^ 1])
        elif damage == "missing":
            del files["base.py"]
        elif damage == "size":
            files["base.py"].size -= 1
        else:
            name = large if damage == "large listing" else "base.py"
            files[name].oid = "0" * 40
            files[name].sha256 = "0" * 64 if files[name].sha256 else ""
        return answer

    monkeypatch.setattr(hub.RequestHandlerClass, "commit", corrupt)
    what = {
        "content": "config.json was downloaded with",
        "missing": "base.py is missing",
        "size": "base.py has .* bytes",
    }
    what |= {"large content": "model-00001.* was downloaded with", "listing": "base.py has the git hash 0000"}
    what |= {"large listing": "model-00001.* has the SHA-256 0000"}
    with pytest.raises(HubError, match=f"at .* differs from what was pushed: {what[damage]}.*do not use this commit"):
        send()
