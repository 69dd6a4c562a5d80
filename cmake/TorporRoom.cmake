# One CMake target per room. torpor_room(NAME SOURCES ... [PUBLIC ...] [PRIVATE ...]) makes the static library
# `torpor_NAME` (alias torpor::NAME) from files of src/NAME, sees include/ and src/, and links what is named. NO_RAW_BYTES:
# the room reads no bytes as anything but bytes, and does not compute with a model's numbers. A sanitizers' build compiles
# it without optimising and without UBSan's `alignment`, in half the time.
# torpor_test(NAME [NOT_SANITIZED] LINK ROOM...) makes one GoogleTest program from tests/NAME.cc. NOT_SANITIZED: it computes
# with models of full size, which would take minutes. torpor_sanitizer_options() names the committed suppressions to all
# tests of a directory.

# Stops unless FOUND is true, saying in one sentence what to install.
function(torpor_need found what debian homebrew)
  if(NOT found)
    message(FATAL_ERROR "Torpor needs ${what}; install it (apt-get install ${debian}, or brew install ${homebrew}) and build again.")
  endif()
endfunction()

find_package(Threads REQUIRED)

add_library(torpor_flags INTERFACE)
target_compile_options(torpor_flags INTERFACE -Wall -Wextra -Wno-unused-parameter -Wno-missing-field-initializers)
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  target_compile_options(torpor_flags INTERFACE -Wthread-safety -Werror=thread-safety) # src/base/mutex.h
endif()
if(TORPOR_WERROR)
  target_compile_options(torpor_flags INTERFACE -Werror)
endif()
if(TORPOR_SANITIZE)
  target_compile_options(torpor_flags INTERFACE -fsanitize=${TORPOR_SANITIZE} -fno-omit-frame-pointer)
  target_link_options(torpor_flags INTERFACE -fsanitize=${TORPOR_SANITIZE})
  if(TORPOR_SANITIZE MATCHES "undefined")
    # AddressSanitizer finds a null pointer that is used, and an access beside its object.
    target_compile_options(torpor_flags INTERFACE -fno-sanitize=null,object-size -fno-sanitize-recover=undefined)
  endif()
  if(TORPOR_SANITIZE STREQUAL "thread")
    # A library's own thread-locals are freed by whichever thread next gets the stack of one that is over, and the order
    # of these two is glibc's secret. Beside the program's they are part of the stack.
    target_compile_options(torpor_flags INTERFACE -ftls-model=initial-exec)
  endif()
endif()
# What is tested is the rooms' code; a test's own is compiled for a short build. With sanitizers half of it were checks for
# undefined behaviour, so these are made in the rooms alone. To be named behind torpor_flags, whose options these take back.
add_library(torpor_test_flags INTERFACE)
# A header that was compiled before is no system's any more, and GoogleTest's macros do what the compiler then warns of.
target_compile_options(torpor_test_flags INTERFACE -O0 -Wno-dangling-else)
if(TORPOR_SANITIZE MATCHES "undefined")
  target_compile_options(torpor_test_flags INTERFACE -fno-sanitize=undefined)
endif()
# Of rooms with NO_RAW_BYTES, for the same reason and in the same place.
add_library(torpor_quick_flags INTERFACE)
target_compile_options(torpor_quick_flags INTERFACE -O0)
if(TORPOR_SANITIZE MATCHES "undefined")
  target_compile_options(torpor_quick_flags INTERFACE -fno-sanitize=alignment)
endif()
if(TORPOR_LIBFUZZER)
  target_compile_options(torpor_flags INTERFACE -fsanitize=fuzzer-no-link)
  target_link_options(torpor_flags INTERFACE -fsanitize=fuzzer-no-link) # tests and tools have no use for what is counted
endif()

# MLX lives in the Python package: `python -m mlx --cmake-dir` names the prefix of its CMake package. The interpreter
# is the one that a wheel is built for, else the virtual environment's, unless the user points MLX_ROOT or MLX_DIR elsewhere.
macro(torpor_find_mlx)
  if(NOT TARGET mlx)
    if(NOT MLX_DIR AND NOT MLX_ROOT)
      if(SKBUILD)
        set(TORPOR_PYTHON "${Python_EXECUTABLE}")
      endif()
      find_program(TORPOR_PYTHON NAMES python3 python HINTS "${PROJECT_SOURCE_DIR}/.venv/bin" NO_DEFAULT_PATH)
      find_program(TORPOR_PYTHON NAMES python3 python)
      execute_process(COMMAND "${TORPOR_PYTHON}" -m mlx --cmake-dir
        OUTPUT_VARIABLE MLX_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    endif()
    find_package(MLX CONFIG QUIET)
    if(NOT MLX_FOUND)
      message(FATAL_ERROR "Torpor needs MLX; install its Python package (scripts/bootstrap does), or name its CMake package by MLX_DIR.")
    endif()
    set(TORPOR_MLX_VERSION "${MLX_VERSION}" CACHE INTERNAL "The MLX that is linked")
    set_target_properties(mlx PROPERTIES IMPORTED_GLOBAL TRUE)
    # Its headers are not ours to keep warning-free.
    get_target_property(_mlx_includes mlx INTERFACE_INCLUDE_DIRECTORIES)
    set_target_properties(mlx PROPERTIES INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${_mlx_includes}")
  endif()
endmacro()

function(torpor_room name)
  cmake_parse_arguments(ROOM "NO_RAW_BYTES" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  set(_kind STATIC)
  if(TORPOR_SANITIZE AND NOT TORPOR_LIBFUZZER)
    set(_kind SHARED) # a hundred tests link the rooms, each for seconds where it has to copy them
  endif()
  add_library(torpor_${name} ${_kind} ${ROOM_SOURCES})
  add_library(torpor::${name} ALIAS torpor_${name})
  set_target_properties(torpor_${name} PROPERTIES EXPORT_NAME ${name})
  target_compile_features(torpor_${name} PUBLIC cxx_std_20)
  target_include_directories(torpor_${name}
    PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:include>
    PRIVATE ${PROJECT_SOURCE_DIR}/src)
  target_link_libraries(torpor_${name} PUBLIC ${ROOM_PUBLIC} PRIVATE ${ROOM_PRIVATE} $<BUILD_INTERFACE:torpor_flags>)
  if(ROOM_NO_RAW_BYTES AND TORPOR_SANITIZE)
    target_link_libraries(torpor_${name} PRIVATE $<BUILD_INTERFACE:torpor_quick_flags>)
  endif()
  set_property(GLOBAL APPEND PROPERTY TORPOR_INSTALL_TARGETS torpor_${name})
  if(TORPOR_UNITY)
    # Most of a file's compilation is templates of the standard library and JSON. Several files at once have them once.
    set_target_properties(torpor_${name} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 8)
    # GCC takes what is included for a header, which other files could include, too.
    target_compile_options(torpor_${name} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-Wno-subobject-linkage>)
  endif()
endfunction()

function(torpor_test name)
  cmake_parse_arguments(TEST "NOT_SANITIZED" "" "LINK" ${ARGN})
  if((TORPOR_TESTS AND NOT name IN_LIST TORPOR_TESTS) OR (TORPOR_SANITIZE AND TEST_NOT_SANITIZED))
    return()
  endif()
  foreach(_room IN LISTS TEST_LINK)
    if(_room MATCHES "^torpor::" AND NOT TARGET ${_room})
      return() # that room is left out of this build (TORPOR_ROOMS)
    endif()
  endforeach()
  add_executable(${name} ${name}.cc)
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/tests)
  target_compile_definitions(${name} PRIVATE TORPOR_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  target_link_libraries(${name} PRIVATE
    ${TEST_LINK} torpor_flags torpor_test_flags GTest::gtest GTest::gtest_main nlohmann_json::nlohmann_json Threads::Threads)
  # The first test's headers, compiled once, serve all of them.
  get_property(_first GLOBAL PROPERTY TORPOR_FIRST_TEST)
  if(_first)
    target_precompile_headers(${name} REUSE_FROM ${_first})
  else()
    set_property(GLOBAL PROPERTY TORPOR_FIRST_TEST ${name})
    target_precompile_headers(${name} PRIVATE <gtest/gtest.h> <nlohmann/json.hpp>
      <algorithm> <atomic> <chrono> <filesystem> <fstream> <functional> <future> <map> <memory> <mutex> <optional>
      <random> <set> <span> <sstream> <string> <thread> <unordered_map> <variant> <vector>)
  endif()
  add_test(NAME ${name} COMMAND ${name})
endfunction()

# Each line of a suppression file names a frame of libmlx, which is not built with a sanitizer.
function(torpor_sanitizer_options)
  if(NOT TORPOR_SANITIZE)
    return()
  endif()
  set(_files "${PROJECT_SOURCE_DIR}/tests/sanitizers")
  get_property(_tests DIRECTORY PROPERTY TESTS)
  foreach(_test IN LISTS _tests)
    set_property(TEST ${_test} APPEND PROPERTY ENVIRONMENT
      "LSAN_OPTIONS=suppressions=${_files}/lsan.supp:print_suppressions=0"
      "UBSAN_OPTIONS=print_stacktrace=1"
      "TSAN_OPTIONS=suppressions=${_files}/tsan.supp:halt_on_error=1:second_deadlock_stack=1")
  endforeach()
endfunction()

# What several rooms use. xxHash ships a pkg-config file and, in some distributions, no CMake package.
find_package(nlohmann_json 3.10 QUIET)
torpor_need("${nlohmann_json_FOUND}" "nlohmann/json 3.10 or newer" nlohmann-json3-dev nlohmann-json)
find_package(PkgConfig QUIET)
torpor_need("${PKG_CONFIG_FOUND}" "pkg-config" pkg-config pkg-config)
pkg_check_modules(XXHASH QUIET IMPORTED_TARGET libxxhash)
torpor_need("${XXHASH_FOUND}" "xxHash" libxxhash-dev xxhash)
