# The packages of a release. The .deb: looked into, installed, consumed by both of its routes, removed. The .tar.gz: the
# same files.
# Root installs it with dpkg into a directory of its own, others unpack it. With VATTN_TEST_SYSTEM_INSTALL=1 in the
# environment (CI does that where it is root) it is also installed into the system itself, and removed again.
include("${CMAKE_CURRENT_LIST_DIR}/run.cmake")
file(REMOVE_RECURSE "${BUILD_DIR}")
file(MAKE_DIRECTORY "${BUILD_DIR}")
run("${CPACK}" --config "${VATTN_BINARY_DIR}/CPackConfig.cmake" -B "${BUILD_DIR}/made")
set(package "${BUILD_DIR}/made/libvattn-dev_${VATTN_VERSION}_all.deb")
set(archive "${BUILD_DIR}/made/vattn-${VATTN_VERSION}.tar.gz")
foreach(file IN ITEMS "${package}" "${archive}")
  file(SHA256 "${file}" sum)
  file(READ "${file}.sha256" stated)
  get_filename_component(name "${file}" NAME)
  if(NOT stated STREQUAL "${sum}  ${name}\n")
    message(FATAL_ERROR "${name}.sha256 says '${stated}', and the file's is ${sum}")
  endif()
endforeach()

foreach(field "Package=libvattn-dev" "Version=${VATTN_VERSION}" "Architecture=all" "Section=libdevel"
              "Depends=libeigen3-dev (>= 3.4)")
  string(REGEX MATCH "^([^=]+)=(.*)$" ignored "${field}")
  set(wanted "${CMAKE_MATCH_2}")
  run("${DPKG_DEB}" --field "${package}" "${CMAKE_MATCH_1}")
  string(STRIP "${output}" output)
  if(NOT output STREQUAL wanted)
    message(FATAL_ERROR "the package says ${CMAKE_MATCH_1}: '${output}', not '${wanted}'")
  endif()
endforeach()

# Leaves in `failures` what the consumers say, so that the package is removed before the test fails.
function(consume root)
  set(failures "")
  foreach(route consume pkg_config)
    execute_process(
      COMMAND
        "${CMAKE_COMMAND}" "-DGENERATOR=${GENERATOR}" "-DCOMPILER=${COMPILER}" "-DSTANDARD=${STANDARD}"
        "-DPKG_CONFIG=${PKG_CONFIG}" -DMODE=package "-DVATTN_SOURCE_DIR=${VATTN_SOURCE_DIR}" "-DVATTN_PREFIX=${root}"
        "-DVATTN_VERSION=${VATTN_VERSION}" "-DEigen3_DIR=${Eigen3_DIR}" "-DBUILD_DIR=${BUILD_DIR}/${route}" -P
        "${CMAKE_CURRENT_LIST_DIR}/${route}.cmake"
      RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
    if(NOT result EQUAL 0)
      string(APPEND failures "${output}")
    endif()
  endforeach()
  set(failures "${failures}" PARENT_SCOPE)
endfunction()

file(ARCHIVE_EXTRACT INPUT "${archive}" DESTINATION "${BUILD_DIR}/unpacked")
run("${DPKG_DEB}" --extract "${package}" "${BUILD_DIR}/extracted")
run(diff -r "${BUILD_DIR}/unpacked/vattn-${VATTN_VERSION}" "${BUILD_DIR}/extracted/usr")

execute_process(COMMAND id -u OUTPUT_VARIABLE user OUTPUT_STRIP_TRAILING_WHITESPACE)
set(root "${BUILD_DIR}/root")
if(user STREQUAL "0")
  file(MAKE_DIRECTORY "${root}/var/lib/dpkg/info" "${root}/var/lib/dpkg/updates")
  file(WRITE "${root}/var/lib/dpkg/status" "")
  file(WRITE "${root}/var/lib/dpkg/available" "")
  # Its Eigen is the system's, which that directory does not know.
  set(dpkg "${DPKG}" "--root=${root}" --force-depends)
  run(${dpkg} --install "${package}")
  consume("${root}/usr")
  run(${dpkg} --remove libvattn-dev)
  file(GLOB_RECURSE left "${root}/usr/*")
  if(left)
    message(FATAL_ERROR "removing the package left ${left}")
  endif()
else()
  run("${DPKG_DEB}" --extract "${package}" "${root}")
  consume("${root}/usr")
endif()
if(failures)
  message(FATAL_ERROR "${failures}")
endif()

if(user STREQUAL "0" AND "$ENV{VATTN_TEST_SYSTEM_INSTALL}" STREQUAL "1")
  if(EXISTS /usr/include/vattn)
    message(FATAL_ERROR "a vattn is installed: remove it before this test installs and removes its own")
  endif()
  run("${DPKG}" --install "${package}")
  consume("")
  run("${DPKG}" --remove libvattn-dev)
  if(EXISTS /usr/include/vattn OR EXISTS /usr/share/cmake/vattn OR EXISTS /usr/share/pkgconfig/vattn.pc)
    message(FATAL_ERROR "removing the package left files in the system")
  endif()
  if(failures)
    message(FATAL_ERROR "${failures}")
  endif()
endif()
