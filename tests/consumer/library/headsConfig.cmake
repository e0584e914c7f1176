include(CMakeFindDependencyMacro)
find_dependency(vattn CONFIG)
include("${CMAKE_CURRENT_LIST_DIR}/headsTargets.cmake")
