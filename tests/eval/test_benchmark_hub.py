"""Rows of published data sets from the Hub: the real client, in a process of its own, against a server of the test."""

import os
import subprocess
import sys
import textwrap
import zipfile

from hub.stand_in import COMMIT, serve
from rows_of_benchmarks import INFINITEBENCH, LONGBENCH_V2, longbench, write

PROGRAM = """
    from hf_kvcache.eval import benchmarks

    def of(name, **source):
        return benchmarks.named(name, benchmarks.Source(**source))[0]

    news = of("longbench:multi_news")
    assert news.n_instances() == 3
    assert news.about()["from"] == "zai-org/LongBench@COMMIT", news.about()
    assert of("longbench_v2").n_instances() == 1
    assert of("infinitebench:passkey", revision="refs/x").about()["rows"] == 1
    # what a run began with goes before what is asked for
    pinned = {"xinrongzhang2022/InfiniteBench": "COMMIT"}
    assert of("infinitebench:passkey", revision="other", pinned=pinned).about()["from"].endswith("COMMIT")
    try:
        of("leval:quality").about()
    except benchmarks.NoRows as error:
        assert "L4NLP/LEval (main) on the Hub: RepositoryNotFoundError" in str(error) and "--data DIR" in str(error)
    else:
        raise AssertionError("there is no such repository")
    print("works")
"""


def test_rows_come_from_the_hub(tmp_path):
    folders = {name: tmp_path / name for name in ("LongBench", "LongBench-v2", "InfiniteBench")}
    write(tmp_path / "multi_news.jsonl", [longbench(i) for i in range(3)])
    folders["LongBench"].mkdir()
    with zipfile.ZipFile(folders["LongBench"] / "data.zip", "w") as archive:
        archive.write(tmp_path / "multi_news.jsonl", "data/multi_news.jsonl")
    write(folders["LongBench-v2"] / "data.json", [LONGBENCH_V2])
    write(folders["InfiniteBench"] / "passkey.jsonl", [INFINITEBENCH["passkey"]])
    owners = {"LongBench": "zai-org", "LongBench-v2": "zai-org", "InfiniteBench": "xinrongzhang2022"}
    with serve({f"{owners[name]}/{name}": folder for name, folder in folders.items()}) as address:
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        program = textwrap.dedent(PROGRAM).replace("COMMIT", COMMIT)
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "works", done.stderr[-3000:]
