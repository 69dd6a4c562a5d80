/// Runs a fuzz target over the files of its corpus, and over simple mutations of each: every truncation near the
/// boundaries, and one flipped bit per byte of the beginning. Deterministic; what libFuzzer finds is added as a file.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr size_t kMutatedBytes = 4096;

void replay(const std::vector<uint8_t>& bytes) {
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  for (size_t i = 0; i < std::min(bytes.size(), kMutatedBytes); ++i) {
    std::vector<uint8_t> mutated = bytes;
    mutated[i] ^= uint8_t(1u << (i % 8));
    LLVMFuzzerTestOneInput(mutated.data(), mutated.size());
    mutated.assign(bytes.begin(), bytes.begin() + ptrdiff_t(i)); // exact size: sanitizers see a read past the end
    LLVMFuzzerTestOneInput(mutated.data(), mutated.size());
  }
}

}  // namespace

int main(int argc, char** argv) {
  size_t files = 0;
  for (int i = 1; i < argc; ++i) {
    std::vector<std::filesystem::path> paths;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(argv[i])) {
      if (entry.is_regular_file()) paths.push_back(entry.path());
    }
    std::sort(paths.begin(), paths.end());
    for (const auto& path : paths) {
      std::ifstream file(path, std::ios::binary);
      const std::vector<uint8_t> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
      std::fprintf(stderr, "%s\n", path.c_str()); // the last line names the culprit
      replay(bytes);
      ++files;
    }
  }
  std::fprintf(stderr, "replayed %zu files\n", files);
  return files == 0 ? 1 : 0;
}
