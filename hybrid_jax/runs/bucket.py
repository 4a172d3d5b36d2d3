"""Google's storage: what it says when it refuses, in one line, and a file there that is changed in one step."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
from collections.abc import Iterator
from typing import Any

from hybrid_jax.core.errors import UserError


class BucketLockFile:
    """A small object that several machines change without losing each other's changes.

    Its version is the generation that the storage counts; a write names the one that it replaces.
    """

    def __init__(self, url: str):
        self._url = url
        with explained(url, "locked"):
            from google.cloud import storage

            bucket, self._name = url.removeprefix("gs://").split("/", 1)
            self._bucket: Any = storage.Client().bucket(bucket)  # typed as if it could be empty

    def read(self) -> tuple[str, int] | None:
        """Text and version; None where there is no such object."""
        from google.api_core.exceptions import NotFound

        with explained(self._url, "locked"):
            while (blob := self._bucket.get_blob(self._name)) is not None:
                with contextlib.suppress(NotFound):  # it was replaced between the two questions
                    return blob.download_as_text(), int(blob.generation)
        return None

    def swap(self, version: int | None, text: str) -> int | None:
        """Writes ``text`` in the place of ``version`` (None: of nothing); returns the new version.

        None where something else lies there by now.
        """
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._name)
        with explained(self._url, "locked"):
            try:
                blob.upload_from_string(text, "application/json", if_generation_match=version or 0)
            except PreconditionFailed:
                return None
        return int(blob.generation)

    def remove(self, version: int) -> None:
        """Removes ``version``, if it is still what lies there."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        with explained(self._url, "unlocked"), contextlib.suppress(NotFound, PreconditionFailed):
            self._bucket.blob(self._name).delete(if_generation_match=version)


@contextlib.contextmanager
def explained(url: str, what: str) -> Iterator[None]:
    """Says in one line why a bucket could not be used."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{url} needs gcsfs, which is not installed: pip install -e '.[gcs]' in the checkout"
        ) from error
    except Exception as error:  # gcsfs, aiohttp and google-auth have each their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{url} cannot be {what}: {reason}{_advice(error, url)}") from error


def _advice(error: Exception, url: str) -> str:
    bucket = url.split("/")[2]
    if isinstance(error, FileNotFoundError):
        return f"; is there a bucket gs://{bucket}?"
    if re.search(r"(?i)anonymous|credentials|unauthenticated|invalid_grant|\b401\b", str(error)):
        return "; log in by `gcloud auth application-default login`"
    if re.search(r"(?i)forbidden|permission|\b403\b", str(error)):
        return (
            f"; give this machine's account the roles storage.objectUser and storage.legacyBucketReader "
            f"on gs://{bucket}"
        )
    return ""


def open_bucket(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path of the URL there."""
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    # What the other processes write must be seen at once; Orbax opens the bucket by the same settings.
    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it says at every request what it does not know
    importlib.import_module("google.cloud.storage")  # Orbax needs it to remove an old checkpoint
    return url_to_fs(url)
