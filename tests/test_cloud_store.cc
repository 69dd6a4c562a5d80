/// The client of object stores where no store answers: what it says then, cancellation, and forked processes. With
/// stores that answer it is tested through the program (test_remote.py).

#include "remote/cloud_store.h"

#include <gtest/gtest.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <thread>

#include "forked_child.h"

namespace torpor::remote {
namespace {

/// Takes connections, and never says anything.
class SilentServer {
 public:
  SilentServer() : socket_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    auto* const any = reinterpret_cast<sockaddr*>(&address);
    EXPECT_EQ(::bind(socket_, any, size), 0);
    EXPECT_EQ(::listen(socket_, 64), 0);
    EXPECT_EQ(::getsockname(socket_, any, &size), 0);
    port_ = ntohs(address.sin_port);
  }
  ~SilentServer() { ::close(socket_); }
  int port() const { return port_; }

 private:
  const int socket_;
  int port_;
};

class CloudStoreTest : public ::testing::Test {
 protected:
  CloudStoreTest() {
    ::setenv("AWS_ACCESS_KEY_ID", "KEY", 1);
    ::setenv("AWS_SECRET_ACCESS_KEY", "secret", 1);
    ::setenv("AWS_CONFIG_FILE", "/dev/null", 1);
    ::setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null", 1);
    ::setenv("AWS_ENDPOINT_URL", ("http://127.0.0.1:" + std::to_string(server_.port())).c_str(), 1);
    patience_.request_timeout = std::chrono::milliseconds(100);
    patience_.retries = 0;
  }

  static ErrorCode code_of(const std::function<void()>& call) {
    try {
      call();
    } catch (const Error& error) {
      return error.code();
    }
    ADD_FAILURE() << "nothing was thrown";
    return ErrorCode::kInternal;
  }

  SilentServer server_;
  CloudOptions patience_;
};

TEST_F(CloudStoreTest, AnAnswerThatDoesNotComeIsALostOne) {
  CloudStore store("s3://bucket/prefix", patience_);
  EXPECT_THROW(store.put("key", {}, Condition::absent()), LostAnswer);
  EXPECT_THROW(store.get("key", 8), LostAnswer);
  EXPECT_THROW(store.list(""), LostAnswer);
  EXPECT_THROW(store.remove("key"), LostAnswer);
}

TEST_F(CloudStoreTest, CancellingEndsCallsUnderWayAndLaterOnes) {
  CloudStore store("s3://bucket/prefix");
  std::vector<std::thread> threads;
  std::atomic<int> cancelled = 0;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] { cancelled += code_of([&] { store.head("key"); }) == ErrorCode::kCancelled; });
  }
  store.cancel();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(cancelled, 4);
  EXPECT_EQ(code_of([&] { store.head("key"); }), ErrorCode::kCancelled);
}

TEST_F(CloudStoreTest, AForkedProcessOpensItsOwnStores) {
  CloudStore store("s3://bucket/prefix", patience_);
  EXPECT_THROW(store.head("key"), LostAnswer);
  testing::ForkedChild child([&] {
    if (code_of([&] { store.head("key"); }) != ErrorCode::kInvalidArgument) throw std::runtime_error("the parent's");
    CloudStore own("s3://bucket/prefix", patience_);
    try {
      own.head("key");
    } catch (const LostAnswer&) {
      return;
    }
    throw std::runtime_error("its own");
  });
  EXPECT_EQ(child.first_part(), 0);
  EXPECT_EQ(child.end(), 0);
  EXPECT_THROW(store.head("key"), LostAnswer);
}

TEST_F(CloudStoreTest, AKeyThatIsNoPathIsRefused) {
  CloudStore store("s3://bucket/prefix", patience_);
  for (const char* key : {"", "/a", "a/", "a//b", "a/../b", "."}) {
    EXPECT_EQ(code_of([&] { store.head(key); }), ErrorCode::kInvalidArgument) << key;
  }
  EXPECT_EQ(code_of([&] { store.put("key", {}, Condition::of_tag("")); }), ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace torpor::remote
