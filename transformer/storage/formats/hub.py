"""Models of the Hugging Face Hub, by `hf://owner/name`."""

import os
import re
from pathlib import Path

_SCHEME = "hf://"
# What a model is loaded from; weights in other formats are left where they are.
_PATTERNS = ("*.json", "*.safetensors", "*.jinja")


def is_address(path: str | os.PathLike) -> bool:
    """Whether a path is meant for the Hub."""
    return os.fspath(path).startswith(_SCHEME)


def download(address: str) -> Path:
    """Downloads a model, unless it is in the cache, and returns its directory there.

    Args:
      address: "hf://owner/name", with "@revision" behind it for another version than the newest.

    Raises:
      ValueError: the address is not of that form.
      FileNotFoundError: the Hub has no such model, or it is not open to everybody.
      ConnectionError: the Hub cannot be reached, and the model is not in the cache.
    """
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address)
    if not found:
        raise ValueError(f"{address!r}; a model of the Hub is hf://owner/name, or with @revision.")
    import huggingface_hub  # here, because it takes a while
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(found[1], revision=found[2], allow_patterns=_PATTERNS)
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{address} is not on the Hub, or not open to everybody: huggingface-cli login."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"{address} is not in the cache, and the Hub cannot be reached: {_first_line(error)}. "
            "Go online, or give the path of a directory that holds the model."
        ) from error


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
