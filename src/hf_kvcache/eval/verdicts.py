"""What a check has found, held against what may be lost: passed, failed, or undecided where nothing can be said.

What is bounded is a mean over texts. It passes where its 95 % interval lies below the limit, fails where the interval
lies above it, and is undecided in between: the remedy is more texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp
from statistics import fmean

from hf_kvcache.eval.checking import Found, Piece
from hf_kvcache.eval.intervals import Estimate, bootstrapped, difference_of

PASSED, FAILED, UNDECIDED = "passed", "failed", "undecided"
# share of the needles that a dense model has to find, and share that it may say again, for a loss to be seen
LEAST_FOUND, MOST_REPEATED = 0.5, 0.5
# more texts than so many times those that were read are not worth advising
MOST_TIMES = 50


@dataclass(frozen=True)
class Limits:
    """The most that may be lost.

    Attributes:
        kl: of prose, nats per token.
        loss: of the needles, in points of 100.
        repeats: more of the sequences of four tokens that are said again, in points of 100.
        bytes_ratio: bytes as a share of the dense cache's; None for any.
    """

    kl: float = 0.05
    loss: float = 10.0
    repeats: float = 30.0
    bytes_ratio: float | None = None


@dataclass(frozen=True)
class Verdict:
    """One thing that was looked at.

    Attributes:
        name: "numbers", "prose", "needles", "decode" or "bytes".
        verdict: "passed", "failed" or "undecided"; None where nothing is asked of it.
        says: what was found, in a line.
        todo: what would decide it; empty where nothing is to be done.
        estimate: of what the limit is of.
        limit: the most that passes.
        measured: everything else that was measured.
    """

    name: str
    verdict: str | None
    says: str
    todo: str = ""
    estimate: Estimate | None = None
    limit: float | None = None
    measured: dict | None = None


def overall(verdicts: Sequence[Verdict]) -> str:
    """Failed if anything has, else undecided if anything is."""
    said = {verdict.verdict for verdict in verdicts}
    return next((worst for worst in (FAILED, UNDECIDED) if worst in said), PASSED)


def judge(pieces: Sequence[Piece], found: Sequence[Found], limits: Limits) -> list[Verdict]:
    """Verdicts on all that was measured; there is at least one piece."""
    verdicts = [_numbers(pieces, found), _prose(pieces, limits)]
    verdicts += [_needles(found, limits)] if found else []
    verdicts += [_decode(pieces, limits)] if pieces[0].repeats is not None else []
    return [*verdicts, _bytes(pieces, limits)]


def held_against(estimate: Estimate, limit: float) -> str:
    """Where an interval lies."""
    if estimate.low is None:
        return UNDECIDED
    return PASSED if estimate.high <= limit else FAILED if estimate.low > limit else UNDECIDED


def texts_needed(estimate: Estimate, limit: float) -> int | None:
    """About how many texts would decide, if the mean stayed where it is; None where they would be too many."""
    if estimate.low is None:
        return max(2 * estimate.n, 4)
    half = estimate.high - estimate.mean if estimate.mean <= limit else estimate.mean - estimate.low
    distance = abs(estimate.mean - limit)
    if not distance:
        return None
    if estimate.kind == "bonett-price" and estimate.mean == 0:
        # where nothing has changed, widths go with the number; else with its root
        n = ceil((estimate.n + 2) * half / distance) - 2
    else:
        n = ceil(estimate.n * (half / distance) ** 2)
    return None if n > MOST_TIMES * estimate.n else max(n, estimate.n + 1)


def _todo(estimate: Estimate, limit: float, option: str) -> str:
    n = texts_needed(estimate, limit)
    return f"the mean is at the limit; {option} N for more" if n is None else f"more texts: about {option} {n}"


def _numbers(pieces: Sequence[Piece], found: Sequence[Found]) -> Verdict:
    read = [*pieces, *found]
    n_bad = sum(not one.deviation.is_finite for one in read)
    measured = {"texts": len(read), "not_finite": n_bad}
    if n_bad:
        return Verdict("numbers", FAILED, f"NaN or infinite logits on {n_bad} of {len(read)} texts", measured=measured)
    return Verdict("numbers", PASSED, "all logits are finite", measured=measured)


def _prose(pieces: Sequence[Piece], limits: Limits) -> Verdict:
    all_of_them, same = [piece.deviation for piece in pieces], fmean(piece.deviation.same for piece in pieces)
    finite = [one for one in all_of_them if one.is_finite]
    if not finite:
        return Verdict("prose", FAILED, "no finite prediction", limit=limits.kl, measured={"same_choice": same})
    kl = bootstrapped([one.kl for one in finite])
    own, dense = (_exp(fmean(of)) for of in zip(*((one.loss, one.dense_loss) for one in finite), strict=True))
    says = (
        f"KL {_interval(kl, '.4f')} nats a token, at most {limits.kl:g}; perplexity {own:.2f}, dense {dense:.2f}; "
        f"{100 * same:.1f} % of the first choices stay"
    )
    verdict = held_against(kl, limits.kl)
    todo = _todo(kl, limits.kl, "--pieces") if verdict == UNDECIDED else ""
    measured = {"perplexity": own, "dense_perplexity": dense, "same_choice": same}
    return Verdict("prose", verdict, says, todo, kl, limits.kl, measured)


def _needles(found: Sequence[Found], limits: Limits) -> Verdict:
    own, dense = [one.score for one in found], [one.dense_score for one in found]
    n = sum(one.n for one in found)
    n_own, n_dense = (sum(score * one.n for score, one in zip(of, found, strict=True)) for of in (own, dense))
    loss = _points(difference_of(dense, own))
    kls = [one.deviation.kl for one in found if one.deviation.is_finite]
    measured = {"questions": n, "found": n_own, "dense_found": n_dense, "kl": fmean(kls) if kls else None}
    says = (
        f"{n_own:g} of {n} found, dense {n_dense:g}: {_interval(loss, '.1f')} points lost, at most {limits.loss:g}"
        + (f"; KL {fmean(kls):.4f} at the answers" if kls else "")
    )
    verdict = held_against(loss, limits.loss)
    if verdict != FAILED and n_dense < LEAST_FOUND * n:
        says = f"your dense model finds {n_dense:g} of {n}: this says nothing ({says})"
        todo = "a shorter --context, or a model that finds them; --needles 0 leaves them out"
        return Verdict("needles", UNDECIDED, says, todo, loss, limits.loss, measured)
    todo = _todo(loss, limits.loss, "--needles") if verdict == UNDECIDED else ""
    return Verdict("needles", verdict, says, todo, loss, limits.loss, measured)


def _decode(pieces: Sequence[Piece], limits: Limits) -> Verdict:
    own, dense = [piece.repeats for piece in pieces], [piece.dense_repeats for piece in pieces]
    more, agreed = _points(difference_of(own, dense)), fmean(piece.agreed for piece in pieces)
    measured = {"repeats": fmean(own), "dense_repeats": fmean(dense), "agreed": agreed}
    says = (
        f"{100 * fmean(own):.0f} % said again, dense {100 * fmean(dense):.0f} %: {_interval(more, '.1f')} points more, "
        f"at most {limits.repeats:g}; {agreed:.0f} tokens as the dense model's"
    )
    verdict = held_against(more, limits.repeats)
    if verdict != FAILED and fmean(dense) > MOST_REPEATED:
        says = f"your dense model repeats itself: this says nothing ({says})"
        return Verdict("decode", UNDECIDED, says, "fewer tokens: --decode N", more, limits.repeats, measured)
    todo = _todo(more, limits.repeats, "--pieces") if verdict == UNDECIDED else ""
    return Verdict("decode", verdict, says, todo, more, limits.repeats, measured)


def _bytes(pieces: Sequence[Piece], limits: Limits) -> Verdict:
    ratio = fmean(piece.nbytes / piece.dense_nbytes for piece in pieces)
    later = fmean(piece.nbytes_later / piece.dense_nbytes_later for piece in pieces)
    says = f"{ratio:.3f} of the dense cache's, {later:.3f} at the end"
    measured = {"ratio": ratio, "ratio_later": later, "nbytes": pieces[0].nbytes}
    if limits.bytes_ratio is None:
        return Verdict("bytes", None, says, measured=measured)
    verdict = PASSED if max(ratio, later) <= limits.bytes_ratio else FAILED
    says += f", at most {limits.bytes_ratio:g}"
    return Verdict("bytes", verdict, says, limit=limits.bytes_ratio, measured=measured)


def _exp(loss: float) -> float:
    # a number for whatever a broken cache loses
    return exp(min(loss, 700.0))


def _points(estimate: Estimate) -> Estimate:
    ends = (None if end is None else 100 * end for end in (estimate.low, estimate.high))
    return Estimate(100 * estimate.mean, *ends, estimate.kind, estimate.n)


def _interval(estimate: Estimate, form: str) -> str:
    if estimate.low is None:
        return f"{estimate.mean:{form}} (one text)"
    return f"{estimate.mean:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"
