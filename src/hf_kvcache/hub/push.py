"""Exported repositories, of models and of kernels, on their way to the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from packaging.version import Version

from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.hub.kernel_repo import VARIANT, check_built

TAKES_KERNELS = "2.3"  # the first huggingface_hub whose uploads do


def push(
    directory: str | os.PathLike,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a folder that `export` or `build_kernel` wrote; the Hub checks its card before it takes anything.

    Kernels go to a repository of that type, to the branch of their version, where `kernels` looks for them; their card
    goes to the main branch, too.

    Args:
        directory: the folder.
        repository: "name" or "organisation/name"; made if need be.
        private: whether a new one is.
        revision: branch; unless told the default one, or that of the kernel's version, as "v1".
        token: of an account that may write; the one that is logged in unless told.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        AdapterError: the folder is no exported repository.
        ValueError: the files of a kernel are not those that were built, huggingface_hub is too old for kernels, or the
            Hub does not take the card's metadata.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, or cannot be reached.
    """
    directory = Path(directory)
    api = HfApi(token=token)
    if (directory / VARIANT).is_dir():
        return _push_kernel(api, directory, repository, private, revision, message)
    check_exported(directory)
    name = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    message = message or "Model with its compressed KV cache, by hf_kvcache"
    return api.upload_folder(repo_id=name, folder_path=directory, revision=revision, commit_message=message).commit_url


def _push_kernel(api: HfApi, directory: Path, repository: str, private, revision, message) -> str:
    version = check_built(directory)["version"]
    if Version(huggingface_hub.__version__) < Version(TAKES_KERNELS):
        raise ValueError(
            f"kernels are uploaded by huggingface_hub {TAKES_KERNELS} or newer; this is {huggingface_hub.__version__}"
        )
    name = api.create_repo(repository, repo_type="kernel", private=private, exist_ok=True).repo_id
    revision = revision or f"v{version}"
    api.create_branch(name, branch=revision, repo_type="kernel", exist_ok=True)
    common = {"repo_id": name, "repo_type": "kernel", "commit_message": message or "Kernel, by hf_kvcache"}
    api.upload_file(path_or_fileobj=directory / "README.md", path_in_repo="README.md", **common)
    # what an earlier build had is not part of this one
    patterns = {"ignore_patterns": ["**/__pycache__/**"], "delete_patterns": ["build/**"]}
    return api.upload_folder(folder_path=directory, revision=revision, **patterns, **common).commit_url


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
