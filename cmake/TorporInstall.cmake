# The libraries of all rooms are one target to the outside, torpor::torpor. Where Torpor is installed (TORPOR_INSTALL),
# `find_package(torpor)` finds it there; the headers are those of include/torpor and nothing else.
if(NOT TARGET torpor_engine OR NOT TARGET torpor_text)
  return() # a build of some rooms only (TORPOR_ROOMS)
endif()
get_property(_targets GLOBAL PROPERTY TORPOR_INSTALL_TARGETS)
add_library(torpor_torpor INTERFACE)
add_library(torpor::torpor ALIAS torpor_torpor)
set_target_properties(torpor_torpor PROPERTIES EXPORT_NAME torpor)
target_link_libraries(torpor_torpor INTERFACE ${_targets})

if(NOT TORPOR_INSTALL)
  return()
endif()
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS torpor_torpor ${_targets} EXPORT torporTargets ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(EXPORT torporTargets NAMESPACE torpor:: DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/torpor")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/torpor" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
  FILES_MATCHING PATTERN "*.h")
if(TARGET torpor_cli AND TORPOR_RELOCATABLE)
  include(TorporPackages)
elseif(TARGET torpor_cli AND NOT SKBUILD)
  # The program is linked with the libmlx of a Python package. bin/torpor, a script, starts it, or says that it is gone.
  set(_libexec "${CMAKE_INSTALL_LIBEXECDIR}/torpor")
  get_target_property(TORPOR_MLX_LIBRARY mlx LOCATION)
  cmake_path(GET TORPOR_MLX_LIBRARY PARENT_PATH _mlx_directory)
  set_target_properties(torpor_cli PROPERTIES INSTALL_RPATH "${_mlx_directory}")
  install(TARGETS torpor_cli RUNTIME DESTINATION "${_libexec}")
  string(REPLACE "'" "'\\''" TORPOR_MLX_LIBRARY "${TORPOR_MLX_LIBRARY}")
  cmake_path(RELATIVE_PATH _libexec BASE_DIRECTORY "${CMAKE_INSTALL_BINDIR}" OUTPUT_VARIABLE TORPOR_LIBEXEC)
  configure_file("${PROJECT_SOURCE_DIR}/cmake/torpor.in" "${PROJECT_BINARY_DIR}/launcher/torpor" @ONLY)
  install(PROGRAMS "${PROJECT_BINARY_DIR}/launcher/torpor" DESTINATION "${CMAKE_INSTALL_BINDIR}")
endif()

install(FILES "${TORPOR_RUST_LIBRARY}" DESTINATION "${CMAKE_INSTALL_LIBDIR}")
cmake_path(GET TORPOR_RUST_LIBRARY FILENAME TORPOR_RUST_FILE)

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/torporConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/torporConfig.cmake"
  INSTALL_DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/torpor"
  PATH_VARS CMAKE_INSTALL_LIBDIR)
write_basic_package_version_file("${PROJECT_BINARY_DIR}/torporConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/torporConfig.cmake" "${PROJECT_BINARY_DIR}/torporConfigVersion.cmake"
  DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/torpor")

# Builds tests/consumer against an installed tree, as a stranger would.
if(TORPOR_DEVELOPER AND NOT TORPOR_SANITIZE)
  add_test(NAME consumer COMMAND "${CMAKE_COMMAND}"
    "-DSOURCE=${PROJECT_SOURCE_DIR}/tests/consumer"
    "-DBUILD=${PROJECT_BINARY_DIR}"
    "-DROOT=${PROJECT_SOURCE_DIR}"
    "-DGENERATOR=${CMAKE_GENERATOR}"
    "-DCOMPILER=${CMAKE_CXX_COMPILER}"
    -P "${PROJECT_SOURCE_DIR}/tests/consumer/run.cmake")
endif()
