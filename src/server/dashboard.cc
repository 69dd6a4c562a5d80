#include "server/dashboard.h"

#include <algorithm>
#include <iterator>

#include "base/hash.h"

namespace torpor::server {
namespace {

struct DashboardFile {
  std::string_view path, name, type;
};

constexpr DashboardFile kFiles[] = {
    {"/", "index.html", "text/html; charset=utf-8"},
    {"/dashboard/app.js", "app.js", "text/javascript; charset=utf-8"},
    {"/dashboard/style.css", "style.css", "text/css; charset=utf-8"},
    {"/dashboard/icon.svg", "icon.svg", "image/svg+xml"},
};

const DashboardFile* file_of(std::string_view path) {
  const auto file = std::ranges::find(kFiles, path, &DashboardFile::path);
  return file == std::end(kFiles) ? nullptr : file;
}

constexpr const char* kPolicy =
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'";

}  // namespace

bool is_dashboard_path(std::string_view path) { return file_of(path) != nullptr; }

void answer_dashboard(const HttpRequest& request, HttpResponse& response) {
  const DashboardFile& file = *file_of(request.path);
  const std::string_view bytes = dashboard_file(file.name);
  std::string tag(1, '"');
  tag.append(hash_hex(bytes)).push_back('"');
  HttpHeaders headers{{"content-type", std::string(file.type)},
                      {"etag", tag},
                      {"cache-control", "no-cache"},
                      {"content-security-policy", kPolicy},
                      {"referrer-policy", "no-referrer"},
                      {"x-content-type-options", "nosniff"}};
  if (request.header("if-none-match") == tag) return response.whole(304, std::move(headers), {});
  response.whole(200, std::move(headers), std::string(bytes));
}

}  // namespace torpor::server
