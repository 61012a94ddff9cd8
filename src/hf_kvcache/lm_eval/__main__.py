"""`accelerate launch -m hf_kvcache.lm_eval --model hf-kvcache ...`: `hf-kvcache lm-eval` as a module."""

from hf_kvcache.lm_eval import main

if __name__ == "__main__":
    main()
