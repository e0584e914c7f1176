// docs/cuda.md's code, as it stands there, compiled: what runs on a card is tested in tests/cuda.
#include <cmath>

#include "vattn/cuda/step.cuh"

// Made by tools/cuda/decoders.cu: compiling a decoder takes a minute.
extern template class vattn::cuda::decoder<__nv_bfloat16, 128, 2>;

vattn::status decode_as_the_page_does(int processors, const vattn::cuda::arguments& a, const void* keys, const void* values,
                                      cudaStream_t stream) {
#include "snippets/cuda/top.hpp"
  return s;
}
