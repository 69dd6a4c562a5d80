// The HTTP edge, from raw sockets.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <functional>
#include <future>
#include <mutex>
#include <thread>

#include "server/http_edge.h"
#include "torpor/error.h"

namespace torpor::server {
namespace {

using namespace std::chrono_literals;

/// A handler of a test's own.
class Handler : public HttpHandler {
 public:
  explicit Handler(std::function<void(const HttpRequest&, HttpResponse&)> body) : body_(std::move(body)) {}
  void handle(const HttpRequest& request, HttpResponse& response) override { body_(request, response); }

 private:
  std::function<void(const HttpRequest&, HttpResponse&)> body_;
};

/// Says method, path, query and body back.
void echo(const HttpRequest& request, HttpResponse& response) {
  if (request.refused) return response.whole(request.refused, {}, "refused");
  response.whole(200, {{"content-type", "text/plain"}},
                 request.method + " " + request.path + " " + request.query + " " + request.body);
}

void wait_until_gone(const HttpResponse& response) {
  while (!response.gone()) std::this_thread::sleep_for(1ms);
}

/// A connection that sends what it is told to.
class Client {
 public:
  explicit Client(uint16_t port) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0)
      throw std::runtime_error("can't connect");
  }
  explicit Client(const std::filesystem::path& path) : fd_(socket(AF_UNIX, SOCK_STREAM, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.string().copy(address.sun_path, sizeof address.sun_path - 1);
    if (connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0)
      throw std::runtime_error("can't connect");
  }
  Client(Client&& other) noexcept : fd_(std::exchange(other.fd_, -1)), unread_(std::move(other.unread_)) {}
  ~Client() { leave(); }

  void leave() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }
  void half_close() { shutdown(fd_, SHUT_WR); }
  /// False: the server has closed the connection.
  bool send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return false;
      bytes.remove_prefix(sent);
    }
    return true;
  }
  void get(std::string_view path, std::string_view headers = {}) {
    send("GET " + std::string(path) + " HTTP/1.1\r\nhost: x\r\n" + std::string(headers) + "\r\n");
  }
  void post(std::string_view path, std::string_view body) {
    send("POST " + std::string(path) + " HTTP/1.1\r\nhost: x\r\ncontent-length: " + std::to_string(body.size()) +
         "\r\n\r\n");
    send(body);
  }

  /// Reads up to the end of `mark`, which it includes; less when the server closes first.
  std::string read_to(std::string_view mark) {
    while (unread_.find(mark) == std::string::npos) {
      if (!receive()) return std::exchange(unread_, {});
    }
    return take(unread_.find(mark) + mark.size());
  }
  std::string read_bytes(size_t count) {
    while (unread_.size() < count) {
      if (!receive()) break;
    }
    return take(std::min(count, unread_.size()));
  }
  std::string read_to_close() {
    while (receive()) {
    }
    return std::exchange(unread_, {});
  }
  struct Answer {
    int status = 0;
    std::string head, body;
  };
  /// An answer with a content-length.
  Answer answer() {
    Answer got;
    got.head = read_to("\r\n\r\n");
    if (got.head.size() < 12) return got;
    got.status = std::stoi(got.head.substr(9, 3));
    const size_t length = got.head.find("content-length: ");
    if (length != std::string::npos) got.body = read_bytes(std::stoul(got.head.substr(length + 16)));
    return got;
  }

 private:
  bool receive() {
    char buffer[65536];
    const ssize_t got = recv(fd_, buffer, sizeof buffer, 0);
    if (got <= 0) return false;
    unread_.append(buffer, got);
    return true;
  }
  std::string take(size_t count) {
    std::string taken = unread_.substr(0, count);
    unread_.erase(0, count);
    return taken;
  }

  int fd_;
  std::string unread_;
};

HttpEdgeOptions options() {
  HttpEdgeOptions options;
  options.port = 0;
  return options;
}

struct Edge {
  explicit Edge(std::function<void(const HttpRequest&, HttpResponse&)> body, HttpEdgeOptions given = options())
      : handler(std::move(body)), edge(given, handler) {}
  Client client() const { return Client(edge.port()); }

  Handler handler;
  HttpEdge edge;
};

TEST(HttpEdge, AnswersOneRequestAfterTheOtherOnAConnection) {
  Edge edge(echo);
  Client client = edge.client();
  client.get("/a%20b?c=d");
  EXPECT_EQ(client.answer().body, "GET /a%20b c=d ");
  client.post("/e", "body");
  const auto second = client.answer();
  EXPECT_EQ(second.status, 200);
  EXPECT_EQ(second.body, "POST /e  body");
  EXPECT_NE(second.head.find("date: "), std::string::npos);
}

TEST(HttpEdge, AnswersPipelinedRequestsInTheirOrder) {
  Edge edge(echo);
  Client client = edge.client();
  std::string all;
  for (int i = 0; i < 20; ++i) all += "GET /" + std::to_string(i) + " HTTP/1.1\r\nhost: x\r\n\r\n";
  client.send(all);
  for (int i = 0; i < 20; ++i) EXPECT_EQ(client.answer().body, "GET /" + std::to_string(i) + "  ");
}

TEST(HttpEdge, StreamsWithoutBufferingByProxiesAndEndsThem) {
  Edge edge([](const HttpRequest&, HttpResponse& response) {
    response.begin(200, {{"content-type", "text/event-stream"}});
    EXPECT_TRUE(response.write("data: 1\n\n"));
    EXPECT_TRUE(response.write("data: 2\n\n"));
    response.end();
  });
  Client client = edge.client();
  client.get("/", "accept-encoding: gzip, br, zstd\r\n");
  const std::string head = client.read_to("\r\n\r\n");
  EXPECT_NE(head.find("x-accel-buffering: no"), std::string::npos);
  EXPECT_NE(head.find("cache-control: no-cache"), std::string::npos);
  EXPECT_EQ(head.find("content-encoding"), std::string::npos);
  std::string body = client.read_to("0\r\n\r\n");
  EXPECT_LT(body.find("data: 1"), body.find("data: 2"));
  client.get("/again");  // the connection lives on; read whole, as its handler may not meet a client that has gone
  EXPECT_NE(client.read_to("0\r\n\r\n").find("200"), std::string::npos);
}

TEST(HttpEdge, EachEventIsSentAtOnce) {
  std::promise<void> read;
  Edge edge([&](const HttpRequest&, HttpResponse& response) {
    response.begin(200, {});
    response.write("first");
    read.get_future().wait();
    response.write("second");
    response.end();
  });
  Client client = edge.client();
  client.get("/");
  client.read_to("first");
  read.set_value();
  EXPECT_NE(client.read_to("second").find("second"), std::string::npos);
}

TEST(HttpEdge, KeepsAStreamAliveBetweenWrites) {
  std::promise<void> done;
  Edge edge([&](const HttpRequest&, HttpResponse& response) {
    response.begin(200, {});
    response.keep_alive(": ping\n\n", 10ms);
    done.get_future().wait();
    response.end();
  });
  Client client = edge.client();
  client.get("/");
  client.read_to(": ping");
  client.read_to(": ping");
  done.set_value();
  EXPECT_EQ(client.read_to("0\r\n\r\n").substr(0, 2), "\n\n");
}

// The three phases of a turn, by the shape of its answer.
enum class Shape { kNothingSaid, kStreamBegun, kStreamWritten };

class Gone : public testing::TestWithParam<Shape> {
 protected:
  void expect_noticed(const std::function<void(Client&)>& leave, std::string_view more = {}) {
    std::promise<void> called, gone;
    std::atomic<int> calls{0};
    Edge edge([&](const HttpRequest&, HttpResponse& response) {
      if (calls++) return;
      if (GetParam() != Shape::kNothingSaid) response.begin(200, {});
      if (GetParam() == Shape::kStreamWritten) response.write("token");
      called.set_value();
      wait_until_gone(response);
      gone.set_value();
    });
    Client client = edge.client();
    client.send("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nbody" + std::string(more));
    called.get_future().wait();
    if (GetParam() == Shape::kStreamWritten) client.read_to("token");
    leave(client);
    EXPECT_EQ(gone.get_future().wait_for(60s), std::future_status::ready);
  }
};

TEST_P(Gone, AClientThatClosesIsNoticed) {
  expect_noticed([](Client& client) { client.leave(); });
}
TEST_P(Gone, AHalfClosedClientCountsAsGone) {
  expect_noticed([](Client& client) { client.half_close(); });
}
TEST_P(Gone, AClientThatPipelinedARequestIsNoticedToo) {
  expect_noticed([](Client& client) { client.leave(); }, "GET /next HTTP/1.1\r\nhost: x\r\n\r\n");
}
INSTANTIATE_TEST_SUITE_P(Phase, Gone, testing::Values(Shape::kNothingSaid, Shape::kStreamBegun, Shape::kStreamWritten));

TEST(HttpEdge, AWriteToAClientThatHasGoneSaysSo) {
  std::promise<bool> written;
  Edge edge([&](const HttpRequest&, HttpResponse& response) {
    response.begin(200, {});
    wait_until_gone(response);
    written.set_value(response.write("x"));
  });
  Client client = edge.client();
  client.get("/");
  client.read_to("\r\n\r\n");
  client.leave();
  EXPECT_FALSE(written.get_future().get());
}

TEST(HttpEdge, ASlowReaderHoldsUpItsOwnWriterOnly) {
  std::atomic<size_t> written{0};
  std::atomic<bool> over{false};
  const std::string piece(64 << 10, 'x');
  Edge edge([&](const HttpRequest& request, HttpResponse& response) {
    if (request.path != "/much") return echo(request, response);
    response.begin(200, {});
    while (written < (size_t(64) << 20) && response.write(piece)) written += piece.size();
    response.end();
    over = true;
  });
  Client slow = edge.client();
  slow.get("/much");
  slow.read_to("\r\n\r\n");
  // It stands still once the sockets' buffers are full.
  for (size_t before = 1; before != written;) {
    before = written;
    std::this_thread::sleep_for(50ms);
  }
  EXPECT_FALSE(over);
  Client other = edge.client();
  other.get("/other");
  EXPECT_EQ(other.answer().status, 200);
  EXPECT_EQ(slow.read_to("\r\n0\r\n\r\n").substr(0, 5), "10000");  // and goes on when it reads
  EXPECT_EQ(written, size_t(64) << 20);
}

TEST(HttpEdge, AReaderThatTakesNothingIsCutOff) {
  std::promise<void> cut;
  HttpEdgeOptions given = options();
  given.stall_timeout = 50ms;
  Edge edge(
      [&](const HttpRequest&, HttpResponse& response) {
        response.begin(200, {});
        const std::string piece(64 << 10, 'x');
        while (response.write(piece)) {
        }
        cut.set_value();
      },
      given);
  Client client = edge.client();
  client.get("/");
  EXPECT_EQ(cut.get_future().wait_for(60s), std::future_status::ready);
}

TEST(HttpEdge, ALongBodyIsRefusedBeforeItIsHeld) {
  HttpEdgeOptions given = options();
  given.max_body_bytes = 1000;
  Edge edge(echo, given);
  Client exact = edge.client();
  exact.post("/", std::string(1000, 'x'));
  EXPECT_EQ(exact.answer().status, 200);
  Client longer = edge.client();
  longer.post("/", std::string(1001, 'x'));
  EXPECT_EQ(longer.answer().status, 413);
  Client chunked = edge.client();
  chunked.send("POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3e9\r\n" + std::string(1001, 'x') +
               "\r\n0\r\n\r\n");
  EXPECT_EQ(chunked.answer().status, 413);
  Client asks = edge.client();  // it waits for leave, so it has sent nothing
  asks.send("POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 1001\r\n\r\n");
  EXPECT_EQ(asks.answer().status, 413);
  Client much = edge.client();  // it reads the answer although it sends all first
  much.post("/", std::string(8 << 20, 'x'));
  EXPECT_EQ(much.answer().status, 413);
}

TEST(HttpEdge, BodiesTogetherAreBounded) {
  HttpEdgeOptions given = options();
  given.max_bodies_bytes = 1500;
  std::promise<void> called, leave;
  Edge edge(
      [&](const HttpRequest& request, HttpResponse& response) {
        if (request.path == "/first") {
          called.set_value();
          leave.get_future().wait();
        }
        echo(request, response);
      },
      given);
  Client first = edge.client();
  first.post("/first", std::string(1000, 'x'));
  called.get_future().wait();
  Client second = edge.client();
  second.post("/second", std::string(1000, 'x'));
  EXPECT_EQ(second.answer().status, 503);
  leave.set_value();
  EXPECT_EQ(first.answer().status, 200);
  Client third = edge.client();  // the first body is given back once its answer is complete
  int status = 0;
  do {
    third.post("/third", std::string(1000, 'x'));
    status = third.answer().status;
  } while (status == 503);
  EXPECT_EQ(status, 200);
}

TEST(HttpEdge, HugeHeadersAreRefused) {
  Edge edge(echo);
  Client one = edge.client();
  one.get("/", "x-big: " + std::string(1 << 20, 'x') + "\r\n");
  EXPECT_EQ(one.answer().status, 431);
  Client many = edge.client();
  std::string headers;
  for (int i = 0; i < 1000; ++i) headers += "x-" + std::to_string(i) + ": y\r\n";
  many.get("/", headers);
  EXPECT_EQ(many.answer().status, 431);
}

TEST(HttpEdge, AHeadIsAnsweredUpToItsLimitAndNoByteFurther) {
  Edge edge(echo);
  const size_t most = HttpEdgeOptions().max_head_bytes;
  const std::string start = "GET / HTTP/1.1\r\nhost: x\r\nx-big: ", end = "\r\n\r\n";
  for (const auto& [length, status] : {std::pair(most, 200), {most + 1, 431}, {most + 4464, 431}, {most + 60000, 431}}) {
    Client client = edge.client();
    client.send(start + std::string(length - start.size() - end.size(), 'x') + end);
    EXPECT_EQ(client.answer().status, status) << length;
  }
}

TEST(HttpEdge, NoHttpIsRefused) {
  Edge edge(echo);
  for (const char* text : {"\x16\x03\x01\x02\r\n\r\n", "GET\r\n\r\n", "GET / HTTP/9.9\r\n\r\n",
                           "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
                           "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx"}) {
    Client client = edge.client();
    client.send(text);
    EXPECT_EQ(client.answer().status, 400) << text;
    EXPECT_EQ(client.read_to_close(), "") << text;
  }
}

TEST(HttpEdge, AHeadThatComesSlowlyIsCutOff) {
  HttpEdgeOptions given = options();
  given.head_timeout = 100ms;
  Edge edge(echo, given);
  Client client = edge.client();
  client.send("GET / HTTP/1.1\r\n");
  while (client.send("x: y\r\n")) std::this_thread::sleep_for(10ms);  // each byte in time, the head never
  Client again = edge.client();
  again.get("/one");
  EXPECT_EQ(again.answer().status, 200);
  again.send("GET / HT");  // a later head too
  EXPECT_EQ(again.read_to_close(), "");
}

TEST(HttpEdge, ABodyThatComesSlowlyIsRefused) {
  HttpEdgeOptions given = options();
  given.body_timeout = 100ms;
  Edge edge(echo, given);
  Client client = edge.client();
  client.send("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nx");
  EXPECT_EQ(client.answer().status, 408);
}

TEST(HttpEdge, AnIdleConnectionIsClosedAndABusyOneIsNot) {
  HttpEdgeOptions given = options();
  given.idle_timeout = 100ms;
  std::promise<void> leave;
  Edge edge(
      [&](const HttpRequest& request, HttpResponse& response) {
        if (request.path == "/long") leave.get_future().wait();
        echo(request, response);
      },
      given);
  Client busy = edge.client();
  busy.get("/long");
  Client used = edge.client(), fresh = edge.client();
  used.get("/");
  EXPECT_EQ(used.answer().status, 200);
  EXPECT_EQ(used.read_to_close(), "");
  EXPECT_EQ(fresh.read_to_close(), "");
  leave.set_value();
  EXPECT_EQ(busy.answer().status, 200);
}

TEST(HttpEdge, ByDefaultAnIdleConnectionLivesLongerThanAProxysPool) { EXPECT_GE(HttpEdgeOptions().idle_timeout, 75s); }

TEST(HttpEdge, OneConnectionTooManyIsToldSo) {
  HttpEdgeOptions given = options();
  given.max_connections = 2;
  Edge edge(echo, given);
  Client first = edge.client(), second = edge.client();
  first.get("/");
  EXPECT_EQ(first.answer().status, 200);
  second.get("/");
  EXPECT_EQ(second.answer().status, 200);
  EXPECT_EQ(edge.edge.connections(), 2u);
  Client third = edge.client();
  EXPECT_EQ(third.answer().status, 503);
}

TEST(HttpEdge, OneRequestTooManyIsToldSo) {
  HttpEdgeOptions given = options();
  given.max_workers = 1;
  std::promise<void> called, leave;
  Edge edge(
      [&](const HttpRequest& request, HttpResponse& response) {
        called.set_value();
        leave.get_future().wait();
        echo(request, response);
      },
      given);
  Client first = edge.client();
  first.get("/");
  called.get_future().wait();
  Client second = edge.client();
  second.get("/");
  const auto refused = second.answer();
  EXPECT_EQ(refused.status, 503);
  EXPECT_NE(refused.head.find("retry-after: 1"), std::string::npos);
  leave.set_value();
  EXPECT_EQ(first.answer().status, 200);
}

TEST(HttpEdge, TwoHundredIdleStreamsKeepNobodyWaiting) {
  std::atomic<int> open{0};
  std::promise<void> leave;
  const std::shared_future<void> left = leave.get_future().share();
  Edge edge([&](const HttpRequest& request, HttpResponse& response) {
    if (request.path != "/stream") return echo(request, response);
    ++open;
    response.begin(200, {});
    left.wait();
    response.end();
  });
  std::vector<Client> streams;
  for (int i = 0; i < 200; ++i) {
    streams.push_back(edge.client());
    streams.back().get("/stream");
  }
  for (auto& stream : streams) EXPECT_NE(stream.read_to("\r\n\r\n").find("200 OK"), std::string::npos);
  EXPECT_EQ(open, 200);
  Client client = edge.client();
  client.get("/health");
  EXPECT_EQ(client.answer().status, 200);
  leave.set_value();
  for (auto& stream : streams) EXPECT_EQ(stream.read_to("0\r\n\r\n"), "0\r\n\r\n");
}

TEST(HttpEdge, AHandlerThatThrowsOrSaysNothingGives500) {
  Edge edge([](const HttpRequest& request, HttpResponse&) {
    if (request.path == "/throws") throw Error(ErrorCode::kInternal, "a defect");
  });
  Client client = edge.client();
  client.get("/throws");
  EXPECT_EQ(client.answer().status, 500);
  client.get("/says-nothing");
  EXPECT_EQ(client.answer().status, 500);
}

TEST(HttpEdge, AStreamThatWasNotEndedIsCutNotEnded) {
  Edge edge([](const HttpRequest&, HttpResponse& response) {
    response.begin(200, {});
    response.write("part");
    throw std::runtime_error("a defect");
  });
  Client client = edge.client();
  client.get("/");
  EXPECT_EQ(client.read_to_close().find("0\r\n\r\n"), std::string::npos);
}

TEST(HttpEdge, AnAnswerOutOfOrderIsADefect) {
  std::promise<int> caught;
  Edge edge([&](const HttpRequest&, HttpResponse& response) {
    int count = 0;
    const auto expect_defect = [&](auto call) {
      try {
        call();
      } catch (const Error& e) {
        count += e.code() == ErrorCode::kInternal;
      }
    };
    expect_defect([&] { response.write("x"); });
    expect_defect([&] { response.end(); });
    expect_defect([&] { response.whole(200, {{"bad\nname", "x"}}, ""); });
    expect_defect([&] { response.whole(200, {{"name", "a\r\nset-cookie: b"}}, ""); });
    expect_defect([&] { response.whole(99, {}, ""); });
    response.whole(204, {}, "");
    expect_defect([&] { response.whole(200, {}, ""); });
    expect_defect([&] { response.begin(200, {}); });
    caught.set_value(count);
  });
  Client client = edge.client();
  client.get("/");
  EXPECT_EQ(client.answer().status, 204);
  EXPECT_EQ(caught.get_future().get(), 7);
}

TEST(HttpEdge, DrainsIdleConnectionsAtOnceAndOthersWhenTheyAreAnswered) {
  std::promise<void> called, leave;
  Edge edge([&](const HttpRequest& request, HttpResponse& response) {
    if (request.path != "/long") return echo(request, response);
    response.begin(200, {});
    response.write("begun");
    called.set_value();
    leave.get_future().wait();
    response.write("done");
    response.end();
  });
  Client fresh = edge.client(), used = edge.client(), busy = edge.client();
  used.get("/");
  used.answer();
  busy.get("/long");
  called.get_future().wait();
  EXPECT_FALSE(edge.edge.drain(10ms));
  EXPECT_EQ(fresh.read_to_close(), "");
  EXPECT_EQ(used.read_to_close(), "");
  EXPECT_THROW(edge.client(), std::runtime_error);  // nobody listens
  leave.set_value();
  EXPECT_TRUE(edge.edge.drain(60s));
  EXPECT_NE(busy.read_to_close().find("done\r\n0\r\n\r\n"), std::string::npos);
}

TEST(HttpEdge, TheDestructorCutsWhatIsOpen) {
  std::promise<void> called;
  std::optional<Edge> edge;
  edge.emplace([&](const HttpRequest&, HttpResponse& response) {
    response.begin(200, {});
    called.set_value();
    wait_until_gone(response);
  });
  Client client = edge->client();
  client.get("/");
  called.get_future().wait();
  edge.reset();
  EXPECT_EQ(client.read_to_close().find("0\r\n\r\n"), std::string::npos);
}

TEST(HttpEdge, AUnixSocketIsForItsOwnerAndGoesWithTheServer) {
  const auto path = std::filesystem::temp_directory_path() / ("torpor-edge-" + std::to_string(getpid()));
  std::filesystem::remove(path);
  HttpEdgeOptions given;
  given.host.clear();
  given.socket = path;
  std::string peer;
  {
    Edge edge(
        [&](const HttpRequest& request, HttpResponse& response) {
          peer = request.peer;
          echo(request, response);
        },
        given);
    struct stat file{};
    ASSERT_EQ(stat(path.c_str(), &file), 0);
    EXPECT_EQ(file.st_mode & 0777, 0600u);
    Client client(path);
    client.get("/a");
    EXPECT_EQ(client.answer().body, "GET /a  ");
    EXPECT_EQ(peer, "unix");
    Handler other(echo);
    EXPECT_THROW(HttpEdge(given, other), Error);  // it is in use
  }
  EXPECT_FALSE(std::filesystem::exists(path));
  {
    // One that a killed server has left is replaced.
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.string().copy(address.sun_path, sizeof address.sun_path - 1);
    ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    close(fd);
    Edge edge(echo, given);
    Client client(path);
    client.get("/b");
    EXPECT_EQ(client.answer().status, 200);
  }
  std::ofstream(path) << "somebody's";
  Handler handler(echo);
  EXPECT_THROW(HttpEdge(given, handler), Error);
  EXPECT_TRUE(std::filesystem::exists(path));
  std::filesystem::remove(path);
}

TEST(HttpEdge, AForkedChildLeavesTheServerToItsParent) {
  std::optional<Edge> edge(std::in_place, echo);
  const pid_t child = fork();
  if (child == 0) {
    edge.reset();
    _exit(0);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  Client client = edge->client();
  client.get("/");
  EXPECT_EQ(client.answer().status, 200);
}

TEST(HttpEdge, APortInUseIsSaidInASentence) {
  Edge edge(echo);
  HttpEdgeOptions given;
  given.port = edge.edge.port();
  Handler handler(echo);
  try {
    HttpEdge second(given, handler);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(std::string(e.what()).find("can't listen on 127.0.0.1:" + std::to_string(given.port)), std::string::npos);
  }
}

TEST(HttpEdge, TheTargetsOwnAuthorityGoesBeforeTheHostHeader) {
  Edge edge([](const HttpRequest& request, HttpResponse& response) {
    response.whole(200, {}, std::string(request.header("host").value_or("none")) + request.path);
  });
  Client client = edge.client();
  client.send("GET http://evil.example/a HTTP/1.1\r\nhost: localhost\r\n\r\n");
  EXPECT_EQ(client.answer().body, "evil.example/a");
}

}  // namespace
}  // namespace torpor::server
