#include "cli/line_reader.h"

#include <termios.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <utility>

#include "cli/interrupt.h"
#include "cli/output.h"
#include "torpor/error.h"
#include "torpor_line_shim.h"

namespace torpor::cli {
namespace {

/// The terminal as it was, which the editor can't put back once a signal has taken its input away.
class TerminalMode {
 public:
  TerminalMode() : terminal_(dup(STDIN_FILENO)) { known_ = terminal_ >= 0 && tcgetattr(terminal_, &mode_) == 0; }
  ~TerminalMode() {
    if (terminal_ >= 0) close(terminal_);
  }
  TerminalMode(const TerminalMode&) = delete;
  TerminalMode& operator=(const TerminalMode&) = delete;

  void put_back() {
    if (terminal_ < 0) return;
    dup2(terminal_, STDIN_FILENO);
    if (known_) tcsetattr(terminal_, TCSADRAIN, &mode_);
    std::fputs("\x1b[?2004l", stdout);  // no brackets around what is pasted
    std::fflush(stdout);
  }

 private:
  const int terminal_;
  termios mode_{};
  bool known_ = false;
};

std::optional<std::string> next_line() {
  char* buffer = nullptr;
  size_t capacity = 0;
  const ssize_t length = getline(&buffer, &capacity, stdin);
  std::optional<std::string> line;
  if (length >= 0) {
    line.emplace(buffer, size_t(length));
    while (!line->empty() && (line->back() == '\n' || line->back() == '\r')) line->pop_back();
  }
  std::free(buffer);
  return line;
}

void check(torpor_text_status status, torpor_text_bytes error) {
  if (status == TORPOR_TEXT_OK) return;
  const std::string message(error.data, error.size);
  torpor_text_bytes_free(error);
  throw Error(ErrorCode::kIo, message);
}

}  // namespace

LineReader::LineReader(Complete complete) : complete_(std::move(complete)), interactive_(isatty(STDIN_FILENO) != 0) {
  if (!interactive_ || isatty(STDOUT_FILENO) == 0) return;
  // The editor takes this signal for itself as long as it lives, and an answer is to be stopped by it.
  struct sigaction interrupt {};
  sigaction(SIGINT, nullptr, &interrupt);
  torpor_text_bytes error{};
  const torpor_text_status status = torpor_line_editor_new(
      [](void* reader, const char* before, size_t size, torpor_line_offers* offers) {
        try {
          for (const std::string& word : static_cast<LineReader*>(reader)->complete_({before, size})) {
            torpor_line_offer(offers, word.data(), word.size());
          }
        } catch (const std::exception&) {
          // What can't be known is not offered.
        }
      },
      this, may_style(STDOUT_FILENO), &editor_, &error);
  sigaction(SIGINT, &interrupt, nullptr);
  check(status, error);
}

LineReader::~LineReader() { torpor_line_editor_free(editor_); }

std::optional<std::string> LineReader::read(const std::string& prompt) {
  std::optional<std::string> text = read_one(prompt);
  while (interactive_ && text && text->ends_with('\\')) {
    const std::optional<std::string> more = read_one(std::string(prompt.size() - 2, '.') + "> ");
    if (!more) return std::nullopt;
    text->back() = '\n';
    *text += *more;
  }
  if (text && !text->empty()) remember(*text);
  return text;
}

void LineReader::remember(const std::string& text) {
  if (editor_ == nullptr) return;
  torpor_text_bytes error{};
  check(torpor_line_remember(editor_, text.data(), text.size(), &error), error);
}

std::optional<std::string> LineReader::read_one(const std::string& prompt) {
  if (editor_ != nullptr) return edit(prompt);
  if (interactive_) std::fputs(prompt.c_str(), stderr);
  return next_line();
}

std::optional<std::string> LineReader::edit(const std::string& prompt) {
  TerminalMode mode;
  std::fflush(stdout);
  int32_t outcome = TORPOR_LINE_END;
  torpor_text_bytes text{}, error{};
  torpor_text_status status = TORPOR_TEXT_OK;
  {
    const InputEndsOnSignal ends;
    if (!ends.came()) status = torpor_line_read(editor_, prompt.data(), prompt.size(), &outcome, &text, &error);
    if (ends.came()) mode.put_back();
  }
  check(status, error);
  if (outcome == TORPOR_LINE_INTERRUPTED) std::raise(SIGINT);
  if (outcome != TORPOR_LINE_TEXT) return std::nullopt;
  std::string line(text.data, text.size);
  torpor_text_bytes_free(text);
  return line;
}

}  // namespace torpor::cli
