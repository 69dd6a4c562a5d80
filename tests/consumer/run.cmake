# Installs the build tree BUILD into a fresh prefix, builds SOURCE against it with find_package(torpor), and runs it.
set(_work "${BUILD}/consumer-test")
file(REMOVE_RECURSE "${_work}")

function(step)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE _result OUTPUT_VARIABLE _output ERROR_VARIABLE _output)
  if(NOT _result EQUAL 0)
    list(JOIN ARGV " " _command)
    message(FATAL_ERROR "${_command}\n${_output}")
  endif()
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
