"""URLs of files and folders in an object store, and the secrets that URLs can contain."""

import re
from urllib.parse import unquote, urlsplit, urlunsplit

_USER_PASSWORD = re.compile(r"(://[^:/@\s]*):\S*@")
_PARAMETER = re.compile(r"([?&])([^=&\s]+)=([^&\s]*)")
_SECRET_NAME = re.compile(r"passw|passphrase|pwd|secret|token|signature|credential|^sig$|(?<!ssl)(?<!ssl_)key", re.I)
"""Names of parameters with a secret. Databases have `sslkey` and `ssl_key`, which are the path of a file."""


def is_url(place: object) -> bool:
    """Whether a path is a URL in an object store, not a path of the file system."""
    return "://" in str(place)


def join_url(url: str, name: str) -> str:
    """Return the URL of a file or folder inside the folder at a URL.

    Args:
        url: the URL of the folder.
        name: the name of the entry, relative to the folder.
    """
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name.strip('/')}"))


def hide_secrets(text: str) -> str:
    """Replace the secrets in each URL of a text by three stars.

    These are a password after the user's name, and parameters such as `password`, `passwd`, `sslpassword` and
    `secret_key`. A text without secrets stays as it is.
    """
    return _PARAMETER.sub(_hide_parameter, _USER_PASSWORD.sub(r"\1:***@", text))


def _hide_parameter(found: re.Match[str]) -> str:
    start, name, _ = found.groups()
    return f"{start}{name}=***" if _SECRET_NAME.search(unquote(name)) else found[0]


def split_url(url: str) -> tuple[str, str]:
    """Split a URL into the URL of its parent folder and the last component of its path."""
    parts = urlsplit(url)
    folder, _, name = parts.path.rstrip("/").rpartition("/")
    return urlunsplit(parts._replace(path=folder)), name
