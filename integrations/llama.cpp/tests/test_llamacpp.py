#!/usr/bin/env python3
"""Tests of libggml-vattn.so in a stock llama.cpp: test_llamacpp.py CASE --driver FILE --library FILE --libs DIR --work DIR

Each case runs the driver with the library beside llama.cpp and without it. `list` prints the cases. Standard library alone.
"""
import argparse
import array
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
CASES = {}


def case(f):
    CASES[f.__name__] = f
    return f


class Setup:
    def __init__(self, a):
        self.driver, self.library, self.libs, self.fake = a.driver, a.library, a.libs, a.fake_version
        self.shared, self.steps = a.models, a.steps
        self.work = pathlib.Path(a.work)
        self.work.mkdir(parents=True, exist_ok=True)

    def random_model(self, name="random", *options):
        path = self.work / f"{name}.gguf"
        if not path.exists():
            part = self.work / f"{name}.{os.getpid()}"
            subprocess.run([sys.executable, HERE / "make_gguf.py", "random", part, *options], check=True)
            part.rename(path)
        return path

    def trained_model(self, name="tiny-llama-32k"):
        folder = pathlib.Path(self.shared) / name
        if not self.shared or not folder.is_dir():
            print(f"skipped: no {name}: give VATTN_LLAMACPP_MODELS, the folder that it is in")
            sys.exit(77)
        path = self.work / f"{name}.gguf"
        if not path.exists():
            part = self.work / f"{name}.{os.getpid()}"
            subprocess.run([sys.executable, HERE / "make_gguf.py", "convert", folder, part], check=True)
            part.rename(path)
        return path, folder

    def run(self, command, *options, model, stock=False, code=0, **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("VATTN_", "GGML_"))}
        if not stock:
            environment["GGML_BACKEND_PATH"] = str(self.library)
        environment.update(variables)
        words = [self.driver, command, "--libs", self.libs, "--model", model, *options]
        done = subprocess.run([str(w) for w in words], env=environment, capture_output=True, text=True, timeout=3000)
        print("$", " ".join(f"{k}={v}" for k, v in variables.items()), "stock" if stock else "", *words[1:])
        print(done.stdout + done.stderr, flush=True)
        assert done.returncode == code, f"exit status {done.returncode}"
        return done.stdout, [l for l in done.stderr.splitlines() if l.startswith("vattn:")]


def floats(path):
    values = array.array("f")
    values.frombytes(pathlib.Path(path).read_bytes())
    return values


def npy(path):
    raw = pathlib.Path(path).read_bytes()
    (size,) = array.array("H", raw[8:10])
    values = array.array("f")
    values.frombytes(raw[10 + size :])
    return values


def largest_difference(a, b):
    return max(abs(x - y) for x, y in zip(a, b))


def rms(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)) / sum(y * y for y in b))


@case
def settings(s):
    """A value that cannot be meant, another ggml, a file that is missing: one clear line, and llama.cpp as it is."""
    model = s.random_model()
    options = ["--fill", "700"]
    expected, lines = s.run("load", *options, model=model, stock=True)
    assert lines == []
    bad = {
        "VATTN_EPSILON": ["0", "1", "-0.1", "abc", "0.1x", "nan", "1e-1"],
        "VATTN_DELTA": ["0", "1.5", ","],
        "VATTN_MODE": ["fast", "Verified"],
        "VATTN_AUDIT": ["2", "-1", "x"],
        "VATTN_REPORT": ["/no such folder/report"],
    }
    for name, values in bad.items():
        for value in values if name == "VATTN_EPSILON" else values[:1]:
            got, lines = s.run("load", *options, model=model, **{name: value})
            assert got == expected
            assert len(lines) == 1 and f'{name} is "{value}": give ' in lines[0] and "as without vattn" in lines[0], lines
    got, lines = s.run("load", *options, model=model, VATTN_MODE="off")
    assert got == expected and len(lines) == 1 and "off" in lines[0], lines
    got, lines = s.run("load", *options, model=model, LD_PRELOAD=str(s.fake))
    assert got == expected and len(lines) == 1 and "9.9.9" in lines[0] and "as without vattn" in lines[0], lines
    got, lines = s.run("load", *options, model=model, GGML_BACKEND_PATH="/no/libggml-vattn.so")
    assert got == expected and lines == []
    # Empty is as not set; what can be meant is said.
    got, lines = s.run("load", *options, model=model, VATTN_EPSILON="", VATTN_MODE="")
    assert len(lines) == 1 and "within 0.1 of its length with probability 0.9" in lines[0], lines
    got, lines = s.run("load", *options, model=model, VATTN_EPSILON="0.05", VATTN_DELTA=".01")
    assert len(lines) == 1 and "within 0.05 of its length with probability 0.99" in lines[0], lines
    got, lines = s.run("load", *options, model=model, VATTN_MODE="exact")
    assert len(lines) == 1 and "exact attention" in lines[0], lines
    assert abs(float(got) / float(expected) - 1) < 1e-3


@case
def prefill_is_stock(s):
    """Prefill, flash attention that is off, ALiBi, and short contexts are ggml's own, bit by bit."""
    llama, alibi = s.random_model(), s.random_model("alibi", "--kind", "refact")
    late = ["--count", "8", "--skip", "900", "--batch", "1"]
    for model, options in ((llama, ["--count", "1500", "--batch", "500"]), (llama, ["--count", "40", "--batch", "1"]),
                           (llama, ["--count", "40", "--batch", "1", "--context", "48"]),
                           (llama, [*late, "--flash", "off"]), (llama, [*late, "--flash", "off", "--type", "f32"]),
                           (alibi, late)):
        for name in ("a", "b"):
            s.run("logits", *options, "--out", s.work / f"prefill_{name}", model=model, stock=name == "a")
        assert (s.work / "prefill_a").read_bytes() == (s.work / "prefill_b").read_bytes(), options


@case
def report(s):
    """Counts as text and JSON."""
    model = s.random_model()
    options = ["--fill", "5400", "--warm", "42", "--steps", "8"]
    path = s.work / "report.json"
    s.run("bench", *options, model=model, VATTN_REPORT=str(path), VATTN_AUDIT="1")
    r = json.loads(path.read_text())
    # Fifty steps of two layers; while their codes are made, exact. Eight heads a step.
    assert r["mode"] == "verified" and r["epsilon"] == 0.1 and r["calls"] == 100 and 40 <= r["verified"] <= 60, r
    assert r["exact"] == r["calls"] - r["verified"], "rows are read twice"
    assert r["outputs"] == 8 * r["verified"] and r["not_finite"] == 0 and r["stale"] == 0, r
    assert len(r["layers"]) == 2, r
    assert all(l["audited"] == 8 * l["verified"] > 0 and l["p_value"] > 1e-4 for l in r["layers"]), r
    assert 0 < r["code_bytes"] < 0.2 * r["cache_bytes"], r
    _, lines = s.run("bench", *options, "--flash", "auto", model=model, VATTN_REPORT="stderr", VATTN_AUDIT="0.5")
    text = "\n".join(lines)
    assert "100 calls" in text and "layer 1: calls " in text and "audited" in text and "stale codes found 0" in text, text
    path = s.work / "report.txt"
    s.run("bench", *options, model=model, VATTN_REPORT=str(path), VATTN_MODE="exact")
    assert "100 calls" in path.read_text() and "0 by codes" in path.read_text()


@case
def report_on_signal(s):
    """SIGUSR1: the counts so far, while llama.cpp goes on."""
    path = s.work / "signal.json"
    path.unlink(missing_ok=True)
    words = [s.driver, "bench", "--libs", s.libs, "--model", s.random_model(), "--fill", "600", "--steps", "20000"]
    environment = {**os.environ, "GGML_BACKEND_PATH": str(s.library), "VATTN_REPORT": str(path)}
    with subprocess.Popen([str(w) for w in words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        for line in run.stderr:  # before it is there a signal would end it
            if line.startswith("vattn:"):
                break
        while run.poll() is None and path.stat().st_size == 0:
            run.send_signal(signal.SIGUSR1)
            time.sleep(0.2)
        assert run.poll() is None, "it ended first"
        time.sleep(0.2)
        assert json.loads(path.read_text())["mode"] == "verified"
        run.kill()


@case
def logits_exact(s):
    """Exact attention by our kernels is as near to the reference as stock is."""
    model, folder = s.trained_model()
    reference = npy(folder / "reference_logits.npy")
    errors = {}
    for mode in ("stock", "exact", "verified"):
        out = s.work / f"logits_{mode}"
        s.run("logits", "--text", folder / "text.txt", "--count", "512", "--batch", "1", "--out", out, model=model,
              stock=mode == "stock", **({} if mode == "stock" else {"VATTN_MODE": mode}))
        errors[mode] = largest_difference(floats(out), reference)
    print(errors)
    assert errors["exact"] <= errors["stock"] * 1.05 and errors["verified"] <= errors["stock"] * 1.05


@case
def logits_long(s):
    """At 6000 tokens: exact within stock's own error; verified nearer than its certificate would allow."""
    model, folder = s.trained_model()
    for kind, exact, sampled in (("f16", 0.01, 0.1), ("q8_0", 0.02, 0.1)):
        got = {}
        state = s.work / f"long_{kind}.state"
        state.unlink(missing_ok=True)
        for mode in ("stock", "exact", "verified"):
            out = s.work / f"long_{mode}"
            s.run("logits", "--text", folder / "text.txt", "--skip", "6000", "--count", "80", "--batch", "1", "--type", kind,
                  "--state", state, "--out", out, model=model, stock=mode == "stock", **({} if mode == "stock" else {"VATTN_MODE": mode}))
            got[mode] = floats(out)
        errors = {m: rms(got[m], got["stock"]) for m in ("exact", "verified")}
        print(kind, errors)
        assert errors["exact"] <= exact and errors["verified"] <= sampled
        state.unlink()


@case
def greedy(s):
    """The likeliest bytes after 5000: exact attention says what stock says, verified nearly always."""
    model, folder = s.trained_model()
    said = {}
    for mode in ("stock", "exact", "verified"):
        out, _ = s.run("greedy", "--text", folder / "text.txt", "--prompt", "5200", "--count", "64", model=model,
                       stock=mode == "stock", **({} if mode == "stock" else {"VATTN_MODE": mode}))
        said[mode] = out.split()[-1]
    assert said["exact"] == said["stock"]
    # A byte that two continuations have in common is often near a tie: what must hold is that the text begins as stock's.
    common = len(os.path.commonprefix([said["verified"], said["stock"]])) // 2
    print("verified as stock for", common, "bytes")
    assert common >= 16


def check_events(s, *options, mode="verified", steps=None, seed="1", model=()):
    model = s.random_model(*model)
    exact = mode == "exact"
    out, lines = s.run("events", "--steps", steps or s.steps, "--seed", seed, *options, "--epsilon", "0.002" if exact else "0.1",
                   model=model, VATTN_MODE=mode, VATTN_REPORT="stderr")
    assert "as promised" in out
    codes = sum(int(m[1]) for l in lines if (m := re.search(r" calls in .*; (\d+) by codes", l)))
    assert (codes > 0) == (not exact and "f32" not in options), "what is tested was not used"
    if exact:
        assert " sampled 0, violations 0, largest" in out


@case
def events_exact(s):
    """All events of a cache, several sequences: each output is exact attention's."""
    check_events(s, "--sequences", "3", "--context", "20480", mode="exact")


@case
def events_verified(s):
    """The same by codes: errors keep to their certificate after each kind of event."""
    check_events(s)


@case
def events_unified(s):
    check_events(s, "--sequences", "3", "--context", "20480", seed="2")


@case
def events_streams(s):
    check_events(s, "--sequences", "2", "--context", "16384", "--unified", "0", seed="3")


@case
def events_q8_0(s):
    check_events(s, "--type", "q8_0", "--sequences", "2", "--context", "14336", seed="4")


@case
def events_q4_0(s):
    check_events(s, "--type", "q4_0", seed="5")


@case
def events_mixed(s):
    check_events(s, "--type", "q8_0+q4_0", seed="6")


@case
def events_bf16(s):
    check_events(s, "--type", "bf16", seed="7")


@case
def events_f32(s):
    check_events(s, "--type", "f32", "--rounding", "0.004", seed="8")


@case
def events_threads(s):
    """More threads than KV heads, and than this machine may have."""
    check_events(s, "--threads", "5", "--poll", "0", seed="9", steps=20)


@case
def threads(s):
    """More threads than KV heads and than cores: exact attention says what it says with one, verified is as near to it."""
    model = s.random_model()
    state = s.work / "threads.state"
    state.unlink(missing_ok=True)

    def logits(mode, count, number, first=0):
        out = s.work / f"threads_{mode}_{number}"
        s.run("logits", "--skip", "5600", "--count", count, "--batch", "1", "--state", state, "--out", out, "--threads", number,
              "--batch-threads", "1", "--poll", "0", model=model, VATTN_MODE=mode)
        return floats(out)[256 * first :]

    expected = logits("exact", 34, 1)
    for number in (2, 4, 8, 16):
        assert largest_difference(logits("exact", 2, number), expected) < 1e-5, number
    # The codes of 5600 cells are made over 24 steps; what is sampled depends on how heads are shared out.
    for number in (1, 4, 8):
        error = rms(logits("verified", 34, number, 26), expected[256 * 26 :])
        print(number, "threads:", error)
        assert 0 < error < 0.1, number
    state.unlink()


@case
def events_twice(s):
    """Models and contexts that come and go in one process."""
    check_events(s, "--times", "3", seed="10", steps=12)


@case
def events_beside(s):
    """Two models at once in one process, as a draft's and its target's are."""
    check_events(s, "--beside", "1", seed="12", steps=20)


@case
def events_softcap(s):
    """Soft cap, and every other layer sees the last 1024 tokens by a mask."""
    check_events(s, seed="13", model=("gemma2", "--kind", "gemma2"))


@case
def events_sliding(s):
    """The same where those layers have a small cache of their own, whose cells are used again."""
    check_events(s, "--swa-full", "0", seed="14", model=("gemma2", "--kind", "gemma2"))


@case
def events_sinks(s):
    """Attention sinks."""
    check_events(s, seed="15", model=("gpt-oss", "--kind", "gpt-oss"))


@case
def soak(s):
    """Many steps with random events, attention held against double precision; memory does not grow."""
    small = ("small", "--hidden", "128", "--heads", "4", "--kv-heads", "1")
    check_events(s, "--sequences", "3", "--context", "20480", "--one-in", "16", "--leak", "1", steps=max(200, 20 * int(s.steps)),
                 seed="11", model=small)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("case", choices=[*CASES, "list"])
    for name in ("driver", "library", "libs", "fake-version", "work", "models"):
        p.add_argument("--" + name, default="")
    p.add_argument("--steps", default="60")
    a = p.parse_args()
    if a.case == "list":
        print("\n".join(CASES))
        return
    CASES[a.case](Setup(a))


main()
