"""Faults of the files: names, links, archives, pickles, secrets, strays, weights."""

import io
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

from edits import (
    MODELING,
    TOKENIZER,
    Edit,
    Fault,
    append,
    both,
    config,
    remove,
    replace,
    write,
)
from safetensors.torch import load_file, save_file


def zipped(file: str, *members: tuple[str, bytes]) -> Edit:
    def edit(folder: Path) -> None:
        with zipfile.ZipFile(folder / file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members:
                archive.writestr(name, data)

    return edit


def tarred(file: str, link: str) -> Edit:
    def edit(folder: Path) -> None:
        with tarfile.open(folder / file, "w") as archive:
            member = tarfile.TarInfo("vocab.txt")
            member.type, member.linkname = tarfile.SYMTYPE, link
            archive.addfile(member)

    return edit


class _Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("true",)


def nan_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def leftover_shard(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00004.safetensors", folder / "model-00001-of-00002.safetensors")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def huge(file: str) -> Edit:
    def edit(folder: Path) -> None:
        with (folder / file).open("wb") as handle:
            handle.truncate(60 * 10**9)  # a hole: takes no space

    return edit


def disguised_pickle() -> bytes:
    """`posix.system`, with the harmless `collections.OrderedDict` pushed and popped before it is looked up."""
    text = lambda word: b"\x8c" + bytes([len(word)]) + word  # noqa: E731
    return b"\x80\x04" + text(b"posix") + text(b"system") + text(b"collections") + text(b"OrderedDict") + b"00\x93."


def memoised_pickle() -> bytes:
    """`posix.system`, its two words fetched from the memo."""
    text = lambda word: b"\x8c" + bytes([len(word)]) + word + b"\x94"  # noqa: E731
    return b"\x80\x04" + text(b"system") + text(b"posix") + b"h\x01h\x00\x93."


def torch_zip() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": _Evil()}))
    return data.getvalue()


# Put together here, so that no tool takes this file for a leak
HF_TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH"
AWS_KEY = "AKIA" + "ABCDEFGHIJKLMNOP"
GITHUB = "ghp_" + "0123456789abcdefghijABCDEFGHIJ012345"
OPENAI = "sk-proj-" + "abcdefghijklmnopqrstuvwxyz0123456789ABCD"
PRIVATE_KEY = "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjE=\n"


FILES = [
    Fault("newline in a name", write("vo\ncab.txt", "a"), "file names", "vo", "U+000A"),
    Fault("reversed text in a name", write("a\u202etxt.exe.md", "a"), "file names", "202e", "U+202E"),
    Fault("names equal but for case", write("Config.JSON", "{}"), "file names", "onfig", "same file on macOS"),
    Fault(
        "link out", lambda f: (f / "vocab.txt").symlink_to("/etc/hostname"), "links", "vocab.txt", "out of the folder"
    ),
    Fault("link to itself", lambda f: (f / "loop").symlink_to("loop"), "links", "loop", "or nowhere"),
    Fault("link to a folder", lambda f: (f / "up").symlink_to(".."), "links", "up", "is a link to '..'"),
    Fault("link inside", lambda f: (f / "copy.py").symlink_to(MODELING), "links", "copy.py", "would be there twice"),
    Fault("pipe", lambda f: os.mkfifo(f / "model.bin"), "links", "model.bin", "pipe"),
    Fault(
        "tokenizer file elsewhere",
        both(config("tokenizer_config.json", vocab_file="../../etc/passwd"), write("tokenizer.json", TOKENIZER)),
        "paths",
        "vocab_file",
        "outside the folder",
    ),
    Fault(
        "path of the author's machine",
        config(_name_or_path="/home/me/run7"),
        "paths",
        "_name_or_path",
        "/home/me/run7",
        "warning",
    ),
    Fault(
        "zip that climbs out", zipped("extra.zip", ("../../x.py", b"x")), "archives", "extra.zip", "outside its folder"
    ),
    Fault(
        "zip bomb", zipped("data.zip", ("a", b"0" * 30_000_000)), "archives", "data.zip", "would unpack to 30,000,000"
    ),
    Fault("tar with a link", tarred("data.tar", "/etc/passwd"), "archives", "data.tar", "link or a device"),
    Fault("archive", zipped("data.zip", ("a.txt", b"a")), "archives", "data.zip", "was not checked", "warning"),
    Fault("malicious pickle", write("extra.pkl", pickle.dumps(_Evil())), "pickles", "extra.pkl", "posix.system"),
    Fault("malicious torch file", write("optimizer.extra", torch_zip()), "pickles", "optimizer.extra", "posix.system"),
    Fault("old pickle", write("extra.pkl", pickle.dumps(_Evil(), 0)), "pickles", "extra.pkl", "posix.system"),
    Fault("plain pickle", write("ids.pkl", pickle.dumps([1, 2])), "pickles", "ids.pkl", "can run code", "warning"),
    Fault(
        "Hugging Face token",
        append("requirements.txt", f"# {HF_TOKEN}\n"),
        "secrets",
        "requirements.txt:3",
        "Hugging Face",
    ),
    Fault("AWS key", write("notes.md", f"a\nkey = {AWS_KEY}\n"), "secrets", "notes.md:2", "AWS access key"),
    Fault("GitHub token", write("train.sh", f"git clone https://x:{GITHUB}"), "secrets", "train.sh:1", "GitHub token"),
    Fault("OpenAI key", append(MODELING, f"\n# {OPENAI}\n"), "secrets", MODELING, "OpenAI key"),
    Fault("private key", write("key.txt", PRIVATE_KEY), "secrets", "key.txt:1", "private key"),
    Fault("git repository", write(".git/config", "[core]"), "stray files", ".git", "git repository"),
    Fault(
        "bytecode", write("__pycache__/a.cpython-311.pyc", b"\0"), "stray files", "__pycache__", "cannot be reviewed"
    ),
    Fault("notebook checkpoint", write(".ipynb_checkpoints/a.md", "x"), "stray files", ".ipynb", "Jupyter"),
    Fault("file browser", write(".DS_Store", b"\0\0\0\1Bud1"), "stray files", ".DS_Store", "file browser"),
    Fault("unfinished write", write("model.safetensors.tmp", b"\0"), "stray files", ".tmp", "unfinished write"),
    Fault("environment file", write(".env", "A=1"), "stray files", ".env", "secrets"),
    Fault(
        "training state", write("trainer_state.json", "{}"), "stray files", "trainer_state", "training run", "warning"
    ),
    Fault("beyond the Hub's limit", huge("data.bigfile"), "file sizes", "data.bigfile", "60.0 GB"),
    Fault("empty file", write("vocab.json", ""), "file sizes", "vocab.json", "is empty"),
    Fault("truncated weights", truncated, "weights", "model.safetensors", "truncated"),
    Fault("no weights", remove("model.safetensors"), "weights", "", "no weights", "warning"),
    Fault(
        "index out of the folder",
        replace("model.safetensors.index.json", "model-00001-of-00004", "../model-00001-of-00004"),
        "weights",
        "index.json",
        "leads out of the folder",
        base="stock_llama",
    ),
    Fault(
        "a shard missing",
        remove("model-00002-of-00004.safetensors"),
        "weights",
        "model-00002",
        "missing",
        base="stock_llama",
    ),
    Fault(
        "file beside the manifest", write("notes.txt", "x"), "manifest", "notes.txt", "not in manifest", base="mygpt2"
    ),
    Fault(
        "changed after the manifest",
        replace("README.md", "##", "#!"),
        "manifest",
        "README.md",
        "SHA-256",
        base="mygpt2",
    ),
    Fault("disguised pickle", write("extra.pkl", disguised_pickle()), "pickles", "extra.pkl", "something.hidden"),
    Fault("memoised pickle", write("extra.pkl", memoised_pickle()), "pickles", "extra.pkl", "posix.system"),
    Fault(
        "registered extension", write("extra.pkl", b"\x80\x02\x82\x01."), "pickles", "extra.pkl", "something.registered"
    ),
    Fault(
        "pickle without an end", write("extra.pkl", b"\x80\x04]"), "pickles", "extra.pkl", "cannot be read completely"
    ),
    Fault("name that Windows cannot have", write("a:b.md", "x"), "file names", "a:b.md", "on Windows", "warning"),
    Fault("damaged archive", write("data.tar.gz", b"no archive"), "archives", "data.tar.gz", "claims to be"),
    Fault("card of 11 MB", write("README.md", "x\n" * 5_500_000), "file sizes", "README.md", "11.0 MB"),
    Fault("NaN weights", nan_weights, "weights", "model.safetensors", "'model.norm.weight' has 1 NaN"),
    Fault(
        "shard of an older save", leftover_shard, "weights", "model-00001-of-00002", "not named by", base="stock_llama"
    ),
    Fault(
        "two checkpoints",
        lambda f: shutil.copy(f / "model-00001-of-00004.safetensors", f / "model.safetensors"),
        "weights",
        "model.safetensors",
        "two checkpoints",
        base="stock_llama",
    ),
]
