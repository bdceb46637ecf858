"""Requests to the Hub: with retries, and failures as one sentence that contains no token."""

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
LONGEST_WAIT = 60.0  # seconds; the upper limit of a server's Retry-After
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{8,}")
_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")  # which one, differs by release
Result = TypeVar("Result")

# HTTP status → what it means and what to do; {repo_id} and {wait} are filled in
STATUS_MESSAGES = {
    400: "the Hub rejected the request for {repo_id}",
    401: "{repo_id} needs a token that the Hub accepts: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token has no permission for this on {repo_id}: use one with write permission for it",
    404: "{repo_id}, or a part of it, does not exist or is not visible to this token: check the name and the token",
    409: "{repo_id} has this already, or is being changed by someone else: check it, and try again",
    412: "{repo_id} was changed by someone else in the meantime, nothing was committed: check it, and push again",
    413: "a file for {repo_id} is larger than the Hub accepts: save the model in smaller shards",
    429: "too many requests for {repo_id} or by this account: wait{wait}, and try again; uploaded files are kept",
    500: "the Hub had repeated server errors for {repo_id}: try again later; uploaded files are kept",
}


class HubError(RuntimeError):
    """The Hub rejected a request, failed, or could not be reached; the message is one sentence without tokens."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an exception of huggingface_hub, None if there was no response."""
    return getattr(getattr(error, "response", None), "status_code", None)


def root_cause(error: BaseException) -> BaseException:
    """The HTTP response or connection error in the chain of causes of an exception of huggingface_hub."""
    seen: BaseException | None = error
    while seen is not None:
        if status_of(seen) is not None or type(seen).__module__.split(".")[0] in _HTTP_LIBRARIES:
            return seen
        seen = seen.__cause__ or seen.__context__
    return error


class Remote:
    """A repo on the Hub, accessed through `huggingface_hub`.

    Args:
        repo_id: `user/name`.
        token: as in `huggingface_hub`: None reads HF_TOKEN or the login of `hf auth login`.
        endpoint: address of the Hub; default HF_ENDPOINT or huggingface.co.
    """

    def __init__(self, repo_id: str, *, token: str | bool | None = None, endpoint: str | None = None) -> None:
        self.repo_id = repo_id
        self.api = HfApi(endpoint=endpoint, token=token)
        self.secrets = [value for value in (token, get_token()) if isinstance(value, str) and value]

    def scrub(self, text: str) -> str:
        """`text` without the tokens in use and without strings that look like tokens."""
        for secret in self.secrets:
            text = text.replace(secret, "hf_…")
        return _TOKEN.sub("hf_…", text)

    def request(self, call: Callable[[], Result], *, attempts: int = ATTEMPTS, what: str = "") -> Result:
        """Return `call()`; retry after a pause if the Hub is overloaded, fails, or drops the connection.

        Args:
            call: a request that is safe to repeat.
            attempts: 1 for requests that huggingface_hub retries itself, such as uploads and listings.
            what: prefix of the error message, such as `"uploading"`.

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
        raise problem  # outside of `except`, because the original exception may contain the token

    def _wait(self, error: BaseException, attempt: int) -> float | None:
        """Seconds until the next attempt; None if a retry is pointless."""
        status = status_of(error)
        if status is None and type(error).__module__.split(".")[0] not in _HTTP_LIBRARIES:
            return None
        if status is not None and status not in (408, 429, 500, 502, 503, 504):
            return None
        asked = _retry_after(error)
        return min(2.0 ** (attempt - 1) if asked is None else asked, LONGEST_WAIT)

    def explain(self, error: BaseException) -> str:
        """One sentence on an exception: what is wrong, what to do, and the server's message."""
        status = status_of(error)
        message = getattr(error, "server_message", None) or ("" if status else str(error)) or type(error).__name__
        detail = one_line(self.scrub(message), 300)
        if status is None and type(error).__module__.split(".")[0] in _HTTP_LIBRARIES:
            return (
                f"the connection to {self.api.endpoint} for {self.repo_id} failed: check it and try again; uploaded files "
                f"are kept ({detail})"
            )
        if status is None:
            return detail
        seconds = _retry_after(error)
        wait = "" if seconds is None else f" {seconds:.0f} seconds"
        sentence = STATUS_MESSAGES.get(status) or STATUS_MESSAGES[500 if status >= 500 else 400]
        return f"{sentence.format(repo_id=self.repo_id, wait=wait)} ({status}: {detail})"

    @contextlib.contextmanager
    def without_tokens_in_logs(self) -> Iterator[None]:
        """Remove tokens from the log records and warnings of huggingface_hub inside this context."""

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
