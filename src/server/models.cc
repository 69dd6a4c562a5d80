/// GET /v1/models and /v1/models/NAME, in OpenAI's form and in Anthropic's.

#include "server/models.h"

#include <algorithm>
#include <chrono>
#include <ctime>

#include "server/failure.h"

namespace torpor::server {
namespace {

Json entry(Dialect dialect, const ModelEntry& model) {
  if (dialect == Dialect::kAnthropic) {
    return {{"type", "model"}, {"id", model.name}, {"display_name", model.name},
            {"created_at", utc_time(model.created)}};
  }
  return {{"id", model.name}, {"object", "model"}, {"created", model.created}, {"owned_by", "torpor"},
          {"context_length", model.context}, {"max_model_len", model.context}};
}

}  // namespace

std::string utc_time(int64_t seconds) {
  const std::time_t time = seconds;
  std::tm fields{};
  gmtime_r(&time, &fields);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &fields);
  return text;
}

int64_t model_time(const std::filesystem::path& dir) {
  std::error_code error;
  const bool file = std::filesystem::is_regular_file(dir, error);
  const auto time = std::filesystem::last_write_time(file ? dir : dir / "config.json", error);
  if (error) return 0;
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::file_clock::to_sys(time).time_since_epoch()).count();
}

ModelEntry find_model(TurnRunner& runner, const std::string& name) {
  const auto models = runner.models();
  const auto found = std::find_if(models.begin(), models.end(), [&](const ModelEntry& m) { return m.name == name; });
  if (found == models.end()) {
    throw Failure(Failure::Kind::kNotFound, "There is no model '" + name + "'; /v1/models lists what there is.",
                  "model");
  }
  return *found;
}

void answer_models(const HttpRequest& http, TurnRunner& runner, HttpResponse& response) {
  const Dialect dialect = dialect_of(http);
  Json list = Json::array();
  for (const ModelEntry& model : runner.models()) list.push_back(entry(dialect, model));
  Json body{{"object", "list"}, {"data", list}};
  if (dialect == Dialect::kAnthropic) {
    body = {{"data", list}, {"has_more", false}};
    body["first_id"] = list.empty() ? Json() : list.front()["id"];
    body["last_id"] = list.empty() ? Json() : list.back()["id"];
  }
  response.whole(200, {{"content-type", "application/json"}}, to_text(body));
}

void answer_model(const HttpRequest& http, const std::string& name, TurnRunner& runner, HttpResponse& response) {
  response.whole(200, {{"content-type", "application/json"}},
                 to_text(entry(dialect_of(http), find_model(runner, name))));
}

}  // namespace torpor::server
