# The Rust half: one static library, the same for every preset (it needs no sanitizers, and its lock file pins the rest), so
# cargo builds it once beside its sources, in a directory for each set of features. The room server asks for
# `http` and `grammar`, the room cli for `line`, which a build with a server has in any case, and TORPOR_REMOTE for
# `remote`, `hub` and all others: its presets share a library.
find_program(TORPOR_CARGO NAMES cargo HINTS "$ENV{HOME}/.cargo/bin")
if(NOT TORPOR_CARGO)
  message(FATAL_ERROR "Torpor needs Rust's cargo (1.87 or newer); install it with rustup (https://rustup.rs) and build again.")
endif()
set(_rust "${PROJECT_SOURCE_DIR}/rust")
set(_set text)
set(_features)
if(TORPOR_REMOTE)
  set(_set remote)
  set(_features --features http,grammar,line,remote,hub)
elseif("server" IN_LIST TORPOR_ROOMS)
  set(_set http)
  set(_features --features http,grammar,line)
elseif("cli" IN_LIST TORPOR_ROOMS)
  set(_set line)
  set(_features --features line)
endif()
set(_target_dir "${_rust}/target/${_set}")
set(_built "${_target_dir}/release/libtorpor_shim.a")
set(_compiler)
if(CMAKE_CROSSCOMPILING)
  # TORPOR_RUSTC: a compiler that has a standard library for this machine, where cargo's own has none.
  set(_triple "${CMAKE_SYSTEM_PROCESSOR}-unknown-linux-gnu")
  set(_target_dir "${_rust}/target/${_triple}/${_set}")
  set(_built "${_target_dir}/${_triple}/release/libtorpor_shim.a")
  list(APPEND _features --target ${_triple})
  # A crate that is a shared library, too, is linked on the way.
  string(TOUPPER "CARGO_TARGET_${_triple}_LINKER" _linker)
  string(REPLACE "-" "_" _linker "${_linker}")
  set(_compiler "${_linker}=${CMAKE_CXX_COMPILER}")
  if(TORPOR_RUSTC)
    list(APPEND _compiler "RUSTC=${TORPOR_RUSTC}")
  endif()
endif()
# For the install step; whoever links torpor::text from an installed tree links this too.
set(TORPOR_RUST_LIBRARY "${_target_dir}/libtorpor_shim.a" CACHE INTERNAL "The Rust half of torpor::text and torpor::server")

file(GLOB_RECURSE _sources CONFIGURE_DEPENDS "${_rust}/src/*.rs")
set(_headers "${_rust}/include/torpor_text_shim.h" "${_rust}/include/torpor_http_shim.h"
  "${_rust}/include/torpor_grammar_shim.h" "${_rust}/include/torpor_line_shim.h"
  "${_rust}/include/torpor_remote_shim.h" "${_rust}/include/torpor_hub_shim.h")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${_headers})
set(_publish COMMAND "${CMAKE_COMMAND}" -E copy "${_built}" "${TORPOR_RUST_LIBRARY}")
if(NOT APPLE)
  # Only the C ABI stays visible: another Rust library of the program's brings the same names of Rust's runtime. What the C
  # ABI does not reach is left out.
  set(_roots)
  foreach(_header IN LISTS _headers)
    file(READ "${_header}" _text)
    string(REGEX MATCHALL "torpor_[a-z0-9_]+\\(" _found "${_text}")
    list(APPEND _roots ${_found})
  endforeach()
  list(REMOVE_DUPLICATES _roots)
  if(NOT _set STREQUAL "remote")
    list(FILTER _roots EXCLUDE REGEX "^torpor_(remote|hub)_")
  endif()
  if(NOT _set MATCHES "http|remote")
    list(FILTER _roots EXCLUDE REGEX "^torpor_(http|grammar)_")
  endif()
  if(_set STREQUAL "text")
    list(FILTER _roots EXCLUDE REGEX "^torpor_line_")
  endif()
  list(TRANSFORM _roots REPLACE "(.*)\\(" "--undefined=\\1")
  set(_object "${_target_dir}/torpor_shim.o")
  set(_publish
    COMMAND "${CMAKE_LINKER}" -r --gc-sections ${_roots} "${_built}" -o "${_object}"
    COMMAND "${CMAKE_OBJCOPY}" --wildcard "--keep-global-symbol=torpor_*" --strip-debug
      --remove-section=.llvmbc --remove-section=.llvmcmd "${_object}" # of no use, and ar's LLVM plugin stumbles over them
    COMMAND "${CMAKE_COMMAND}" -E rm -f "${TORPOR_RUST_LIBRARY}"
    COMMAND "${CMAKE_AR}" crs "${TORPOR_RUST_LIBRARY}" "${_object}"
    COMMAND "${CMAKE_COMMAND}" -E rm "${_object}")
endif()
add_custom_command(
  OUTPUT "${TORPOR_RUST_LIBRARY}"
  COMMAND "${CMAKE_COMMAND}" -E env "CARGO_TARGET_DIR=${_target_dir}" ${_compiler}
    "${TORPOR_CARGO}" build --release --locked --quiet --manifest-path "${_rust}/Cargo.toml" ${_features}
  ${_publish}
  DEPENDS ${_sources} "${_rust}/Cargo.toml" "${_rust}/Cargo.lock"
  COMMENT "Building the Rust half"
  VERBATIM)
add_custom_target(torpor_shim_build DEPENDS "${TORPOR_RUST_LIBRARY}")

set(_links Threads::Threads ${CMAKE_DL_LIBS} m)
if(APPLE AND TORPOR_REMOTE)
  list(APPEND _links "-framework Security" "-framework CoreFoundation") # the system's certificates
endif()
set(TORPOR_RUST_LINKS "${_links}" CACHE INTERNAL "What the Rust half needs beside it")
add_library(torpor_shim STATIC IMPORTED GLOBAL)
set_target_properties(torpor_shim PROPERTIES
  IMPORTED_LOCATION "${TORPOR_RUST_LIBRARY}"
  INTERFACE_INCLUDE_DIRECTORIES "${_rust}/include"
  INTERFACE_LINK_LIBRARIES "${TORPOR_RUST_LINKS}")
add_dependencies(torpor_shim torpor_shim_build)

# The Rust half's own tests; what they need beside it is built already, so they take half a minute.
if(TORPOR_DEVELOPER AND NOT TORPOR_SANITIZE AND NOT TORPOR_TESTS AND NOT CMAKE_CROSSCOMPILING)
  add_test(NAME rust COMMAND "${CMAKE_COMMAND}" -E env "CARGO_TARGET_DIR=${_target_dir}"
    "${TORPOR_CARGO}" test --lib --release --locked --quiet --manifest-path "${_rust}/Cargo.toml" ${_features})
endif()
