# Names vattn in an export set, so that a library with vattn in its interface can be exported although it has fetched
# vattn. Nothing is installed by it: the library's own config finds vattn, by find_dependency(vattn), where that is
# installed: by itself, or with the library if VATTN_INSTALL is on.
include_guard()
include(GNUInstallDirs)

if(NOT CMAKE_SKIP_INSTALL_RULES)
  set(exported vattn)
  if(TARGET Eigen3_Eigen) # fetched: in no export set of its own
    list(APPEND exported Eigen3_Eigen)
  endif()
  install(TARGETS ${exported} EXPORT vattnTargets)
  install(EXPORT vattnTargets NAMESPACE vattn:: DESTINATION "${CMAKE_INSTALL_DATADIR}/cmake/vattn"
          COMPONENT vattn_targets EXCLUDE_FROM_ALL)
  export(EXPORT vattnTargets NAMESPACE vattn:: FILE "${CMAKE_CURRENT_BINARY_DIR}/vattnTargets.cmake")
endif()
