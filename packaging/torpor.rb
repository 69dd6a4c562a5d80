# A Homebrew formula. Never run yet: nothing of Torpor was ever built on a Mac. The URL and its digest are a release's.
class Torpor < Formula
  desc "LLM agents that sleep to disk and wake in milliseconds"
  homepage "https://github.com/OWNER/torpor"
  url "https://github.com/OWNER/torpor/releases/download/v0.1.0/torpor-0.1.0-darwin-arm64.tar.gz"
  sha256 "0000000000000000000000000000000000000000000000000000000000000000"
  license "Apache-2.0"
  depends_on arch: :arm64
  depends_on macos: :sonoma

  def install
    bin.install "bin/torpor"
    lib.install "lib/torpor" # where bin/torpor looks: ../lib/torpor
  end

  service do
    run [opt_bin/"torpor", "serve", "--config", etc/"torpor/serve.toml"]
    keep_alive true
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/torpor --version")
  end
end
