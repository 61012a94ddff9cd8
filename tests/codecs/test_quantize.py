"""The quantised codec: error, huge key biases, rotation, chains, bytes."""

import pytest
import torch
from cases import WITHOUT_HEAD_DIM, assert_close, new_model, prompt, replay, tiny_model
from transformers import DynamicCache, Qwen2Config

import hf_kvcache as kv
from hf_kvcache.attention import fused
from hf_kvcache.attention.blockwise import attend_blocks
from hf_kvcache.attention.call import AttentionCall
from hf_kvcache.codecs.rotation import hadamard, rotate


def rows(n=64, width=64, seed=0):
    return torch.randn(2, 3, n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_error_is_half_a_step(bits, axis):
    x = rows()
    codec = kv.Quantize(bits, axis=axis)
    back = codec.decode(codec.encode(x), torch.float32, x.shape[-1])
    if axis == "channel":
        grouped = x.unflatten(2, (2, 32))
        step = (grouped.amax(3) - grouped.amin(3)).repeat_interleave(32, 2) / (2**bits - 1)
    else:
        width = codec.channels_per_group(64)
        grouped = x.unflatten(3, (-1, width))
        step = (grouped.amax(4) - grouped.amin(4)).repeat_interleave(width, 3) / (2**bits - 1)
    # the metadata is float16, which costs a little on top of round-to-nearest
    assert ((back - x).abs() <= step * 0.51 + 2e-3).all()
    # and it is no better than its bits: the format is not secretly dense
    assert (back - x).abs().mean() > step.mean() * 0.2


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_bytes_keep_the_promise(bits):
    for width in (16, 64, 128):
        for codec in (kv.Quantize(bits, axis="channel"), kv.Quantize(bits, axis="token")):
            encoded = codec.encode(rows(width=width))
            held = sum(t.numel() * t.element_size() for t in encoded.values())
            assert held == codec.nbytes_per_token(width, 2) * 2 * 3 * 64
            for name, t in encoded.items():
                assert t.shape[2] * codec.fields[name] == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype):
    codec = kv.Quantize(8, axis="token")
    back = codec.decode(codec.encode(rows().to(dtype)), dtype, 64)
    assert back.dtype == dtype
    assert_close("rows", back, rows(), 0.05)


def test_constant_rows_and_empty_groups_are_exact():
    for value in (0.0, -3.0, 300.0):
        for axis in ("channel", "token"):
            codec = kv.Quantize(2, axis=axis)
            x = torch.full((1, 1, 32, 64), value)
            assert torch.equal(codec.decode(codec.encode(x), torch.float32, x.shape[-1]), x)


def test_a_large_bias_costs_resolution_and_never_clips():
    x = rows() + 300
    codec = kv.Quantize(4, axis="channel")
    back = codec.decode(codec.encode(x), torch.float32, x.shape[-1])
    # float16 resolves 300 to 0.25; the scale is measured from the rounded mid-point
    step = (x.unflatten(2, (2, 32)).amax(3) - x.unflatten(2, (2, 32)).amin(3)).amax() / 15
    assert (back - x).abs().max() <= step


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_nan_is_not_hidden_and_stays_in_its_group(axis):
    x = rows()
    x[0, 0, 3, 5] = float("nan")
    codec = kv.Quantize(4, axis=axis)
    back = codec.decode(codec.encode(x), torch.float32, x.shape[-1])
    group = back[0, 0, :32, 5] if axis == "channel" else back[0, 0, 3]
    assert group.isnan().all()
    assert back.isnan().sum() == group.numel()


# -- huge key biases -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def biased():
    """A Qwen2 with what Qwen2.5 has: a few low-frequency key channels with a bias of hundreds."""
    sizes = WITHOUT_HEAD_DIM | dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    model = new_model(Qwen2Config(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    for layer in model.model.layers:
        # channels 31 and 63, 30 and 62 turn together, slowest of all
        layer.self_attn.k_proj.bias[[31, 62]] = torch.tensor([350.0, -220.0])
    return model


def damage(model, cache, ids):
    """Mean KL of the next-token distributions to those of the dense model, over tokens decoded from the cache."""
    sizes = [96] + [1] * 24
    dense, ours = (replay(model, c, ids, sizes)[:, 96:].log_softmax(-1) for c in (DynamicCache(), cache))
    return (dense.exp() * (dense - ours)).sum(-1).mean().item()


def test_per_channel_keys_survive_a_huge_bias(biased):
    ids = prompt(4, 120)
    channel = damage(biased, kv.QuantCache(4, window=8), ids)
    token = damage(biased, kv.QuantCache(4, window=8, key_axis="token"), ids)
    plain = damage(new_model(biased.config), kv.QuantCache(4, window=8), ids)
    assert channel < 3 * plain
    assert token > 10 * channel
    # rotation spreads the bias over all channels; per token that is still ruinous, per channel harmless
    assert damage(biased, kv.QuantCache(4, window=8, rotate=True), ids) < 3 * plain


def test_more_bits_are_closer():
    ids = prompt(4, 120)
    by_bits = [damage(tiny_model(), kv.QuantCache(bits, window=8), ids) for bits in (8, 4, 3, 2)]
    assert by_bits == sorted(by_bits)
    assert by_bits[0] < 1e-3 and by_bits[3] > 10 * by_bits[0]


# -- rotation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 64, 80, 96, 128])
def test_rotating_twice_is_the_identity(width):
    x = rows(width=width)
    assert_close("rows", rotate(rotate(x)), x, 1e-5)
    assert_close("norms", rotate(x).norm(dim=-1), x.norm(dim=-1), 1e-4)
    matrix = hadamard(width, torch.device("cpu"))
    assert torch.equal(matrix, matrix.T)


def test_rotation_shares_out_an_outlier():
    x = rows()
    x[..., 7] *= 50
    plain, mixed = kv.Quantize(4, axis="token"), kv.Quantize(4, axis="token", rotate=True)
    errors = [
        (c.decode(c.encode(x), torch.float32, x.shape[-1]) - x).pow(2).mean(dim=-1).mean() for c in (plain, mixed)
    ]
    small = [(c.decode(c.encode(x), torch.float32, x.shape[-1]) - x)[..., :7].pow(2).mean() for c in (plain, mixed)]
    assert small[1] < small[0] / 2 and errors[1] < 2 * errors[0]


FORMATS = {
    "channel": dict(axis="channel"),
    "token": dict(axis="token"),
    "rotate": dict(axis="channel", rotate=True),
    "rotate-token": dict(axis="token", rotate=True),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_sink", [0, 5])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_attention_on_the_bytes_equals_attention_on_decoded_rows(name, bits, n_sink, masked):
    codec = (kv.Quantize(bits, **FORMATS[name]), kv.Quantize(bits, axis="token", rotate="rotate" in name))
    layer = kv.KVLayer(0, *codec, window=16, n_sink=n_sink)
    x = rows(150)
    layer.compress(AttentionCall(layer.append(x, rows(150, seed=1)), x))
    q, new = torch.randn(2, 6, 3, 64, generator=torch.Generator().manual_seed(2)), rows(3, seed=3)
    view = layer.append(new, new)
    assert layer.store.n_packed == 128
    mask = torch.rand(2, 1, 3, 153, generator=torch.Generator().manual_seed(4)) > 0.3 if masked else None
    options = dict(scaling=0.125, softcap=20.0)
    ours = fused.attend(q, view, mask=None if mask is None else layer.store.to_view_order(mask), **options)
    # materialised in the order of the positions, plain softmax
    k, v = (t.repeat_interleave(2, 1) for t in view.materialize())
    scores = torch.tanh(q @ k.transpose(2, 3) * 0.125 / 20.0) * 20.0
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    expected = scores.softmax(-1) @ v
    assert_close("fused", ours, expected, 2e-5)
    in_order = None if mask is None else layer.store.to_view_order(mask)
    assert_close("blockwise", attend_blocks(q, view, mask=in_order, **options)[0], expected, 2e-5)


# -- chains --------------------------------------------------------------------------------------------------------


def test_chains_of_dense():
    quantize = kv.Quantize(4)
    assert kv.Dense() >> quantize is quantize
    assert quantize >> kv.Dense() is quantize
    with pytest.raises(ValueError, match="leaves nothing"):
        kv.Chain(quantize, quantize)
    chain = kv.Chain(kv.Dense(), kv.Quantize(4)).for_side("k")
    alone = kv.Quantize(4).for_side("k")
    x = rows()
    assert torch.equal(
        chain.decode(chain.encode(x), x.dtype, x.shape[-1]), alone.decode(alone.encode(x), x.dtype, x.shape[-1])
    )
    assert chain.nbytes_per_token(64, 2) == alone.nbytes_per_token(64, 2)
    assert chain.granularity == alone.granularity == 32
