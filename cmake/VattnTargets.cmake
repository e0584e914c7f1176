# Flags of our own programs; none of them reaches a consumer.
include_guard()

add_library(vattn_warnings INTERFACE)
target_compile_options(vattn_warnings INTERFACE
  $<$<CXX_COMPILER_ID:GNU,Clang,AppleClang>:-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wnon-virtual-dtor>
  $<$<AND:$<BOOL:${VATTN_WERROR}>,$<CXX_COMPILER_ID:GNU,Clang,AppleClang>>:-Werror>)

# Synthetic caches, .npy, JSON reports: shared by examples, tests and benchmarks, not installed.
add_library(vattn_support INTERFACE)
target_include_directories(vattn_support INTERFACE "${PROJECT_SOURCE_DIR}/tools")
target_link_libraries(vattn_support INTERFACE vattn::vattn)

option(VATTN_QUICK_BENCHMARKS "Build benchmarks unoptimised, in half the time, where that they run is all that matters" OFF)

# For a directory of benchmarks. __OPTIMIZE__ tells the programs, which say it.
macro(vattn_quick_benchmarks)
  if(VATTN_QUICK_BENCHMARKS AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    add_compile_options(-O0)
  endif()
endmacro()
