# The tree that this port lies in. A registry's port has in its place
#   vcpkg_from_github(OUT_SOURCE_PATH SOURCE_PATH REPO <owner>/vattn REF "v${VERSION}" SHA512 <of the tag's archive>)
get_filename_component(SOURCE_PATH "${CURRENT_PORT_DIR}/../../../.." ABSOLUTE)

set(VCPKG_BUILD_TYPE release) # header-only
vcpkg_cmake_configure(
    SOURCE_PATH "${SOURCE_PATH}"
    OPTIONS
        -DVATTN_BUILD_BENCHMARKS=OFF
        -DVATTN_BUILD_CUDA=OFF
        -DVATTN_BUILD_EXAMPLES=OFF
        -DVATTN_BUILD_FUZZERS=OFF
        -DVATTN_BUILD_MPI=OFF
        -DVATTN_BUILD_TESTS=OFF
)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(CONFIG_PATH share/cmake/vattn)
vcpkg_fixup_pkgconfig()
file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/share/doc")

file(INSTALL "${CMAKE_CURRENT_LIST_DIR}/usage" DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
