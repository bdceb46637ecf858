"""Secrets in text files: tokens and keys of the services that people who train models use."""

import re
from collections.abc import Iterator
from pathlib import Path

from .repo_snapshot import Finding, Folder

MAX_BYTES = 100_000_000
_CHUNK = 1 << 20
_OVERLAP = 4096

# kind → pattern; the services' formats, long enough that no word or hash matches
_FORMS: dict[str, str] = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,40}\b|\bapi_(?:org_)?[A-Za-z]{30,40}\b",
    "an OpenAI key": r"\bsk-(?:proj|svcacct|admin)-[\w-]{20,}|\bsk-[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}\b|\bsk-[A-Za-z0-9]{48}\b",
    "an Anthropic key": r"\bsk-ant-[\w-]{20,}",
    "an AWS access key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_[A-Za-z0-9_]{50,}",
    "a GitLab token": r"\bgl(?:pat|dt|rt|ptt|ft|cbt|soat)-[\w-]{20,}",
    "a Google key": r"\bAIza[\w-]{35}\b",
    "a Slack token": r"\bxox[abposr]-[A-Za-z0-9-]{20,}",
    "a Stripe key": r"\b[sr]k_live_[A-Za-z0-9]{20,}",
    "a PyPI token": r"\bpypi-AgEIcHlwaS5vcmc[\w-]{30,}",
    "a Weights & Biases key": r"(?i:wandb[\w.]{0,20}key)\W{1,6}[0-9a-f]{40}\b",
    "an AWS secret key": r"(?i:aws_secret_access_key)\W{1,6}[A-Za-z0-9/+=]{40}",
    "a private key": r"-----BEGIN (?:[A-Z0-9]{2,9} ){0,2}PRIVATE KEY(?: BLOCK)?-----|\bPuTTY-User-Key-File-\d: ",
    "a login of .netrc": r"\bmachine[ \t]+[\w.-]+\s+(?:login|user)[ \t]+\S+\s+password[ \t]+\S{6,}",
    "a webhook of Slack": r"\bhooks\.slack\.com/(?:services|workflows)/[A-Z0-9]{8,}/[A-Z0-9]{8,}/[A-Za-z0-9]{16,}",
    "a webhook of Discord": r"\bdiscord(?:app)?\.com/api/webhooks/\d{16,20}/[\w-]{50,}",
    "a webhook of Teams": r"\b[\w.-]+\.webhook\.office\.com/webhookb2/[0-9a-f-]{36}@[0-9a-f-]{36}",
    "a token of a Telegram bot": r"\b\d{8,10}:AA[\w-]{33}\b",
    "a Google OAuth secret": r"\bGOCSPX-[\w-]{28}|\bya29\.[\w-]{30,}",
    "an npm token": r"\bnpm_[A-Za-z0-9]{36}\b|_authToken\s*=\s*[\w-]{20,}",
    "a Docker Hub token": r"\bdckr_pat_[\w-]{27}",
    "a SendGrid key": r"\bSG\.[\w-]{22}\.[\w-]{43}",
    "a Replicate, Groq or Perplexity key": r"\br8_[A-Za-z0-9]{37}\b|\bgsk_[A-Za-z0-9]{48,}\b|\bpplx-[A-Za-z0-9]{48,}\b",
    "a Databricks token": r"\bdapi[0-9a-f]{32}\b",
    "an Azure key": r"\bAccountKey=[A-Za-z0-9+/]{60,}={0,2}|\bSharedAccessKey=[A-Za-z0-9+/]{40,}=?",
    "a JSON Web Token": r"\beyJ[\w-]{15,}\.eyJ[\w-]{15,}\.[\w-]{20,}",
    "a password for HTTP": r"(?i:authorization)[\"']?\s{0,2}[:=]\s{0,2}[\"']?(?:Basic|Bearer)[ \t]+[A-Za-z0-9+/._-]{20,}={0,2}",
    "a password or key in a setting": r"(?i:password|passwd|secret_key|client_secret|api_key|access_token|auth_token)[\"']?\s{0,3}[:=]"
    r"\s{0,3}[\"'](?=[^\"'\n]{0,99}\d)(?=[^\"'\n]{0,99}[A-Za-z])[\w+/=!@#%^&*.-]{16,100}[\"']",
    "a password in an address": r"\b(?:https?|ftp|postgres(?:ql)?|mysql|mongodb(?:\+srv)?|rediss?|amqps?|ssh|git|smtp)://[\w.%-]{1,64}:[\w.%!$&*+-]{6,128}@[\w-]{1,63}",
}
_COMPILED = {kind: re.compile(form) for kind, form in _FORMS.items()}
# texts that each pattern requires: searching for these first is many times faster
_HINTS: dict[str, tuple[str, ...]] = {
    "a Hugging Face token": ("hf_", "api_"),
    "an OpenAI key": ("sk-",),
    "an Anthropic key": ("sk-ant-",),
    "an AWS access key": ("AKIA", "ASIA"),
    "a GitHub token": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    "a GitLab token": ("glpat-", "gldt-", "glrt-", "glptt-", "glft-", "glcbt-", "glsoat-"),
    "a Google key": ("AIza",),
    "a Slack token": ("xox",),
    "a Stripe key": ("k_live_",),
    "a PyPI token": ("pypi-",),
    "a Weights & Biases key": ("wandb",),
    "an AWS secret key": ("aws_secret",),
    "a private key": ("-----BEGIN", "PuTTY-"),
    "a login of .netrc": ("machine",),
    "a webhook of Slack": ("hooks.slack",),
    "a webhook of Discord": ("api/webhooks",),
    "a webhook of Teams": ("webhookb2",),
    "a token of a Telegram bot": (":AA",),
    "a Google OAuth secret": ("GOCSPX-", "ya29."),
    "an npm token": ("npm_", "_authToken"),
    "a Docker Hub token": ("dckr_pat_",),
    "a SendGrid key": ("SG.",),
    "a Replicate, Groq or Perplexity key": ("r8_", "gsk_", "pplx-"),
    "a Databricks token": ("dapi",),
    "an Azure key": ("AccountKey=", "SharedAccessKey="),
    "a JSON Web Token": ("eyJ",),
    "a password for HTTP": ("authorization",),
    "a password or key in a setting": ("passw", "secret", "api_key", "_token"),
    "a password in an address": ("://",),
}
_ANY_CASE = ("wandb", "aws_secret", "authorization", "passw", "secret", "api_key", "_token")


def secrets(folder: Folder) -> Iterator[Finding]:
    """Tokens and keys; findings name their kind and place and never show them."""
    for name, path in folder.files.items():
        for line, kind in find_secrets(path):
            where = f"{name}:{line}"
            remedy = "revoke it now (removing it is not enough once it was shared), then remove it"
            yield Finding("failed", f"{name} contains what looks like {kind}", where, remedy)


def find_secrets(path: Path) -> Iterator[tuple[int, str]]:
    """(line, what it is) of every secret in a text file, each kind once; nothing for a binary file."""
    reported: set[str] = set()
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
            lower = text.lower()
            for kind, hints in _HINTS.items():
                if kind in reported or not any(hint in (lower if hint in _ANY_CASE else text) for hint in hints):
                    continue
                found = next((m for m in _COMPILED[kind].finditer(text) if not _is_placeholder(m[0])), None)
                if found is not None:
                    reported.add(kind)
                    yield line + text.count("\n", 0, found.start()), kind
            tail = block[-_OVERLAP:]
            line += text.count("\n", 0, len(block) - len(tail))
            data = file.read(_CHUNK)


def _is_placeholder(text: str) -> bool:
    """Whether a text is a placeholder for a secret: one repeated character, or a placeholder name."""
    if text.startswith("-----"):
        return False
    longest = max(re.findall(r"[A-Za-z0-9]+", text), key=len)
    words = r"x{4}|X{4}|\.{3}|example\.|//user(name)?:|:pass(word)?@|<|(?i:your[_-])"
    return len(set(longest)) < 6 or re.search(words, text) is not None


CHECKS = {"secrets": secrets}
