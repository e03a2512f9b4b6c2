"""The manifest of a run's folder: what the run is made from, how its rows are cut into shards, and its schema."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_async_batching.dataset.store.atomic_files import write_if_first, write_whole
from hf_async_batching.dataset.store.fingerprint import Fingerprint, differences, digest
from hf_async_batching.errors import ResumeMismatchError

VERSION = 1
NAME = "manifest.json"


@dataclass(slots=True)
class Manifest:
    """The contents of a manifest, which is written before the first row is served.

    Attributes:
        fingerprint: Arguments, model, tokenizer, and what is known about the data in advance.
        shard_rows: Rows per shard; shard k holds the rows from k * shard_rows on.
        features: Features of the finished dataset, as `datasets.Features.to_dict` gives them.
        num_rows: Length of the whole dataset; None for streams until the run is complete.
        shards: Names of the shards' files, in order; None until all exist.
        checksums: Checksums of the files' contents, by name; None until all exist.
        made_with: Versions of the packages, for information only.
        signed: Whether the shards' files say to which run they belong and which shard they are.
        version: Version of the folder's layout.
    """

    fingerprint: Fingerprint
    shard_rows: int
    features: dict[str, Any]
    num_rows: int | None
    shards: list[str] | None = None
    checksums: dict[str, str] | None = None
    made_with: dict[str, str] = field(default_factory=dict)
    signed: bool = False
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder, in full or not at all."""
        content = json.dumps(asdict(self), indent=1)
        write_whole(folder / NAME, lambda path: path.write_text(content, encoding="utf-8"))

    def write_if_first(self, folder: Path) -> None:
        """Write the manifest into a folder, unless another process was first; its manifest then counts."""
        write_if_first(folder / NAME, json.dumps(asdict(self), indent=1))

    @property
    def run(self) -> str:
        """A checksum that distinguishes this run's shards from another run's."""
        return digest(json.dumps([self.fingerprint, self.features, self.shard_rows], sort_keys=True))


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a folder; None if there is none.

    Raises:
        ResumeMismatchError: The file is not a manifest, or has another version.
    """
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if content["version"] == VERSION:
            return Manifest(**content)
        found = f"version {content['version']}; this is version {VERSION}"
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        found = repr(error)
    raise ResumeMismatchError(
        f"`resume_dir`: {folder / NAME} is not a manifest that this version reads ({found}); choose another folder"
    )


def check_same(folder: Path, before: Manifest, now: Manifest) -> None:
    """Refuse to continue in another run's folder.

    Raises:
        ResumeMismatchError: The manifests differ; the message names each difference.
    """
    lines = differences(before.fingerprint, now.fingerprint)
    if before.features != now.features:
        lines += differences({"columns": before.features}, {"columns": now.features})
    if lines:
        raise ResumeMismatchError(
            f"`resume_dir`: {folder} holds a run with other arguments or data:\n  "
            + "\n  ".join(lines)
            + "\nPass the same arguments and data to continue it, or another folder to start anew."
        )
