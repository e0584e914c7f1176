#!/usr/bin/env python3
"""A Llama's answers, density, violations and tokens a second by verified sparse decode, against SDPA.

    examples/torch/decode_llama.py --model ../shared/tiny-llama-d128 --prompts ../shared/tiny-llama-32k/prompts.jsonl --length 32768 --task niah kv"""
import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM

import vattn_attention


def answer(model, attention, prompt, sparse):
    """Right bytes of the true answers, teacher-forced, and seconds a token after the prefill."""
    tokens = lambda text: torch.tensor([list(text.encode())], device="cuda")
    attention.enabled = False
    with torch.no_grad():
        cache, context = None, tokens(prompt["context"])
        for i in range(0, context.shape[1], 4096):
            out = model(context[:, i : i + 4096], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
        attention.enabled = sparse
        attention.forget()
        right = total = steps = 0
        torch.cuda.synchronize()
        begin = time.time()
        for question, truth in prompt["qa"]:
            for i, byte in enumerate(question.encode() + truth.encode()):
                if i >= len(question.encode()):
                    total += 1
                    right += int(out.logits[0, -1].argmax()) == byte
                out = model(torch.tensor([[byte]], device="cuda"), past_key_values=cache, use_cache=True)
                steps += 1
        torch.cuda.synchronize()
    return right, total, (time.time() - begin) / steps


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--prompts", required=True)
    p.add_argument("--length", type=int, default=32768)
    p.add_argument("--task", nargs="+", default=["niah", "kv"])
    p.add_argument("--count", type=int, default=2, help="prompts of each task")
    p.add_argument("--epsilon", type=float, default=0.1)
    p.add_argument("--delta", type=float, default=0.1)
    p.add_argument("--audit", type=float, default=0.1, help="share of layers' steps that are compared with exact attention")
    p.add_argument("--reads", type=int, default=2, help="0: as the plan predicts, 2: sample whatever it costs")
    o = p.parse_args()
    attention = vattn_attention.register(epsilon=o.epsilon, delta=o.delta, max_tokens=o.length + 8192, reads=o.reads)
    model = AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.bfloat16, attn_implementation="vattn").cuda().eval()
    for task in o.task:
        prompts = [r for r in map(json.loads, open(o.prompts)) if r["task"] == task and r["length"] == o.length][: o.count]
        for sparse in (False, True):
            attention.reset_counts()
            attention.audit = o.audit if sparse else 0.0
            results = [answer(model, attention, r, sparse) for r in prompts]
            attention.audit = 0.0
            seconds = answer(model, attention, prompts[0], sparse)[2]
            right, total = sum(r[0] for r in results), sum(r[1] for r in results)
            line = f"{task:5} {'vattn' if sparse else 'sdpa':5} bytes right {right}/{total}, {1 / seconds:.1f} tokens/s"
            if sparse and attention.audited:
                line += (f", density {attention.density / attention.audited:.3f}, violations {attention.violations}/{attention.audited}, "
                         f"verified {attention.verified / attention.audited:.3f}")
            print(line, flush=True)


main()
