"""Benchmarks verify before they time, and write what they found."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPTIONS = SimpleNamespace(device="cpu", rounds=1)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("attention", "generation", "memory", "peers", "projection", "pruning", "run"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_decode_step_rows():
    import attention

    rows = attention._decode_step(OPTIONS, "Llama-3.1-8B", batch=2, n_tokens=256, n_layers=1)
    names = [row["cache"] for row in rows]
    assert names[:3] == ["DynamicCache + sdpa", "DynamicCache, unfused", "KVCache"]
    mib = {row["cache"]: row["MiB"] for row in rows}
    assert mib["QuantCache 2 bit"] < mib["QuantCache 4 bit"] < mib["QuantCache 8 bit"] < mib["KVCache"]
    assert mib["SparseCache 70 % + 4 bit"] < mib["SparseCache 70 %"] < mib["SparseCache 50 %"] < mib["KVCache"]
    assert mib["LowRankCache 50 % pre-RoPE + 4 bit"] < mib["LowRankCache 50 % pre-RoPE"] < mib["KVCache"]
    assert all(row["ms"] > 0 for row in rows)


def test_a_wrong_result_is_never_timed(monkeypatch):
    import attention
    import peers

    def broken(cache, module):
        step = peers.our_step(cache, module)
        return lambda q, k, v: step(q, k, v) * 1.5

    honest = peers.contestants

    def contestants(module):
        found = honest(module)
        found["KVCache"].step = broken(found["KVCache"].cache, module)
        return found

    monkeypatch.setattr(peers, "contestants", contestants)
    monkeypatch.setattr(attention, "interleaved", lambda *_: pytest.fail("timed on red"))
    with pytest.raises(AssertionError, match="KVCache: relative error"):
        attention._decode_step(OPTIONS, "Llama-2-7B", batch=1, n_tokens=64, n_layers=1)


def test_results_say_where_they_come_from(tmp_path, monkeypatch):
    import run

    monkeypatch.setitem(run.SUITES, "memory", lambda options: [{"cache": "KVCache", "ms": 1.5}])
    assert run.main(["memory", "--device", "cpu", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "memory-cpu.json").read_text())
    assert result["rows"] == [{"cache": "KVCache", "ms": 1.5}]
    assert {"device", "threads", "versions", "commit", "suite"} <= result.keys()


def test_unknown_suite(capsys):
    import run

    with pytest.raises(SystemExit):
        run.main(["nonsense"])
    assert "no suite is called nonsense" in capsys.readouterr().err
