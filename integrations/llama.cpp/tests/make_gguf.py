#!/usr/bin/env python3
"""Models for the tests, as GGUF files of bf16 matrices and f32 vectors. Python's standard library alone.

  make_gguf.py convert MODEL_DIR OUT.gguf [--vocab bytes]
      a Llama of bytes: config.json and safetensors of bf16, as Hugging Face has them
  make_gguf.py random OUT.gguf [--layers 2] [--hidden 256] [--heads 8] [--kv-heads 2] [--head-size 64] [--context 32768]
      [--kind llama|refact|gemma2|gpt-oss]
      the same architecture with random weights, whose caches are of a real one's size; logits vary by about 1.5 nats, and
      values have a common part, as those of trained heads do. Or others: with ALiBi (refact); with a soft cap of 10 (gemma2);
      with attention sinks and experts (gpt-oss). The last two see 1024 tokens in every other layer.

Without --vocab the vocabulary has no tokenizer: token ids go in through llama.h. With it, byte b is token b.
"""
import argparse
import json
import pathlib
import random
import struct

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # GGUF's types of metadata
TYPE_F32, TYPE_BF16 = 0, 30  # ggml's types of tensors
ALIGNMENT = 32


def string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def metadata(key, kind, value):
    head = string(key) + struct.pack("<I", kind)
    if kind == STRING:
        return head + string(value)
    if kind == ARRAY:
        item, items = value
        packed = [string(i) if item == STRING else struct.pack("<f" if item == F32 else "<i", i) for i in items]
        return head + struct.pack("<IQ", item, len(items)) + b"".join(packed)
    return head + struct.pack({U32: "<I", F32: "<f", BOOL: "<?"}[kind], value)


def write(path, fields, tensors):
    """tensors: (name, shape, bytes of bf16), rows first; vectors and biases become f32."""
    infos, data, offset = [], [], 0
    for name, shape, raw in tensors:
        kind = TYPE_BF16
        if len(shape) == 1 or name.endswith(".bias"):
            wide = bytearray(2 * len(raw))
            wide[2::4], wide[3::4] = raw[0::2], raw[1::2]
            kind, raw = TYPE_F32, bytes(wide)
        dims = shape[::-1]
        infos.append(string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
        padded = len(raw) + -len(raw) % ALIGNMENT
        data.append((raw, padded))
        offset += padded
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields)) + b"".join(fields) + b"".join(infos)
    with open(path, "wb") as out:
        out.write(head + bytes(-len(head) % ALIGNMENT))
        for raw, padded in data:
            out.write(raw + bytes(padded - len(raw)))


def architecture(name, c, vocab, kind="llama"):
    fields = [
        metadata("general.architecture", STRING, kind),
        metadata("general.name", STRING, name),
        metadata(f"{kind}.vocab_size", U32, c["vocab_size"]),
        metadata(f"{kind}.context_length", U32, c["max_position_embeddings"]),
        metadata(f"{kind}.embedding_length", U32, c["hidden_size"]),
        metadata(f"{kind}.block_count", U32, c["num_hidden_layers"]),
        metadata(f"{kind}.feed_forward_length", U32, c["intermediate_size"]),
        metadata(f"{kind}.attention.head_count", U32, c["num_attention_heads"]),
        metadata(f"{kind}.attention.head_count_kv", U32, c["num_key_value_heads"]),
        metadata(f"{kind}.attention.key_length", U32, c["head_dim"]),
        metadata(f"{kind}.attention.value_length", U32, c["head_dim"]),
        metadata(f"{kind}.rope.dimension_count", U32, c["head_dim"]),
        metadata(f"{kind}.rope.freq_base", F32, c["rope_theta"]),
        metadata(f"{kind}.attention.layer_norm_rms_epsilon", F32, c["rms_norm_eps"]),
    ]
    if vocab == "none":
        return fields + [metadata("tokenizer.ggml.model", STRING, "none")]
    return fields + [
        metadata("tokenizer.ggml.model", STRING, "llama"),
        metadata("tokenizer.ggml.tokens", ARRAY, (STRING, [f"<0x{i:02X}>" for i in range(256)])),
        metadata("tokenizer.ggml.scores", ARRAY, (F32, [0.0] * 256)),
        metadata("tokenizer.ggml.token_type", ARRAY, (I32, [6] * 256)),  # each a byte
        metadata("tokenizer.ggml.add_space_prefix", BOOL, False),
        metadata("tokenizer.ggml.add_bos_token", BOOL, False),
        metadata("tokenizer.ggml.add_eos_token", BOOL, False),
        metadata("tokenizer.ggml.bos_token_id", U32, 0),
        metadata("tokenizer.ggml.eos_token_id", U32, 0),
        metadata("tokenizer.ggml.unknown_token_id", U32, 0),
    ]


NAMES = {  # of a layer: GGUF's, Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def pairs_of_neighbours(shape, raw, heads):
    """Hugging Face rotates element i of a head with i + d/2, llama.cpp 2i with 2i + 1: rows are put in that order."""
    row, d = len(raw) // shape[0], shape[0] // heads
    order = [h * d + i % 2 * (d // 2) + i // 2 for h in range(heads) for i in range(d)]
    return b"".join(raw[r * row : (r + 1) * row] for r in order)


def convert(a):
    folder = pathlib.Path(a.model)
    c = json.loads((folder / "config.json").read_text())
    source = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        (size,) = struct.unpack_from("<Q", raw)
        for name, t in json.loads(raw[8 : 8 + size]).items():
            if name != "__metadata__":
                if t["dtype"] != "BF16":
                    raise SystemExit(f"{name} is {t['dtype']}: give a model of bf16")
                first, last = t["data_offsets"]
                source[name] = (t["shape"], raw[8 + size + first : 8 + size + last])
    tensors = [("token_embd.weight", *source["model.embed_tokens.weight"]), ("output_norm.weight", *source["model.norm.weight"])]
    if not c.get("tie_word_embeddings"):
        tensors.append(("output.weight", *source["lm_head.weight"]))
    heads = {"attn_q": c["num_attention_heads"], "attn_k": c["num_key_value_heads"]}
    for i in range(c["num_hidden_layers"]):
        for ours, theirs in NAMES.items():
            shape, raw = source[f"model.layers.{i}.{theirs}.weight"]
            if ours in heads:
                raw = pairs_of_neighbours(shape, raw, heads[ours])
            tensors.append((f"blk.{i}.{ours}.weight", shape, raw))
    write(a.out, architecture(folder.name, c, a.vocab), tensors)


def random_model(a):
    draw = random.Random(1)
    q, kv = a.heads * a.head_size, a.kv_heads * a.head_size
    hidden, feed, experts = a.hidden, 256, 4

    def uniform(shape, exponent):
        """bf16 of random sign in [2^exponent, 2^(exponent + 1))."""
        n = 1
        for s in shape:
            n *= s
        high, low = (exponent + 127) >> 1, (exponent + 127 & 1) << 7
        raw = bytearray(2 * n)
        raw[0::2] = draw.randbytes(n).translate(bytes(b & 0x7F | low for b in range(256)))
        raw[1::2] = draw.randbytes(n).translate(bytes(b & 0x80 | high for b in range(256)))
        return shape, bytes(raw)

    def constant(n, value):
        return [n], struct.pack("<f", value)[2:] * n

    scale = (256 / hidden) ** 0.5  # so that sums over `hidden` are as those over 256
    tensors = [("token_embd.weight", *uniform([256, hidden], 0)), ("output_norm.weight", *constant(hidden, 0.5))]
    for i in range(a.layers):
        shapes = {
            "attn_norm.weight": constant(hidden, 0.8125 * scale),
            "attn_q.weight": uniform([q, hidden], -4),
            "attn_k.weight": uniform([kv, hidden], -4),
            "attn_v.weight": uniform([kv, hidden], -4),
            "attn_v.bias": uniform([kv], 0),
            "attn_output.weight": uniform([hidden, q], -6),
            "ffn_norm.weight": constant(hidden, scale),
            "ffn_gate.weight": uniform([feed, hidden], -5),
            "ffn_up.weight": uniform([feed, hidden], -5),
            "ffn_down.weight": uniform([hidden, feed], -5),
        }
        if a.kind == "gemma2":
            shapes["post_attention_norm.weight"] = shapes["post_ffw_norm.weight"] = constant(hidden, 0.25 * scale)
        if a.kind == "gpt-oss":
            shapes["post_attention_norm.weight"] = shapes.pop("ffn_norm.weight")
            for name in ("gate", "up", "down"):
                shape, _ = shapes.pop(f"ffn_{name}.weight")
                shapes[f"ffn_{name}_exps.weight"] = uniform([experts, *shape], -5)
                shapes[f"ffn_{name}_exps.bias"] = uniform([experts, shape[0]], -5)
            shapes["ffn_gate_inp.weight"] = uniform([experts, hidden], -5)
            shapes["ffn_gate_inp.bias"] = uniform([experts], -5)
            shapes["attn_output.bias"] = uniform([hidden], -5)
            shapes["attn_sinks.weight"] = uniform([a.heads], 2)  # a few thousand tokens together have a logit of 9 or so
        tensors += [(f"blk.{i}.{name}", *value) for name, value in shapes.items()]
    if a.kind == "gpt-oss":
        tensors.append(("output.weight", *uniform([256, hidden], 0)))
    c = {
        "vocab_size": 256, "max_position_embeddings": a.context, "hidden_size": hidden, "num_hidden_layers": a.layers,
        "intermediate_size": feed, "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_size, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    }
    fields = architecture("random", c, "none", a.kind)
    if a.kind in ("gemma2", "gpt-oss"):
        fields.append(metadata(f"{a.kind}.attention.sliding_window", U32, 1024))
    if a.kind == "gemma2":
        fields.append(metadata("gemma2.attn_logit_softcapping", F32, 10.0))
    if a.kind == "gpt-oss":
        fields += [metadata(f"gpt-oss.expert_{k}", U32, v)
                   for k, v in {"count": experts, "used_count": 2, "feed_forward_length": feed}.items()]
    write(a.out, fields, tensors)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("convert")
    p.add_argument("model")
    p.add_argument("out")
    p.add_argument("--vocab", default="none", choices=["none", "bytes"])
    p.set_defaults(run=convert)
    p = commands.add_parser("random")
    p.add_argument("out")
    for name, value in {"layers": 2, "hidden": 256, "heads": 8, "kv-heads": 2, "head-size": 64, "context": 32768}.items():
        p.add_argument("--" + name, type=int, default=value)
    p.add_argument("--kind", default="llama", choices=["llama", "refact", "gemma2", "gpt-oss"])
    p.set_defaults(run=random_model)
    a = parser.parse_args()
    a.run(a)


main()
