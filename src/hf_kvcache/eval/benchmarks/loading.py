"""Rows of published data sets: from files in a local folder, or from a repository of the Hub at one revision."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile, ZipFile


class NoRows(ValueError):
    """Rows that cannot be had; says why, and what to do."""


@dataclass(frozen=True)
class Origin:
    """Where a data set is published.

    Attributes:
        repository: of data sets on the Hub.
        file: path in it; a local copy may lie in any folder, also as `BENCHMARK_NAME`.
        archive: path of the ZIP file in the repository that `file` is in; None where it lies there by itself.
    """

    repository: str
    file: str
    archive: str | None = None


@dataclass
class Source:
    """Where rows are read.

    Args:
        folder: with files of data sets, at any depth; None for the Hub.
        revision: of repositories on the Hub: branch, tag or commit.
        pinned: commits of repositories that go before `revision`: those which an evaluation began with.
    """

    folder: Path | None = None
    revision: str = "main"
    pinned: dict[str, str] = field(default_factory=dict)

    def rows(self, benchmark: str, origin: Origin) -> tuple[list[dict], str]:
        """All rows of a data set, and where they are from.

        Raises:
            NoRows: they are not there, or are no JSON.
        """
        if self.folder is None:
            path, where = self._from_hub(origin)
        else:
            path = self._from_folder(benchmark, origin)
            where = path.name
        if path.suffix == ".zip":
            return _rows(_unpacked(path, origin), path / origin.file), where
        return _rows(path.read_bytes(), path), where

    def beside(self, name: str) -> dict | None:
        """A JSON object in the folder, such as the prompts that a benchmark was published with; None for none."""
        found = [] if self.folder is None else sorted(self.folder.rglob(name))
        return _parsed(found[0].read_bytes(), found[0]) if found else None

    def _from_folder(self, benchmark: str, origin: Origin) -> Path:
        if not self.folder.is_dir():
            raise NoRows(f"{str(self.folder)!r} is no folder")
        name = Path(origin.file).name
        names = [name, f"{benchmark}_{name}"]
        found = sorted({path for wanted in names for path in self.folder.rglob(wanted) if path.is_file()})
        # what is in a folder of its own belongs to it
        found = [path for path in found if benchmark in path.parts or benchmark in path.name] or found
        if not found and origin.archive:
            found = sorted(self.folder.rglob(origin.archive))
        if len(found) > 1:
            raise NoRows(
                f"{name} is there {len(found)} times: {', '.join(map(str, found[:3]))}; leave one in the folder"
            )
        if not found:
            raise NoRows(
                f"neither {' nor '.join(names)} is in {str(self.folder)!r}; on the Hub it is "
                f"{origin.archive or origin.file} of {origin.repository}"
            )
        return found[0]

    def _from_hub(self, origin: Origin) -> tuple[Path, str]:
        from huggingface_hub import hf_hub_download

        wanted = origin.archive or origin.file
        revision = self.pinned.get(origin.repository, self.revision)
        try:
            path = Path(hf_hub_download(origin.repository, wanted, repo_type="dataset", revision=revision))
        except Exception as error:  # of whichever HTTP library this release of the client uses
            reason = str(error).splitlines()[0] if str(error) else "no reason given"
            raise NoRows(
                f"{origin.repository} ({revision}) on the Hub: {type(error).__name__}: {reason}; "
                "or give a folder with the files (--data DIR)"
            ) from error
        return path, f"{origin.repository}@{_commit(path) or revision}"


def _commit(path: Path) -> str | None:
    """Commit of a file in the Hub's cache: the folder behind `snapshots`."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _unpacked(path: Path, origin: Origin) -> bytes:
    try:
        with ZipFile(path) as archive:
            names = [name for name in archive.namelist() if Path(name).name == Path(origin.file).name]
            if not names:
                raise NoRows(f"{path} has no {Path(origin.file).name}")
            return archive.read(names[0])
    except BadZipFile as error:
        raise NoRows(f"{path} is no ZIP file") from error


def _rows(data: bytes, path: Path) -> list[dict]:
    """Rows of JSON lines, or of a JSON list."""
    if path.suffix == ".jsonl":
        # line feeds alone: texts may contain what else ends a line
        lines = [line for line in data.split(b"\n") if line.strip()]
        rows = [_parsed(line, path, f", row {i}") for i, line in enumerate(lines, 1)]
    else:
        rows = _parsed(data, path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise NoRows(f"{path} has no rows: JSON objects, one a line or in a list")
    return rows


def _parsed(data: bytes, path: Path, where: str = ""):
    try:
        return json.loads(data)
    except ValueError as error:
        raise NoRows(f"{path}{where}: no JSON ({error})") from error
