"""Secrets in text files: tokens and keys of the services that people who train models use."""

import re
from collections.abc import Iterator
from pathlib import Path

from .folder import Finding, Folder

MAX_BYTES = 100_000_000
_CHUNK = 1 << 20
_OVERLAP = 4096

# what it is → how it looks; the forms are the services' own, long enough that no word or hash looks like one
_FORMS: dict[str, str] = {
    "a Hugging Face token": r"\bhf_[A-Za-z]{30,40}\b|\bapi_org_[A-Za-z]{30,40}\b",
    "an OpenAI key": r"\bsk-(?:proj|svcacct|admin)-[\w-]{20,}|\bsk-[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}\b|\bsk-[A-Za-z0-9]{48}\b",
    "an Anthropic key": r"\bsk-ant-[\w-]{20,}",
    "an AWS access key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_[A-Za-z0-9_]{50,}",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "a Google key": r"\bAIza[\w-]{35}\b",
    "a Slack token": r"\bxox[abposr]-[A-Za-z0-9-]{20,}",
    "a Stripe key": r"\b[sr]k_live_[A-Za-z0-9]{20,}",
    "a PyPI token": r"\bpypi-AgEIcHlwaS5vcmc[\w-]{30,}",
    "a Weights & Biases key": r"(?i:wandb[\w.]{0,20}key)\W{1,6}[0-9a-f]{40}\b",
    "an AWS secret key": r"(?i:aws_secret_access_key)\W{1,6}[A-Za-z0-9/+=]{40}",
    "a private key": r"-----BEGIN (?:[A-Z]{2,9} ){0,2}PRIVATE KEY-----",
    "a password in an address": r"\b(?:https?|ftp|postgres(?:ql)?|mysql|mongodb(?:\+srv)?|redis|amqp)://[\w.%-]{1,64}:[\w.%!$&*+-]{6,128}@[\w-]{1,63}",
}
_ANY = re.compile("|".join(f"(?P<s{i}>{form})" for i, form in enumerate(_FORMS.values())))
_HINT = re.compile(  # fast to look for; without one of these no form above can match
    r"hf_|api_org_|sk-|sk_live|rk_live|AKIA|ASIA|gh[pousr]_|github_pat|glpat|AIza|xox|pypi-|(?i:wandb|aws_secret)|-----BEGIN|://"
)


def secrets(folder: Folder) -> Iterator[Finding]:
    """Tokens and keys, named by what they are and where, never shown."""
    for name, path in folder.files.items():
        for line, kind in find_secrets(path):
            where = f"{name}:{line}"
            remedy = "revoke it now (removing it is not enough once it was shared), then remove it"
            yield Finding("failed", f"{name} contains what looks like {kind}", where, remedy)


def find_secrets(path: Path) -> Iterator[tuple[int, str]]:
    """(line, what it is) of every secret in a text file, each kind once; nothing for a binary file."""
    told: set[str] = set()
    with path.open("rb") as file:
        data = file.read(8192)
        if b"\0" in data:
            if not data.startswith((b"\xff\xfe", b"\xfe\xff")):
                return
            data = path.read_bytes()[:_CHUNK].decode("utf-16", errors="replace").encode()  # written by Windows
        tail, line, read = b"", 1, 0
        while data and read < MAX_BYTES:
            read += len(data)
            block = tail + data
            text = block.decode("latin-1")
            if _HINT.search(text):
                for match in _ANY.finditer(text):
                    kind = list(_FORMS)[int(str(match.lastgroup)[1:])]
                    if kind not in told and not _is_placeholder(match[0]):
                        told.add(kind)
                        yield line + text.count("\n", 0, match.start()), kind
            tail = block[-_OVERLAP:]
            line += text.count("\n", 0, len(block) - len(tail))
            data = file.read(_CHUNK)


def _is_placeholder(text: str) -> bool:
    """What a manual writes where a secret goes: one character over and over, or names that stand for anything."""
    if text.startswith("-----"):
        return False
    longest = max(re.findall(r"[A-Za-z0-9]+", text), key=len)
    words = r"x{4}|X{4}|\.{3}|example\.|//user(name)?:|:pass(word)?@|<|(?i:your[_-])"
    return len(set(longest)) < 6 or re.search(words, text) is not None


CHECKS = {"secrets": secrets}
