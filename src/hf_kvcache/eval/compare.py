"""One model, one text, many caches: bytes, speed, fidelity and retrieval side by side in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, median

import numpy as np
import torch

from hf_kvcache.dmc import retrofits
from hf_kvcache.eval import fidelity, passkey, retrieval
from hf_kvcache.eval.peers import dynamic
from hf_kvcache.eval.specs import CacheSpec, parse
from hf_kvcache.eval.speed import Round, generate_once


@dataclass(frozen=True)
class Settings:
    """What is measured, and on how much.

    Attributes:
        context: tokens prefilled where bytes and time are measured.
        n_new: tokens decoded after them, in every round.
        rounds: generations per cache; the rounds of all caches alternate, so that drift hits all alike.
        eval_context: tokens of a window of text, and of a retrieval prompt.
        n_windows: windows of text for fidelity.
        n_next: last tokens of each window, which are fed through the cache.
        n_prompts: retrieval prompts.
        attention: implementation under our caches; transformers' own run on sdpa, or on eager where that is named.
        seed: of the retrieval prompts.
        scores: whether perplexity, KL and retrieval are measured, or bytes and speed alone.
    """

    context: int = 4096
    n_new: int = 32
    rounds: int = 3
    eval_context: int = 2048
    n_windows: int = 4
    n_next: int = 256
    n_prompts: int = 4
    attention: str = "hf_kvcache"
    seed: int = 0
    scores: bool = True

    @property
    def n_prefix(self) -> int:
        """Tokens of a window that are prefilled and compressed, at least half of it."""
        return self.eval_context - min(self.n_next, self.eval_context // 2)

    @property
    def n_entries(self) -> int:
        """Things to find in a retrieval prompt: one in 64 tokens."""
        return min(max(self.eval_context // 64, 2), retrieval.N_KEYS)


@dataclass
class Row:
    """One cache. What could not be measured is None, and `error` says why.

    Attributes:
        cache, is_peer: its specification, and whether it is transformers' own.
        nbytes, nbytes_prompt: bytes after the generation, and right after its prompt.
        bytes_ratio: `nbytes` as a share of `DynamicCache`'s.
        prefill_s: seconds to the first token, compression included, median of the rounds.
        speedup: of a decoding step over `DynamicCache`'s in the same round, median of the rounds.
        tokens_per_s: decoded tokens per second: `DynamicCache`'s median step, times `speedup`.
        mean_step_s: seconds per step as measured, steps that pack or evict included.
        perplexity, kl, retrieval: see `Fidelity`; share of questions answered exactly.
    """

    cache: str
    is_peer: bool
    nbytes: int | None = None
    nbytes_prompt: int | None = None
    bytes_ratio: float | None = None
    prefill_s: float | None = None
    speedup: float | None = None
    tokens_per_s: float | None = None
    mean_step_s: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    retrieval: float | None = None
    error: str | None = None


@dataclass
class Trial:
    """A row in the making."""

    row: Row
    spec: CacheSpec
    rounds: list[Round] = field(default_factory=list)

    def attempt(self, measure: Callable[[Trial, Callable], None], make_cache: Callable) -> None:
        """Run one measurement; its failure ends this row, not the comparison."""
        if self.row.error is None:
            try:
                measure(self, make_cache)
            except Exception as error:
                self.row.error = f"{type(error).__name__}: {error}"


def n_stages(n_specs: int, settings: Settings) -> int:
    """How often `compare` calls `advance`."""
    return n_specs * (settings.rounds + 1 + 2 * settings.scores)


def with_baseline(specs: list[CacheSpec]) -> list[CacheSpec]:
    """Caches to compare, `DynamicCache`, which the others are measured by, first."""
    return [parse("dynamic"), *(spec for spec in specs if spec.factory is not dynamic)]


def compare(
    model,
    tokenizer,
    text: str,
    specs: list[CacheSpec],
    settings: Settings,
    advance: Callable[[str], None] = lambda stage: None,
    measured: Callable[[Row, bool], None] = lambda row, is_final: None,
) -> list[Row]:
    """Measure every cache; the first of `specs` must be `dynamic` (see `with_baseline`).

    Bytes and speed come first, in rounds that alternate between the caches, then one cache after the other is scored.

    Args:
        model, tokenizer: a causal language model in evaluation mode.
        text: prose, at least `eval_context` tokens of it.
        advance: called with a description before each measurement.
        measured: called with every row after each round and when it has been scored, and whether that was its last
            measurement.

    Raises:
        ValueError: the text is too short.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = fidelity.build_windows(
        ids, settings.n_prefix, settings.eval_context - settings.n_prefix, settings.n_windows, tokenizer.bos_token_id
    ).to(model.device)
    prompt = ids.repeat(-(-settings.context // len(ids)))[None, : settings.context].to(model.device)
    ask = retrieval_task(tokenizer, ids.numpy(), settings)
    trials = [Trial(Row(spec.text, spec.is_peer), spec) for spec in specs]

    def run(trial: Trial, name: str, measure: Callable[[Trial, Callable], None]) -> None:
        advance(f"{trial.row.cache} · {name}")
        prepare(model, trial.spec, settings)
        trial.attempt(measure, partial(trial.spec.build, model.config))

    def generate(trial: Trial, make_cache: Callable) -> None:
        trial.rounds.append(generate_once(model, prompt, make_cache, settings.n_new))

    def score(trial: Trial, make_cache: Callable) -> None:
        scores = fidelity.fidelity(model, windows, settings.n_prefix, dense, make_cache)
        trial.row.perplexity, trial.row.kl = scores.perplexity, scores.kl

    def retrieve(trial: Trial, make_cache: Callable) -> None:
        trial.row.retrieval = ask(model, make_cache=make_cache)

    def warm_up(trial: Trial, make_cache: Callable) -> None:
        generate_once(model, prompt[:, :256], make_cache, 2)

    try:
        # compiles what is compiled on first use, and lets a cache that cannot work fail early
        for trial in trials:
            run(trial, "warm-up", warm_up)
        for i in range(settings.rounds):
            for trial in trials:
                run(trial, f"speed, round {i + 1} of {settings.rounds}", generate)
            add_speed(trials)
            is_final = i + 1 == settings.rounds and not settings.scores
            for trial in trials:
                measured(trial.row, is_final)
        if not settings.scores:
            return [trial.row for trial in trials]
        prepare(model, specs[0], settings)
        dense = fidelity.dense_logits(model, windows, settings.n_prefix)
        for trial in trials:
            run(trial, "fidelity", score)
            run(trial, "retrieval", retrieve)
            measured(trial.row, True)
    finally:
        for child in retrofits(model).values():
            child.compresses = True
    return [trial.row for trial in trials]


def prepare(model, spec: CacheSpec, settings: Settings) -> None:
    """Let the model run as this cache asks for.

    transformers' own caches get the attention that they have without this package. A retrofitted model compresses for
    the cache of its method only: all others, and the baseline, have the same weights without compression.
    """
    plain = "sdpa" if settings.attention == "hf_kvcache" else settings.attention
    wanted = plain if spec.is_peer else settings.attention
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)
    for child in retrofits(model).values():
        child.compresses = spec.is_learned


def retrieval_task(tokenizer, prose: np.ndarray, settings: Settings) -> Callable:
    """`(model, make_cache) -> accuracy`: the ledger where the tokenizer has one, else passkeys in prose."""
    size = {"n_tokens": settings.eval_context, "n_prompts": settings.n_prompts, "seed": settings.seed}
    try:
        ledger = retrieval.Ledger.from_tokenizer(tokenizer)
    except ValueError:
        prompts = passkey.build_prompts(tokenizer, prose, n_facts=min(settings.n_entries, len(passkey.NAMES)), **size)
        return partial(passkey.exact_match, prompts=prompts)
    prompts = retrieval.build_prompts(
        ledger, prose, n_questions=settings.n_entries, n_entries=settings.n_entries, **size
    )
    return partial(retrieval.exact_match, prompts=prompts)


def add_speed(trials: list[Trial]) -> None:
    """Fill in bytes and times, and the ratios to the baseline, which is the first trial."""
    base = trials[0]
    for row, rounds in ((trial.row, trial.rounds) for trial in trials if trial.rounds):
        row.nbytes, row.nbytes_prompt = rounds[-1].nbytes, rounds[-1].nbytes_prompt
        row.prefill_s = median(r.prefill_s for r in rounds)
        row.mean_step_s = fmean(s for r in rounds for s in r.step_s)
        if base.rounds:
            row.bytes_ratio = row.nbytes / base.rounds[-1].nbytes
            # rounds alternate between the caches, so what slows the machine down for a while cancels out
            row.speedup = median(median(b.step_s) / median(r.step_s) for b, r in zip(base.rounds, rounds))
            row.tokens_per_s = row.speedup / median(s for r in base.rounds for s in r.step_s)
