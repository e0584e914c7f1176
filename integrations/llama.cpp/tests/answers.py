#!/usr/bin/env python3
"""Answers to questions about long contexts, by stock llama.cpp and by verified attention, from the same caches:

  answers.py --driver FILE --library FILE --libs DIR --model OUT.gguf --prompts FILE.jsonl [--lengths 8192,16384]
             [--limit 1] [--tasks niah,kv] [--audit 0.02] [--work DIR]

A line of the prompts is {"task": ..., "length": ..., "id": ..., "context": ..., "qa": [[question, answer], ...]}; its bytes are
the tokens. Of each task and length, the first `limit` contexts are taken; stock prefills each once and its state is kept in
`work`, which both then load. An answer is right if each of its bytes was the likeliest, the true ones before it given. Exit
status 1 where verified attention has fewer right than stock in some task beyond what a coin would do to answers that differ
(p < 0.01, the sign test), or where an audited layer violates ε more often than δ (p < 0.001).
"""
import argparse
import json
import math
import os
import pathlib
import re
import subprocess
import sys


def run(a, mode, length, task, report):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VATTN_", "GGML_"))}
    if mode != "stock":
        environment |= {"GGML_BACKEND_PATH": a.library, "VATTN_MODE": mode, "VATTN_REPORT": str(report),
                        "VATTN_EPSILON": a.epsilon, "VATTN_DELTA": a.delta, "VATTN_AUDIT": a.audit}
    words = [a.driver, "prompts", "--libs", a.libs, "--model", a.model, "--prompts", a.prompts, "--states", a.work,
             "--context", length + 1024, "--length", length, "--limit", a.limit, "--threads", a.threads, "--type", a.type,
             "--task", task]
    done = subprocess.run([str(w) for w in words], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(str(w) for w in words)}\n{done.stderr}")
    return {m[1]: (m[2], int(m[3]), int(m[4])) for m in re.finditer(r"(\S+) ([01]*) (\d+) of (\d+)", done.stdout)}


def tail(k, n, p):
    """P(X >= k), X binomial(n, p)."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("driver", "library", "libs", "model", "prompts"):
        p.add_argument("--" + name, required=True)
    for name, value in {"lengths": "8192", "limit": "1", "tasks": "", "work": "answers", "audit": "0.02", "epsilon": "0.1",
                        "delta": "0.1", "threads": "1", "type": "f16", "modes": "verified"}.items():
        p.add_argument("--" + name, default=value)
    a = p.parse_args()
    pathlib.Path(a.work).mkdir(parents=True, exist_ok=True)
    tasks = a.tasks.split(",") if a.tasks else list(dict.fromkeys(json.loads(l)["task"] for l in open(a.prompts, encoding="utf-8")))
    ok, audits = True, {}
    for mode in a.modes.split(","):
        for length in map(int, a.lengths.split(",")):
            for task in tasks:
                report = pathlib.Path(a.work) / "report.json"
                report.unlink(missing_ok=True)
                stock = run(a, "stock", length, task, report).get(task)
                if stock is None:
                    continue
                ours = run(a, mode, length, task, report)[task]
                lost = sum(x == "1" and y == "0" for x, y in zip(stock[0], ours[0]))
                won = sum(x == "0" and y == "1" for x, y in zip(stock[0], ours[0]))
                r = json.loads(report.read_text())
                for layer in r["layers"]:
                    if "audited" in layer:
                        so_far = audits.setdefault((mode, layer["layer"]), [0, 0])
                        so_far[0] += layer["violations"]
                        so_far[1] += layer["audited"]
                good = tail(lost, lost + won, 0.5) >= 0.01
                ok = ok and good
                print(f"{mode} {task} {length}: stock {stock[1]} of {stock[2]}, ours {ours[1]}; lost {lost}, won {won}; "
                      f"rows read {100 * r['rows_read'] / max(1, r['rows']):.1f} %, in full "
                      f"{100 * r['dense'] / max(1, r['outputs']):.1f} %{'' if good else '  FEWER THAN STOCK'}", flush=True)
    for (mode, layer), (violations, audited) in sorted(audits.items()):
        p_value = tail(violations, audited, float(a.delta)) if audited else 1
        ok = ok and p_value >= 1e-3
        print(f"{mode} layer {layer}: {violations} of {audited} audited outputs beyond epsilon, p {p_value:.2g}")
    sys.exit(0 if ok else 1)


main()
