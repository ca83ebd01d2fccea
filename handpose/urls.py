"""URLs of files and folders in an object store."""

from urllib.parse import urlsplit, urlunsplit


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


def split_url(url: str) -> tuple[str, str]:
    """Split a URL into the URL of its parent folder and the last component of its path."""
    parts = urlsplit(url)
    folder, _, name = parts.path.rstrip("/").rpartition("/")
    return urlunsplit(parts._replace(path=folder)), name
