# cmake -DDIRECTORY=... -DOUTPUT=FILE.cc -P embed.cmake: the bytes of the dashboard's files, for server/dashboard.h.
set(cases "")
foreach(file index.html style.css app.js icon.svg)
  file(READ "${DIRECTORY}/${file}" bytes HEX)
  file(SIZE "${DIRECTORY}/${file}" size)
  string(REGEX REPLACE "(..)" "\\\\x\\1" bytes "${bytes}")
  string(APPEND cases "  if (name == \"${file}\") return std::string_view(\"${bytes}\", ${size});\n")
endforeach()
file(WRITE "${OUTPUT}" "#include \"server/dashboard.h\"

namespace torpor::server {

std::string_view dashboard_file(std::string_view name) {
${cases}  return {};
}

}  // namespace torpor::server
")
