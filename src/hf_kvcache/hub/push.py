"""Exported repositories on their way to the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

from huggingface_hub import HfApi

from hf_kvcache.adapters.errors import AdapterError


def push(
    directory: str | os.PathLike,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a folder that `export` wrote; the Hub checks its card before it takes anything.

    Args:
        directory: the folder.
        repository: "name" or "organisation/name"; made if need be.
        private: whether a new one is.
        revision: branch; the default one unless told.
        token: of an account that may write; the one that is logged in unless told.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        AdapterError: the folder is no exported repository.
        ValueError: the Hub does not take the card's metadata.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, or cannot be reached.
    """
    directory = Path(directory)
    check_exported(directory)
    api = HfApi(token=token)
    name = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    message = message or "Model with its compressed KV cache, by hf_kvcache"
    return api.upload_folder(repo_id=name, folder_path=directory, revision=revision, commit_message=message).commit_url


def check_exported(directory: Path) -> None:
    """Raise `AdapterError` unless a folder holds what `export` writes, whole."""
    try:
        config = json.loads((directory / "config.json").read_text())
        files = {path.partition(".")[0] for path in config["auto_map"].values()}
        is_ours = isinstance(config["kv_cache"], dict)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise AdapterError(
            f"{directory} is no exported repository (config.json: {error!r}); export writes one"
        ) from error
    missing = [name for name in (*(f"{file}.py" for file in files), "README.md") if not (directory / name).exists()]
    if not is_ours or missing or not list(directory.glob("*.safetensors")):
        raise AdapterError(
            f"{directory} is no whole repository: it lacks {', '.join(missing) or 'weights or kv_cache'}"
        )
