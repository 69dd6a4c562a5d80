# cmake -DDIRECTORY=... -DFILES=A,B -DHEADER=server/x.h -DFUNCTION=x_file -DOUTPUT=FILE.cc -P embed.cmake: files as bytes of the
# program. The function, which HEADER declares, gives those of a name.
set(cases "")
string(REPLACE "," ";" files "${FILES}")
foreach(file IN LISTS files)
  file(READ "${DIRECTORY}/${file}" bytes HEX)
  file(SIZE "${DIRECTORY}/${file}" size)
  string(REGEX REPLACE "(..)" "\\\\x\\1" bytes "${bytes}")
  string(APPEND cases "  if (name == \"${file}\") return std::string_view(\"${bytes}\", ${size});\n")
endforeach()
file(WRITE "${OUTPUT}" "#include \"${HEADER}\"

namespace torpor::server {

std::string_view ${FUNCTION}(std::string_view name) {
${cases}  return {};
}

}  // namespace torpor::server
")
