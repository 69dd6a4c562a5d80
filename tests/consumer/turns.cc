#include <cstdio>
#include <exception>

#include <torpor/engine.h>

/// turns MODEL STORE: asks an agent the same each time; what it holds grows from run to run.
int main(int argc, char** argv) {
  if (argc != 3) return 2;
  try {
    torpor::Engine engine({.model = argv[1], .store = argv[2], .memory_budget = size_t(2) << 30});
    torpor::TurnRequest request{.agent = "ada", .prompt = "What did I ask you before?"};
    request.generate.max_tokens = 64;
    request.generate.on_text = [](std::string_view text) { std::printf("%.*s", int(text.size()), text.data()); };
    const torpor::TurnResult result = engine.turn(request);
    std::printf("\n%d tokens, %d of them held before\n", result.tokens.context, result.tokens.cached);
    if (result.save_error) throw *result.save_error;
    for (const torpor::Message& message : engine.messages("ada")) {
      std::printf("%s: %s\n", message.role.c_str(), message.content.c_str());
    }
  } catch (const torpor::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
