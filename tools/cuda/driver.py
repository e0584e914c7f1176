"""What the programs for a GPU share: the C interface of decoders.cu by ctypes, caches and exact outputs by PyTorch."""
import ctypes as C
import math

import torch

DEVICE = "cuda"
P, I, F, D = C.c_void_p, C.c_int, C.c_float, C.c_double


class Shape(C.Structure):
    _fields_ = [(x, I) for x in "n_batch n_q_heads n_kv_heads d max_tokens".split()] + [("type", C.c_uint8)]


class Settings(C.Structure):
    _fields_ = [("epsilon", D), ("delta", D), ("scale_of_error", C.c_uint8), ("scale", F), ("softcap", F), ("sliding_window", I),
                ("sinks", I), ("window", I), ("bits", I), ("reads", C.c_uint8), ("seed", C.c_uint64)]


class CacheView(C.Structure):
    _fields_ = [("k", P), ("v", P), ("page_stride", C.c_int64), ("head_stride", C.c_int64), ("row_stride", C.c_int64), ("page_shift", I),
                ("table", P), ("table_start", P), ("table_stride", C.c_int32), ("lengths", P), ("last_page_len", P), ("max_tokens", C.c_int32)]


class Arguments(C.Structure):
    _fields_ = [("cache", CacheView), ("q", P), ("output", P), ("output_float", C.c_bool), ("lse", P), ("sink_logits", P), ("codes", P),
                ("state", P), ("workspace", P), ("certificates", P), ("step", P), ("sequences", P), ("layer", C.c_uint32)]


class Call(C.Structure):
    _fields_ = [("shape", Shape), ("settings", Settings), ("arguments", Arguments), ("processors", I), ("workspace_bytes", C.c_longlong),
                ("code_bytes", C.c_longlong), ("state_bytes", C.c_longlong), ("sparse", I), ("message", C.c_char * 232)]


CERTIFICATE = "epsilon_achieved variance goal dimension dof log_denominator rows candidates n breaches rounds ratio".split()
INTEGERS = {"rows", "candidates", "n", "breaches", "rounds"}


def load(path):
    lib = C.CDLL(path)
    lib.vattn_cuda_do.argtypes = [C.POINTER(Call), I, I, P, P, P]
    if lib.vattn_cuda_size_of_call() != C.sizeof(Call):
        raise RuntimeError(f"{path} has a call of {lib.vattn_cuda_size_of_call()} bytes, this driver one of {C.sizeof(Call)}: build both of one revision")
    return lib


def pointer(t):
    return None if t is None else t.data_ptr()


class Layer:
    """One layer's cache and all that a step of it needs; `share` another layer for the workspace."""

    def __init__(self, lib, batch, n, q_heads=32, kv_heads=8, d=128, type=torch.bfloat16, bits=2, epsilon=0.05, delta=0.1, share=None, k=None,
                 v=None, seed=1, layer=0, reads=0, sinks=16, window=128, rms=False, softcap=0.0, sliding=0, scale=None, used=None):
        self.lib, self.batch, self.n, self.hq, self.hk, self.d, self.type = lib, batch, n, q_heads, kv_heads, d, type
        self.heads, self.group = batch * q_heads, q_heads // kv_heads
        c = self.call = Call()
        c.shape = Shape(batch, q_heads, kv_heads, d, n, 0 if type == torch.bfloat16 else 1)
        self.scale = scale if scale is not None else 1 / math.sqrt(d)
        c.settings = Settings(epsilon, delta, 1 if rms else 0, self.scale, softcap, sliding, sinks, window, bits, reads, seed)
        c.processors = torch.cuda.get_device_properties(0).multi_processor_count
        self.k = torch.empty(batch, kv_heads, n, d, device=DEVICE, dtype=type) if k is None else k
        self.v = torch.empty_like(self.k) if v is None else v
        a = c.arguments
        a.cache = CacheView(pointer(self.k), pointer(self.v), kv_heads * n * d, n * d, d, 30, None, None, 0, None, None, n)
        self.q = torch.zeros(batch, q_heads, d, device=DEVICE, dtype=type)
        self.o = torch.zeros(batch, q_heads, d, device=DEVICE)
        self.lse = torch.zeros(batch, q_heads, device=DEVICE)
        self.raw = torch.zeros(self.heads, 12, device=DEVICE)
        self.do(0)
        room = lambda size: torch.zeros(max(int(size), 16), device=DEVICE, dtype=torch.uint8)
        self.codes, self.state = room(c.code_bytes), room(c.state_bytes)
        self.workspace = share.workspace if share else room(c.workspace_bytes)
        self.step = share.step if share else torch.zeros(1, device=DEVICE, dtype=torch.int32)
        a.q, a.output, a.output_float, a.lse = pointer(self.q), pointer(self.o), True, pointer(self.lse)
        a.codes, a.state, a.workspace, a.certificates = pointer(self.codes), pointer(self.state), pointer(self.workspace), pointer(self.raw)
        a.step, a.layer = pointer(self.step), layer
        self.sparse = bool(c.sparse)

    def do(self, what, extra=0, x=None, y=None):
        if self.lib.vattn_cuda_do(C.byref(self.call), what, extra, x, y, torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(self.call.message.decode())

    def prepare(self):
        self.do(1)
        if self.sparse:
            self.do(2)

    def gaussian(self, seed):
        self.do(6, seed)

    def query(self, sigma):
        """Logits N(0, sigma^2) over keys N(0, I), independent for the heads."""
        q = torch.randn(self.batch, self.hq, self.d, device=DEVICE)
        self.q.copy_(q / q.norm(dim=-1, keepdim=True) * (sigma / self.scale))

    def run(self):
        self.do(3)

    def certificates(self):
        ints = self.raw.view(torch.int32)
        return {name: (ints if name in INTEGERS else self.raw)[:, i].clone() for i, name in enumerate(CERTIFICATE)}

    def exact(self):
        o, lse = torch.empty(self.heads, self.d, device=DEVICE, dtype=torch.float64), torch.empty(self.heads, device=DEVICE, dtype=torch.float64)
        self.do(5, 0, pointer(o), pointer(lse))
        return o.view(self.batch, self.hq, self.d), lse.view(self.batch, self.hq)

    def errors(self, exact=None):
        o = self.exact()[0] if exact is None else exact
        return ((self.o.double() - o).norm(dim=-1) / o.norm(dim=-1)).flatten()
