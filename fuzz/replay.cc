/// Runs a fuzz target over the files of its corpus, and over simple mutations of each: every truncation near the
/// boundaries, and one flipped bit per byte of the beginning. Files of the folder `grown`, which libFuzzer has mutated
/// enough, are run as they are. Deterministic.
///     fuzz_NAME CORPUS [STRIDE]    (mutates each STRIDEth byte alone: of targets that write a file for each input)

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr size_t kMutatedBytes = 4096;

void replay(const std::vector<uint8_t>& bytes, size_t stride) {
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  for (size_t i = 0; i < std::min(bytes.size(), kMutatedBytes); i += stride) {
    std::vector<uint8_t> mutated = bytes;
    mutated[i] ^= uint8_t(1u << (i % 8));
    LLVMFuzzerTestOneInput(mutated.data(), mutated.size());
    mutated.assign(bytes.begin(), bytes.begin() + ptrdiff_t(i)); // exact size: sanitizers see a read past the end
    LLVMFuzzerTestOneInput(mutated.data(), mutated.size());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  const int stride = argc > 2 ? std::max(std::atoi(argv[2]), 1) : 1;
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(argv[1])) {
    if (entry.is_regular_file()) paths.push_back(entry.path());
  }
  std::sort(paths.begin(), paths.end());
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<uint8_t> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    std::fprintf(stderr, "%s\n", path.c_str()); // the last line names the culprit
    if (path.parent_path().filename() == "grown") {
      LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    } else {
      replay(bytes, size_t(stride));
    }
  }
  std::fprintf(stderr, "replayed %zu files\n", paths.size());
  return paths.empty() ? 1 : 0;
}
