"""How well a text is gone on with through a compressed cache: loss and KL to the dense cache, token by token.

As in `fidelity`, and for many texts: each is read once, its rows are replayed into every cache, and what follows is fed
through that cache. The prediction of the prefill is left out: it is exact by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch.nn.functional import log_softmax

from hf_kvcache.compat import cache_argument
from hf_kvcache.dmc import retrofits
from hf_kvcache.eval.compare import prepare
from hf_kvcache.eval.lines import Lines
from hf_kvcache.eval.memory import cache_nbytes
from hf_kvcache.eval.reading import Reading
from hf_kvcache.eval.specs import CacheSpec
from hf_kvcache.eval.texts import Texts
from hf_kvcache.eval.windows import Windows, in_steps

# tokens fed at a time
STEP = 8


@dataclass(frozen=True)
class Continued:
    """One text behind one cache.

    Attributes:
        length: tokens that were read and compressed.
        text: number of the window, from 0.
        cache: as typed.
        loss: negative log-likelihood of every token that follows the first one, in nats.
        kl: KL(dense cache || this cache) of the predictions of the same tokens, in nats.
        nbytes: bytes of the cache once it had compressed; of several texts read together their share.
        filled: how it got its rows; see `Line`.
        error: what went wrong; None for nothing.
    """

    length: int
    text: int
    cache: str
    loss: list[float] | None = None
    kl: list[float] | None = None
    nbytes: int | None = None
    filled: str | None = None
    error: str | None = None

    @property
    def key(self) -> tuple:
        return self.length, self.text, self.cache


class ContinuedLines(Lines):
    """What has been scored so far, with all that `Lines` promises."""

    kind = Continued


@dataclass(frozen=True)
class TextPlan:
    """What is scored.

    Attributes:
        lengths: tokens that are read and compressed.
        n_next: tokens that are fed behind them, each of which predicts one.
        n_texts: windows of every length.
        specs: caches, the baseline first.
        batch_size: texts that are read together, at most.
    """

    lengths: tuple[int, ...]
    n_next: int
    n_texts: int
    specs: tuple[CacheSpec, ...]
    batch_size: int = 1

    def n_tokens(self, length: int) -> int:
        """Tokens of a window: the last one is predicted only."""
        return length + self.n_next + 1

    @property
    def n_lines(self) -> int:
        """Lines of the whole run."""
        return len(self.lengths) * self.n_texts * len(self.specs)


def go_on(
    model,
    windows: Windows,
    plan: TextPlan,
    settings,
    lines: ContinuedLines,
    advance: Callable[[str, int], None] = lambda stage, n_lines: None,
) -> None:
    """Score all that has no line yet.

    Args:
        model: causal language model in evaluation mode.
        windows: of the texts; enough of them.
        plan: what is scored.
        settings: of the evaluation (`running.Settings`).
        lines: takes a line as soon as there is one.
        advance: called with a description and a number of lines, before they are scored or where they are there.
    """
    try:
        # the first texts of all lengths, then those after them
        for start, length in product(range(0, plan.n_texts, plan.batch_size), plan.lengths):
            numbers = range(start, min(start + plan.batch_size, plan.n_texts))
            missing = {spec.text: [i for i in numbers if not lines.has((length, i, spec.text))] for spec in plan.specs}
            n_missing = sum(map(len, missing.values()))
            advance("", len(plan.specs) * len(numbers) - n_missing)
            if n_missing:
                found = [windows.window(i, plan.n_tokens(length)) for i in numbers]
                together = _Together(model, torch.tensor(found, device=model.device), length, settings)
                for line in together.run(plan.specs, numbers, missing, advance):
                    lines.add(line)
    finally:
        for child in retrofits(model).values():
            child.compresses = True


class _Together:
    """Texts that are read together behind one cache after the other, and compared with the dense one.

    Args:
        windows: token ids, `[B, length + n_next + 1]`.
        length: tokens that are read and compressed.
    """

    def __init__(self, model, windows: torch.Tensor, length: int, settings):
        self.model, self.windows, self.length, self.settings = model, windows, length, settings
        self.reading = Reading(model, Texts(windows[:, :length]), settings)
        # log-probabilities of the dense cache, [B, step, vocab] of every step
        self.dense: list[torch.Tensor] = []

    def run(
        self, specs: tuple[CacheSpec, ...], numbers: range, missing: dict, advance: Callable
    ) -> Iterator[Continued]:
        """Lines of all that is missing; the baseline is scored in any case, since the others are compared with it."""
        failed = None
        for spec in specs:
            is_base = spec is specs[0]
            if not missing[spec.text] and not is_base:
                continue
            shown = f"{self.length:,} · {numbers[0] + 1} · {spec.text}"
            advance(shown, len(missing[spec.text]))
            try:
                if failed is not None:
                    raise RuntimeError(failed)
                found = self._score(spec, is_base)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                found = {"error": said}
                if is_base:
                    failed = f"the baseline failed: {said}"
            for row, i in enumerate(numbers):
                if i in missing[spec.text]:
                    of_row = {name: value[row] if isinstance(value, list) else value for name, value in found.items()}
                    yield Continued(self.length, i, spec.text, **of_row)

    def _score(self, spec: CacheSpec, is_base: bool) -> dict:
        """What lines say of one cache; lists are of the texts."""
        prepare(self.model, spec, self.settings)
        cache, _, filled = self.reading.fill(spec)
        nbytes = cache_nbytes(cache) // len(self.windows)
        loss, kl = [], []
        for k, (log_probs, targets) in enumerate(self._predictions(cache)):
            if is_base:
                self.dense.append(log_probs)
            p = self.dense[k]
            loss.append(-log_probs.gather(2, targets[..., None])[..., 0])
            # rounding can take a sum of zeros below zero
            kl.append((p.exp() * (p - log_probs)).sum(-1).clamp(min=0))
        loss, kl = ([[round(x, 6) for x in row] for row in torch.cat(part, 1).tolist()] for part in (loss, kl))
        return {"loss": loss, "kl": kl, "nbytes": nbytes, "filled": filled}

    @torch.no_grad()
    def _predictions(self, cache) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Log-probabilities `[B, step, vocab]` and right tokens `[B, step]` of what follows, fed through a cache."""
        for fed, targets in in_steps(self.windows, self.length, STEP):
            logits = self.model(fed, **cache_argument(cache), use_cache=True).logits
            yield log_softmax(logits.float(), -1), targets
