// HTTP as plain data: headers, query parameters, the parts of a path.
#include <gtest/gtest.h>

#include "recording_response.h"
#include "server/http.h"

namespace torpor::server {
namespace {

TEST(HttpRequest, FindsTheFirstHeaderOfAName) {
  HttpRequest request;
  request.headers = {{"host", "a"}, {"accept", "x"}, {"accept", "y"}};
  EXPECT_EQ(request.header("accept"), "x");
  EXPECT_EQ(request.header("origin"), std::nullopt);
}

TEST(HttpRequest, DecodesAQueryParameter) {
  HttpRequest request;
  request.query = "beta=true&name=a+b%2Fc%&empty=&flag&twice=1&twice=2";
  EXPECT_EQ(request.parameter("beta"), "true");
  EXPECT_EQ(request.parameter("name"), "a b/c%");
  EXPECT_EQ(request.parameter("empty"), "");
  EXPECT_EQ(request.parameter("flag"), "");
  EXPECT_EQ(request.parameter("twice"), "1");
  EXPECT_EQ(request.parameter("nam"), std::nullopt);
  EXPECT_EQ(HttpRequest{}.parameter("any"), std::nullopt);
}

TEST(HttpRequest, SplitsThePathBeforeItDecodes) {
  HttpRequest request;
  const auto parts = [&](std::string path) {
    request.path = std::move(path);
    return request.path_parts();
  };
  using Parts = std::vector<std::string>;
  EXPECT_EQ(parts("/v1/models/a%2Fb%20c"), (Parts{"v1", "models", "a/b c"}));
  EXPECT_EQ(parts("/v1/models/"), (Parts{"v1", "models"}));
  EXPECT_EQ(parts("/a//b"), (Parts{"a", "", "b"}));
  EXPECT_EQ(parts("/100%+1"), (Parts{"100%+1"}));
  EXPECT_EQ(parts("/"), Parts{});
}

TEST(RecordingResponse, KeepsAStreamUntilTheClientLeaves) {
  RecordingResponse response;
  response.leaves_after = 2;
  response.begin(200, {{"content-type", "text/event-stream"}});
  EXPECT_TRUE(response.write("a"));
  EXPECT_TRUE(response.write("b"));
  EXPECT_FALSE(response.gone());
  EXPECT_FALSE(response.write("c"));
  EXPECT_TRUE(response.gone());
  EXPECT_EQ(response.body, "ab");
  EXPECT_EQ(response.header("content-type"), "text/event-stream");
  EXPECT_THROW(response.whole(200, {}, ""), std::logic_error);
}

}  // namespace
}  // namespace torpor::server
