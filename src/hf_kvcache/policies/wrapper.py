"""A policy around another one, which scores the tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_kvcache.policies.base import Policy


@dataclass
class Wrapper(Policy):
    """What scores are made of comes from `scorer`; what is done with them is the subclass's.

    Attributes:
        scorer: name of an eviction method, which then gets this policy's budget, or a `Policy`.
    """

    scorer: str | Policy = "snapkv"

    def __post_init__(self):
        if isinstance(self.scorer, str):
            self.scorer = self._named(self.scorer)
        if not isinstance(self.scorer, Policy):
            raise TypeError(f"{type(self).__name__}: scorer must be a Policy or the name of one, not {self.scorer!r}")
        self._check_scorer(type(self.scorer))
        # asked at every step
        for name in ("n_queries", "wants_queries", "defer_prefill_eviction"):
            setattr(self, name, getattr(self.scorer, name))
        super().__post_init__()

    def _check_scorer(self, kind: type[Policy]) -> None:
        if kind.is_ragged:
            raise ValueError(f"{type(self).__name__}: {kind.__name__} chooses by itself and has no scores")

    def _named(self, name: str) -> Policy:
        # a repository that brings its code describes the scorer, and has no registry
        from hf_kvcache import registry

        kind = registry.load(registry.method(name).factory)
        if not (isinstance(kind, type) and issubclass(kind, Policy)):
            raise ValueError(f"{type(self).__name__}: {name!r} is not an eviction method")
        self._check_scorer(kind)
        shared = ("budget", "ratio", "n_sink", "n_recent", "decode", "interval")
        knobs = {knob: getattr(self, knob) for knob in shared}
        if self.budget is None and self.ratio is None and self.takes_budget == "maybe":
            knobs["ratio"] = 1.0
        return kind(**knobs)

    @property
    def needs(self):
        return self.scorer.needs

    @property
    def state(self):
        return self.scorer.state

    @property
    def rope(self):
        return self.scorer.rope

    def for_model(self, context):
        return replace(self, scorer=self.scorer.for_model(context))

    def on_forward(self, view):
        self.scorer.on_forward(view)

    def on_queries(self, q, view):
        self.scorer.on_queries(q, view)

    def score(self, view):
        return self.scorer.score(view)
