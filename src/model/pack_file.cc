#include "model/pack_file.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <optional>
#include <thread>

#include "base/env.h"
#include "base/environment.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/mapped_output.h"
#include "base/mutex.h"
#include "kernels/thread_pool.h"
#include "model/known_digests.h"
#include "torpor/error.h"
#include "torpor/log.h"
#include "torpor/model_info.h"

namespace torpor::model {
namespace {

namespace fs = std::filesystem;
using kernels::WeightMemory;
using nlohmann::json;

constexpr size_t kBlock = size_t(4) << 20;
constexpr uint64_t kMaxIndex = uint64_t(64) << 20;
constexpr size_t kDigits = 32;
constexpr const char* kSuffix = ".weights";
constexpr const char* kTemporary = ".torpor-tmp-";

struct Footer {
  char key[kDigits];
  uint64_t offset, size;  // of the index
  char checksum[kDigits];
};
static_assert(sizeof(Footer) == 80);

struct Piece {
  std::string fingerprint;
  uint64_t offset = 0, size = 0;
  std::string checksum;
};

fs::path packs_directory() { return fs::path(cache_directory()) / "packed"; }

size_t n_blocks(size_t size) { return (size + kBlock - 1) / kBlock; }
std::span<std::byte> block(std::span<std::byte> bytes, size_t i) {
  return bytes.subspan(i * kBlock, std::min(kBlock, bytes.size() - i * kBlock));
}
std::string checksum_of(const std::vector<std::string>& blocks) {
  Hasher hasher;
  for (const std::string& digest : blocks) hasher.update_field(digest);
  return hasher.hex();
}

/// What the end of a file says of it: its index, checked. nullopt when it is no file of this format.
std::optional<json> read_index(const File& file, uint64_t size, std::string_view key) {
  Footer footer;
  if (size < sizeof footer) return std::nullopt;
  file.read_at(std::as_writable_bytes(std::span(&footer, 1)), size - sizeof footer);
  if (std::string_view(footer.key, kDigits) != key || footer.size > kMaxIndex || footer.offset > size ||
      footer.size > size - footer.offset) {
    return std::nullopt;
  }
  std::string text(footer.size, '\0');
  file.read_at(std::as_writable_bytes(std::span(text)), footer.offset);
  if (hash_hex(text) != std::string_view(footer.checksum, kDigits)) return std::nullopt;
  return parse_json<json>(text, nullptr, false);
}

json stamps_of(const std::vector<fs::path>& files) {
  json stamps = json::array();
  for (const fs::path& file : files) {
    const fs::path path = fs::canonical(file);
    const auto stat = Env::posix().stat(path);
    stamps.push_back({path.string(), stat ? stat->size : 0, stat ? stat->mtime_ns : 0});
  }
  return stamps;
}

/// Whether a temporary file is of a process that is gone.
bool is_left(const std::string& name) {
  const int pid = std::atoi(name.substr(std::string_view(kTemporary).size()).c_str());
  return pid <= 0 || (::kill(pid, 0) != 0 && errno == ESRCH);
}

/// A file that an earlier process has written.
class Reader final : public PackFile {
 public:
  Reader(File file, uint64_t size, const json& index) : file_(std::move(file)), size_(size) {
    for (const json& piece : index.at("pieces")) {
      pieces_.push_back({piece.at(0), piece.at(1), piece.at(2), piece.at(3)});
      if (pieces_.back().offset > size || pieces_.back().size > size - pieces_.back().offset) {
        throw Error(ErrorCode::kCorruption, "'" + file_.path().string() + "' is damaged: a piece lies outside.");
      }
    }
  }

  WeightMemory& resident() override { return resident_; }
  WeightMemory& mapped() override { return mapped_; }
  /// Reads every piece.
  bool intact() {
    std::vector<std::byte> memory;
    return std::ranges::all_of(pieces_, [&](const Piece& piece) {
      memory.resize(piece.size);
      return read(memory, piece.offset) == piece.checksum;
    });
  }

 private:
  struct Facet final : WeightMemory {
    Facet(Reader& of, bool maps) : of(of), maps(maps) {}
    Place take(size_t size, const std::string& fingerprint) override { return of.take(size, fingerprint, maps); }
    void filled(const Place&, size_t) override {}
    Reader& of;
    const bool maps;
  };

  WeightMemory::Place take(size_t size, const std::string& fingerprint, bool maps) {
    const Piece* const piece = useless_ || next_ == pieces_.size() ? nullptr : &pieces_[next_++];
    if (piece == nullptr || piece->size != size || piece->fingerprint != fingerprint) {
      give_up("it is of another model");
      return {kernels::allocate_weights(size), false};
    }
    if (maps && sound() && mapping() != nullptr) {
      return {{mapping_, const_cast<std::byte*>(mapping_.get()) + piece->offset}, true};
    }
    WeightMemory::Place place{kernels::allocate_weights(size), true};
    if (read({place.data.get(), size}, piece->offset) != piece->checksum) {
      give_up("it is damaged");
      place.filled = false;
    }
    return place;
  }

  /// Reads a piece and gives its checksum.
  std::string read(std::span<std::byte> to, uint64_t offset) {
    std::vector<std::string> digests(n_blocks(to.size()));
    kernels::ThreadPool::shared().parallel_for(digests.size(), [&](size_t i, int) {
      file_.read_at(block(to, i), offset + i * kBlock);
      digests[i] = hash_hex(block(to, i));
    });
    return checksum_of(digests);
  }

  const std::byte* mapping() {
    if (mapping_ == nullptr) mapping_ = file_.map(size_);
    return mapping_.get();
  }

  /// Whether all pieces are as they were written. Once it is known of a file, it is known until the file changes.
  bool sound() {
    if (!sound_) {
      const std::string all = "sound";
      sound_ = digest_of_files({&file_.path(), 1}, [&] { return intact() ? all : "damaged"; }) == all;
      if (!*sound_) give_up("it is damaged");
    }
    return *sound_;
  }

  void complete() override {}

  /// The file is removed at once: what is packed in its place may not fit the memory, and end the process.
  void give_up(const char* why) {
    if (std::exchange(useless_, true)) return;
    log(LogLevel::kWarning, "The packed weights '" + file_.path().string() + "' are not used: " + why + ".");
    try {
      const auto there = Env::posix().stat(file_.path());
      if (there && there->is_same_file(file_.stat())) Env::posix().remove(file_.path());
    } catch (const Error&) {
      // The next process finds out the same.
    }
  }

  const File file_;
  const uint64_t size_;
  std::vector<Piece> pieces_;
  size_t next_ = 0;
  bool useless_ = false;
  std::optional<bool> sound_;
  std::shared_ptr<const std::byte> mapping_;
  Facet resident_{*this, false}, mapped_{*this, true};
};

/// A file that this process writes.
class Writer final : public PackFile {
 public:
  Writer(std::string key, std::vector<fs::path> of)
      : key_(std::move(key)),
        of_(std::move(of)),
        temporary_(packs_directory() / (kTemporary + std::to_string(::getpid()) + "-" + Env::posix().random_id())),
        output_(temporary_),
        thread_([this] { work(); }) {}
  ~Writer() override {
    {
      const MutexLock lock(mutex_);
      ended_ = true;
    }
    wake_.notify_one();
    thread_.join();
  }

  WeightMemory& resident() override { return resident_; }
  WeightMemory& mapped() override { return mapped_; }
  bool over() {
    const MutexLock lock(mutex_);
    return over_;
  }

 private:
  void complete() override {
    const MutexLock lock(mutex_);
    complete_ = ended_ = true;
    wake_.notify_one();
  }

  /// A piece that is packed: where it goes in the file, and from where, unless it was packed there.
  struct Job {
    std::string fingerprint;
    WeightMemory::Place from;
    MappedOutput::Place to;
    size_t size = 0;
  };
  struct Facet final : WeightMemory {
    Facet(Writer& of, bool maps) : of(of), maps(maps) {}
    Place take(size_t size, const std::string& fingerprint) override { return of.take(size, fingerprint, maps); }
    void filled(const Place& place, size_t size) override { of.filled(place, size); }
    Writer& of;
    const bool maps;
  };

  WeightMemory::Place take(size_t size, const std::string& fingerprint, bool maps) {
    taken_ = {
        .fingerprint = fingerprint, .from = {}, .to = full_ ? MappedOutput::Place{} : output_.take(size), .size = size};
    full_ |= taken_.to.data == nullptr;
    if (maps && !full_) return {taken_.to.data, false};
    return {kernels::allocate_weights(size), false};
  }
  void filled(const WeightMemory::Place& place, size_t) {
    if (full_) return;
    if (place.data != taken_.to.data) taken_.from = place;
    const MutexLock lock(mutex_);
    jobs_.push_back(std::move(taken_));
    wake_.notify_one();
  }

  void work() {
    try {
      while (const auto job = next()) write(*job);
      if (whole()) {
        commit();
      } else {
        throw Error(ErrorCode::kResourceExhausted, full_ ? "the disk is full." : "the model was not loaded.");
      }
    } catch (const std::exception& error) {
      log(LogLevel::kWarning, std::string("Packed weights are not kept: ") + error.what());
    }
    remove_temporary();
    const MutexLock lock(mutex_);
    over_ = true;
  }
  void remove_temporary() {
    try {
      Env::posix().remove(temporary_);
    } catch (const Error&) {
      // Found as stale.
    }
  }
  std::optional<Job> next() {
    MutexLock lock(mutex_);
    while (jobs_.empty() && !ended_) wake_.wait(lock);
    if (jobs_.empty() || (ended_ && !complete_)) return std::nullopt;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    return job;
  }
  bool whole() {
    const MutexLock lock(mutex_);
    return complete_ && !full_;
  }
  void write(const Job& job) {
    if (job.from.data != nullptr) std::memcpy(job.to.data.get(), job.from.data.get(), job.size);
    const std::span bytes(job.to.data.get(), job.size);
    std::vector<std::string> digests;
    for (size_t i = 0; i < n_blocks(job.size); ++i) digests.push_back(hash_hex(block(bytes, i)));
    pieces_.push_back({job.fingerprint, job.to.offset, job.size, checksum_of(digests)});
  }
  void commit() {
    json index{{"pieces", json::array()}, {"of", json::array()}};
    for (const Piece& piece : pieces_) {
      index["pieces"].push_back({piece.fingerprint, piece.offset, piece.size, piece.checksum});
    }
    index["of"] = stamps_of(of_);
    const std::string text = dump_json(index), checksum = hash_hex(text);
    const MappedOutput::Place place = output_.take(text.size() + sizeof(Footer));
    if (place.data == nullptr) throw Error(ErrorCode::kResourceExhausted, "the disk is full.");
    Footer footer{.key = {}, .offset = place.offset, .size = text.size(), .checksum = {}};
    std::memcpy(footer.key, key_.data(), kDigits);
    std::memcpy(footer.checksum, checksum.data(), kDigits);
    std::memcpy(place.data.get(), text.data(), text.size());
    std::memcpy(place.data.get() + text.size(), &footer, sizeof footer);
    output_.finish();
    Env& env = Env::posix();
    env.rename(temporary_, packs_directory() / (key_ + kSuffix));
    // What another version has packed of the same files is of no use any more.
    for (const std::string& name : env.list_own(packs_directory())) {
      const fs::path other = packs_directory() / name;
      const std::string key = other.stem().string();
      if (other.extension() != kSuffix || key == key_) continue;
      try {
        const File file = env.open(other, OpenMode::kRead);
        if (const auto of = read_index(file, file.stat().size, key); of && of->at("of") == index["of"])
          env.remove(other);
      } catch (const std::exception&) {
        // gc removes what is none.
      }
    }
  }

  const std::string key_;
  const std::vector<fs::path> of_;
  const fs::path temporary_;
  MappedOutput output_;
  Job taken_;
  bool full_ = false;          // the disk is; of the thread that packs, and read by the other after complete_
  std::vector<Piece> pieces_;  // of thread_
  Facet resident_{*this, false}, mapped_{*this, true};
  Mutex mutex_;
  CondVar wake_;
  std::deque<Job> jobs_ TORPOR_GUARDED_BY(mutex_);
  bool complete_ TORPOR_GUARDED_BY(mutex_) = false, ended_ TORPOR_GUARDED_BY(mutex_) = false;
  bool over_ TORPOR_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // the last member: it uses all others
};

/// Files that are still being written when their model's load is over.
class Finishing {
 public:
  ~Finishing() {
    // A forked child has no such threads.
    if (process_ != ::getpid()) {
      for (auto& writer : writers_) static_cast<void>(writer.release());
    }
  }
  void add(std::unique_ptr<Writer> writer) {
    const MutexLock lock(mutex_);
    std::erase_if(writers_, [](const auto& one) { return one->over(); });
    writers_.push_back(std::move(writer));
  }

 private:
  const pid_t process_ = ::getpid();
  Mutex mutex_;
  std::vector<std::unique_ptr<Writer>> writers_;
};

}  // namespace

void PackFile::finish(std::unique_ptr<PackFile> file) {
  if (file == nullptr) return;
  file->complete();
  static Finishing finishing;
  if (auto* const writer = dynamic_cast<Writer*>(file.get())) {
    static_cast<void>(file.release());
    finishing.add(std::unique_ptr<Writer>(writer));
  }
}

std::unique_ptr<PackFile> PackFile::open(const std::string& key, const std::vector<fs::path>& of, uint64_t bytes) {
  if (cache_directory().empty()) return nullptr;
  Env& env = Env::posix();
  const fs::path path = packs_directory() / (key + kSuffix);
  try {
    if (env.is_file(path)) {
      File file = env.open(path, OpenMode::kRead);
      const uint64_t size = file.stat().size;
      if (const auto index = read_index(file, size, key); index && index->is_object()) {
        return std::make_unique<Reader>(std::move(file), size, *index);
      }
      log(LogLevel::kWarning, "The packed weights '" + path.string() + "' are damaged, and are made anew.");
    }
  } catch (const std::exception& error) {
    log(LogLevel::kWarning, std::string("Packed weights are made anew: ") + error.what());
  }
  try {
    std::error_code ignored;
    fs::create_directories(packs_directory(), ignored);
    for (const std::string& name : env.list_own(packs_directory())) {
      if (name.starts_with(kTemporary) && is_left(name)) env.remove(packs_directory() / name);
    }
    if (bytes > env.free_space(packs_directory()) / 2) {
      log(LogLevel::kInfo, "Packed weights are not kept: they would take more than half of what is free in '" +
                               packs_directory().string() + "'.");
      return nullptr;
    }
    return std::make_unique<Writer>(key, of);
  } catch (const std::exception& error) {
    log(LogLevel::kInfo, std::string("Packed weights are not kept: ") + error.what());
    return nullptr;
  }
}

std::optional<std::string> PackFile::check(const std::string& key) {
  if (cache_directory().empty()) return std::nullopt;
  Env& env = Env::posix();
  const fs::path path = packs_directory() / (key + kSuffix);
  if (!env.is_file(path)) return std::nullopt;
  File file = env.open(path, OpenMode::kRead);
  const uint64_t size = file.stat().size;
  try {
    const auto index = read_index(file, size, key);
    if (index && Reader(std::move(file), size, *index).intact()) return "";
  } catch (const std::exception&) {
    // As the sentence says.
  }
  return "The packed weights '" + path.string() + "' are damaged; remove the file, and the next start makes it anew.";
}

}  // namespace torpor::model

namespace torpor {
namespace {

/// Whether a packed file is of no model that is still there.
bool is_stale(const std::filesystem::path& path, uint64_t size) {
  try {
    const auto index = model::read_index(Env::posix().open(path, OpenMode::kRead), size, path.stem().string());
    return !index || std::ranges::any_of(index->at("of"), [](const nlohmann::json& file) {
      const auto stat = Env::posix().stat(file.at(0).get<std::string>());
      return !stat || stat->size != file.at(1) || stat->mtime_ns != file.at(2);
    });
  } catch (const std::exception&) {
    return true;
  }
}

}  // namespace

ModelCacheUsage clean_model_cache(bool remove) {
  ModelCacheUsage usage;
  if (cache_directory().empty()) return usage;
  Env& env = Env::posix();
  if (remove) model::forget_digests_of_gone_files();
  for (const std::string& name : env.list_own(model::packs_directory())) {
    const std::filesystem::path path = model::packs_directory() / name;
    const auto stat = env.stat_link(path);
    const bool temporary = name.starts_with(model::kTemporary);
    if (!stat || !stat->is_file || (!temporary && path.extension() != model::kSuffix)) continue;
    ++usage.files;
    usage.bytes += int64_t(stat->size);
    const bool stale = temporary ? model::is_left(name) : is_stale(path, stat->size);
    if (!stale || (remove && !env.remove(path))) continue;
    ++usage.stale_files;
    usage.stale_bytes += int64_t(stat->size);
  }
  return usage;
}

}  // namespace torpor
