"""Asking the Hub: a bounded number of attempts, every failure as one sentence, and no token in any of them."""

import contextlib
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub import HfApi, get_token

from ..messages import one_line

REPO_ID = r"\w[\w.-]*(?:/\w[\w.-]*)?"
ATTEMPTS = 5
LONGEST_WAIT = 60.0  # seconds; what a server asks for in Retry-After is kept up to this
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{8,}")
_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")  # which one, differs by release
Result = TypeVar("Result")

# what a status means, and what to do about it; {repo_id} and {wait} are filled in
STATUS_MESSAGES = {
    400: "the Hub does not accept what was sent for {repo_id}",
    401: "{repo_id} needs a token that the Hub accepts: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not do this with {repo_id}: use one with write permission for it",
    404: "{repo_id}, or what was asked of it, is not there or not visible to this token: check the name and the token",
    409: "what was to be made in {repo_id} is there already, or is being changed by someone else: look, and try again",
    412: "{repo_id} was changed by someone else in the meantime, nothing was committed: look at that, and push again",
    413: "a file for {repo_id} is larger than the Hub takes: save the model in smaller shards",
    429: "the Hub was asked too often for {repo_id} or by this account: wait{wait}, and try again; what arrived stays",
    500: "the Hub has a fault of its own with {repo_id} and kept having it: try again later; what arrived stays",
}


class HubError(RuntimeError):
    """The Hub refused, failed, or could not be reached; the message is one sentence, without tokens."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status an exception of huggingface_hub stands for, None if there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def root_cause(error: BaseException) -> BaseException:
    """The answer or the broken connection that lies behind an exception of huggingface_hub."""
    seen: BaseException | None = error
    while seen is not None:
        if status_of(seen) is not None or type(seen).__module__.split(".")[0] in _HTTP_LIBRARIES:
            return seen
        seen = seen.__cause__ or seen.__context__
    return error


class Remote:
    """One repo on the Hub, asked through `huggingface_hub` alone.

    Args:
        repo_id: `user/name`.
        token: as in `huggingface_hub`: None takes it from HF_TOKEN or from where `hf auth login` put it.
        endpoint: another Hub than HF_ENDPOINT or huggingface.co.
    """

    def __init__(self, repo_id: str, *, token: str | bool | None = None, endpoint: str | None = None) -> None:
        self.repo_id = repo_id
        self.api = HfApi(endpoint=endpoint, token=token)
        self.secrets = [value for value in (token, get_token()) if isinstance(value, str) and value]

    def scrub(self, text: str) -> str:
        """`text` without tokens: those in use, and whatever looks like one."""
        for secret in self.secrets:
            text = text.replace(secret, "hf_…")
        return _TOKEN.sub("hf_…", text)

    def request(self, call: Callable[[], Result], *, attempts: int = ATTEMPTS, what: str = "") -> Result:
        """`call()`, and again after a pause while the Hub is overloaded, has a fault, or drops the connection.

        Args:
            call: safe to repeat.
            attempts: 1 for what huggingface_hub repeats by itself, as it does uploads and listings.
            what: begins the sentence, such as `"uploading"`.

        Raises:
            HubError: the last failure, as one sentence.
        """
        for attempt in range(1, attempts + 1):
            with self.without_tokens_in_logs():
                try:
                    return call()
                except Exception as error:
                    failure = root_cause(error)
                    wait = self._wait(failure, attempt)
                    problem = HubError(f"{what}: {self.explain(failure)}" if what else self.explain(failure))
            if wait is None or attempt == attempts:
                break
            time.sleep(wait)
        raise problem  # outside of `except`: the original's text and its request may hold the token

    def _wait(self, error: BaseException, attempt: int) -> float | None:
        """Seconds until another attempt makes sense; None if none does."""
        status = status_of(error)
        if status is None and type(error).__module__.split(".")[0] not in _HTTP_LIBRARIES:
            return None
        if status is not None and status not in (408, 429, 500, 502, 503, 504):
            return None
        asked = _retry_after(error)
        return min(2.0 ** (attempt - 1) if asked is None else asked, LONGEST_WAIT)

    def explain(self, error: BaseException) -> str:
        """One sentence on an exception: what is wrong and what to do, and what the server said to it."""
        status = status_of(error)
        said = getattr(error, "server_message", None) or ("" if status else str(error)) or type(error).__name__
        detail = one_line(self.scrub(said), 300)
        if status is None and type(error).__module__.split(".")[0] in _HTTP_LIBRARIES:
            return (
                f"the connection to {self.api.endpoint} for {self.repo_id} failed or broke off: check it and try again; what "
                f"arrived stays ({detail})"
            )
        if status is None:
            return detail
        seconds = _retry_after(error)
        wait = "" if seconds is None else f" {seconds:.0f} seconds"
        sentence = STATUS_MESSAGES.get(status) or STATUS_MESSAGES[500 if status >= 500 else 400]
        return f"{sentence.format(repo_id=self.repo_id, wait=wait)} ({status}: {detail})"

    @contextlib.contextmanager
    def without_tokens_in_logs(self) -> Iterator[None]:
        """Within it, nothing that huggingface_hub logs or warns of shows a token."""

        def scrub_record(record: logging.LogRecord) -> bool:
            record.msg, record.args = self.scrub(record.getMessage()), ()
            return True

        handlers = [*logging.getLogger("huggingface_hub").handlers, *logging.getLogger().handlers]
        for handler in handlers:
            handler.addFilter(scrub_record)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            for handler in handlers:
                handler.removeFilter(scrub_record)
            for warning in caught:
                warnings.warn(self.scrub(str(warning.message)), warning.category, stacklevel=3)


def _retry_after(error: BaseException) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = str(headers.get("Retry-After", ""))
    return float(value) if re.fullmatch(r"\d{1,6}", value) else None
