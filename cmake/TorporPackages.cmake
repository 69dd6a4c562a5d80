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
install(FILES "${PROJECT_BINARY_DIR}/packages/NOTICE" "${PROJECT_SOURCE_DIR}/packaging/copyright"
  DESTINATION share/doc/torpor COMPONENT program EXCLUDE_FROM_ALL)
if(NOT APPLE)
  # As Debian's policy has it: stripped, a manual page and a changelog, packed without a time.
  set(_pages "${PROJECT_BINARY_DIR}/packaging")
  configure_file("${PROJECT_SOURCE_DIR}/packaging/changelog.in" "${_pages}/changelog" @ONLY)
  configure_file("${PROJECT_SOURCE_DIR}/packaging/torpor.1" "${_pages}/torpor.1" COPYONLY)
  execute_process(COMMAND gzip -9nkf "${_pages}/changelog" "${_pages}/torpor.1" COMMAND_ERROR_IS_FATAL ANY)
  install(FILES "${_pages}/changelog.gz" DESTINATION share/doc/torpor COMPONENT program EXCLUDE_FROM_ALL)
  install(FILES "${_pages}/torpor.1.gz" DESTINATION share/man/man1 COMPONENT program EXCLUDE_FROM_ALL)
  set(CPACK_STRIP_FILES ON)
  install(CODE "execute_process(COMMAND \"${CMAKE_STRIP}\" --strip-unneeded
    \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/lib/torpor/mlx/lib/libmlx.so\" COMMAND_ERROR_IS_FATAL ANY)"
    COMPONENT program EXCLUDE_FROM_ALL)
endif()

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
  set(CPACK_DEBIAN_PACKAGE_DESCRIPTION
"What a language model has computed of a conversation is kept on disk, as an
agent. Any process goes on with it, bit for bit, and computes what is new
alone. The package has the command line and the HTTP server, for CPUs.")
  # Of the Debian that the release is built on; the other libraries are inside.
  set(CPACK_DEBIAN_PACKAGE_DEPENDS "libc6 (>= 2.36), libgcc-s1, libstdc++6 (>= 12)")
  set(CPACK_DEBIAN_PACKAGE_RECOMMENDS ca-certificates)
endif()
include(CPack)
