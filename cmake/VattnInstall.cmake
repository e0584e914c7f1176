# What `cmake --install` leaves: headers, a CMake package that finds Eigen again, a pkg-config file; and the .deb of it.
# The config declares the target itself: an exported one would name whatever Eigen this build happened to use,
# and a fetched Eigen cannot be exported.
include_guard()
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir "${CMAKE_INSTALL_DATADIR}/cmake/vattn")
set(pkgconfig_dir "${CMAKE_INSTALL_DATADIR}/pkgconfig")
configure_package_config_file(
  "${CMAKE_CURRENT_LIST_DIR}/vattnConfig.cmake.in" "${PROJECT_BINARY_DIR}/vattnConfig.cmake"
  INSTALL_DESTINATION "${package_dir}"
  PATH_VARS CMAKE_INSTALL_INCLUDEDIR
  NO_CHECK_REQUIRED_COMPONENTS_MACRO)
# docs/releases.md has the promise; headers have no architecture.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/vattnConfigVersion.cmake" COMPATIBILITY SameMajorVersion
                                 ARCH_INDEPENDENT)
# Relative to the file itself, so that an installed tree may be moved; but a directory that was given as an absolute path
# (as distributions with a prefix for each output do) is meant as it stands.
if(IS_ABSOLUTE "${pkgconfig_dir}")
  set(pc_prefix "${CMAKE_INSTALL_PREFIX}")
else()
  file(RELATIVE_PATH pkgconfig_to_prefix "/prefix/${pkgconfig_dir}" "/prefix")
  set(pc_prefix "\${pcfiledir}/${pkgconfig_to_prefix}")
endif()
if(IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}")
  set(pc_includedir "${CMAKE_INSTALL_INCLUDEDIR}")
else()
  set(pc_includedir "\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}")
endif()
configure_file("${CMAKE_CURRENT_LIST_DIR}/vattn.pc.in" "${PROJECT_BINARY_DIR}/vattn.pc" @ONLY)

install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/vattn" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh")
install(FILES "${PROJECT_BINARY_DIR}/vattnConfig.cmake" "${PROJECT_BINARY_DIR}/vattnConfigVersion.cmake"
        DESTINATION "${package_dir}")
install(FILES "${PROJECT_BINARY_DIR}/vattn.pc" DESTINATION "${pkgconfig_dir}")
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DOCDIR}" RENAME copyright)

# `cpack --config CPackConfig.cmake` in the build directory: .deb and .tar.gz, each with its SHA-256 beside it.
if(PROJECT_IS_TOP_LEVEL)
  set(CPACK_GENERATOR DEB TGZ)
  set(CPACK_PACKAGE_CHECKSUM SHA256)
  set(CPACK_PACKAGE_NAME libvattn-dev)
  set(CPACK_PACKAGE_FILE_NAME "vattn-${PROJECT_VERSION}") # and the archive's only folder
  set(CPACK_PACKAGE_CONTACT "The vattn authors")
  set(CPACK_PACKAGING_INSTALL_PREFIX /)
  set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
  set(CPACK_DEBIAN_PACKAGE_ARCHITECTURE all)
  set(CPACK_DEBIAN_PACKAGE_SECTION libdevel)
  set(CPACK_DEBIAN_PACKAGE_DEPENDS "libeigen3-dev (>= 3.4)")
  set(CPACK_PROJECT_CONFIG_FILE "${CMAKE_CURRENT_LIST_DIR}/VattnPackages.cmake")
  include(CPack)
endif()
