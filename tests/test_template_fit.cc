/// Conversations of every shape that clients send, rendered by templates that refuse most of them.

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>

#include "server/template_fit.h"
#include "torpor/error.h"

namespace torpor::server {
namespace {

namespace fs = std::filesystem;

/// A template of the goldens: header (Llama 3), inst (Mistral), thinking (Qwen3), turns (Gemma), chatml.
class TemplateFitTest : public ::testing::Test {
 protected:
  void use(const std::string& name) {
    dir_ = fs::path(::testing::TempDir()) / ("template_fit_" + std::to_string(::getpid()));
    fs::remove_all(dir_);
    fs::create_directories(dir_);
    fs::copy_file(fs::path(TORPOR_SOURCE_DIR) / "tests/goldens/text/templates" / (name + ".jinja"),
                  dir_ / "chat_template.jinja");
    std::ofstream(dir_ / "tokenizer_config.json") << R"({"bos_token": "<s>", "eos_token": "</s>"})";
    chat_template_ = ChatTemplate::load(dir_);
    fit_ = std::make_unique<TemplateFit>(chat_template_, template_source(dir_));
  }
  void TearDown() override { fs::remove_all(dir_); }

  std::string render(const std::vector<Message>& messages, const std::vector<Tool>& tools = {}) {
    const FittedConversation fitted = fit_->fit(messages, tools);
    Json list = Json::array();
    for (const torpor::Message& message : fitted.messages) {
      Json json = parse_json<Json>(message_to_json(message));
      for (Json& call : json["tool_calls"]) {
        Json function{{"name", call["name"]}, {"arguments", call["arguments"]}};
        Json& arguments = function["arguments"];
        if (arguments.is_string()) arguments = parse_json<Json>(std::string(arguments));
        call = {{"id", call["id"]}, {"type", "function"}, {"function", function}};
      }
      if (json["tool_calls"].empty()) json.erase("tool_calls");
      list.push_back(json);
    }
    Json variables = Json::object();
    if (!fitted.tools.empty()) variables["tools"] = parse_json<Json>(fitted.tools);
    return chat_template_->render(to_text(list), true, to_text(variables));
  }

  fs::path dir_;
  std::shared_ptr<const ChatTemplate> chat_template_;
  std::unique_ptr<TemplateFit> fit_;
};

const std::vector<Tool> kTools{{"read", "Reads.", Json{{"type", "object"}}, false}};

Message called(const std::vector<std::string>& names) {
  Message message{Role::kAssistant, "I look."};
  for (const std::string& name : names) {
    message.tool_calls.push_back({"c" + std::to_string(message.tool_calls.size()), name, R"({"path":"a"})"});
  }
  return message;
}
Message result(const std::string& id, const std::string& text) {
  Message message{Role::kTool, text};
  message.tool_call_id = id;
  message.tool_name = "read";
  return message;
}

TEST_F(TemplateFitTest, SystemMessagesAnywhereAreRenderedByEveryTemplate_ollama_17774_vllm_44505_Rapid_MLX_975) {
  for (const char* name : {"header", "inst", "thinking", "turns", "chatml"}) {
    SCOPED_TRACE(name);
    use(name);
    const std::string text = render({{Role::kSystem, "first-rule"}, {Role::kSystem, "second-rule"},
                                     {Role::kUser, "one"},
                                     {Role::kSystem, "third-rule"}, {Role::kUser, "two"}, {Role::kAssistant, "yes"},
                                     {Role::kSystem, "fourth-rule"}, {Role::kUser, "three"}});
    // In their order, but for Mistral's manner to put the first system message before the last question.
    size_t last = 0;
    for (const char* word : {"second-rule", "one", "third-rule", "two", "yes", "fourth-rule", "three"}) {
      const size_t at = text.find(word, last);
      EXPECT_NE(at, std::string::npos) << word << " in " << text;
      if (at != std::string::npos) last = at;
    }
    EXPECT_NE(text.find("first-rule"), std::string::npos) << text;
  }
}

TEST_F(TemplateFitTest, ToolsCallsAndResultsAreRenderedByEveryTemplate_opencode_1680) {
  for (const char* name : {"header", "inst", "thinking", "turns", "chatml"}) {
    SCOPED_TRACE(name);
    use(name);
    std::vector<Message> messages{{Role::kUser, "Look."}, called({"read"}), result("c0", "the text")};
    if (fit_->parallel_calls()) {
      messages.push_back(called({"read", "read"}));
      messages.push_back(result("c0", "one"));
      messages.push_back(result("c1", "other"));
    }
    const std::string text = render(messages, kTools);
    for (const char* word : {"Reads.", "read", "path", "the text"}) {
      EXPECT_NE(text.find(word), std::string::npos) << text;
    }
  }
}

TEST_F(TemplateFitTest, TemplatesAreKnownByWhatTheyRender) {
  use("thinking");
  EXPECT_TRUE(fit_->renders_tools());
  EXPECT_EQ(fit_->format().calls, CallFormat::kTagged);
  EXPECT_EQ(fit_->format().think_open, "<think>");
  EXPECT_FALSE(fit_->opens_thinking(Json::object()));
  use("header");
  EXPECT_TRUE(fit_->renders_tools());
  EXPECT_EQ(fit_->format().calls, CallFormat::kLlama);
  EXPECT_FALSE(fit_->parallel_calls());
  use("inst");
  EXPECT_EQ(fit_->format().calls, CallFormat::kMistral);
  use("turns");
  EXPECT_FALSE(fit_->renders_tools());
  EXPECT_EQ(fit_->format().calls, CallFormat::kTagged);  // as the message that tells of the tools says
}

TEST_F(TemplateFitTest, AConversationThatGrowsKeepsItsBeginning) {
  const std::vector<Message> all{{Role::kSystem, "rule"}, {Role::kUser, "one"},  {Role::kSystem, "mid"},
                                 called({"read"}),        result("c0", "text"), {Role::kUser, "more"},
                                 {Role::kAssistant, "so"}, {Role::kUser, "two"}};
  for (const char* name : {"header", "inst", "thinking", "turns", "chatml"}) {
    SCOPED_TRACE(name);
    use(name);
    const auto whole = fit_->fit(all, kTools).messages;
    for (const size_t n : {size_t(3), size_t(6)}) {  // up to the question before each answer
      const auto part = fit_->fit({all.begin(), all.begin() + ptrdiff_t(n)}, kTools).messages;
      ASSERT_LT(part.size(), whole.size());
      EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin()));
      const torpor::Message answer = fit_->fit_answer(all[n]);
      EXPECT_TRUE(says_the_same(answer, whole[part.size()]));
    }
  }
}

TEST_F(TemplateFitTest, IdsOfCallsAreOursSoThatTheyNeitherDifferNorAreRefused) {
  use("inst");
  const std::vector<Message> sent{{Role::kUser, "Look."}, called({"read", "read"}), result("c1", "b"), result("c0", "a")};
  const auto messages = fit_->fit(sent, kTools).messages;
  EXPECT_EQ(messages[1].tool_calls[0].id, "000000000");
  EXPECT_EQ(messages[2].tool_call_id, "000000001");
  EXPECT_EQ(messages[3].tool_call_id, "000000000");
}

}  // namespace
}  // namespace torpor::server
