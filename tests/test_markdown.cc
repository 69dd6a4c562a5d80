/// What `torpor chat` shows of the Markdown that a model writes. `scripts/make-goldens-markdown` asks markdown-it-py.

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/markdown.h"

namespace torpor::cli {
namespace {

/// All of it, with "{}" for the plain style and "{1}", "{1;4}" for others.
std::string shown(const std::string& text) {
  MarkdownStream stream;
  std::string out = stream.feed(text);
  out += stream.finish();
  for (size_t at = 0; (at = out.find("\x1b[0", at)) != out.npos;) {
    const size_t end = out.find('m', at);
    const std::string codes = end > at + 4 ? out.substr(at + 4, end - at - 4) : "";
    out.replace(at, end + 1 - at, "{" + codes.substr(codes.starts_with(';')) + "}");
  }
  return out;
}

/// The texts of one style each, with their styles, as scripts/make-goldens-markdown has them.
nlohmann::json parts(const std::string& text) {
  nlohmann::json list = nlohmann::json::array();
  std::string rest = "{}" + shown(text);
  while (!rest.empty()) {
    const std::string style = rest.substr(1, rest.find('}') - 1);
    const size_t next = std::min(rest.find('{', 1), rest.size());
    const std::string words = rest.substr(style.size() + 2, next - style.size() - 2);
    rest.erase(0, next);
    if (words.empty()) continue;
    if (!list.empty() && list.back()[0] == style) {
      list.back()[1] = list.back()[1].get<std::string>() + words;
    } else {
      list.push_back({style, words});
    }
  }
  return list;
}

TEST(Markdown, EmphasisCodeHeadingsAndListsHaveAStyleInPlaceOfTheirMarks) {
  EXPECT_EQ(shown("a **bold** b *it* c ***both*** d __x__ _y_.\n"), "a {1}bold{} b {3}it{} c {1;3}both{} d {1}x{} {3}y{}.\n");
  EXPECT_EQ(shown("**bold *it***, *it **b***"), "{1}bold {1;3}it{1}{}, {3}it {1;3}b{3}{}");
  EXPECT_EQ(shown("`a*b*` ``x ` y`` `` `z` ``"), "{36}a*b*{} {36}x ` y{} {36}`z`{}");
  EXPECT_EQ(shown("# One *two*\nplain\n### Three"), "{1;4}One {1;3;4}two{1;4}{}\nplain\n{1}Three{}");
  EXPECT_EQ(shown("- one\n  * two\n+ three\n1. four\n"), "\u2022 one\n  \u2022 two\n\u2022 three\n1. four\n");
  EXPECT_EQ(shown("* **a**: b\n*c*\n"), "\u2022 {1}a{}: b\n{3}c{}\n");
}

TEST(Markdown, FencedCodeIsShownAsItIsWritten) {
  EXPECT_EQ(shown("```py\n# *a*\n\n  - `b`\n```\n*c*"), "{2}```py{}\n{36}# *a*{}\n\n{36}  - `b`{}\n{2}```{}\n{3}c{}");
  EXPECT_EQ(shown("~~~~\n~~~\n```\n~~~~~ \n"), "{2}~~~~{}\n{36}~~~{}\n{36}```{}\n{2}~~~~~ {}\n");
  EXPECT_EQ(shown("```\nnever closed"), "{2}```{}\n{36}never closed{}");
  EXPECT_EQ(shown("```x``` y"), "{36}x{} y");
}

TEST(Markdown, WhatIsNoMarkdownStaysAsItIs) {
  for (const std::string text : {
           "2 * 3 * 4, 2*3*4, 2**3**4, a_b_c, snake_case_name, f(*args, **kwargs)", "an *open one", "`open, too", "** a **", "****",
           "#hash #1", "####### seven", "-5", "--- ---\n---\n***\n* * *\n- - -\n", "| a | b |\n|---|---|\n", "> quoted", "[a](b)",
           "C:\\dir \\( x \\)", "caf\u00e9 \u2022\n\n\n", "   ", "-", "\\", "*\n*", "- "}) {
    EXPECT_EQ(shown(text), text);
  }
  EXPECT_EQ(shown("\\*a\\* \\_b\\_ \\`c\\` \\\\*d*"), "*a* _b_ `c` \\\\{3}d{}");
  EXPECT_EQ(shown("*a \\* b* **c `**` d**"), "{3}a * b{} {1}c {1;36}**{1} d{}");
}

TEST(Markdown, TextIsShownAsSoonAsItIsDecidedAndASpanIsNotWaitedForPastItsBound) {
  MarkdownStream stream;
  EXPECT_EQ(stream.feed("Plain wor"), "Plain wor");
  EXPECT_EQ(stream.feed("ds and **bo"), "ds and ");
  EXPECT_EQ(stream.feed("ld*"), "");
  EXPECT_EQ(stream.feed("* and"), "\x1b[0;1mbold\x1b[0m and");
  EXPECT_EQ(stream.feed(" *open\nnext"), " *open\nnext");
  EXPECT_EQ(stream.feed("\n## He"), "\n\x1b[0;1;4mHe");
  EXPECT_EQ(stream.finish(), "\x1b[0m");
  const std::string open = "*" + std::string(MarkdownStream::kLongestSpan - 2, 'x');
  EXPECT_EQ(stream.feed(open), "");
  EXPECT_EQ(stream.feed("y"), open + "y");
  EXPECT_EQ(stream.feed("* z"), "* z");
}

/// Texts cut at each place, and into single bytes.
TEST(Markdown, WhereATextIsCutChangesNothing) {
  const std::string text =
      "# A *b*\n\n- `c` **d *e***\n  1. f_g_ __h__\n```cpp\n  int *p; // `x`\n ```\n~~~\n* * *\n**open\n``i ` j`` \\*k\\* 2*3*4\n-\n- ";
  const std::string whole = shown(text);
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    MarkdownStream stream, reference;
    std::string out = stream.feed(text.substr(0, cut));
    out += stream.feed(text.substr(cut));
    std::string expected = reference.feed(text);
    EXPECT_EQ(out + stream.finish(), expected + reference.finish()) << cut;
  }
  MarkdownStream stream, reference;
  std::string out, expected = reference.feed(text);
  for (const char byte : text) out += stream.feed({&byte, 1});
  EXPECT_EQ(out + stream.finish(), expected + reference.finish());
}

TEST(Markdown, TextAndStylesAreThoseOfMarkdownItPy) {
  std::ifstream file(TORPOR_SOURCE_DIR "/tests/goldens/text/markdown.json");
  const auto cases = nlohmann::json::parse(file);
  ASSERT_GT(cases.size(), 30u);
  for (const auto& one : cases) EXPECT_EQ(parts(one.at("markdown")), one.at("shown")) << one.at("markdown");
}

}  // namespace
}  // namespace torpor::cli
