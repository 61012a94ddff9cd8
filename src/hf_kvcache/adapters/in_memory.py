"""Adapters apart from any model: their tensors, saved, loaded, and compared with models."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from hf_kvcache.adapters import fit
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.modules import attentions


class Adapter:
    """The adapter of a whole model. Subclasses are frozen dataclasses with these attributes.

    Attributes:
        kind: what its files are, a `Kind`.
        layers: what it holds, by layer.
        tensors: all of them, by layer and part.
        config: of no arguments, what `adapter_config.json` says: the fields of the config that PEFT knows.
        from_config: a class method of a config and tensors by layer and part, which makes an adapter of them.
        base_model: name or path of the model.
        fingerprint: what tells that model from others, `fit.fingerprint` of one layer; None fits every model of these
            shapes.
    """

    def __deepcopy__(self, memo):
        # constants: copies of a cache share them
        return self

    @property
    def n_layers(self) -> int:
        """Layers of the model, as far as is known: at least one more than the largest index."""
        return fit.known_layers(self.fingerprint, self.layers)

    def to(self, *args, **kwargs):
        """This adapter in another dtype or on another device; arguments as `torch.Tensor.to`."""
        moved = {place: t.to(*args, **kwargs) for place, t in self.tensors.items()}
        return self.from_config(self.config(), moved)

    def made_for(self, model: torch.nn.Module, name: str | None = None):
        """This adapter, tied to a model by its name and its fingerprint.

        Raises:
            AdapterError: the model lacks its first layer.
        """
        found = attentions(model)
        if min(self.layers) not in found:
            raise AdapterError(f"layers: the model has {len(found)}, the adapter is for {sorted(self.layers)}")
        first = found[min(self.layers)].module
        name = fit.model_name(model, first) if name is None else name
        return replace(self, base_model=name, fingerprint=fit.fingerprint(first))

    def check_model(self, model: torch.nn.Module, weights: bool = True) -> None:
        """Raise unless this adapter fits a model, or one attention module of it.

        Args:
            model: the model, bare or wrapped by PEFT, or one attention module.
            weights: also compare a sample of the base weights, where they are there to be compared; False lets a
                decomposed, or otherwise changed, model pass.

        Raises:
            AdapterError: names all that differs, or the projections that are missing.
        """
        fit.check_fit(self.kind, self.config(), model, weights)

    def save(self, directory: str | os.PathLike, model: torch.nn.Module | None = None) -> Path:
        """Write a PEFT adapter: `PeftModel.from_pretrained`, `model.load_adapter` and `load` read it.

        Args:
            directory: created if need be; an earlier adapter there is replaced, atomically.
            model: the model that it is for. Its name, its fingerprint and the paths of its attention modules are
                recorded; without it, an adapter that does not know its model fits every one of the same shapes.

        Raises:
            AdapterError: it does not fit `model`, or holds NaN or infinity.
        """
        adapter = self if model is None or self.fingerprint is not None else self.made_for(model)
        if model is not None:
            adapter.check_model(model)
        return self.kind.write(directory, adapter.config(), self.tensors, model)

    @classmethod
    def load(cls, source: str | os.PathLike, **hub):
        """Read an adapter from a folder or from the Hub; PEFT is not needed.

        Args:
            source: folder, or name of a repository on the Hub.
            hub: `revision`, `token`, `subfolder` and the like for the Hub.

        Raises:
            AdapterError: files are missing, pickled, damaged, of another format, or say something impossible.
        """
        return cls.from_config(*cls.kind.read(source, **hub))
