"""Orderings that published tables claim, and what an evaluation of ours says of them.

python benchmarks/claims.py DIR [DIR ...]     # folders of `hf-kvcache eval`; writes results/claims-smollm2-cpu.json

A claim is about two caches on the same instances, or about one in two settings. It is agreed with where the 95 %
interval of the paired difference lies on its side, contradicted where it lies on the other, else not decided.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from hf_kvcache.eval.front import LEAST_DENSE
from hf_kvcache.eval.gathering import gather
from hf_kvcache.eval.intervals import Estimate, difference_of, mean_of_means
from hf_kvcache.eval.scores import Scores

FILE = Path(__file__).parent / "results" / "claims-smollm2-cpu.json"
RATIOS = "0.5", "0.25", "0.125"
KVPRESS = "kvpress leaderboard, RULER 4K, Llama-3.1-8B, question unknown"


@dataclass(frozen=True)
class Claim:
    """`better` scores higher than `worse`, by `margin` at least.

    Attributes:
        better, worse: specifications of caches; `{r}` stands for the share of tokens kept.
        setting: in which; two of them, where the claim is about one cache in both.
        said: the published numbers, in the order of the claim.
        source: where they stand.
        margin: of scores; negative where the claim is that little is lost.
        reason: what we found out about a contradiction.
        least: the smallest ratio that is claimed.
    """

    better: str
    worse: str
    setting: str
    said: str
    source: str
    margin: float = 0.0
    reason: str = ""
    least: float = 0.0


CLAIMS = (
    Claim("adakv:ratio={r}", "snapkv:ratio={r}", "unknown", "88.1 > 81.8 with 3/4 kept", KVPRESS),
    Claim(
        "adakv:ratio={r}",
        "snapkv:ratio={r}",
        "known",
        "35.5 > 34.6, LongBench",
        "Ada-KV, arXiv 2407.11550",
        reason="sharing among three KV heads: with floor=1, without it, 37.5 % of 24 needles like SnapKV, else 29.2",
    ),
    Claim(
        "adakv:ratio={r},scorer=expected_attention",
        "expected_attention:ratio={r}",
        "unknown",
        "93.6 > 88.5 with 3/4 kept",
        KVPRESS,
    ),
    Claim("expected_attention:ratio={r}", "snapkv:ratio={r}", "unknown", "88.5 > 81.8 with 3/4 kept", KVPRESS),
    Claim("kvzip:ratio={r}", "expected_attention:ratio={r}", "unknown", "95.5 > 88.5 with 3/4 kept", KVPRESS),
    Claim("kvzip:ratio={r}", "snapkv:ratio={r}", "unknown", "95.5 > 81.8 with 3/4 kept", KVPRESS),
    Claim(
        "kvzip:ratio={r}",
        "dynamic",
        "unknown",
        "95.5 of 95.7 with half kept, 94.9 with 1/5",
        "kvpress, KVzip, RULER 4K, Llama-3.1-8B",
        margin=-0.02,
        least=0.2,
    ),
    Claim(
        "keydiff:ratio={r}",
        "snapkv:ratio={r}",
        "unknown",
        "best of five in blocks, LongBench",
        "KeyDiff, arXiv 2504.15364",
    ),
    Claim("keydiff:ratio={r}", "tova:ratio={r}", "unknown", "best of five, in blocks", "KeyDiff, arXiv 2504.15364"),
    Claim("locret:ratio={r}", "snapkv:ratio={r}", "unknown", "97.5 > 2.5, in chunks", "Locret, arXiv 2410.01805"),
    Claim("snapkv:ratio={r}", "h2o:ratio={r}", "known", "48.8 > 15.0, RULER 128K", "Locret, arXiv 2410.01805"),
    Claim("snapkv:ratio={r}", "streaming:ratio={r}", "known", "needles at all depths", "SnapKV, arXiv 2404.14469"),
    Claim("pyramidkv:ratio={r}", "snapkv:ratio={r}", "known", "+20.5 TREC at 0.7 %", "PyramidKV, arXiv 2406.02069"),
    Claim(
        "snapkv:ratio={r}",
        "snapkv:ratio={r}",
        "known > unknown",
        "good on the first turn, fails later",
        "SCBench, arXiv 2412.10319",
    ),
    Claim("quant:bits=4", "dynamic", "unknown", "4 bits lose nothing", "KIVI, arXiv 2402.02750", margin=-0.02),
    Claim(
        "quant:bits=2",
        "dynamic",
        "unknown",
        "2 bits lose about 1 %",
        "KIVI, arXiv 2402.02750",
        margin=-0.02,
        reason="keys of many layers: those of the worst made dense, KL 0.089 becomes 0.077 (`hf-kvcache check`)",
    ),
    Claim("quant:bits=2", "quanto:bits=2", "unknown", "quanto at 2 bits: 43.8 → 14.3", "Locret, arXiv 2410.01805"),
    Claim(
        "sparse:sparsity=0.5",
        "sparse:sparsity=0.7",
        "unknown",
        "44.9 → 36.1, LongBench synthetic",
        "Mustafar, arXiv 2505.22913",
    ),
    Claim("lowrank:rank=0.5", "lowrank:rank=0.25", "unknown", "falls past half the rank", "Palu, arXiv 2407.21118"),
)


@dataclass(frozen=True)
class Verdict:
    """What an evaluation says of a claim.

    Attributes:
        better, worse, setting, said, source: of the claim, `{r}` filled in.
        length: tokens.
        difference: better minus worse, paired; None where it was not measured.
        verdict: "agrees", "contradicts", "not decided", "not measured".
        reason: about a contradiction.
    """

    better: str
    worse: str
    setting: str
    said: str
    source: str
    length: int | None
    difference: Estimate | None
    verdict: str
    reason: str = ""


def judge(difference: Estimate | None, margin: float) -> str:
    """Where the interval of a difference lies."""
    if difference is None:
        return "not measured"
    if difference.low is None:
        return "not decided"
    return "agrees" if difference.low > margin else "contradicts" if difference.high < margin else "not decided"


def verdicts(scores: dict[tuple[str, int], Scores]) -> list[Verdict]:
    """Of all claims, at every ratio and length at which both caches were asked; one line for those that were not.

    Args:
        scores: by setting and length.
    """
    found = []
    for claim in CLAIMS:
        own = []
        for ratio in (r for r in RATIOS if float(r) >= claim.least) if "{r}" in claim.better else ("",):
            better, worse = claim.better.format(r=ratio), claim.worse.format(r=ratio)
            for length in sorted({length for _, length in scores}):
                difference = _difference(scores, claim.setting, length, better, worse)
                if difference is not None:
                    verdict = judge(difference, claim.margin)
                    reason = claim.reason if verdict == "contradicts" else ""
                    rest = claim.setting, claim.said, claim.source, length, difference, verdict, reason
                    own.append(Verdict(better, worse, *rest))
        nothing = claim.setting, claim.said, claim.source, None, None, judge(None, 0)
        found += own or [Verdict(claim.better, claim.worse, *nothing)]
    return found


def _difference(scores: dict, setting: str, length: int, better: str, worse: str) -> Estimate | None:
    """The mean of the paired differences of the tasks that both caches were asked; None where there is none."""
    one, _, other = setting.partition(" > ")
    first, second = scores.get((one, length)), scores.get((other or one, length))
    if first is None or second is None:
        return None
    better, worse = _named(first, better), _named(second, worse)
    differences = []
    for task in first.tasks:
        a, b = first.of(better, task), second.of(worse, task)
        both = [i for i in a if i in b]
        if both:
            differences.append(difference_of([a[i] for i in both], [b[i] for i in both]))
    return mean_of_means(differences) if differences else None


def _named(scores: Scores, spec: str) -> str:
    """The cache of a specification, with whatever adapter."""
    return next((cache for cache in scores.caches if cache.partition(" @ ")[0] == spec), spec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="default: %(default)s")
    args = parser.parse_args()
    gathered = gather(args.folders)
    groups = defaultdict(list)
    for line in gathered.lines:
        groups[line.setting, line.length].append(line)
    scores = {key: Scores(lines, gathered.n_questions, LEAST_DENSE) for key, lines in groups.items()}
    rows = [asdict(verdict) for verdict in verdicts(scores)]
    n = {"n_instances": fmean(own.n_instances(own.dense) for own in scores.values() if own.tasks)}
    args.out.write_text(json.dumps(gathered.about[0] | n | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(row["verdict"], row["better"], ">", row["worse"], row["setting"])


if __name__ == "__main__":
    main()
