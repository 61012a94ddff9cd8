"""A wheel with a tiny Llama in a GGUF file, and the weights that are in it."""

import zipfile
from pathlib import Path

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

FILE = "kv_tiny/tiny.Q4_1.gguf"
NAME = "kv_tiny-1.0-py3-none-any.whl"
D, FFN, V = 64, 96, 258
SHAPES = {
    "token_embd": (V, D),
    "blk.0.attn_q": (D, D),
    "blk.0.attn_k": (D // 2, D),
    "blk.0.attn_v": (D // 2, D),
    "blk.0.attn_output": (D, D),
    "blk.0.ffn_gate": (FFN, D),
    "blk.0.ffn_up": (FFN, D),
    "blk.0.ffn_down": (D, FFN),
}


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write the model in Q4_1; its matrices, dequantised."""
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(128)
    file.add_block_count(1)
    file.add_embedding_length(D)
    file.add_feed_forward_length(FFN)
    file.add_head_count(4)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_dimension_count(D // 4)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(V)
    # every byte, two line feeds as one token, and two blanks
    file.add_tokenizer_model("gpt2")
    file.add_token_list([*sorted(ByteLevel.alphabet()), "ĊĊ", "ĠĠ"])
    file.add_token_types([gguf.TokenType.NORMAL] * V)
    file.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    random, kind, found = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_1, {}
    for name, shape in SHAPES.items():
        packed = gguf.quantize(random.standard_normal(shape, np.float32) / 8, kind)
        file.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        found[name] = gguf.dequantize(packed, kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        file.add_tensor(f"{name}.weight", np.ones(D, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return found


def write_wheel(folder: Path) -> dict[str, np.ndarray]:
    """Write a wheel that pip takes, with the model in it; its matrices, dequantised."""
    weights = write_gguf(folder / "tiny.gguf")
    info = "kv_tiny-1.0.dist-info"
    with zipfile.ZipFile(folder / NAME, "w") as wheel:
        wheel.write(folder / "tiny.gguf", FILE)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kv-tiny\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return weights
