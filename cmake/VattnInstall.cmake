# find_package(vattn): headers, a config that finds Eigen again, a version file.
# The config declares the target itself: an exported one would name whatever Eigen this build happened to use,
# and a fetched Eigen cannot be exported.
include_guard()
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir "${CMAKE_INSTALL_DATADIR}/cmake/vattn")
configure_package_config_file(
  "${CMAKE_CURRENT_LIST_DIR}/vattnConfig.cmake.in" "${PROJECT_BINARY_DIR}/vattnConfig.cmake"
  INSTALL_DESTINATION "${package_dir}"
  PATH_VARS CMAKE_INSTALL_INCLUDEDIR
  NO_CHECK_REQUIRED_COMPONENTS_MACRO)
# Before 1.0 a minor version may break; headers have no architecture.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/vattnConfigVersion.cmake" COMPATIBILITY SameMinorVersion
                                 ARCH_INDEPENDENT)

install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/vattn" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.hpp")
install(FILES "${PROJECT_BINARY_DIR}/vattnConfig.cmake" "${PROJECT_BINARY_DIR}/vattnConfigVersion.cmake"
        DESTINATION "${package_dir}")
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DOCDIR}")
