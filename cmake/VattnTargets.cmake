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

# Our units have hundreds of instantiations: GCC need not look for garbage so often. A tenth of the time for a tenth more
# memory.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:--param=ggc-min-heapsize=524288>)
endif()

# A build that is not optimised, so that it is soon done, optimises what would run for minutes, or is about the code that
# users get. Not where sanitizers watch: there it takes longer to compile than it saves.
set(VATTN_OPTIMISE OFF)
if(CMAKE_BUILD_TYPE STREQUAL "Release" AND CMAKE_CXX_FLAGS_RELEASE MATCHES "-O0" AND NOT CMAKE_CXX_FLAGS MATCHES "sanitize|coverage")
  set(VATTN_OPTIMISE ON)
endif()
function(vattn_optimise target level)
  if(VATTN_OPTIMISE)
    target_compile_options(${target} PRIVATE -O${level})
  endif()
endfunction()
