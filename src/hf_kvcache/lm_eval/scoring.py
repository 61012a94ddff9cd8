"""Log-likelihoods through a cache: a text is read and compressed once, and its continuations are fed to copies."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch

from hf_kvcache.compat import cache_argument
from hf_kvcache.eval.memory import cache_nbytes
from hf_kvcache.eval.reading import finish
from hf_kvcache.lm_eval.passages import Passage
from hf_kvcache.long_prompts import prefill, reads_twice


class Scorer:
    """Scores passages behind new caches.

    Tokens are fed one at a time, as `generate` does: windows move, rows are packed and evicted between them, and
    methods that choose rows for each query choose again. One pass over all of them would see the cache as it is before
    the first. Texts are read one by one, without padding, so that no score depends on what else is scored.

    Args:
        model: causal language model in evaluation mode.
        make_cache: returns a new cache.
        n_rows: continuations of one text that are fed at a time.
        log_softmax: logits `[..., vocab]` to log-probabilities.
        measured: called with the bytes and the tokens of every cache that has compressed a text.
    """

    def __init__(
        self,
        model,
        make_cache: Callable,
        n_rows: int,
        log_softmax: Callable[[torch.Tensor], torch.Tensor],
        measured: Callable[[int, int], None] = lambda n_bytes, n_tokens: None,
    ):
        self.model, self.make_cache, self.n_rows = model, make_cache, n_rows
        self.log_softmax, self.measured = log_softmax, measured

    @torch.no_grad()
    def score(self, passages: Sequence[Passage]) -> Iterator[tuple[int, float, bool]]:
        """The number of a passage, its log-likelihood, and whether each of its tokens is the most probable one.

        Long texts come first, and what follows the same text follows each other.
        """
        groups: dict[tuple, dict[tuple, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, passage in enumerate(passages):
            # passages that differ in their last token only ("A", "B") are one row
            groups[passage.read, passage.n_by_the_way][passage.fed].append(i)
        for (read, n), rows in sorted(groups.items(), key=lambda item: -len(item[0][0])):
            cache, by_the_way = self._read(read, n)
            # longest first, so that rows that are fed together are about as long
            feds = sorted(rows, key=len, reverse=True)
            for start in range(0, len(feds), self.n_rows):
                part = feds[start : start + self.n_rows]
                is_last = start + self.n_rows >= len(feds)
                copied = cache if is_last else self._fork(cache, read)
                if read and len(part) > 1:
                    copied.batch_repeat_interleave(len(part))
                total, is_greedy, last = self._feed(copied, part)
                for j, fed in enumerate(part):
                    first, is_first_greedy = _chosen(by_the_way, [*read[len(read) + 1 - n :], fed[0]] if n else [])
                    for i in rows[fed]:
                        token = passages[i].last
                        is_exact = is_first_greedy and bool(is_greedy[j]) and int(last[j].argmax()) == token
                        yield i, first + float(total[j] + last[j, token]), is_exact

    def _read(self, read: tuple[int, ...], n: int):
        """A cache that has compressed a text, and the log-probabilities `[n, vocab]` after its last `n` tokens."""
        cache = self.make_cache()
        if n and reads_twice(cache):
            raise ValueError(
                f"{type(cache.policy).__name__} reads a text twice, before there is anything to score: perplexity "
                "(loglikelihood_rolling) needs another cache"
            )
        if not read:
            return cache, None
        if reads_twice(cache):
            # `prefill` leaves the last token out, which is fed
            prefill(self.model, torch.tensor([[*read, 0]], device=self.model.device), cache)
        else:
            ids = torch.tensor([read], device=self.model.device)
            logits = self._forward(ids, cache, max(n, 1))
        finish(cache)
        self.measured(cache_nbytes(cache), len(read))
        return cache, self.log_softmax(logits[0]) if n else None

    def _fork(self, cache, read: tuple[int, ...]):
        """A copy of a cache that has compressed a text, to be changed."""
        try:
            return copy.deepcopy(cache)
        except RuntimeError:
            # tensors of optimum-quanto cannot be copied: the text is read once more
            return self._read(read, 0)[0]

    def _feed(self, cache, feds: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Feed rows to a cache that has as many, or none yet.

        Returns:
            The log-likelihood of all tokens of a row but its first `[B]`, whether they are the most probable ones
            `[B]`, and the log-probabilities after its last `[B, vocab]`.
        """
        n_fed = torch.tensor([len(fed) for fed in feds], device=self.model.device)
        longest = int(n_fed.max())
        # what follows the end of a row is fed, too, and changes nothing before it
        padded = [[*fed, *[fed[-1]] * (longest - len(fed))] for fed in feds]
        ids = torch.tensor(padded, device=self.model.device)  # [B, S]
        total = torch.zeros(len(feds), device=self.model.device)
        is_greedy, last = torch.ones_like(total, dtype=torch.bool), None
        for i in range(longest):
            found = self.log_softmax(self._forward(ids[:, i : i + 1], cache, 1)[:, 0])  # [B, vocab]
            last = found if last is None else torch.where((n_fed > i)[:, None], found, last)
            if i + 1 < longest:
                following, is_there = ids[:, i + 1], n_fed > i + 1
                total += found.gather(1, following[:, None])[:, 0].float() * is_there
                is_greedy &= (found.argmax(-1) == following) | ~is_there
        return total, is_greedy, last

    def _forward(self, ids: torch.Tensor, cache, n_logits: int) -> torch.Tensor:
        """Logits `[B, n_logits, vocab]` of the last of the tokens `[B, S]`, which the cache takes in."""
        return self.model(ids, **cache_argument(cache), use_cache=True, logits_to_keep=n_logits).logits


def _chosen(log_probs: torch.Tensor | None, tokens: list[int]) -> tuple[float, bool]:
    """Log-likelihood of tokens by log-probabilities `[n, vocab]`, and whether each is the most probable one."""
    if not tokens:
        return 0.0, True
    wanted = torch.tensor(tokens, device=log_probs.device)
    total = log_probs.gather(1, wanted[:, None]).sum()
    return float(total), bool((log_probs.argmax(-1) == wanted).all())
