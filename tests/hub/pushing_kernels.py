"""Run as a script under HF_ENDPOINT: uploads a kernel repository twice, and loads it from there."""

import json
import sys

from kernels import get_kernel

from hf_kvcache.cli import main

if __name__ == "__main__":
    where, older = sys.argv[1:]
    pushed = [main(["push", folder, "someone/merge-step"]) for folder in (older, where)]
    kernel = get_kernel("someone/merge-step", version=1, trust_remote_code=True)
    print("ANSWER " + json.dumps({"pushed": pushed, "id": kernel.__name__, "all": kernel.__all__}))
