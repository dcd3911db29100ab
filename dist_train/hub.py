"""The Hugging Face hub as this machine sees it: may it be asked, can it be reached, what do its refusals mean.

Torch-free. What is downloaded, and to where, is fetch.py's.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from dist_train.config import Section
from dist_train.errors import DataError, StorageError, ToolkitError
from dist_train.rundir import unwritable

# The hub's own client asks several times, which takes most of a minute where nothing answers.
CONNECT_S = 5.0
_DEFAULT = "https://huggingface.co"
_TRUE = ("1", "ON", "YES", "TRUE")
_PORTS = {"https": 443, "http": 80, "socks5": 1080, "socks5h": 1080, "socks4": 1080}
_ADVICE = {401: "set HF_TOKEN", 403: "set HF_TOKEN", 404: "if that is no hub, set HF_ENDPOINT"}
_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def is_offline(data: Section) -> bool:
    """Whether data.offline or HF_HUB_OFFLINE forbids to ask the hub."""
    variable = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return bool(getattr(data, "offline", False)) or variable.upper() in _TRUE


def settle_offline(data: Section) -> None:
    """Make the hub's libraries obey `data.offline`: they read the variable when they are imported."""
    if is_offline(data):
        os.environ["HF_HUB_OFFLINE"] = "1"


def endpoint() -> str:
    """The address of the hub or of a mirror. It may hold a password: never print it."""
    return (os.environ.get("HF_ENDPOINT") or _DEFAULT).rstrip("/")


def is_hub_name(name: str) -> bool:
    """A local folder is absolute by the time a config is loaded."""
    return not os.path.isabs(name)


def check_reachable(what: str, instead: str) -> None:
    """DataError within seconds where the hub cannot be reached from here.

    what: what was asked for, for example "model.pretrained is bert-base-uncased". instead: what to set after having
    downloaded it elsewhere.
    """
    cause = _why_unreachable()
    if cause is not None:
        raise unreachable(what, cause, instead)


def unreachable(what: str, cause: str, instead: str) -> DataError:
    return DataError(
        f"{what}, a name on the hub, but this machine cannot reach {_shown(endpoint())}: {cause}.\n"
        "Run `dist-train prepare` with the same settings where there is network, data.cache_dir on a disk that both "
        f"machines see; or download it elsewhere and {instead}; or set HF_ENDPOINT to a mirror within reach."
    )


def refusal(what: str, error: Exception, folder: Path, instead: str) -> ToolkitError:
    """What an exception of the hub's client means for the user. Its text may quote addresses: it is not repeated."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return DataError(
            f"{what}, which asks for consent: accept its conditions on its page on the hub, then set HF_TOKEN to a "
            "token of the same account."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return DataError(f"{what}, but the hub has no such revision of it: name a branch, a tag or a commit.")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return DataError(
            f"{what}, but there is no such folder here, and {_shown(endpoint())} has no such name: check the spelling, "
            "or set HF_TOKEN if it is private."
        )
    if isinstance(error, OSError) and error.errno in _NO_PLACE:
        return unwritable(folder, error, "data.cache_dir")
    response = getattr(error, "response", None)
    if isinstance(error, errors.HfHubHTTPError) and response is not None:
        advice = _ADVICE.get(response.status_code, "try again later")
        return DataError(f"{what}, but {_shown(endpoint())} answered HTTP {response.status_code}: {advice}.")
    kind = type(error).__name__
    return unreachable(what, "it timed out" if "Timeout" in kind else kind, instead)


def check_room(folder: Path, needed: int, what: str) -> None:
    """StorageError before a download that the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{folder} has {free / 2**20:.0f} MiB free, but {what} needs {needed / 2**20:.0f} MiB: free some space, or "
            "choose another folder with data.cache_dir=..."
        )


def _why_unreachable() -> str | None:
    """None where the first hop to the hub takes a connection; a name that does not resolve may block for longer than
    any timeout of a socket, so a thread of its own tries."""
    host, port = _first_hop(endpoint())
    outcome: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_S).close()
            outcome.append(None)
        except OSError as error:
            outcome.append((error.strerror or str(error)).lower())

    thread = threading.Thread(target=connect, name="hub", daemon=True)
    thread.start()
    thread.join(CONNECT_S + 0.5)
    return outcome[0] if outcome else f"no answer within {CONNECT_S:.0f} s"


def _first_hop(address: str) -> tuple[str, int]:
    """Host and port that a request to `address` connects to: the proxy's, where the environment names one."""
    parts = urlsplit(address)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 443)


def _shown(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//", address)
