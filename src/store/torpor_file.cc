#include "store/torpor_file.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstring>
#include <optional>

#include "base/hash.h"
#include "torpor/error.h"

namespace torpor {

static_assert(std::endian::native == std::endian::little, "store files are little-endian");

void corrupt(const std::string& file_name, const std::string& what) {
  throw Error(ErrorCode::kCorruption, "'" + file_name + "' is damaged: " + what + ".").with_path(file_name);
}

namespace {

// The checksum stands first, so that where its digits are does not depend on anything that could be damaged.
constexpr std::string_view kPrefix = "{\"__metadata__\":{\"checksum\":\"";
constexpr size_t kDigestLength = 32;
constexpr size_t kChecksumAt = 8 + kPrefix.size();

constexpr int kMaxHeads = 1 << 16;
constexpr int kMaxDim = 1 << 20;
constexpr size_t kMaxTensors = 1 << 14;
/// Rows kept apart take at most so many times the bytes of those that a segment's file has.
constexpr size_t kMaxApart = 64;

std::string header_checksum(std::span<const std::byte> header) {
  Hasher hasher;
  hasher.update(header.first(kChecksumAt));
  hasher.update(std::as_bytes(std::span(kNoChecksum)));
  hasher.update(header.subspan(kChecksumAt + kDigestLength));
  return hasher.hex();
}

bool parse_int(std::string_view text, int& out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc() && end == text.data() + text.size();
}

/// How a tensor's elements lie: only so. The second word says that segments don't have them.
constexpr std::string_view kRowOrder = "rows", kRowsApart = "rows-apart";

KvLayout decode_layout(std::string_view text, int version, const std::string& file_name) {
  const char* const kNotUnderstood = "its layout can't be understood";
  KvLayout layout;
  for (const std::string& part : split(text)) {
    std::vector<std::string_view> fields;
    for (std::string_view rest = part;;) {
      const size_t colon = rest.find(':');
      fields.push_back(rest.substr(0, colon));
      if (colon == std::string_view::npos) break;
      rest.remove_prefix(colon + 1);
    }
    KvTensorSpec spec;
    if (fields.size() != (version < 3 ? 5 : 6)) corrupt(file_name, kNotUnderstood);
    spec.name = fields[0];
    const auto dtype = parse_kv_dtype(fields[1]);
    if (!dtype || !parse_int(fields[2], spec.n_kv_heads) || !parse_int(fields[3], spec.dim) ||
        !parse_int(fields[4], spec.window)) {
      corrupt(file_name, kNotUnderstood);
    }
    spec.apart = version >= 3 && fields[5] == kRowsApart;
    if (version >= 3 && fields[5] != kRowOrder && !spec.apart) {
      throw Error(ErrorCode::kIncompatible, "'" + file_name + "' keeps the elements of '" + spec.name +
                                                "' in the order '" + std::string(fields[5]) +
                                                "', which this Torpor does not know; use a newer one.")
          .with_path(file_name)
          .with_field("layout", std::string(kRowOrder), std::string(fields[5]));
    }
    spec.dtype = *dtype;
    layout.tensors.push_back(std::move(spec));
  }
  try {
    check_layout(layout);
  } catch (const Error&) {
    corrupt(file_name, kNotUnderstood);
  }
  return layout;
}

/// In agents and parts of version 3: one tensor `rows`, and messages of their own.
bool is_flat(std::string_view kind, int version) { return version >= 3 && (kind == "agent" || kind == "part"); }

void check_layer_tensors(TorporFile& file, const std::string& file_name) {
  const auto& tensors = file.header.tensors;
  const size_t named = file.kind == "segment" ? file.layout.n_together() : file.layout.tensors.size();
  if (file.row_tensors != named) {
    corrupt(file_name, "it has " + std::to_string(file.row_tensors) + " layer tensors, its layout names " +
                           std::to_string(named));
  }
  for (size_t i = 0; i < file.row_tensors; ++i) {
    const auto& spec = file.layout.tensors[i];
    const auto& tensor = tensors[i];
    if (tensor.name != spec.name)
      corrupt(file_name, "tensor '" + tensor.name + "' stands where its layout has '" + spec.name + "'");
    if (i == 0 && tensor.shape.size() == 4) file.rows = tensor.shape[2];
    if (tensor.dtype != kv_dtype_name(spec.dtype) ||
        tensor.shape != std::vector<uint64_t>{1, uint64_t(spec.n_kv_heads), file.rows, uint64_t(spec.dim)}) {
      corrupt(file_name, "the dtype or shape of tensor '" + tensor.name + "' is not what its layout says");
    }
  }
  if (file.rows == 0) corrupt(file_name, "its layer tensors have no rows");
}

void check_flat_rows(TorporFile& file, size_t bytes_per_token, const std::string& file_name) {
  const SafetensorsTensor& rows = file.header.tensors.front();
  if (file.row_tensors != 1 || rows.name != "rows" || rows.dtype != "U8" || rows.shape.size() != 1) {
    corrupt(file_name, "tensor '" + rows.name + "' stands where its rows should be");
  }
  if (bytes_per_token == 0 || rows.size() == 0 || rows.size() % bytes_per_token != 0) {
    corrupt(file_name, "its rows are not those of whole tokens");
  }
  file.rows = rows.size() / bytes_per_token;
}

/// The rows' tensors, then the state's, then `messages`, then `tokens`.
void check_tensors(TorporFile& file, size_t bytes_per_token, const std::string& file_name) {
  auto& tensors = file.header.tensors;
  // An empty tensor sorts before the one it stands in front of; `tokens` belongs last, whatever its size.
  const auto tokens = std::find_if(tensors.begin(), tensors.end(), [](const auto& t) { return t.name == "tokens"; });
  if (tokens == tensors.end()) corrupt(file_name, "it has no tensor 'tokens'");
  if (tokens + 1 != tensors.end()) corrupt(file_name, "its tensor 'tokens' is not the last");
  if (tokens->dtype != "I32" || tokens->shape.size() != 1)
    corrupt(file_name, "its tensor 'tokens' is not a list of I32");
  file.n_tokens = tokens->shape[0];
  size_t others = tensors.size() - 1;
  if (file.version >= 3 && others > 0 && tensors[others - 1].name == "messages") {
    const auto& messages = tensors[others - 1];
    if (messages.dtype != "U8" || messages.shape.size() != 1 || messages.size() == 0) {
      corrupt(file_name, "its tensor 'messages' is not a text");
    }
    file.has_messages = true;
    --others;
  }
  const std::string* state_text = file.version >= 2 ? file.header.metadata_value("state") : nullptr;
  const std::vector<std::string> state = split(state_text != nullptr ? *state_text : "");
  if (others < state.size()) corrupt(file_name, "it lacks some of the tensors that its state names");
  file.state_tensors = state.size();
  file.row_tensors = others - state.size();
  for (size_t i = 0; i < state.size(); ++i) {
    const auto& tensor = tensors[file.row_tensors + i];
    if (tensor.name != state[i])
      corrupt(file_name, "tensor '" + tensor.name + "' stands where its state has '" + state[i] + "'");
    if (tensor.size() == 0) corrupt(file_name, "the state '" + tensor.name + "' is empty");
  }
  if (file.row_tensors == 0) return;
  if (is_flat(file.kind, file.version)) {
    check_flat_rows(file, bytes_per_token, file_name);
  } else {
    check_layer_tensors(file, file_name);
  }
}

}  // namespace

std::string check_header_checksum(std::span<const std::byte> header, const std::string& file_name) {
  const std::string_view text(reinterpret_cast<const char*>(header.data()), header.size());
  if (text.size() < kChecksumAt + kDigestLength || text.substr(8, kPrefix.size()) != kPrefix) {
    corrupt(file_name, "it has no Torpor checksum in its place");
  }
  const std::string stored(text.substr(kChecksumAt, kDigestLength));
  if (stored != header_checksum(header)) {
    corrupt(file_name, "its header does not match its checksum; restore the file from a copy, or delete the agent");
  }
  return stored;
}

uint64_t TorporFile::rows_bytes() const { return row_tensors > 0 ? header.tensors[row_tensors - 1].end : 0; }

uint64_t TorporFile::rows_bytes(const TensorMask& wanted) const {
  uint64_t bytes = 0;
  for (size_t i = 0; i < row_tensors; ++i) {
    if (wanted[i]) bytes += header.tensors[i].size();
  }
  return bytes;
}

const std::string& TorporFile::required(std::string_view key, const std::string& file_name) const {
  const std::string* value = header.metadata_value(key);
  if (value == nullptr) corrupt(file_name, "its metadata lacks '" + std::string(key) + "'");
  return *value;
}

TorporFile parse_torpor_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name,
                             const KnownLayout* known) {
  TorporFile file;
  file.header = parse_safetensors_header(prefix, file_size, file_name);
  file.checksum = check_header_checksum(prefix.first(size_t(file.header.data_start)), file_name);
  // Rows are used where they are mapped, by whatever instructions their dtype allows.
  if (file.header.data_start % kSafetensorsAlignment != 0) {
    corrupt(file_name, "its data does not begin at a multiple of " + std::to_string(kSafetensorsAlignment) + " bytes");
  }
  const std::string& version = file.required("format_version", file_name);
  if (!parse_int(version, file.version) || file.version < 1 || file.version > kFormatVersion) {
    const std::string newest = std::to_string(kFormatVersion);
    throw Error(ErrorCode::kIncompatible, "'" + file_name + "' has format version " + version + ", this Torpor reads " +
                                              newest + " and older; use a newer one.")
        .with_path(file_name)
        .with_field("format_version", newest, version);
  }
  file.kind = file.required("kind", file_name);
  const std::string& layout = file.required("layout", file_name);
  if (known == nullptr) {
    file.layout = decode_layout(layout, file.version, file_name);
  } else if (layout != known->text) {
    corrupt(file_name, "its layout is not the agent's");
  }
  check_tensors(file, known != nullptr ? known->bytes_per_token : file.layout.bytes_per_token(), file_name);
  file.checksums = split(file.required("checksums", file_name));
  if (file.checksums.size() != file.header.tensors.size() ||
      !std::all_of(file.checksums.begin(), file.checksums.end(), is_hex_digest)) {
    corrupt(file_name, "it does not have one checksum for each tensor");
  }
  return file;
}

std::string encode_torpor_header(const FileContents& contents, const KvLayout& layout, std::string* checksum) {
  Metadata all = {{"checksum", std::string(kDigestLength, '0')},
                  {"format_version", std::to_string(contents.version)},
                  {"kind", std::string(contents.kind)}};
  all.insert(all.end(), contents.metadata.begin(), contents.metadata.end());
  if (!contents.state.empty()) {
    std::vector<std::string> names;
    for (const KvState& tensor : contents.state) names.push_back(tensor.name);
    all.emplace_back("state", join(names));
  }
  all.emplace_back("layout", encode_layout(layout, contents.version));
  all.emplace_back("checksums", join(contents.checksums));
  std::vector<SafetensorsTensor> tensors;
  if (contents.rows > 0 && is_flat(contents.kind, contents.version)) {
    tensors.push_back({.name = "rows", .dtype = "U8", .shape = {contents.rows * layout.bytes_per_token()}});
  } else if (contents.rows > 0) {
    for (const auto& spec : layout.tensors) {
      if (spec.apart && contents.kind == "segment") break;  // and so are all behind it
      tensors.push_back({.name = spec.name,
                         .dtype = kv_dtype_name(spec.dtype),
                         .shape = {1, uint64_t(spec.n_kv_heads), contents.rows, uint64_t(spec.dim)}});
    }
  }
  for (const KvState& tensor : contents.state)
    tensors.push_back({.name = tensor.name, .dtype = tensor.dtype, .shape = tensor.shape});
  if (contents.message_bytes > 0)
    tensors.push_back({.name = "messages", .dtype = "U8", .shape = {contents.message_bytes}});
  tensors.push_back({.name = "tokens", .dtype = "I32", .shape = {contents.n_tokens}});
  std::string header = encode_safetensors_header(tensors, all);
  const std::string digest = header_checksum(std::as_bytes(std::span(header.data(), header.size())));
  header.replace(kChecksumAt, kDigestLength, digest);
  if (checksum != nullptr) *checksum = digest;
  return header;
}

void check_layout(const KvLayout& layout, std::span<const KvState> state) {
  auto fail = [](const std::string& what) {
    throw Error(ErrorCode::kInvalidArgument, "The KV layout can't be stored: " + what + ".");
  };
  if (layout.tensors.size() + state.size() > kMaxTensors)
    fail("it has more than " + std::to_string(kMaxTensors) + " tensors");
  const auto check_name = [&](const std::string& name) {
    const bool plain = !name.empty() && std::all_of(name.begin(), name.end(), [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' ||
             c == '-';
    });
    if (!plain || name == "tokens" || name == "rows" || name == "messages" || name == "__metadata__")
      fail("'" + name + "' is no name for a layer tensor");
  };
  std::vector<std::string_view> names;
  for (const KvState& tensor : state) {
    check_name(tensor.name);
    names.push_back(tensor.name);
  }
  bool apart_seen = false;
  size_t apart_bytes = 0, together_bytes = 0;
  if (layout.has_apart() && layout.n_together() == 0) fail("all its tensors are kept apart");
  for (const auto& spec : layout.tensors) {
    check_name(spec.name);
    if (spec.apart && spec.window == 0) fail("'" + spec.name + "' is kept apart and has no window");
    if (!spec.apart && apart_seen) fail("'" + spec.name + "' comes after tensors that are kept apart");
    apart_seen = spec.apart;
    (spec.apart ? apart_bytes : together_bytes) += spec.bytes_per_token();
    if (spec.n_kv_heads < 1 || spec.n_kv_heads > kMaxHeads || spec.dim < 1 || spec.dim > kMaxDim || spec.window < 0) {
      fail("the heads, dim or window of '" + spec.name + "' are out of range");
    }
    names.push_back(spec.name);
  }
  // So memory for a run is bounded by what is on disk, whatever a layout says.
  if (apart_bytes / kMaxApart > together_bytes) fail("too much of it is kept apart");
  std::sort(names.begin(), names.end());
  if (std::adjacent_find(names.begin(), names.end()) != names.end()) fail("two of its tensors have the same name");
}

std::string encode_layout(const KvLayout& layout, int version) {
  std::string text;
  for (const auto& spec : layout.tensors) {
    if (!text.empty()) text += ',';
    text += spec.name + ":" + kv_dtype_name(spec.dtype) + ":" + std::to_string(spec.n_kv_heads) + ":" +
            std::to_string(spec.dim) + ":" + std::to_string(spec.window);
    if (version >= 3) text.append(":").append(spec.apart ? kRowsApart : kRowOrder);
  }
  return text;
}

std::string layout_digest(const KvLayout& layout, int version) { return hash_hex(encode_layout(layout, version)); }

bool is_hex_digest(std::string_view text) {
  return text.size() == kDigestLength && std::all_of(text.begin(), text.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

std::string join(const std::vector<std::string>& parts) {
  std::string text;
  for (const auto& part : parts) {
    if (!text.empty()) text += ',';
    text += part;
  }
  return text;
}

std::vector<std::string> split(std::string_view text) {
  std::vector<std::string> parts;
  if (text.empty()) return parts;
  for (;;) {
    const size_t comma = text.find(',');
    parts.emplace_back(text.substr(0, comma));
    if (comma == std::string_view::npos) return parts;
    text.remove_prefix(comma + 1);
  }
}

std::span<const std::byte> token_bytes(std::span<const int32_t> tokens) { return std::as_bytes(tokens); }

}  // namespace torpor
