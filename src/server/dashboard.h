#pragma once
/// The dashboard: a page of the browser's, from files inside the program. It asks nobody but this server, and it knows
/// nothing: what it shows comes from /torpor/v1, with the key that its user signs in with.

#include <string_view>

#include "server/http.h"

namespace torpor::server {

/// The bytes of a file of src/server/dashboard; empty when there is none of that name.
std::string_view dashboard_file(std::string_view name);

/// Whether `path` is the page's or one of its files'.
bool is_dashboard_path(std::string_view path);

/// Answers GET of such a path. Nothing may be loaded from elsewhere, nor any script or style that stands in the page.
void answer_dashboard(const HttpRequest& request, HttpResponse& response);

}  // namespace torpor::server
