#include "base/mapped_output.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/env.h"

namespace torpor {
namespace {

constexpr uint64_t kAlignment = 64;
/// A mapping is a multiple of any system's pages, and there are few of them.
constexpr uint64_t kPage = uint64_t(1) << 16;
constexpr uint64_t kWindow = uint64_t(256) << 20;

uint64_t rounded_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

/// Whether the disk has given the file these bytes: a page of a hole that it has no room for would end the process.
bool allocate(int fd, uint64_t first, uint64_t size) {
#ifdef __APPLE__
  fstore_t store{.fst_flags = F_ALLOCATEALL, .fst_posmode = F_PEOFPOSMODE, .fst_offset = 0, .fst_length = off_t(size)};
  return ::fcntl(fd, F_PREALLOCATE, &store) == 0 && ::ftruncate(fd, off_t(first + size)) == 0;
#else
  return ::posix_fallocate(fd, off_t(first), off_t(size)) == 0;
#endif
}

}  // namespace

MappedOutput::MappedOutput(const std::filesystem::path& path) : path_(path) {
  fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd_ < 0) throw_io_error("create", path, errno);
}

MappedOutput::~MappedOutput() { ::close(fd_); }

bool MappedOutput::open_window(size_t size) {
  const uint64_t begin = rounded_up(end_, kPage), bytes = rounded_up(std::max<uint64_t>(size, kWindow), kPage);
  if (!allocate(fd_, begin, bytes)) return false;
  void* const memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, off_t(begin));
  if (memory == MAP_FAILED) return false;
  window_ = {static_cast<std::byte*>(memory), [bytes](std::byte* p) { ::munmap(p, bytes); }};
  window_begin_ = end_ = begin;
  window_size_ = bytes;
  return true;
}

MappedOutput::Place MappedOutput::take(size_t size) {
  end_ = rounded_up(end_, kAlignment);
  if (window_ == nullptr || size > window_begin_ + window_size_ - end_) {
    if (!open_window(size)) return {};
  }
  Place place{{window_, window_.get() + (end_ - window_begin_)}, end_};
  end_ += size;
  return place;
}

void MappedOutput::finish() {
  if (::ftruncate(fd_, off_t(end_)) != 0) throw_io_error("cut", path_, errno);
  if (::fsync(fd_) != 0) throw_io_error("flush", path_, errno);
}

}  // namespace torpor
