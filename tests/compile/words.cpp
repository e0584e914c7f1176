// Words of ours that a program may have made macros of: windows.h's, X11's, and any header's min and max. That it
// compiles is the test, and that they are as before afterwards.
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define small char
#define near
#define far
#define interface struct
#define IN
#define OUT
#define CONST const
#define OPTIONAL
#define ERROR 0
#define Yield() static_cast<void>(0)

#include <vattn/base/openmp.hpp>
#include <vattn/base/thread_pool.hpp>
#include <vattn/call/audit.hpp>
#include <vattn/plan.hpp>
#include <vattn/vattn.hpp>

interface words {
  small far* near letter = nullptr;
};

int main() {
  const float numbers[64] = {1, 2, 3, 4};
  float output[4];
  vattn::workspace memory;
  const vattn::status s =
      vattn::vattention<>()(vattn::tensor_view<const float, 4>(numbers, {1, 1, 1, 4}),
                            vattn::contiguous_kv(numbers, numbers, {.n_tokens = 16, .dk = 4, .dv = 4}), {.scale = 0.5f},
                            {.output = {output, {1, 1, 1, 4}}}, memory);
  Yield();
  return s.ok() && words{}.letter == nullptr && min(1, 2) == 1 && max(1, 2) == 2 ? ERROR : 1;
}
