# Configures, builds and runs tests/consumer/project from nothing.
include("${CMAKE_CURRENT_LIST_DIR}/run.cmake")

file(REMOVE_RECURSE "${BUILD_DIR}")
set(options "")
if(Eigen3_DIR)
  list(APPEND options "-DEigen3_DIR=${Eigen3_DIR}")
endif()
if(MODE STREQUAL "fetchcontent")
  # As CMake lets anybody give a fetched project's sources: nothing is downloaded.
  list(APPEND options "-DFETCHCONTENT_SOURCE_DIR_VATTN=${VATTN_SOURCE_DIR}")
endif()
run("${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}/project" -B "${BUILD_DIR}" -G "${GENERATOR}"
    "-DCMAKE_CXX_COMPILER=${COMPILER}" "-DMODE=${MODE}" "-DVATTN_SOURCE_DIR=${VATTN_SOURCE_DIR}"
    "-DCMAKE_PREFIX_PATH=${VATTN_PREFIX}" "-DVATTN_VERSION=${VATTN_VERSION}" -DCMAKE_EXPORT_COMPILE_COMMANDS=ON
    ${options})
run("${CMAKE_COMMAND}" --build "${BUILD_DIR}")
run("${BUILD_DIR}/consumer")

# What the compiler was told is the consumer's own: no warning, optimisation, ISA or definition of ours.
file(READ "${BUILD_DIR}/compile_commands.json" commands)
foreach(flag " -W" " -O" " -march" " -f[a-z]" " -D")
  string(REGEX MATCH "${flag}[^ \"]*" found "${commands}")
  if(found)
    message(FATAL_ERROR "the consumer was compiled with${found}")
  endif()
endforeach()
