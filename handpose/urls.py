"""URLs of places in an object store."""

from urllib.parse import urlsplit, urlunsplit


def is_url(place: object) -> bool:
    """Whether a place is one in a store, not a folder."""
    return "://" in str(place)


def join_url(url: str, name: str) -> str:
    """The URL of something in the folder that a URL names."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name.strip('/')}"))


def split_url(url: str) -> tuple[str, str]:
    """The URL of the folder that something lies in, and its name there."""
    parts = urlsplit(url)
    folder, _, name = parts.path.rstrip("/").rpartition("/")
    return urlunsplit(parts._replace(path=folder)), name
