#pragma once
/// Digests of files that were read once, so that a start need not read gigabytes to know what they are. They are kept
/// in cache_directory()/digests with each file's size, times, inode and device: none of them may have changed.

#include <filesystem>
#include <functional>
#include <span>
#include <string>

namespace torpor::model {

/// What `compute` gives of these files: asked now, or known from when they were as they are. What was written in the
/// last seconds is not remembered, for a file's times can't tell two writes in one moment apart. Any thread.
std::string digest_of_files(std::span<const std::filesystem::path> files, const std::function<std::string()>& compute);

/// What `compute` gave of these files, if that is known of them as they are; else empty. `note` is where it stands.
std::string known_digest(std::span<const std::filesystem::path> files, std::filesystem::path& note);
/// Removes what is known of files that are not there any more.
void forget_digests_of_gone_files();

}  // namespace torpor::model
