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
from hf_kvcache.eval.texts import Texts, in_steps

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
        nbytes: bytes of the cache once it had compressed.
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
    """

    lengths: tuple[int, ...]
    n_next: int
    n_texts: int
    specs: tuple[CacheSpec, ...]

    def n_tokens(self, length: int) -> int:
        """Tokens of a window: the last one is predicted only."""
        return length + self.n_next + 1

    @property
    def n_lines(self) -> int:
        """Lines of the whole run."""
        return len(self.lengths) * self.n_texts * len(self.specs)


def go_on(
    model,
    texts: Texts,
    plan: TextPlan,
    settings,
    lines: ContinuedLines,
    advance: Callable[[str, int], None] = lambda stage, n_lines: None,
) -> None:
    """Score all that has no line yet.

    Args:
        model: causal language model in evaluation mode.
        texts: where windows are taken from; enough of them.
        plan: what is scored.
        settings: of the evaluation (`running.Settings`).
        lines: takes a line as soon as there is one.
        advance: called with a description and a number of lines, before they are scored or where they are there.
    """
    try:
        # the first text of all lengths, then the second
        for i, length in product(range(plan.n_texts), plan.lengths):
            missing = [spec for spec in plan.specs if not lines.has((length, i, spec.text))]
            advance("", len(plan.specs) - len(missing))
            if not missing:
                continue
            window = texts.window(i, plan.n_tokens(length))
            reading = Reading(model, window[:length], settings)
            base, *others = plan.specs
            advance(f"{length:,} · {i + 1} · {base.text}", int(base in missing))
            # the others are compared with it, so that it is scored again where a run goes on
            line, dense = _scored(model, reading, window, i, base, settings, None)
            if base in missing:
                lines.add(line)
            for spec in others:
                if spec in missing:
                    advance(f"{length:,} · {i + 1} · {spec.text}", 1)
                    lines.add(_compared(model, reading, window, i, spec, settings, dense, line.error))
    finally:
        for child in retrofits(model).values():
            child.compresses = True


def _compared(model, reading, window, i, spec, settings, dense, error: str | None) -> Continued:
    """One cache against the dense one, or why there is none to compare it with."""
    if error is not None:
        return Continued(len(reading.ids), i, spec.text, error=f"the baseline failed: {error}")
    return _scored(model, reading, window, i, spec, settings, dense)[0]


def _scored(model, reading, window, i, spec, settings, dense) -> tuple[Continued, list[torch.Tensor]]:
    """The line of one cache, and its log-probabilities `[step, vocab]` of every step; a failure is a line, too."""
    n = len(reading.ids)
    prepare(model, spec, settings)
    try:
        cache, _, filled = reading.fill(spec)
        nbytes = cache_nbytes(cache)
        loss, kl, kept = [], [], []
        for k, (log_probs, targets) in enumerate(_predictions(model, cache, window, n)):
            loss += (-log_probs.gather(1, targets[:, None])[:, 0]).tolist()
            if dense is None:
                kept.append(log_probs)
                kl += [0.0] * len(targets)
            else:
                p = dense[k]
                # rounding can take a sum of zeros below zero
                kl += (p.exp() * (p - log_probs)).sum(-1).clamp(min=0).tolist()
    except Exception as error:
        return Continued(n, i, spec.text, error=f"{type(error).__name__}: {error}"), []
    loss, kl = ([round(value, 6) for value in values] for values in (loss, kl))
    return Continued(n, i, spec.text, loss, kl, nbytes, filled), kept


@torch.no_grad()
def _predictions(model, cache, window: list[int], n_context: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities `[step, vocab]` and right tokens `[step]` of what follows, fed through a cache."""
    for fed, targets in in_steps(window, n_context, STEP):
        ids = torch.tensor([fed], device=model.device)
        logits = model(ids, **cache_argument(cache), use_cache=True).logits[0]
        yield log_softmax(logits.float(), -1), torch.tensor(targets, device=model.device)
