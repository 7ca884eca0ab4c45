"""An OpenAI-compatible endpoint for chat completions: one question, one reply, or a named error."""

import contextlib
import dataclasses
import email.utils
import http.client
import json
import logging
import os
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from paxo.judges.checks import JudgeError

logger = logging.getLogger(__name__)

# Busy, late or broken for now: worth another attempt. All else is a mistake of the settings.
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
MAX_REPLY_BYTES = 8 << 20


class EndpointError(JudgeError):
    """An endpoint gave no reply, however often it was asked."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a language model is asked, and how patiently.

    Attributes:
        url: base of the API, such as "http://localhost:8000/v1"; `/chat/completions` is added.
        model: name of the model there.
        key_variable: environment variable that holds the API key; None for none. The key is read
            when it is sent and stands in no log, error or file.
        temperature: of the model.
        max_tokens: of a reply.
        options: more fields of the request, such as {"seed": 0}.
        timeout_s: seconds for one request, from connecting to the last byte.
        retries: attempts after the first, after a refused connection, a time limit, a status that
            says "later" (429, 5xx) or a reply that is none.
        backoff_s: seconds before the first of them; doubled each time.
        max_backoff_s: and never more than that, even if the server asks for it.
        concurrency: requests at once.
        seed: of the jitter, a factor in [0.5, 1) of each wait.

    Raises:
        ValueError: for settings that cannot work.

    >>> endpoint = Endpoint("http://localhost:8000/v1", "judge-7b", options={"seed": 0})
    >>> sorted(endpoint.request([{"role": "user", "content": "Which is better?"}]))
    ['max_tokens', 'messages', 'model', 'seed', 'temperature']
    """

    url: str
    model: str
    key_variable: str | None = None
    temperature: float = 0.0
    max_tokens: int = 1024
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timeout_s: float = 120.0
    retries: int = 5
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    concurrency: int = 8
    seed: int = 0

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"Endpoint.url must be http://... or https://...; got {self.url!r}")
        if parts.username or parts.password:
            raise ValueError("Endpoint.url must hold no password: name a key_variable")
        if not self.model:
            raise ValueError("Endpoint.model must name a model")
        for name in ("max_tokens", "timeout_s", "concurrency"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Endpoint.{name} must be above 0; got {getattr(self, name)!r}")
        for name in ("temperature", "retries", "backoff_s", "max_backoff_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"Endpoint.{name} must not be negative; got {getattr(self, name)!r}"
                )
        own = {"model", "messages", "temperature", "max_tokens", "stream"} & set(self.options)
        if own:
            raise ValueError(f"Endpoint.options may not hold {sorted(own)}: those have fields")

    def key(self) -> str | None:
        """The API key from the environment.

        Raises:
            EndpointError: if the variable is not set or cannot stand in a header.
        """
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key or not key.isprintable() or not key.isascii():
            state = "not set" if not key else "no key: it holds characters that no header may"
            raise EndpointError(
                f"endpoint {self.url}: the environment variable {self.key_variable} is {state}"
            )
        return key

    def request(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """The body that is sent for these messages: all that a reply depends on."""
        return {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            **self.options,
        }

    def ask(self, request: Mapping[str, Any], stop: threading.Event | None = None) -> str:
        """The text of the reply; empty if the model said nothing.

        Args:
            request: from `request`.
            stop: set by another thread to give up between attempts.

        Raises:
            EndpointError: if no attempt led to a reply; it names the URL and what came last.
        """
        stop = stop or threading.Event()
        body = json.dumps(request, sort_keys=True).encode()
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(body)
            except _TryLater as error:
                problem = str(error)
                if attempt == self.retries:
                    break
                wait = self.wait(body, attempt, error.asked_s)
                logger.info("endpoint %s: %s; trying again in %.1f s", self.url, problem, wait)
            if stop.wait(wait):
                raise EndpointError(f"endpoint {self.url}: given up, as another request failed")
        raise EndpointError(
            f"endpoint {self.url}, model {self.model!r}: no reply in {self.retries + 1} attempts; "
            f"the last: {problem}"
        )

    def wait(self, body: bytes, attempt: int, asked_s: float = 0.0) -> float:
        """Seconds before the next attempt, the same in every run: a server's own wish counts."""
        jitter = random.Random(f"{self.seed} {attempt} {body!r}").uniform(0.5, 1.0)
        return min(max(self.backoff_s * 2**attempt * jitter, asked_s), self.max_backoff_s)

    def _attempt(self, body: bytes) -> str:
        key = self.key()
        try:
            status, headers, said = self._post(body, key)
        except (OSError, http.client.HTTPException) as error:
            raise _TryLater(f"{type(error).__name__}: {error}") from None
        text = said.decode(errors="replace")
        if key is not None:
            text = text.replace(key, "***")
        if status in RETRIED:
            raise _TryLater(f"status {status}: {text[:300]}", _seconds(headers.get("Retry-After")))
        if status != 200:
            where = f" to {headers['Location']}" if "Location" in headers else ""
            raise EndpointError(
                f"endpoint {self.url}, model {self.model!r}: status {status}{where}: {text[:500]}"
            )
        try:
            content = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise _TryLater(f"status 200, but no chat completion: {text[:300]!r}") from None
        if content is not None and not isinstance(content, str):
            raise _TryLater(f"status 200, but its content is no text: {text[:300]!r}")
        # Half of a surrogate pair can stand in JSON, but in no file.
        return (content or "").encode(errors="replace").decode()

    def _post(self, body: bytes, key: str | None) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and content of one request, within the time limit as a whole."""
        parts = urllib.parse.urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        path = f"{parts.path.rstrip('/')}/chat/completions"
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        connection = kind(parts.hostname, parts.port, timeout=self.timeout_s)
        late = threading.Event()

        def cut() -> None:
            # A socket's own limit holds for each read: a server that drips would never end.
            late.set()
            for line in sockets:
                with contextlib.suppress(OSError):  # closed already
                    line.shutdown(socket.SHUT_RDWR)

        sockets: list[socket.socket] = []
        timer = threading.Timer(self.timeout_s, cut)
        timer.daemon = True
        timer.start()
        try:
            connection.connect()
            sockets.append(connection.sock)
            if late.is_set():  # connecting took all the time, and `cut` has found no socket
                raise TimeoutError
            query = f"?{parts.query}" if parts.query else ""
            connection.request("POST", path + query, body, headers)
            response = connection.getresponse()
            said = response.read(MAX_REPLY_BYTES)
        except (OSError, http.client.HTTPException) as error:
            if not late.is_set():
                raise
            raise TimeoutError(f"no whole reply within {self.timeout_s} s") from error
        finally:
            timer.cancel()
            connection.close()
        if late.is_set():
            raise TimeoutError(f"no whole reply within {self.timeout_s} s")
        return response.status, response.headers, said


class _TryLater(Exception):
    """An attempt failed in a way that another may not."""

    def __init__(self, problem: str, asked_s: float = 0.0):
        super().__init__(problem)
        self.asked_s = asked_s


def _seconds(header: str | None) -> float:
    """A Retry-After, which is a number or a date, in seconds from now; 0 for none or nonsense."""
    try:
        return float(header or 0)
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
        return 0.0
