"""Verified sparse decode as an attention implementation of Hugging Face transformers.

    import vattn_attention
    attention = vattn_attention.register(epsilon=0.1, delta=0.1, max_tokens=40000)     # name "vattn"
    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.bfloat16, attn_implementation="vattn").cuda()

Prefill, and whatever a plan says is faster read in full, goes to scaled_dot_product_attention."""
import os

import torch
from torch.utils import cpp_extension

HERE = os.path.dirname(os.path.abspath(__file__))
PREPARE, ENCODE, FRESH, RUN = range(4)


def load(verbose=False):
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0+PTX")
    cpp_extension.load("vattn_torch", [os.path.join(HERE, "vattn_torch.cu")], extra_include_paths=[os.path.join(HERE, "..", "..", "include")],
                       extra_cflags=["-std=c++20"], extra_cuda_cflags=["-std=c++20", "-O3"], verbose=verbose, is_python_module=False)


class Layer:
    """What is kept of one layer between steps."""

    def __init__(self, plan, sizes, device):
        self.codes, self.state = (torch.zeros(max(s, 16), dtype=torch.uint8, device=device) for s in sizes)
        self.coded = 0  # tokens that the codes know of


class Attention:
    def __init__(self, epsilon, delta, max_tokens, reads=0, audit=0.0, seed=1):
        self.epsilon, self.delta, self.max_tokens, self.reads, self.audit, self.seed = epsilon, delta, max_tokens, reads, audit, seed
        self.plan, self.layers, self.enabled = None, {}, True
        self.reset_counts()

    def reset_counts(self):
        self.rows = self.audited = self.violations = self.verified = 0
        self.density = 0.0

    def forget(self):
        """A new sequence begins."""
        self.layers = {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **rest):
        b, hq, t, d = query.shape
        n = key.shape[2]
        scale = scaling if scaling is not None else d**-0.5
        if t > 1 or not self.enabled or n < 1024:
            if n < 1024 or t > 1:
                self.layers.pop(module.layer_idx, None)
            # A chunk after others sees them and itself up to each token.
            causal = t > 1 and t == n
            mask = None if causal or t == 1 else torch.ones(t, n, dtype=torch.bool, device=query.device).tril(n - t)
            o = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True)
            return o.transpose(1, 2).contiguous(), None
        return self.decode(module.layer_idx, query.view(b, hq, d).contiguous(), key, value, scale).view(b, 1, hq, d), None

    def decode(self, layer, q, key, value, scale):
        b, hq, d = q.shape
        n = key.shape[2]
        if self.plan is None:
            self.plan, size, *self.sizes, self.sparse = torch.ops.vattn.make(b, hq, key.shape[1], d, self.max_tokens, q.dtype == torch.float16, self.epsilon,
                                                                             self.delta, scale, self.reads, self.seed)
            self.workspace = torch.zeros(size, dtype=torch.uint8, device=q.device)
            self.certificates = torch.zeros(b * hq, 12, device=q.device)
            self.number = torch.zeros(1, dtype=torch.int32, device=q.device)
        out = torch.empty_like(q)
        kept = self.layers.get(layer)

        def step(what, fresh=0):
            torch.ops.vattn.step(what, self.plan, q, key, value, None, None, out, kept.codes, kept.state, self.workspace, self.certificates, self.number, layer,
                                 fresh)

        if kept is None:
            kept = self.layers[layer] = Layer(self.plan, self.sizes, q.device)
            step(PREPARE), step(ENCODE)
        elif n > kept.coded:
            step(FRESH, n - kept.coded)
        kept.coded = n
        self.number += 1
        step(RUN)
        if self.audit > 0 and torch.rand(()).item() < self.audit:
            exact = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], key, value, scale=scale, enable_gqa=True)[:, :, 0].float()
            error = (out.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
            ints = self.certificates.view(torch.int32)
            self.audited += error.numel()
            self.violations += int((error > self.epsilon + 4e-3).sum())  # both are rounded to bf16
            self.verified += int((ints[:, 10] > 0).sum())
            self.density += float((ints[:, 6].float() / ints[:, 8]).sum())
        return out


def register(name="vattn", **options):
    load()
    attention = Attention(**options)
    from transformers import AttentionInterface

    AttentionInterface.register(name, attention)
    return attention
