"""From a model, texts and a budget to the configuration of a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import exp
from statistics import fmean

from hf_kvcache import compat
from hf_kvcache.cache import KVCache
from hf_kvcache.policies.base import Policy
from hf_kvcache.tuning.allocate import allocate, uniform
from hf_kvcache.tuning.follow import Followed
from hf_kvcache.tuning.menu import Choice, Menu, menus_of
from hf_kvcache.tuning.probes import Probe, Score, Text, read_all
from hf_kvcache.tuning.rates import decode_rate
from hf_kvcache.tuning.sensitivity import N_SAMPLES, LayerTable, add_codecs, add_ratios, blame

WINDOWS = (64, 32, 16)
# a window takes at most this share of the budget
WINDOW_SHARE = 1 / 6
LEAST_FACTOR, MOST_FACTOR = 0.1, 30.0
# shares of the bytes between which one is looked for that reaches another goal
SHARES, HALVINGS = (0.03, 0.6), 5
# times that a ratio is looked for between the best and those next to it
N_REFINED = 2
Advance = Callable[[str], None]


@dataclass(frozen=True)
class Goal:
    """What is asked for: one of the first three.

    Attributes:
        bytes_ratio: most bytes, as a share of a dense cache's.
        max_kl: most divergence of prose, nats per token.
        tokens_per_second: least speed of decoding one text on this machine.
        needle_weight: what a nat at the answers of needles counts beside one of prose.
    """

    bytes_ratio: float | None = None
    max_kl: float | None = None
    tokens_per_second: float | None = None
    needle_weight: float = 1.0

    def loss(self, by_kind: dict[str, float]) -> float:
        """What is made small."""
        return by_kind["text"] + self.needle_weight * by_kind.get("needle", 0.0)


@dataclass
class Trial:
    """A cache that was measured.

    Attributes:
        menu, choices: what it is made of.
        kl: divergence by kind of text, nats per token.
        shares: of the layers in the loss.
        bytes_ratio: bytes as a share of a dense cache's.
    """

    menu: Menu
    choices: list[Choice]
    kl: dict[str, float]
    shares: list[float]
    bytes_ratio: float


@dataclass
class Tuned:
    """What was found.

    Attributes:
        trial: the cache.
        cache: an empty one.
        score: by kind of text, of predictions through the real cache.
        dense: that of the dense model.
        trials: loss and bytes of everything that was measured, in order.
        tokens_per_second: what it decodes one text with, where that was asked for.
    """

    trial: Trial
    cache: KVCache
    score: dict[str, Score]
    dense: dict[str, Score]
    trials: list[dict] = field(default_factory=list)
    tokens_per_second: float | None = None


class Tuner:
    """Looks for a cache of one model.

    Args:
        model: causal language model in evaluation mode, all of whose layers have full attention.
        texts: what it is measured on, prose and needles.
        policies: that layers may evict by.
        names: codecs that they may have, see `menu.codec_of`.
        advance: called with a description before every step.

    Raises:
        ValueError: the model cannot be listened to, or there is no prose among the texts.
    """

    def __init__(
        self,
        model,
        texts: Sequence[Text],
        policies: Sequence[Policy],
        names: Sequence[str],
        advance: Advance = lambda stage: None,
    ):
        self.model, self.policies, self.names, self.advance = model, policies, tuple(names), advance
        if not any(text.kind == "text" for text in texts):
            raise ValueError("there is no prose among the texts")
        self.probes: list[Probe] = read_all(model, texts, advance)
        if self.probes[0].prefill is None:
            raise ValueError(f"this model cannot be tuned for: {self.probes[0].why_not}")
        self.layers = [i for i, layer in enumerate(compat.hf_layers(model.config)) if layer is None]
        self._first = next(probe for probe in self.probes if probe.text.kind == "text")
        for probe in self.probes:
            probe.counts_bytes = probe is self._first
        self._followed: list[tuple[Followed, list]] = []
        self._tables: dict[int, dict] = {}

    @property
    def nbytes_dense(self) -> int:
        """Bytes of a dense cache of the first text."""
        return self._first.nbytes

    def tune(self, goal: Goal, n_rounds: int = 4) -> Tuned:
        """Share out a budget, measure, put right what the sum of parts got wrong, and again.

        Raises:
            ValueError: no cache on offer is as small, as fast, or diverges as little, as asked for.
        """
        if goal.tokens_per_second is not None:
            return self._fast(goal, n_rounds)
        if goal.bytes_ratio is None:
            return self._least(goal, n_rounds)
        trials = self._within(goal, goal.bytes_ratio, n_rounds)
        fits = [trial for trial in trials if trial.bytes_ratio <= goal.bytes_ratio * 1.002]
        if not fits:
            least = min(trial.bytes_ratio for trial in trials)
            raise ValueError(
                f"the smallest cache that was measured has {least:.4f} of the bytes, not {goal.bytes_ratio}"
            )
        return self._verified(min(fits, key=lambda trial: goal.loss(trial.kl)), trials)

    def _within(self, goal: Goal, bytes_ratio: float, n_rounds: int) -> list[Trial]:
        """Trials of at most so many bytes."""
        n_dense = self._window(bytes_ratio)
        menus = [menu for policy in (None, *self.policies) for menu in menus_of(policy, n_dense, self.names)]
        found, reasons = [], []
        for menu in menus:
            try:
                found.append(_Search(self, menu, goal, bytes_ratio).round())
            except ValueError as error:
                reasons.append(error)
        if not found:
            raise reasons[0]
        for _ in range(N_REFINED):
            found += self._between(found, goal, bytes_ratio)
        best = min(found, key=lambda search: goal.loss(search.trials[-1].kl))
        for _ in range(n_rounds - 1):
            best.round()
        best.round_of_equals()
        return [trial for search in found for trial in search.trials]

    def _between(self, found: list[_Search], goal: Goal, bytes_ratio: float) -> list[_Search]:
        """Where the best policy has one ratio for all layers: what is between that and those next to it."""
        best = min(found, key=lambda search: goal.loss(search.trials[-1].kl)).menu
        if not best.is_shared:
            return []
        ratio = best.ratios[0]
        others = sorted(search.menu.ratios[0] for search in found if search.menu.policy == best.policy)
        at, between = others.index(ratio), []
        for other in others[max(at - 1, 0) : at] + others[at + 1 : at + 2]:
            menu = replace(best, ratios=(round((ratio * other) ** 0.5, 4),))
            # a larger share may not fit, whatever bits its rows have
            with suppress(ValueError):
                between.append(_Search(self, menu, goal, bytes_ratio).round())
        return between

    def _least(self, goal: Goal, n_rounds: int) -> Tuned:
        """The smallest cache with less divergence than asked for."""
        found = self._halved(goal, n_rounds, lambda trials: min(trial.kl["text"] for trial in trials) <= goal.max_kl)
        least = min((trial.kl["text"] for trial in found), default=float("nan"))
        for trial in sorted(found, key=lambda trial: trial.bytes_ratio):
            if trial.kl["text"] <= goal.max_kl:
                tuned = self._verified(trial, found)
                # trials are of rows handed on, and the model behind the real cache may differ a little
                if tuned.score["text"].kl <= goal.max_kl:
                    return tuned
                least = tuned.score["text"].kl
        raise ValueError(f"no cache on offer comes below a KL of {goal.max_kl}; the nearest has {least:.4f}")

    def _fast(self, goal: Goal, n_rounds: int) -> Tuned:
        """The cache that loses least of those that decode fast enough."""
        rated: list[tuple[Trial, float]] = []

        def is_slow(trials: list[Trial]) -> bool:
            trial = min(trials, key=lambda trial: goal.loss(trial.kl))
            self.advance("decoding")
            rated.append((trial, decode_rate(self._first, self._cache(trial))))
            return rated[-1][1] < goal.tokens_per_second

        found = self._halved(goal, n_rounds, is_slow)
        fast = [pair for pair in rated if pair[1] >= goal.tokens_per_second]
        if not fast:
            most = max((rate for _, rate in rated), default=float("nan"))
            raise ValueError(
                f"no cache on offer decodes {goal.tokens_per_second:g} tokens per second; the fastest has {most:.1f}"
            )
        trial, rate = min(fast, key=lambda pair: goal.loss(pair[0].kl))
        return replace(self._verified(trial, found), tokens_per_second=rate)

    def _halved(self, goal: Goal, n_rounds: int, is_larger: Callable[[list[Trial]], bool]) -> list[Trial]:
        """Trials of the shares of bytes that halving looks at.

        Args:
            is_larger: whether the trials of a share are larger than they have to be, or than they may be.
        """
        (low, high), found = SHARES, []
        for _ in range(HALVINGS):
            middle = (low * high) ** 0.5
            try:
                trials = self._within(goal, middle, max(n_rounds - 2, 1))
            except ValueError:
                # nothing on offer is as small
                low = middle
                continue
            found += trials
            low, high = (low, middle) if is_larger(trials) else (middle, high)
        return found

    def _cache(self, trial: Trial) -> KVCache:
        """An empty cache like that of a trial."""
        return trial.menu.cache(trial.choices, self.layers, self.model.config)

    def _verified(self, best: Trial, trials: list[Trial]) -> Tuned:
        """A trial with the scores of the real cache."""
        self.advance("verifying")
        scores = [(probe, probe.score(probe.filled(self._cache(best)))) for probe in self.probes]
        logged = [
            {
                "policy": None if t.menu.policy is None else type(t.menu.policy).__name__,
                "bytes_ratio": round(t.bytes_ratio, 5),
                "kl": {kind: round(kl, 5) for kind, kl in t.kl.items()},
            }
            for t in trials
        ]
        dense = _by_kind((probe, probe.dense) for probe in self.probes)
        return Tuned(best, self._cache(best), _by_kind(scores), dense, logged)

    def _window(self, bytes_ratio: float) -> int:
        """Newest tokens that stay dense: many where there is room."""
        most = WINDOW_SHARE * bytes_ratio * len(self._first.text.context)
        return next((n for n in WINDOWS if n <= most), WINDOWS[-1])

    def weight_of(self, probe: Probe, goal: Goal) -> float:
        """What one text counts in the loss."""
        n = sum(other.text.kind == probe.text.kind for other in self.probes)
        return (1.0 if probe.text.kind == "text" else goal.needle_weight) / n

    def tables(self, menu: Menu, goal: Goal) -> list[LayerTable]:
        """What every layer loses by what is on a menu; remembered by policy and window."""
        codecs = self._tables.setdefault((None, menu.n_dense, goal.needle_weight), {})
        if not self._followed:
            for n, probe in enumerate(self.probes):
                self.advance(f"gradients, text {n + 1} of {len(self.probes)}")
                text = probe.text
                followed = Followed(self.model, probe.rows, len(text.context), text.follow, text.scored)
                self._followed.append((followed.let_go(samples := followed.samples(N_SAMPLES)), samples))
        if not codecs:
            codecs["tables"] = [LayerTable() for _ in self.layers]
            for n, (probe, own) in enumerate(zip(self.probes, self._followed, strict=True)):
                self.advance(f"codecs, text {n + 1} of {len(self.probes)}")
                add_codecs(codecs["tables"], replace(menu, policy=None), probe, *own, self.weight_of(probe, goal))
        if menu.policy is None:
            return codecs["tables"]
        key = repr(menu.policy), menu.ratios, menu.n_dense, goal.needle_weight
        if key not in self._tables:
            self._tables[key] = [table.without_policy() for table in codecs["tables"]]
            for n, (probe, own) in enumerate(zip(self.probes, self._followed, strict=True)):
                self.advance(f"{menu}, text {n + 1} of {len(self.probes)}")
                add_ratios(self._tables[key], menu, probe, *own, self.weight_of(probe, goal))
        return self._tables[key]


class _Search:
    """Rounds of sharing out and measuring with one policy."""

    def __init__(self, tuner: Tuner, menu: Menu, goal: Goal, bytes_ratio: float):
        self.tuner, self.menu, self.goal, self.bytes_ratio = tuner, menu, goal, bytes_ratio
        self.tables = tuner.tables(menu, goal)
        self.factors = [1.0] * len(self.tables)
        self.trials: list[Trial] = []
        # real bytes by those that were foreseen
        self.surplus = 1.0

    def round(self) -> _Search:
        """Share out, measure, and learn from that what layers lose together.

        Returns:
            Itself.

        Raises:
            ValueError: not even the smallest caches fit.
        """
        choices = self._choose(lambda offers, most: allocate(offers, most))
        if any(trial.choices == choices for trial in self.trials):
            return self
        trial = self._measure(choices)
        for i, (table, choice) in enumerate(zip(self.tables, choices, strict=True)):
            foreseen = table.loss(choice)
            if foreseen > 0:
                found = min(max(trial.shares[i] / foreseen, LEAST_FACTOR), MOST_FACTOR)
                # half way, in logarithms: a share holds for this cache, and the next will be another
                self.factors[i] = (self.factors[i] * found) ** 0.5
        return self

    def round_of_equals(self, n: int = 2) -> None:
        """Measure the best that all layers can have alike, so that nothing that is chosen is worse."""
        most = self.bytes_ratio * self.tuner.nbytes_dense / self.surplus
        for choice in uniform([table.offers(self.menu) for table in self.tables], most, n):
            self._measure([choice] * len(self.tables))

    def _choose(self, share_out) -> list[Choice]:
        offers = [table.offers(self.menu, f) for table, f in zip(self.tables, self.factors, strict=True)]
        most = self.bytes_ratio * self.tuner.nbytes_dense
        for _ in range(4):
            choices = share_out(offers, most / self.surplus)
            found = self._filled(choices, self.tuner._first).nbytes
            if found <= most:
                return choices
            self.surplus *= found / most * 1.001
        return choices

    def _filled(self, choices: list[Choice], probe: Probe) -> KVCache:
        return probe.filled(self.menu.cache(choices, self.tuner.layers, self.tuner.model.config))

    def _measure(self, choices: list[Choice]) -> Trial:
        tuner, shares, kls = self.tuner, [0.0] * len(self.tables), []
        tuner.advance(f"{self.menu}, cache {len(self.trials) + 1}")
        bytes_ratio = 0.0
        for probe in tuner.probes:
            cache = self._filled(choices, probe)
            if probe.counts_bytes:
                bytes_ratio = cache.nbytes / tuner.nbytes_dense
            found, weight = blame(probe, cache), tuner.weight_of(probe, self.goal)
            kls.append((probe, found.kl))
            shares = [total + weight * own for total, own in zip(shares, found.shares, strict=True)]
        self.trials.append(Trial(self.menu, choices, _means(kls), shares, bytes_ratio))
        return self.trials[-1]


def _means(found) -> dict[str, float]:
    """Means by kind of text of pairs of a probe and a number."""
    found = list(found)
    kinds = dict.fromkeys(probe.text.kind for probe, _ in found)
    return {kind: fmean(x for probe, x in found if probe.text.kind == kind) for kind in kinds}


def _by_kind(found) -> dict[str, Score]:
    """Mean scores by kind of text of pairs of a probe and a score."""
    found = list(found)
    means = {name: _means((probe, getattr(s, name)) for probe, s in found) for name in ("kl", "nll", "hits")}
    return {kind: Score(*(means[name][kind] for name in ("kl", "nll", "hits"))) for kind in means["kl"]}


def described(tuned: Tuned) -> dict:
    """What a configuration says of how it was found."""
    about = {"bytes_ratio": round(tuned.trial.bytes_ratio, 5)}
    if tuned.tokens_per_second is not None:
        about["tokens_per_second"] = round(tuned.tokens_per_second, 2)
    for kind, score in tuned.score.items():
        dense = tuned.dense[kind]
        about[kind] = {"kl": round(score.kl, 5), "kl_rows": round(tuned.trial.kl[kind], 5)}
        if kind == "text":
            about[kind] |= {"perplexity": round(exp(score.nll), 4), "dense_perplexity": round(exp(dense.nll), 4)}
        else:
            about[kind] |= {"tokens_right": round(score.hits, 4), "dense_tokens_right": round(dense.hits, 4)}
    return about | {"trials": tuned.trials}
