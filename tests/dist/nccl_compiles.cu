// The adapter for NCCL is a communicator, also to nvcc. What it does is for machines with several GPUs to say.
#include "vattn/dist/nccl.hpp"

static_assert(vattn::dist::communicator<vattn::dist::nccl_communicator>);

vattn::status gather_on_a_stream(vattn::dist::nccl_communicator& c, const void* mine, void* all, std::size_t bytes) {
  return c.gather(mine, all, bytes);
}
