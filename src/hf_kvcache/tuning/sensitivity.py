"""What compressing one thing in one layer does to predictions, by what it changes in the output of attention.

To second order the divergence that a change `d` of attention's output causes is `d^T F d / 2` with the Fisher
information `F`, which is the mean square of gradients of tokens that the model draws itself. Gradients are taken once
per text; every candidate then costs compressing and attending in one layer, and no forward pass. Changes at different
tokens and heads are taken as independent; what that leaves out is put right by `attribution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from hf_kvcache.tuning.allocate import Offer
from hf_kvcache.tuning.follow import Followed, Rows, divergence
from hf_kvcache.tuning.menu import KEEP_ALL, Choice, Menu
from hf_kvcache.tuning.probes import Probe

N_SAMPLES = 8
# what tokens are kept in while the loss by eviction is looked at
LIGHT = "8"


@dataclass
class LayerTable:
    """What one layer loses, nats per token, and takes, bytes.

    Attributes:
        keys, values: loss by name of codec.
        tokens: loss by ratio.
        fixed, packed: bytes beside packed rows, and packed rows of all heads with room for more, by ratio.
        per_row: bytes of one packed row of one head by side and name.
    """

    keys: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    tokens: dict[float, float] = field(default_factory=lambda: {KEEP_ALL: 0.0})
    fixed: dict[float, float] = field(default_factory=dict)
    packed: dict[float, int] = field(default_factory=dict)
    per_row: dict[tuple[str, str], float] = field(default_factory=dict)

    def without_policy(self) -> LayerTable:
        """A copy that knows codecs alone."""
        kept = {KEEP_ALL: self.fixed[KEEP_ALL]}
        return replace(self, tokens={KEEP_ALL: 0.0}, fixed=kept, packed={KEEP_ALL: self.packed[KEEP_ALL]})

    def offers(self, menu: Menu, factor: float = 1.0) -> list[Offer]:
        """All that a menu has for this layer; losses are added up, and multiplied by `factor`."""
        return [Offer(self.nbytes(c), factor * self.loss(c), c) for c in menu.choices()]

    def loss(self, choice: Choice) -> float:
        """The sum of what each thing alone loses."""
        return self.tokens[choice.ratio] + self.keys[choice.keys] + self.values[choice.values]

    def nbytes(self, choice: Choice) -> float:
        """Bytes of the layer."""
        per_row = self.per_row["k", choice.keys] + self.per_row["v", choice.values]
        return self.fixed[choice.ratio] + self.packed[choice.ratio] * per_row


def add_codecs(
    tables: Sequence[LayerTable], menu: Menu, probe: Probe, followed: Followed, grads, weight: float
) -> None:
    """Add what codecs lose in every layer where all tokens stay, `weight` times."""
    values = [*menu.names]
    for i, table in enumerate(tables):
        dense, heard = probe.rows[i], followed.heard[i]
        for n, keys in enumerate(menu.keys_of_all):
            # every name of the other side comes along once
            other = values[n % len(values)]
            layer = probe.filled_layer(menu.one_layer(i, Choice(KEEP_ALL, keys, other), probe.model.config), i)
            own = Rows.of(layer)
            found = weight * _loss(heard, Rows(own.k, dense.v), grads[i], probe)
            table.keys[keys] = table.keys.get(keys, 0.0) + found
            if n < len(values):
                found = weight * _loss(heard, Rows(dense.k, own.v), grads[i], probe)
                table.values[other] = table.values.get(other, 0.0) + found
            if probe.counts_bytes:
                _note_bytes(table, layer, keys, other, KEEP_ALL)


def add_ratios(
    tables: Sequence[LayerTable], menu: Menu, probe: Probe, followed: Followed, grads, weight: float
) -> None:
    """Add what eviction loses in every layer, `weight` times."""
    for ratio in menu.ratios:
        light = Choice(ratio, LIGHT, LIGHT)
        # what shares out tokens among layers is asked of all of them together
        config, every = probe.model.config, range(len(tables))
        whole = probe.filled(menu.cache([light] * len(tables), every, config)) if menu.is_shared else None
        for i, table in enumerate(tables):
            layer = whole.layers[i] if menu.is_shared else probe.filled_layer(menu.one_layer(i, light, config), i)
            found = _loss(followed.heard[i], Rows.of(layer), grads[i], probe)
            table.tokens[ratio] = table.tokens.get(ratio, 0.0) + weight * found
            if probe.counts_bytes:
                _note_bytes(table, layer, LIGHT, LIGHT, ratio)


def _note_bytes(table: LayerTable, layer, keys: str, values: str, ratio: float) -> None:
    store = layer.store
    for side, name, width in (("k", keys, layer.head_dim), ("v", values, layer.v_head_dim)):
        table.per_row[side, name] = store.codec_of(side).nbytes_per_token(width, layer.dtype.itemsize)
    # pages are allocated whole
    n_rows = store.packed.n_pages * store.packed.page if store.is_ragged else store.n_packed * layer.n_kv_heads
    table.packed[ratio] = n_rows
    per_row = table.per_row["k", keys] + table.per_row["v", values]
    table.fixed[ratio] = layer.nbytes - table.packed[ratio] * per_row


def _loss(heard, rows, grads: torch.Tensor, probe: Probe) -> float:
    change = heard.attend(rows) - heard.out
    return (grads * change).sum(-1).square().sum((1, 2, 3)).mean().item() / (2 * len(probe.text.scored))


@dataclass(frozen=True)
class Blame:
    """The divergence behind a whole cache, and what each layer has to do with it.

    Attributes:
        kl: nats per token.
        shares: of the layers, which add up to about that.
    """

    kl: float
    shares: list[float]


def blame(probe: Probe, cache) -> Blame:
    """Read what follows a probe over the rows of a filled cache.

    A layer's share is half its change of attention times the gradient of the divergence: were the divergence a square,
    they would add up to it.
    """
    rows = [Rows.of(layer) for layer in cache.layers]
    text = probe.text
    followed = Followed(probe.model, rows, len(text.context), text.follow, text.scored)
    kl = divergence(probe.expected, followed.logp)
    grads = followed.gradients_of(lambda logp: divergence(probe.expected, logp))
    shares = [
        ((heard.out - heard.attend(dense)) * grad).sum().item() / 2
        for heard, dense, grad in zip(followed.heard, probe.rows, grads, strict=True)
    ]
    return Blame(kl.item(), shares)
