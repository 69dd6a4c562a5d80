# Packages of the command line that need neither Python nor a compiler: bin/torpor with its libraries, libmlx among
# them, in lib/torpor. CPack makes a tarball and a Debian package of the component `program` (scripts/make-packages).
include(GNUInstallDirs)
get_target_property(_mlx mlx LOCATION)
cmake_path(GET _mlx PARENT_PATH _mlx_directory)
cmake_path(SET _site NORMALIZE "${_mlx_directory}/../..")

# libmlx finds what it brings at ../../mlx_cpu.libs; so it is beside the package mlx here, too.
if(APPLE)
  set(_origin "@loader_path")
else()
  set(_origin "$ORIGIN")
endif()
set_target_properties(torpor_cli PROPERTIES
  INSTALL_RPATH "${_origin}/../lib/torpor;${_origin}/../lib/torpor/mlx/lib")
install(TARGETS torpor_cli RUNTIME_DEPENDENCY_SET torpor_libraries
  RUNTIME DESTINATION bin COMPONENT program EXCLUDE_FROM_ALL)
install(RUNTIME_DEPENDENCY_SET torpor_libraries
  # Of the system, and what comes with libmlx.
  PRE_EXCLUDE_REGEXES "^lib(c|m|dl|rt|pthread|gcc_s|stdc\\+\\+|c\\+\\+.*|System.*)\\." "^ld-linux" "libmlx\\."
  POST_EXCLUDE_REGEXES "^/usr/lib/.*\\.dylib$" "^/System/"
  LIBRARY DESTINATION lib/torpor COMPONENT program EXCLUDE_FROM_ALL
  FRAMEWORK DESTINATION lib/torpor COMPONENT program EXCLUDE_FROM_ALL)
install(FILES "${_mlx}" DESTINATION lib/torpor/mlx/lib COMPONENT program EXCLUDE_FROM_ALL)
install(DIRECTORY "${_site}/mlx_cpu.libs" DESTINATION lib/torpor COMPONENT program EXCLUDE_FROM_ALL OPTIONAL)
install(FILES "${_mlx_directory}/mlx.metallib" DESTINATION lib/torpor/mlx/lib
  COMPONENT program EXCLUDE_FROM_ALL OPTIONAL)
install(FILES "${PROJECT_SOURCE_DIR}/packaging/torpor.service" DESTINATION lib/systemd/user
  COMPONENT program EXCLUDE_FROM_ALL)
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION share/doc/torpor COMPONENT program EXCLUDE_FROM_ALL)
install(FILES "${PROJECT_BINARY_DIR}/packages/NOTICE" DESTINATION share/doc/torpor RENAME copyright
  COMPONENT program EXCLUDE_FROM_ALL)

set(CPACK_PACKAGE_NAME torpor)
set(CPACK_PACKAGE_VENDOR "The Torpor authors")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "${PROJECT_DESCRIPTION}")
set(CPACK_PACKAGE_DIRECTORY "${PROJECT_BINARY_DIR}/packages")
set(CPACK_GENERATOR TGZ)
set(CPACK_COMPONENTS_ALL program)
set(CPACK_COMPONENTS_GROUPING ALL_COMPONENTS_IN_ONE)
set(CPACK_ARCHIVE_COMPONENT_INSTALL ON)
string(TOLOWER "torpor-${PROJECT_VERSION}-${CMAKE_SYSTEM_NAME}-${CMAKE_SYSTEM_PROCESSOR}" CPACK_PACKAGE_FILE_NAME)
if(NOT APPLE)
  set(CPACK_DEB_COMPONENT_INSTALL ON)
  set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
  set(CPACK_DEBIAN_PACKAGE_MAINTAINER "The Torpor authors <noreply@example.org>")
  set(CPACK_DEBIAN_PACKAGE_SECTION science)
  # Of the Debian that the release is built on; the other libraries are inside.
  set(CPACK_DEBIAN_PACKAGE_DEPENDS "libc6 (>= 2.36), libgcc-s1, libstdc++6 (>= 12)")
  set(CPACK_DEBIAN_PACKAGE_RECOMMENDS ca-certificates)
endif()
include(CPack)
