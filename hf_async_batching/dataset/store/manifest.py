"""What a folder of a run says about itself: what it was made from, how its rows are cut into shards, its schema."""

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
    """Written before the first row is served.

    Attributes:
        fingerprint: Arguments, model, tokenizer, and what is known of the data in advance.
        shard_rows: Rows per shard: shard k holds the rows from k * shard_rows on.
        features: Features of the finished dataset, as `datasets.Features.to_dict` gives them.
        num_rows: Length of the whole dataset; None for streams, until it is complete.
        shards: Names of the shards' files, in order; None until all are there.
        checksums: Checksums of these files' content, by name; None until all are there.
        made_with: Versions, for people.
        signed: Whether the shards' files say which run and which shard they are.
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
        """Put it into its place, in full or not at all."""
        content = json.dumps(asdict(self), indent=1)
        write_whole(folder / NAME, lambda path: path.write_text(content, encoding="utf-8"))

    def write_if_first(self, folder: Path) -> None:
        """Put it into its place unless another process has done so, which is then as good."""
        write_if_first(folder / NAME, json.dumps(asdict(self), indent=1))

    @property
    def run(self) -> str:
        """A checksum that tells this run's shards from another's."""
        return digest(json.dumps([self.fingerprint, self.features, self.shard_rows], sort_keys=True))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none.

    Raises:
        ResumeMismatchError: It is not a run's folder, or one of another version.
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
    """Refuse to go on with another run's folder.

    Raises:
        ResumeMismatchError: Names each difference.
    """
    lines = differences(before.fingerprint, now.fingerprint)
    if before.features != now.features:
        lines += differences({"columns": before.features}, {"columns": now.features})
    if lines:
        raise ResumeMismatchError(
            f"`resume_dir`: {folder} holds a run with other arguments or data:\n  "
            + "\n  ".join(lines)
            + "\nPass the same ones to go on with it, or another folder to start anew."
        )
