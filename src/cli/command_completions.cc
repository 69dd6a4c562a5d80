/// completions: what a shell offers after Tab, made from the commands' own descriptions.

#include <algorithm>

#include <CLI/CLI.hpp>

#include "cli/commands.h"
#include "cli/output.h"

namespace torpor::cli {
namespace {

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : " ") + word;
  return text;
}

/// Those of its own commands, as `remote` has, among them.
std::vector<std::string> options_of(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::Option* option : command.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  }
  for (const CLI::App* below : command.get_subcommands([](const CLI::App*) { return true; })) {
    for (const std::string& name : options_of(*below)) {
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    }
  }
  return names;
}

std::vector<const CLI::App*> commands_of(const CLI::App& app) {
  std::vector<const CLI::App*> commands;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App* sub) { return !sub->get_name().empty(); })) {
    commands.push_back(command);
  }
  return commands;
}

/// Whether its first argument is an agent of the store.
bool takes_agents(const CLI::App& command) {
  const CLI::Option* first = command.get_option_no_throw("ID");
  return first != nullptr && command.get_name() != "import";
}

/// The words that arguments may be: its own commands, and what an IsMember check describes as "{bash,zsh,fish}".
std::string choices_of(const CLI::App& command) {
  std::string choices;
  for (const CLI::App* own : commands_of(command)) choices += (choices.empty() ? "" : " ") + own->get_name();
  for (const CLI::Option* option : command.get_options()) {
    const std::string type = option->get_type_name();
    const size_t begin = type.find('{');
    if (!option->get_positional() || begin == std::string::npos) continue;
    for (const char c : type.substr(begin + 1, type.find('}') - begin - 1)) choices += c == ',' ? ' ' : c;
  }
  return choices;
}

std::string bash(const CLI::App& app) {
  std::vector<std::string> names;
  std::string cases;
  for (const CLI::App* command : commands_of(app)) {
    names.push_back(command->get_name());
    const std::string choices = choices_of(*command);
    cases += "    " + command->get_name() + ") words=\"" + (choices.empty() ? "" : choices + " ") +
             joined(options_of(*command)) + "\";" +
             (takes_agents(*command) ? " agents=1;" : "") + " ;;\n";
  }
  return "# bash: eval \"$(torpor completions bash)\"\n"
         "_torpor() {\n"
         "  local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words agents=\n"
         "  case ${COMP_WORDS[1]} in\n" + cases +
         "    *) words=\"" + joined(names) + "\" ;;\n"
         "  esac\n"
         "  [ \"$before\" = --agent ] && words= agents=1\n"
         "  [ -n \"$agents\" ] && words=\"$words $(torpor ls -q 2>/dev/null)\"\n"
         "  COMPREPLY=($(compgen -W \"$words\" -- \"$current\"))\n"
         "}\n"
         "complete -o default -F _torpor torpor\n";
}

std::string zsh(const CLI::App& app) {
  return "# zsh: eval \"$(torpor completions zsh)\"\nautoload -U +X bashcompinit && bashcompinit\n" + bash(app);
}

/// A description as one of fish's single-quoted words.
std::string quoted(const std::string& text) {
  std::string out = "'";
  for (const char c : text) out += c == '\'' || c == '\\' ? std::string("\\") + c : std::string(1, c);
  return out + "'";
}

std::string fish(const CLI::App& app) {
  std::string text = "# fish: torpor completions fish | source\n";
  for (const CLI::App* command : commands_of(app)) {
    const std::string name = command->get_name();
    text += "complete -c torpor -n __fish_use_subcommand -a " + name + " -d " + quoted(command->get_description()) + "\n";
    const std::string here = "complete -c torpor -n '__fish_seen_subcommand_from " + name + "' ";
    for (const std::string& option : options_of(*command)) {
      text += here + "-l " + option.substr(2) + (option == "--agent" ? " -xa '(torpor ls -q 2>/dev/null)'" : "") + "\n";
    }
    if (const std::string choices = choices_of(*command); !choices.empty()) text += here + "-xa " + quoted(choices) + "\n";
    if (takes_agents(*command)) text += here + "-a '(torpor ls -q 2>/dev/null)'\n";
  }
  return text;
}

}  // namespace

void add_completions_command(CLI::App& app, Invocation& invocation) {
  const auto shell = std::make_shared<std::string>();
  CLI::App* completions = app.add_subcommand("completions", "Print what makes a shell complete torpor's commands");
  completions->add_option("SHELL", *shell, "bash, zsh or fish")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh", "fish"}))
      ->type_name("");
  completions->callback([&app, &invocation, shell] {
    invocation.run = [&app, shell] {
      print(*shell == "bash" ? bash(app) : *shell == "zsh" ? zsh(app) : fish(app));
      return 0;
    };
  });
}

}  // namespace torpor::cli
