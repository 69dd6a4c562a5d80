# install() and export for `find_package(torpor)`. The libraries of all rooms are one target to the outside,
# torpor::torpor; the headers are those of include/torpor and nothing else.
if(NOT TARGET torpor_engine OR NOT TARGET torpor_text)
  return() # a build of some rooms only (TORPOR_ROOMS)
endif()
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

get_property(_targets GLOBAL PROPERTY TORPOR_INSTALL_TARGETS)
add_library(torpor_torpor INTERFACE)
add_library(torpor::torpor ALIAS torpor_torpor)
set_target_properties(torpor_torpor PROPERTIES EXPORT_NAME torpor)
target_link_libraries(torpor_torpor INTERFACE ${_targets})

install(TARGETS torpor_torpor ${_targets} EXPORT torporTargets ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(EXPORT torporTargets NAMESPACE torpor:: DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/torpor")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/torpor" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
  FILES_MATCHING PATTERN "*.h")
if(TARGET torpor_cli)
  install(TARGETS torpor_cli RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
endif()

install(FILES "${TORPOR_TEXT_SHIM_LIBRARY}" DESTINATION "${CMAKE_INSTALL_LIBDIR}")
cmake_path(GET TORPOR_TEXT_SHIM_LIBRARY FILENAME TORPOR_TEXT_SHIM_FILE)

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/torporConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/torporConfig.cmake"
  INSTALL_DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/torpor"
  PATH_VARS CMAKE_INSTALL_LIBDIR)
write_basic_package_version_file("${PROJECT_BINARY_DIR}/torporConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/torporConfig.cmake" "${PROJECT_BINARY_DIR}/torporConfigVersion.cmake"
  DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/torpor")

# Builds tests/consumer against an installed tree, as a stranger would.
if(TORPOR_DEVELOPER)
  add_test(NAME consumer COMMAND "${CMAKE_COMMAND}"
    "-DSOURCE=${PROJECT_SOURCE_DIR}/tests/consumer"
    "-DBUILD=${PROJECT_BINARY_DIR}"
    "-DGENERATOR=${CMAKE_GENERATOR}"
    "-DCOMPILER=${CMAKE_CXX_COMPILER}"
    -P "${PROJECT_SOURCE_DIR}/tests/consumer/run.cmake")
endif()
