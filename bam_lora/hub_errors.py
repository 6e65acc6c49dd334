"""What goes wrong between here and the Hub, as one line that says what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bam_lora.errors import UserError, first_line

_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"}
_BROKEN = {"TransportError", "ChunkedEncodingError", "IncompleteRead", "ConnectionError"}
_NOT_HERE = "LocalEntryNotFoundError"
_AGAIN = "then give the command again"
_LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub: `org/name`, a branch, tag or commit (None: main), and "model" or "dataset"."""

    name: str
    revision: str | None = None
    kind: str = "model"

    @property
    def words(self) -> str:
        """What messages call its kind."""
        return "data set" if self.kind == "dataset" else "model"

    @property
    def page(self) -> str:
        """The address of its page."""
        return f"{endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


def endpoint() -> str:
    """The Hub's address: `HF_ENDPOINT`, or huggingface.co."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_away(error: BaseException) -> bool:
    """Whether the Hub could not answer (offline, no connection, overloaded), so that the cache may."""
    status = status_of(error)
    return bool({"OfflineModeIsEnabled", *_NO_CONNECTION, *_BROKEN} & _kinds(error)) or (
        status is not None and (status == 429 or status >= 500)
    )


def explain(error: BaseException, wanted: Repository) -> UserError:
    """The line for an error of huggingface_hub, datasets or the HTTP library under them, while reading a repository."""
    return known_trouble(error, wanted) or UserError.of(
        wanted.name,
        expected=f"a {wanted.words} that can be read",
        found=f"{type(error).__name__}: {first_line(error.__cause__ or error)}",
        remedy="Check the name, your access (`hf auth login`) and the network",
    )


@contextmanager
def explained(wanted: Repository, line: Callable[[BaseException, Repository], UserError] = explain) -> Iterator[None]:
    """Turns what the libraries raise here into a line, by default that of `explain`; a UserError stays as it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise line(error, wanted) from error


def known_trouble(error: BaseException, wanted: Repository) -> UserError | None:
    """The same, or None for what has nothing to do with the Hub's answers, the network or the disk."""
    kinds, status = _kinds(error), status_of(error)
    if _is_full(error):
        return disk_full(wanted)
    if "GatedRepoError" in kinds:
        return _gated(wanted, status)
    if status == 401 and ("Invalid credentials" in _text(error) or "Invalid user token" in _text(error)):
        return bad_token(wanted.name)
    if "RepositoryNotFoundError" in kinds or "HFValidationError" in kinds:
        return _missing(wanted)
    if "RevisionNotFoundError" in kinds:
        return UserError.of(
            wanted.name,
            expected=f"the revision {wanted.revision!r}",
            found="no such branch, tag or commit",
            remedy=f"Choose one of {wanted.page}/commits/main, or leave `revision` out",
        )
    if status == 403:
        return UserError.of(
            wanted.name,
            expected=f"leave to read this {wanted.words}",
            found="a token without it",
            remedy="Give the token that right at https://huggingface.co/settings/tokens, or log in with another one",
        )
    return _forbidden(error) or _unreachable(error, wanted)


def _forbidden(error: BaseException) -> UserError | None:
    """The cache belongs to somebody else, or cannot be written."""
    found = next(
        (one for one in _chain(error) if isinstance(one, OSError) and one.errno in (errno.EACCES, errno.EPERM,
         errno.EROFS)),
        None,
    )  # fmt: skip
    if found is None or not found.filename:
        return None
    return UserError.of(
        str(found.filename),
        expected="leave to read and write it",
        found=str(found.strerror),
        remedy="Set HF_HOME to a folder of your own, or change the permissions",
    )


def _gated(wanted: Repository, status: int | None) -> UserError:
    """Without a token the Hub says 401, with one that was not let in 403."""
    has_token = status == 403
    return UserError.of(
        wanted.name,
        expected=f"access to this gated {wanted.words}",
        found="a token whose account has no access" if has_token else "no token",
        remedy=f"Open {wanted.page} "
        + ("with the account of that token, accept its terms (some owners answer by hand)" if has_token else
           f"and accept its terms, {_LOG_IN}") + f", {_AGAIN}",
    )  # fmt: skip


def _missing(wanted: Repository) -> UserError:
    """A private repository looks the same as one that is not there."""
    a_folder = wanted.kind == "model"
    hidden = " that your token may see" if _has_token() else ""
    return UserError.of(
        wanted.name,
        expected=f"a {wanted.words} on the Hub" + (" or a model folder" if a_folder else ""),
        found=("no such folder here, and on the Hub no" if a_folder else "no")
        + f" {wanted.words} of that name{hidden}",
        remedy="Check the spelling" + ("" if _has_token() else f"; if it is private, {_LOG_IN}"),
    )


def _unreachable(error: BaseException, wanted: Repository) -> UserError | None:
    kinds, status = _kinds(error), status_of(error)
    if "OfflineModeIsEnabled" in kinds or (is_offline() and kinds & {_NOT_HERE, *_NO_CONNECTION, *_BROKEN}):
        return not_in_cache(wanted)
    if status == 429:
        return UserError.of(
            wanted.name,
            expected="an answer",
            found="“too many requests” (429)",
            remedy="Wait some minutes and give the command again"
            + ("" if _has_token() else "; with a token the limit is higher: `hf auth login`"),
        )
    if status is not None and status >= 500:
        return UserError.of(
            wanted.name,
            expected=f"an answer of {endpoint()}",
            found=f"trouble there (status {status})",
            remedy="Try again later; https://status.huggingface.co says what is known",
        )
    if kinds & _NO_CONNECTION:
        return not_in_cache(wanted)
    if kinds & _BROKEN or "Consistency check failed" in _text(error):
        return UserError.of(
            wanted.name,
            expected="the whole download",
            found=f"a broken connection ({first_line(error)})",
            remedy="Give the same command again: files that came whole are kept",
        )
    return None


def not_in_cache(wanted: Repository, missing: str | None = None) -> UserError:
    """The Hub may not be asked, or does not answer, and the cache does not have everything; `missing` names what."""
    where = f"not all of it in {cache_folder()}" + (f": {missing} is missing" if missing else "")
    if is_offline():
        return UserError.of(
            wanted.name,
            expected="all of it in the cache, as HF_HUB_OFFLINE is set",
            found=where,
            remedy=f"Unset HF_HUB_OFFLINE, or fetch it where there is a network: {fetch_command(wanted)}",
        )
    return UserError.of(
        wanted.name,
        expected=f"{endpoint()}, or a whole copy of the {wanted.words} in the cache",
        found=f"no connection, and {where}",
        remedy=f"Check the network and the proxy, or fetch it elsewhere: {fetch_command(wanted)}",
    )


def disk_full(wanted: Repository, needed_bytes: int | None = None, free_bytes: int | None = None) -> UserError:
    """There is no room for a download in the cache."""
    sizes = needed_bytes is not None and free_bytes is not None
    return UserError.of(
        f"{wanted.name} in {cache_folder()}",
        expected=f"{(needed_bytes or 0) / 1e9:.2f} GB free" if sizes else "room for it",
        found=f"{(free_bytes or 0) / 1e9:.2f} GB" if sizes else "a full disk",
        remedy="Free some space (`hf cache list` shows what is kept), or set HF_HOME to a folder on another disk",
    )


def bad_token(what: str) -> UserError:
    """The Hub does not know the token."""
    named = "HF_TOKEN" in os.environ
    return UserError.of(
        what,
        expected="a token that the Hub knows",
        found="one that it refuses" + (", from HF_TOKEN" if named else ""),
        remedy="Unset or renew HF_TOKEN" if named else "Log in again: `hf auth login --force`",
    )


def fetch_command(wanted: Repository) -> str:
    """The command that puts a whole repository into the cache."""
    kind = " --repo-type dataset" if wanted.kind == "dataset" else ""
    revision = f" --revision {wanted.revision}" if wanted.revision else ""
    return f"`hf download {wanted.name}{kind}{revision}`"


def cache_folder() -> str:
    """Where the Hub's files are kept: below `HF_HOME`, or `HF_HUB_CACHE`."""
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` is set."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    seen: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop(0)
        if one is not None and one not in seen:
            seen.append(one)
            pending += [one.__cause__, one.__context__]
            yield one


def _kinds(error: BaseException) -> set[str]:
    """Names of the classes of an error and its causes: the HTTP library below has changed more than once."""
    return {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the answer that an error, or one that led to it, is about."""
    for one in _chain(error):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _text(error: BaseException) -> str:
    answers = (getattr(getattr(one, "response", None), "headers", None) or {} for one in _chain(error))
    messages = " ".join(str(headers.get("X-Error-Message", "")) for headers in answers)
    return " ".join(str(one) for one in _chain(error)) + messages


def _is_full(error: BaseException) -> bool:
    return any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in _chain(error))
