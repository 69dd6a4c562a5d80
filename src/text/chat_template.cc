#include "base/hash.h"
#include "text/tokenizer_impl.h"
#include "torpor/text.h"

namespace torpor {

using text::ShimText;

struct ChatTemplate::Impl {
  text::TemplateHandle handle;
  std::string digest;
};

ChatTemplate::ChatTemplate(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ChatTemplate::~ChatTemplate() = default;

std::shared_ptr<const ChatTemplate> ChatTemplate::load(const std::filesystem::path& dir) {
  const text::ModelFiles files(dir, /*tokenizer=*/false);
  const torpor_text_files view = files.view();
  torpor_text_template* handle = nullptr;
  ShimText source, error;
  text::check(torpor_text_template_new(&view, &handle, source.out(), error.out()), error,
              "can't use the chat template of " + dir.string() + ": ");
  if (!handle) return nullptr;
  auto impl = std::make_unique<Impl>();
  impl->handle.reset(handle);
  impl->digest = hash_hex(source.str());
  return std::shared_ptr<const ChatTemplate>(new ChatTemplate(std::move(impl)));
}

std::string ChatTemplate::render(std::string_view messages_json, bool add_generation_prompt,
                                 std::string_view extra_json) const {
  return render(messages_json, add_generation_prompt, extra_json, nullptr).text;
}

RenderedText ChatTemplate::render(std::string_view messages_json, bool add_generation_prompt,
                                  std::string_view extra_json, const Tokenizer* guarded_by) const {
  ShimText rendered, joint, error;
  text::check(torpor_text_template_render(impl_->handle.get(), messages_json.data(), messages_json.size(),
                                          add_generation_prompt, extra_json.data(), extra_json.size(),
                                          guarded_by != nullptr ? guarded_by->impl_->handle.get() : nullptr,
                                          rendered.out(), joint.out(), error.out()),
              error);
  return {rendered.str(), joint.str()};
}

const std::string& ChatTemplate::digest() const { return impl_->digest; }

}  // namespace torpor
