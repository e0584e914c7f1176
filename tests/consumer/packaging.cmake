# Packaging as distributions and large projects do it: absolute install directories; vattn fetched by a library that is
# itself exported and installed.
include("${CMAKE_CURRENT_LIST_DIR}/run.cmake")
file(REMOVE_RECURSE "${BUILD_DIR}")
set(options -G "${GENERATOR}" "-DCMAKE_CXX_COMPILER=${COMPILER}" "-DEigen3_DIR=${Eigen3_DIR}")
set(alone -DVATTN_BUILD_TESTS=OFF -DVATTN_BUILD_EXAMPLES=OFF -DVATTN_BUILD_BENCHMARKS=OFF)

function(expect_flags prefix wanted)
  if(PKG_CONFIG)
    set(ENV{PKG_CONFIG_PATH} "${prefix}/pkgconfig")
    run("${PKG_CONFIG}" --cflags-only-I vattn)
    if(NOT output MATCHES "-I${wanted}( |\n|$)")
      message(FATAL_ERROR "pkg-config says '${output}': the headers are in ${wanted}")
    endif()
  endif()
endfunction()
function(consume name)
  run("${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}/project" -B "${BUILD_DIR}/${name}" ${options} -DMODE=package
      "-DVATTN_VERSION=${VATTN_VERSION}" ${ARGN})
endfunction()

# Headers, libraries and data each under an absolute path of its own; then the data alone; then the headers alone.
foreach(directories "INCLUDEDIR;DATADIR;LIBDIR" "DATADIR" "INCLUDEDIR")
  string(REPLACE ";" "_" name "${directories}")
  set(build "${BUILD_DIR}/${name}")
  set(where "")
  set(include "${build}/prefix/include")
  set(data "${build}/prefix/share")
  foreach(directory IN LISTS directories)
    list(APPEND where "-DCMAKE_INSTALL_${directory}=${build}/away/${directory}")
    if(directory STREQUAL "INCLUDEDIR")
      set(include "${build}/away/INCLUDEDIR")
    elseif(directory STREQUAL "DATADIR")
      set(data "${build}/away/DATADIR")
    endif()
  endforeach()
  run("${CMAKE_COMMAND}" -S "${VATTN_SOURCE_DIR}" -B "${build}/build" ${options} ${alone} ${where}
      "-DCMAKE_INSTALL_PREFIX=${build}/prefix")
  run("${CMAKE_COMMAND}" --install "${build}/build")
  if(NOT EXISTS "${include}/vattn/vattn.hpp")
    message(FATAL_ERROR "no headers in ${include}")
  endif()
  expect_flags("${data}" "${include}")
  consume("consume_${name}" "-Dvattn_DIR=${data}/cmake/vattn")
endforeach()

# A tree that was moved after it was installed.
run("${CMAKE_COMMAND}" -S "${VATTN_SOURCE_DIR}" -B "${BUILD_DIR}/movable" ${options} ${alone}
    "-DCMAKE_INSTALL_PREFIX=${BUILD_DIR}/first")
run("${CMAKE_COMMAND}" --install "${BUILD_DIR}/movable")
file(RENAME "${BUILD_DIR}/first" "${BUILD_DIR}/second")
expect_flags("${BUILD_DIR}/second/share" "${BUILD_DIR}/second/share/pkgconfig/../../include")
consume(moved "-DCMAKE_PREFIX_PATH=${BUILD_DIR}/second")

# A library that fetches vattn, has it in its interface and is exported; with and without vattn's own installation.
foreach(install OFF ON)
  set(build "${BUILD_DIR}/library_${install}")
  run("${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}/library" -B "${build}" ${options}
      "-DFETCHCONTENT_SOURCE_DIR_VATTN=${VATTN_SOURCE_DIR}" -DVATTN_INSTALL=${install}
      "-DCMAKE_INSTALL_PREFIX=${build}/prefix")
  run("${CMAKE_COMMAND}" --install "${build}")
  file(GLOB_RECURSE ours "${build}/prefix/*vattn*")
  if(install AND NOT ours OR ours AND NOT install)
    message(FATAL_ERROR "VATTN_INSTALL is ${install}, and of vattn there is: '${ours}'")
  endif()
  set(elsewhere "")
  if(NOT install)
    set(elsewhere "-Dvattn_DIR=${BUILD_DIR}/second/share/cmake/vattn")
  endif()
  run("${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}/library_user" -B "${build}_user" ${options}
      "-DCMAKE_PREFIX_PATH=${build}/prefix" ${elsewhere})
  run("${CMAKE_COMMAND}" --build "${build}_user")
  run("${build}_user/user")
endforeach()
