"""The embedded model as the harness takes it, and requests to it."""

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hf_kvcache.lm_eval import KVCacheLM
from hf_kvcache.models import embedded_model, embedded_prose

LOADED = {"pretrained": str(embedded_model()), "dtype": "float32", "device": "cpu"}
PROSE = embedded_prose().read_text(encoding="utf-8")


def stock(**changed):
    """The harness' own model."""
    return HFLM(**LOADED | changed)


def behind(cache, **changed):
    """Ours, behind a cache."""
    return KVCacheLM(**LOADED | {"cache": cache} | changed)


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


def likelihoods(lm, *pairs):
    """Log-likelihood of every (context, continuation), and whether it is what greedy decoding says."""
    return lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


def rolling(lm, *texts):
    return lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True)


def generated(lm, *prompts, **options):
    options = {"until": ["\n\n"], "max_gen_toks": 12} | options
    return lm.generate_until(requests("generate_until", *((prompt, options) for prompt in prompts)), disable_tqdm=True)
