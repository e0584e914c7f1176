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
