"""Threads that share a model, each with a cache of its own: as if one had run after the other."""

import sys
import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_kvcache as kv
from hf_kvcache.adapters.watching import Watch
from hf_kvcache.compat import cache_argument
from hf_kvcache.dmc import Settings, compression_off, retrofit, retrofits

STEPS, PROMPT, VOCAB = 200, 60, 97


def tiny():
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
    config = LlamaConfig(**sizes, head_dim=8, num_hidden_layers=1, eos_token_id=None, attn_implementation="hf_kvcache")
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def locret():
    adapters = pytest.importorskip("hf_kvcache.adapters")
    pytest.importorskip("peft")
    model = tiny()
    adapters.attach(model, adapters.RetainingHeads.new(model, 4))
    return model, lambda: kv.LocretCache(budget=32, local=4, stabilizers=4, decode=True)


def retrofitted(method, make):
    model = tiny()
    retrofit(model, Settings(method, offset=0.5, scale=5.0, window=12))
    generator = torch.Generator().manual_seed(3)
    for child in retrofits(model).values():
        child.requires_grad_(False)
        for weight in (child.decision, child.importance):
            if weight is not None:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return model, make


MODELS = {
    "locret": locret,
    "dmc": lambda: retrofitted("dmc", kv.DMCCache),
    "dms": lambda: retrofitted("dms", kv.DMSCache),
}


@torch.no_grad()
def logits(model, cache, seed):
    """Of the last token of a prompt, and of tokens fed one by one, `[1 + STEPS, VOCAB]`."""
    ids = torch.randint(3, VOCAB, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(seed))
    found = [model(ids[:, :PROMPT], **cache_argument(cache)).logits[0, -1]]
    found += [model(ids[:, t : t + 1], **cache_argument(cache)).logits[0, -1] for t in range(PROMPT, PROMPT + STEPS)]
    return torch.stack(found)


@pytest.fixture
def switching():
    """Threads take turns after every few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("kind", MODELS)
def test_two_caches_of_one_model(kind, switching):
    model, make = MODELS[kind]()
    alone = {seed: logits(model, make(), seed) for seed in (1, 2)}
    together, started = {}, threading.Barrier(2)

    def run(seed):
        started.wait()
        try:
            together[seed] = logits(model, make(), seed)
        except Exception as error:
            together[seed] = error

    threads = [threading.Thread(target=run, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, wanted in alone.items():
        assert not isinstance(together[seed], Exception), together[seed]
        assert torch.equal(together[seed], wanted)


def test_a_projection_is_hooked_once():
    """A second thread that finds projections without hooks while the first one puts them on."""
    watch, module = Watch(), torch.nn.Linear(2, 2)
    has_second_come, register = threading.Event(), module.register_forward_hook

    def follow():
        watch.follow({"q": module}, {"q": lambda *args: None})

    second = threading.Thread(target=follow)

    def slowly(hook):
        if threading.current_thread() is second:
            has_second_come.set()
        else:
            second.start()
            # for ever in vain, if the lock holds
            has_second_come.wait(0.1)
        return register(hook)

    module.register_forward_hook = slowly
    follow()
    second.join()
    assert len(module._forward_hooks) == len(watch.handles) == 1
    watch.release()
    assert not module._forward_hooks


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dmc", "dms"])
def test_a_teacher_is_one_for_its_own_thread(kind):
    model, _ = MODELS[kind]()
    ids, found = torch.arange(3, 43)[None], []

    def run():
        with torch.no_grad():
            found.append(model(ids, use_cache=False).logits)

    run()
    with compression_off(model):
        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    run()
    student, teacher, other, after = found
    assert not torch.equal(student, teacher)
    assert torch.equal(other, student) and torch.equal(after, student)
