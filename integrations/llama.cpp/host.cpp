#include "host.hpp"

#include <dlfcn.h>
#include <link.h>

#include <cstdlib>
#include <cstring>

namespace vattn_ggml {
namespace {

// Interfaces whose private parts were compared with the headers at hand and run by the tests.
constexpr const char* checked_versions[] = {"0.25."};

template <class F>
bool bind_to(F& f, const char* name, std::string& problem) {
  f = reinterpret_cast<F>(host::find(name));
  if (f == nullptr && problem.empty()) problem = std::string("the ggml of this process has no ") + name;
  return f != nullptr;
}

}  // namespace

void* host::find(const char* name) noexcept {
  if (void* p = dlsym(RTLD_DEFAULT, name)) return p;
  struct search {
    const char* name;
    void* found;
  } s{name, nullptr};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* user) {
        auto& wanted = *static_cast<search*>(user);
        if (info->dlpi_name == nullptr || std::strstr(info->dlpi_name, "ggml") == nullptr) return 0;
        if (void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD)) {
          wanted.found = dlsym(library, wanted.name);
          dlclose(library);
        }
        return wanted.found != nullptr ? 1 : 0;
      },
      &s);
  return s.found;
}

bool host::bind(std::string& problem) {
  if (!bind_to(version, "ggml_version", problem)) {
    problem = "no ggml with a version number is loaded in this process";
    return false;
  }
  bool known = false;
  for (const char* v : checked_versions) known = known || std::strncmp(version(), v, std::strlen(v)) == 0;
  if (!known) {
    problem = std::string("ggml ") + version() + " is loaded, and only ggml " + checked_versions[0] +
              "x was checked: use a llama.cpp that has it, or a vattn that knows yours";
    return false;
  }
  return bind_to(op_name, "ggml_op_name", problem) && bind_to(type_name, "ggml_type_name", problem) &&
         bind_to(tensor_overhead, "ggml_tensor_overhead", problem) &&
         bind_to(type_traits, "ggml_get_type_traits", problem) && bind_to(n_nodes, "ggml_graph_n_nodes", problem) &&
         bind_to(node, "ggml_graph_node", problem) && bind_to(n_bytes, "ggml_nbytes", problem) &&
         bind_to(device_by_type, "ggml_backend_dev_by_type", problem) && bind_to(init_, "ggml_init", problem) &&
         bind_to(free_, "ggml_free", problem) && bind_to(new_tensor_, "ggml_new_tensor_4d", problem) &&
         bind_to(flash_attn_, "ggml_flash_attn_ext", problem) && bind_to(set_rows_, "ggml_set_rows", problem) &&
         bind_to(custom_, "ggml_custom_4d", problem) && bind_to(device_name_, "ggml_backend_dev_name", problem) &&
         bind_to(device_reg_, "ggml_backend_dev_backend_reg", problem) &&
         bind_to(device_buffers_, "ggml_backend_dev_buffer_type", problem) &&
         bind_to(alloc_buffer_, "ggml_backend_buft_alloc_buffer", problem) &&
         bind_to(buffer_free_, "ggml_backend_buffer_free", problem) &&
         bind_to(buffer_size_, "ggml_backend_buffer_get_size", problem) &&
         bind_to(buffer_base_, "ggml_backend_buffer_get_base", problem) &&
         bind_to(buffer_type_, "ggml_backend_buffer_get_type", problem) &&
         bind_to(device_init_, "ggml_backend_dev_init", problem) &&
         bind_to(backend_device_, "ggml_backend_get_device", problem) &&
         bind_to(backend_name_, "ggml_backend_name", problem) && bind_to(backend_free_, "ggml_backend_free", problem);
}

bool host::check(std::string& problem) const { return check_tensors(problem) && check_backend(problem); }

bool host::check_tensors(std::string& problem) const {
  const auto differs = [&](const char* what) {
    problem = std::string("ggml ") + version() + " has another " + what + " than the headers that this was built with";
    return false;
  };
  // An object's header is 32 bytes on 64-bit machines.
  if (tensor_overhead() != sizeof(ggml_tensor) + 32) return differs("size of ggml_tensor");
  const struct {
    ggml_op op;
    const char* name;
  } ops[] = {{GGML_OP_NONE, "NONE"},           {GGML_OP_VIEW, "VIEW"},
             {GGML_OP_RESHAPE, "RESHAPE"},     {GGML_OP_PERMUTE, "PERMUTE"},
             {GGML_OP_TRANSPOSE, "TRANSPOSE"}, {GGML_OP_SET_ROWS, "SET_ROWS"},
             {GGML_OP_CUSTOM, "CUSTOM"},       {GGML_OP_FLASH_ATTN_EXT, "FLASH_ATTN_EXT"}};
  for (const auto& o : ops) {
    if (std::strcmp(op_name(o.op), o.name) != 0) return differs("numbering of operations");
  }
  const struct {
    ggml_type type;
    const char* name;
  } types[] = {{GGML_TYPE_F32, "f32"},   {GGML_TYPE_F16, "f16"},   {GGML_TYPE_BF16, "bf16"},
               {GGML_TYPE_Q8_0, "q8_0"}, {GGML_TYPE_Q4_0, "q4_0"}, {GGML_TYPE_I64, "i64"}};
  for (const auto& t : types) {
    if (std::strcmp(type_name(t.type), t.name) != 0) return differs("numbering of types");
  }

  ggml_context* const c = init_({.mem_size = size_t{1} << 20, .mem_buffer = nullptr, .no_alloc = false});
  if (c == nullptr) {
    problem = "no memory to check ggml's interface";
    return false;
  }
  ggml_tensor* const q = new_tensor_(c, GGML_TYPE_F32, 32, 3, 4, 1);
  ggml_tensor* const k = new_tensor_(c, GGML_TYPE_F16, 32, 64, 2, 1);
  ggml_tensor* const v = new_tensor_(c, GGML_TYPE_F16, 16, 64, 2, 1);
  ggml_tensor* const mask = new_tensor_(c, GGML_TYPE_F16, 64, 64, 1, 1);
  const ggml_tensor* const attention = flash_attn_(c, q, k, v, mask, 0.25f, 0.0f, 3.0f);
  ggml_tensor* const to = new_tensor_(c, GGML_TYPE_F16, 64, 32, 1, 1);
  ggml_tensor* const rows = new_tensor_(c, GGML_TYPE_F32, 64, 5, 1, 1);
  ggml_tensor* const cells = new_tensor_(c, GGML_TYPE_I64, 5, 1, 1, 1);
  const ggml_tensor* const written = set_rows_(c, to, rows, cells);
  ggml_tensor* arguments[] = {q};
  const ggml_custom_op_t function = [](ggml_tensor*, int, int, void*) {};
  const ggml_tensor* const custom =
      custom_(c, GGML_TYPE_F32, 8, 1, 1, 1, arguments, 1, function, GGML_N_TASKS_MAX, &problem);
  float numbers[3];
  std::memcpy(numbers, attention->op_params, sizeof numbers);
  custom_parameters parameters{};
  std::memcpy(&parameters, custom->op_params, sizeof parameters);
  const bool attends = attention->op == GGML_OP_FLASH_ATTN_EXT && attention->src[0] == q && attention->src[1] == k &&
                       attention->src[2] == v && attention->src[3] == mask && attention->src[4] == nullptr &&
                       numbers[0] == 0.25f && numbers[1] == 0 && numbers[2] == 3 && attention->ne[0] == 16 &&
                       attention->ne[1] == 4 && attention->ne[2] == 3 && attention->data != nullptr;
  const bool writes = written->op == GGML_OP_SET_ROWS && written->src[0] == rows && written->src[1] == cells &&
                      written->view_src == to && written->data == to->data && to->nb[1] == 128;
  const bool calls = custom->op == GGML_OP_CUSTOM && parameters.function == function &&
                     parameters.tasks == GGML_N_TASKS_MAX && parameters.user == &problem;
  free_(c);
  if (!attends) return differs("node of flash attention");
  if (!writes) return differs("node that writes rows");
  if (!calls) return differs("node of a custom operation");
  return true;
}

bool host::check_backend(std::string& problem) const {
  const auto differs = [&](const char* what) {
    problem = std::string("ggml ") + version() + " has another " + what + " than the headers that this was built with";
    return false;
  };
  ggml_backend_dev_t device = device_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  if (device == nullptr) {
    problem = "ggml's CPU backend is not loaded yet: let llama.cpp load this library, by GGML_BACKEND_PATH";
    return false;
  }
  const ggml_backend_reg_t reg = device_reg_(device);
  if (device->reg != reg || reg->api_version != GGML_BACKEND_API_VERSION || device->iface.get_name == nullptr ||
      std::strcmp(device->iface.get_name(device), device_name_(device)) != 0 || device->iface.init_backend == nullptr)
    return differs("table of a device");
  const ggml_backend_buffer_t buffer = alloc_buffer_(device_buffers_(device), 4096);
  if (buffer == nullptr) {
    problem = "no memory to check ggml's interface";
    return false;
  }
  const bool holds = buffer->size == buffer_size_(buffer) && buffer->buft == buffer_type_(buffer) &&
                     buffer->iface.get_base && buffer->iface.get_base(buffer) == buffer_base_(buffer) &&
                     buffer->iface.set_tensor && buffer->iface.clear;
  buffer_free_(buffer);
  if (!holds) return differs("table of a buffer");
  const ggml_backend_t backend = device_init_(device, nullptr);
  if (backend == nullptr) {
    problem = "ggml's CPU backend does not start";
    return false;
  }
  const bool runs = backend->device == device && backend->device == backend_device_(backend) &&
                    backend->iface.get_name &&
                    std::strcmp(backend->iface.get_name(backend), backend_name_(backend)) == 0 &&
                    backend->iface.graph_compute && backend->iface.free;
  backend_free_(backend);
  return runs || differs("table of a backend");
}

}  // namespace vattn_ggml
