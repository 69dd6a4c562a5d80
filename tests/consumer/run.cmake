# Installs the build tree BUILD into a fresh prefix, runs what is installed, and builds SOURCE against it with
# find_package(torpor). Then configures SOURCE/parent, a project that contains Torpor's source tree ROOT.
set(_work "${BUILD}/consumer-test")
file(REMOVE_RECURSE "${_work}")

function(step)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE _result OUTPUT_VARIABLE _output ERROR_VARIABLE _output)
  if(NOT _result EQUAL 0)
    list(JOIN ARGV " " _command)
    message(FATAL_ERROR "${_command}\n${_output}")
  endif()
  set(_output "${_output}" PARENT_SCOPE)
endfunction()

step("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${_work}/prefix")
step("${CMAKE_COMMAND}" -S "${SOURCE}" -B "${_work}/build" -G "${GENERATOR}" -DCMAKE_BUILD_TYPE=Release
  "-DCMAKE_CXX_COMPILER=${COMPILER}" "-DCMAKE_PREFIX_PATH=${_work}/prefix")
step("${CMAKE_COMMAND}" --build "${_work}/build")
step("${_work}/build/consumer" "${_work}/store")

# Nothing but the public headers is installed, and nothing installed names the source tree's own headers.
file(GLOB_RECURSE _headers RELATIVE "${_work}/prefix/include" "${_work}/prefix/include/*")
foreach(_header IN LISTS _headers)
  if(NOT _header MATCHES "^torpor/[a-z_]+\\.h$")
    message(FATAL_ERROR "installed by mistake: include/${_header}")
  endif()
endforeach()

# What is installed starts, also through a link from elsewhere.
if(EXISTS "${_work}/prefix/bin/torpor")
  step("${_work}/prefix/bin/torpor" --version)
  if(NOT _output MATCHES "^torpor [0-9.]+\nMLX [0-9.]+.*\nbackend [a-z]+\nCPU target [A-Za-z0-9_]+\nformat versions: reads [0-9]")
    message(FATAL_ERROR "torpor --version says:\n${_output}")
  endif()
  file(CREATE_LINK "${_work}/prefix/bin/torpor" "${_work}/linked" SYMBOLIC)
  step("${_work}/linked" ls --json --store "${_work}/store")
  if(NOT _output MATCHES "\"agent\":\"embedded\"")
    message(FATAL_ERROR "torpor ls says:\n${_output}")
  endif()
  # It says what to do when the libmlx that it is linked with is gone.
  file(READ "${_work}/prefix/bin/torpor" _launcher)
  string(REGEX REPLACE "mlx='[^\n]*'" "mlx='/gone/libmlx.so'" _launcher "${_launcher}")
  file(WRITE "${_work}/prefix/bin/orphan" "${_launcher}")
  execute_process(COMMAND sh "${_work}/prefix/bin/orphan" ls RESULT_VARIABLE _result ERROR_VARIABLE _error)
  if(NOT _result EQUAL 3 OR NOT _error MATCHES "^torpor: MLX .* is gone from '/gone/libmlx.so'; install .*\\.\n$")
    message(FATAL_ERROR "without libmlx: exit ${_result}: ${_error}")
  endif()
endif()

# A project that contains Torpor keeps its own settings.
step("${CMAKE_COMMAND}" -S "${SOURCE}/parent" -B "${_work}/parent" -G "${GENERATOR}" "-DCMAKE_CXX_COMPILER=${COMPILER}"
  "-DTORPOR_ROOT=${ROOT}")
step("${CMAKE_COMMAND}" --install "${_work}/parent" --prefix "${_work}/parent-prefix") # nothing is built: it must have no rules

# A room that there is not is refused, not left out in silence.
execute_process(COMMAND "${CMAKE_COMMAND}" -S "${ROOT}" -B "${_work}/rooms" -G "${GENERATOR}" "-DCMAKE_CXX_COMPILER=${COMPILER}"
  "-DTORPOR_ROOMS=base;stoer" RESULT_VARIABLE _result ERROR_VARIABLE _error OUTPUT_QUIET)
if(_result EQUAL 0 OR NOT _error MATCHES "'stoer', which is no room")
  message(FATAL_ERROR "an unknown room: exit ${_result}: ${_error}")
endif()
