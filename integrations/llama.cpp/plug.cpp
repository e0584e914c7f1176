// libggml-vattn.so: loaded by GGML_BACKEND_PATH, takes over attention of decode steps in a llama.cpp as it is shipped.
//
// It registers as a backend without devices, and puts itself between ggml's CPU backend and its graphs: new backends of
// the CPU device get a graph_compute of ours around theirs. The scheduler, its splits and its threads are as they were.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>

#include "graph_attention.hpp"

namespace vattn_ggml {
namespace {

host ggml;
settings chosen;

// CPU backends and what is kept for each; `compute` and `free` are theirs.
struct attached {
  ggml_status (*compute)(ggml_backend_t, ggml_cgraph*) = nullptr;
  void (*free)(ggml_backend_t) = nullptr;
  std::unique_ptr<graph_attention> attention;
};
std::mutex mutex;
std::map<ggml_backend_t, attached>& backends() {
  static auto* const all = new std::map<ggml_backend_t, attached>;  // not destroyed: contexts may outlive statics
  return *all;
}
attached& of(ggml_backend_t b) {
  std::lock_guard lock(mutex);
  return backends()[b];  // a map's elements stay where they are
}

ggml_status compute(ggml_backend_t b, ggml_cgraph* graph) {
  attached& a = of(b);
  a.attention->before(graph);
  const ggml_status s = a.compute(b, graph);
  a.attention->after();
  return s;
}
void release(ggml_backend_t b) {
  void (*const free)(ggml_backend_t) = of(b).free;
  {
    std::lock_guard lock(mutex);
    backends().erase(b);
  }
  free(b);
}

ggml_backend_t (*cpu_init)(ggml_backend_dev_t, const char*) = nullptr;
ggml_backend_t init_and_attach(ggml_backend_dev_t device, const char* parameters) {
  const ggml_backend_t b = cpu_init(device, parameters);
  if (b == nullptr) return nullptr;
  attached& a = of(b);
  a = {b->iface.graph_compute, b->iface.free, std::make_unique<graph_attention>(ggml, chosen)};
  b->iface.graph_compute = compute;
  b->iface.free = release;
  return b;
}

const char* reg_name(ggml_backend_reg_t) { return "vattn"; }
size_t no_devices(ggml_backend_reg_t) { return 0; }
ggml_backend_dev_t no_device(ggml_backend_reg_t, size_t) { return nullptr; }
void* no_function(ggml_backend_reg_t, const char*) { return nullptr; }

void say(const std::string& line) { std::fprintf(stderr, "vattn: %s\n", line.c_str()); }

// What was attached to must stay, even if this backend is unloaded.
void stay_loaded() {
  Dl_info self;
  if (dladdr(reinterpret_cast<const void*>(&no_devices), &self) != 0)
    static_cast<void>(dlopen(self.dli_fname, RTLD_NOW | RTLD_NODELETE | RTLD_NOLOAD));
}

void attach() {
  static bool attached_once = false;
  if (attached_once) return;
  std::string problem;
  if (!read_settings(chosen, problem)) return say(problem + "; llama.cpp runs as without vattn");
  if (chosen.mode == run_mode::off) return say("off (VATTN_MODE)");
  if (!ggml.check(problem)) return say(problem + "; llama.cpp runs as without vattn");
  attached_once = true;
  stay_loaded();
  report::instance().configure(chosen);
  ggml_backend_dev_t cpu = ggml.device_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  cpu_init = cpu->iface.init_backend;
  cpu->iface.init_backend = init_and_attach;
  say(promise_of(chosen));
}

}  // namespace
}  // namespace vattn_ggml

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init() {
  using namespace vattn_ggml;
  std::string problem;
  try {
    if (!ggml.bind(problem)) {  // a ggml that we do not know may have another table: none is given
      say(problem + "; llama.cpp runs as without vattn");
      return nullptr;
    }
    attach();
  } catch (const std::exception& e) {
    say(std::string(e.what()) + "; llama.cpp runs as without vattn");
    return nullptr;
  }
  static ggml_backend_reg reg{};
  reg.api_version = GGML_BACKEND_API_VERSION;
  reg.iface = {reg_name, no_devices, no_device, no_function};
  return &reg;
}
