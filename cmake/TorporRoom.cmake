# One CMake target per room. torpor_room(NAME SOURCES ... [PUBLIC ...] [PRIVATE ...]) makes the static library
# `torpor_NAME` (alias torpor::NAME) from files of src/NAME, sees include/ and src/, and links what is named.
# torpor_test(NAME ROOM...) makes one GoogleTest program from tests/NAME.cc.
find_package(Threads REQUIRED)

add_library(torpor_flags INTERFACE)
target_compile_options(torpor_flags INTERFACE -Wall -Wextra -Wno-unused-parameter -Wno-missing-field-initializers)
if(TORPOR_WERROR)
  target_compile_options(torpor_flags INTERFACE -Werror)
endif()
if(TORPOR_SANITIZE)
  target_compile_options(torpor_flags INTERFACE -fsanitize=address,undefined -fno-sanitize-recover=undefined
    -fno-omit-frame-pointer)
  target_link_options(torpor_flags INTERFACE -fsanitize=address,undefined)
endif()

# MLX lives in the Python package: `python -m mlx --cmake-dir` names the prefix of its CMake package. The interpreter
# is the virtual environment's unless the user points MLX_ROOT or MLX_DIR elsewhere.
macro(torpor_find_mlx)
  if(NOT TARGET mlx)
    if(NOT MLX_DIR AND NOT MLX_ROOT)
      find_program(TORPOR_PYTHON NAMES python3 python HINTS "${PROJECT_SOURCE_DIR}/.venv/bin" NO_DEFAULT_PATH)
      find_program(TORPOR_PYTHON NAMES python3 python)
      execute_process(COMMAND "${TORPOR_PYTHON}" -m mlx --cmake-dir
        OUTPUT_VARIABLE MLX_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    endif()
    find_package(MLX CONFIG REQUIRED)
    set_target_properties(mlx PROPERTIES IMPORTED_GLOBAL TRUE)
    # Its headers are not ours to keep warning-free.
    get_target_property(_mlx_includes mlx INTERFACE_INCLUDE_DIRECTORIES)
    set_target_properties(mlx PROPERTIES INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${_mlx_includes}")
  endif()
endmacro()

function(torpor_room name)
  cmake_parse_arguments(ROOM "" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  add_library(torpor_${name} STATIC ${ROOM_SOURCES})
  add_library(torpor::${name} ALIAS torpor_${name})
  set_target_properties(torpor_${name} PROPERTIES EXPORT_NAME ${name})
  target_compile_features(torpor_${name} PUBLIC cxx_std_20)
  target_include_directories(torpor_${name}
    PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:include>
    PRIVATE ${PROJECT_SOURCE_DIR}/src)
  target_link_libraries(torpor_${name} PUBLIC ${ROOM_PUBLIC} PRIVATE ${ROOM_PRIVATE} $<BUILD_INTERFACE:torpor_flags>)
  set_property(GLOBAL APPEND PROPERTY TORPOR_INSTALL_TARGETS torpor_${name})
endfunction()

function(torpor_test name)
  cmake_parse_arguments(TEST "" "" "LINK" ${ARGN})
  foreach(_room IN LISTS TEST_LINK)
    if(_room MATCHES "^torpor::" AND NOT TARGET ${_room})
      return() # that room is left out of this build (TORPOR_ROOMS)
    endif()
  endforeach()
  add_executable(${name} ${name}.cc)
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/tests)
  target_compile_definitions(${name} PRIVATE TORPOR_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  target_link_libraries(${name} PRIVATE ${TEST_LINK} torpor_flags GTest::gtest GTest::gtest_main Threads::Threads)
  add_test(NAME ${name} COMMAND ${name})
endfunction()

# What several rooms use. xxHash ships a pkg-config file and, in some distributions, no CMake package.
find_package(nlohmann_json 3.10 REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
