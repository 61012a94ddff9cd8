"""Decisions of a retrofit (DMC, DMS) as weights of a repository's model."""

from __future__ import annotations

from torch import nn

from hf_kvcache.dmc.retrofitting import retrofit
from hf_kvcache.dmc.settings import Settings


def add_retrofit(model: nn.Module, spec: dict) -> None:
    """Let the model decide which tokens keep a row."""
    retrofit(model, Settings.from_dict(spec["settings"]))
