"""rerotate_keys=True: kept keys are those that the model would have made at their new places, however often rows go."""

import pytest
import torch
from cases import KNOBS, new_model, prompt, replay
from transformers import GPT2Config, LlamaConfig

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument

SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=32768,
    pad_token_id=0,
)
POLICIES = {
    "streaming": lambda: kv.EvictionCache("streaming", budget=40, n_recent=8, interval=4, rerotate_keys=True),
    "keydiff": lambda: kv.EvictionCache("keydiff", budget=40, n_recent=8, interval=4, rerotate_keys=True),
    "adakv": lambda: kv.EvictionCache(
        "adakv", budget=56, scorer="keydiff", n_recent=8, interval=4, window=4, rerotate_keys=True
    ),
}


class Watched:
    """A tiny model and its keys before rotation, in the order of the tokens."""

    def __init__(self, dtype):
        self.model = new_model(LlamaConfig(**SIZES))
        # bringing a model to 16 bits rounds the angles of its embedding, which is what it then rotates by
        self.model.to(dtype)
        self.keys = []
        self.hook = self.model.model.layers[0].self_attn.k_proj.register_forward_hook(self._see)

    def _see(self, module, inputs, output):
        self.keys.append(output.view(output.shape[0], -1, 1, 16).transpose(1, 2).double())

    @torch.no_grad()
    def feed(self, cache, ids, size=16):
        for start in range(0, ids.shape[1], size):
            self.model(ids[:, start : start + size], **cache_argument(cache))

    def error(self, cache, beams=None):
        """Relative error of the kept keys against float64 rotations of what the model had made, rows of pages too."""
        layer = cache.layers[0]
        layer.finish()
        store, made = layer.store, torch.cat(self.keys, 2)
        made = made if beams is None else made[beams]
        positions, angle = store.positions.long(), store.state("angle").double()
        raw = made.gather(2, positions.clamp(min=0).unsqueeze(-1).expand(*positions.shape, 16))
        turns = angle.unsqueeze(-1) * self.model.model.rotary_emb.inv_freq.double()
        cos, sin = turns.cos().repeat(1, 1, 1, 2), turns.sin().repeat(1, 1, 1, 2)
        exact = raw * cos + torch.cat([-raw[..., 8:], raw[..., :8]], -1) * sin
        exact = exact * (positions >= 0).unsqueeze(-1)
        held = torch.cat([k for k, _ in store.blocks(1 << 20)], 2).double() * (positions >= 0).unsqueeze(-1)
        return ((held - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    "dtype, most",
    [(torch.bfloat16, 6e-3), pytest.param(torch.float16, 8e-4, marks=pytest.mark.slow)],
    ids=["bfloat16", "float16"],
)
@pytest.mark.parametrize("name", POLICIES)
def test_keys_do_not_drift(name, dtype, most):
    watched, cache = Watched(dtype), POLICIES[name]()
    watched.feed(cache, prompt(1, 4096), size=8)
    assert watched.error(cache) < most


@pytest.mark.slow
@pytest.mark.parametrize("name", ["streaming", "adakv"])
def test_float32_stays_right_over_16_thousand_tokens(name):
    watched, cache = Watched(torch.float32), POLICIES[name]()
    watched.feed(cache, prompt(1, 16384), size=16)
    assert watched.error(cache) < 1e-3
    assert all("original" not in buffer.tensors for buffer in cache.layers[0].store.buffers().values())


@pytest.mark.parametrize("name", POLICIES)
def test_originals_follow_files_beams_and_crops(name, tmp_path):
    watched, cache = Watched(torch.bfloat16), POLICIES[name]()
    ids = prompt(3, 1024)
    watched.feed(cache, ids[:, :512])
    cache.save(tmp_path)
    loaded = kv.KVCache.load(tmp_path, watched.model)
    seen = len(watched.keys)
    watched.feed(cache, ids[:, 512:])
    del watched.keys[seen:]
    watched.feed(loaded, ids[:, 512:])
    assert torch.equal(cache.layers[0].store.state("angle"), loaded.layers[0].store.state("angle"))
    assert watched.error(cache) == watched.error(loaded) < 6e-3
    # beams
    order = torch.tensor([2, 0, 0])
    loaded.reorder_cache(order)
    watched.feed(loaded, ids[order, :256])
    beams = [*torch.cat(watched.keys, 2)[order].split(1024, 2)[:1], *watched.keys[-16:]]
    watched.keys = [beams[0], *beams[1:]]
    assert watched.error(loaded) < 6e-3


@pytest.mark.parametrize("name", POLICIES)
def test_originals_are_cropped(name):
    watched, cache = Watched(torch.bfloat16), POLICIES[name]()
    ids = prompt(1, 700)
    watched.feed(cache, ids[:, :300])
    cache.activate_past_recording()
    watched.feed(cache, ids[:, 300:305], size=5)
    cache.crop(-3)
    watched.keys[-1] = watched.keys[-1][:, :, :2]
    for layer in cache.layers:
        layer.record_past = False
    watched.feed(cache, ids[:, 302:])
    assert watched.error(cache) < 6e-3


def test_a_file_without_originals_is_refused(tmp_path):
    watched, cache = Watched(torch.bfloat16), POLICIES["streaming"]()
    watched.feed(cache, prompt(1, 128))
    layer = cache.layers[0]
    del layer.store.dense.tensors["original"]
    cache.save(tmp_path)
    with pytest.raises(ValueError, match="keys as they were appended"):
        kv.KVCache.load(tmp_path, watched.model)


def test_a_model_without_rotary_positions_is_refused():
    model = new_model(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=128))
    cache = kv.EvictionCache("streaming", budget=24, rerotate_keys=True, **KNOBS)
    with pytest.raises(ValueError, match="no rotary positions"):
        replay(model, cache, prompt(1, 40), [40])
