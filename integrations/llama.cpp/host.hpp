// The ggml that this process has loaded: its functions, by name, and whether it is what this library was compiled for.
#pragma once

#include <string>

#include "ggml-backend-impl.h"
#include "ggml.h"

namespace vattn_ggml {

/// Nothing is linked: sonames differ between distributions, and a process has one ggml. `find` looks in the process,
/// and in libraries that were loaded without giving their names to others, as node does.
class host {
 public:
  [[nodiscard]] static void* find(const char* name) noexcept;

  /// False: `problem` is a line that says what is missing, or what is not as this library was compiled for.
  [[nodiscard]] bool bind(std::string& problem);
  /// Sizes, numbers and layouts that this library relies on, by what the functions of the loaded ggml say of objects
  /// that they make. Needs the CPU backend.
  [[nodiscard]] bool check(std::string& problem) const;

  const char* (*version)() = nullptr;
  const char* (*op_name)(ggml_op) = nullptr;
  const char* (*type_name)(ggml_type) = nullptr;
  size_t (*tensor_overhead)() = nullptr;
  const ggml_type_traits* (*type_traits)(ggml_type) = nullptr;
  int (*n_nodes)(ggml_cgraph*) = nullptr;
  ggml_tensor* (*node)(ggml_cgraph*, int) = nullptr;
  size_t (*n_bytes)(const ggml_tensor*) = nullptr;
  ggml_backend_dev_t (*device_by_type)(enum ggml_backend_dev_type) = nullptr;

 private:
  [[nodiscard]] bool check_tensors(std::string& problem) const;
  [[nodiscard]] bool check_backend(std::string& problem) const;

  ggml_context* (*init_)(ggml_init_params) = nullptr;
  void (*free_)(ggml_context*) = nullptr;
  ggml_tensor* (*new_tensor_)(ggml_context*, ggml_type, int64_t, int64_t, int64_t, int64_t) = nullptr;
  decltype(&ggml_flash_attn_ext) flash_attn_ = nullptr;
  decltype(&ggml_set_rows) set_rows_ = nullptr;
  decltype(&ggml_custom_4d) custom_ = nullptr;
  decltype(&ggml_backend_dev_name) device_name_ = nullptr;
  decltype(&ggml_backend_dev_backend_reg) device_reg_ = nullptr;
  decltype(&ggml_backend_dev_buffer_type) device_buffers_ = nullptr;
  decltype(&ggml_backend_buft_alloc_buffer) alloc_buffer_ = nullptr;
  decltype(&ggml_backend_buffer_free) buffer_free_ = nullptr;
  decltype(&ggml_backend_buffer_get_size) buffer_size_ = nullptr;
  decltype(&ggml_backend_buffer_get_base) buffer_base_ = nullptr;
  decltype(&ggml_backend_buffer_get_type) buffer_type_ = nullptr;
  decltype(&ggml_backend_dev_init) device_init_ = nullptr;
  decltype(&ggml_backend_get_device) backend_device_ = nullptr;
  decltype(&ggml_backend_name) backend_name_ = nullptr;
  decltype(&ggml_backend_free) backend_free_ = nullptr;
};

/// Parameters of GGML_OP_CUSTOM, as ggml_custom_4d writes them.
struct custom_parameters {
  ggml_custom_op_t function;
  int tasks;
  void* user;
};

}  // namespace vattn_ggml
