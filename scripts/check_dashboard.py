"""The dashboard in Chromium (scripts/check-dashboard): each view, each action, axe without violations, screenshots."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

MODEL = ".models/smollm2-135m"
PICTURES = {"Agent ada": "docs/dashboard-agent.png", "Requests": "docs/dashboard-requests.png"}
VIEWS = ["Chat", "Agents", "Now", "Memory and disk", "Requests", "Connect"]  # Chat first: it makes the agent


class Visit:
    """One browser's visit, and what it finds amiss."""

    def __init__(self, browser, url, scheme, width):
        self.base = url.split("/#")[0]
        self.context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        self.page = self.context.new_page()
        self.problems = []
        self.page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        self.page.on("console", lambda said: self.problems.append(f"console: {said.text}") if said.type == "error" else None)
        self.page.on("request", lambda request: self.problems.append(f"asks {request.url}")
                     if not request.url.startswith((self.base, "blob:")) else None)
        self.page.goto(url)

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def heading(self, name):
        self.page.get_by_role("heading", name=name, exact=True, level=2).wait_for()

    def check(self, name):
        """The view is there, fits, and is one that everybody can use."""
        self.heading(name)
        root = "document.documentElement"
        if self.page.evaluate(f"{root}.scrollWidth > {root}.clientWidth"):
            self.problems.append(f"{name} is wider than the window")
        for found in Axe().run(self.page).response["violations"]:
            self.problems.append(f"{name}: {found['id']}: {found['nodes'][0]['html'][:200]}")

    def views(self):
        for name in VIEWS:
            self.page.get_by_role("link", name=name, exact=True).click()
            self.heading(name)
            if name == "Chat":
                self.page.get_by_label("Longest answer").fill("24")
                self.page.get_by_label("Message").fill("Who keeps the lamp?")
                self.page.keyboard.press("Tab")
                self.page.keyboard.press("Enter")
                self.page.get_by_text("tokens cached").wait_for()
            if name == "Connect":
                self.test_clients()
            self.check(name)
            yield name
        self.page.get_by_role("link", name="Agents", exact=True).click()
        self.page.get_by_role("link", name="ada", exact=True).click()
        self.check("Agent ada")
        yield "Agent ada"

    def test_clients(self):
        tests = self.page.get_by_role("button", name=re.compile("^Test: "))
        for i in range(tests.count()):
            tests.nth(i).click()
        outcomes = self.page.locator("section [role=status]")
        while not all(re.search("answers|fails", text) for text in outcomes.all_text_contents()):
            self.page.wait_for_timeout(100)
        self.problems += [text for text in outcomes.all_text_contents() if "fails" in text]

    def actions(self):
        """On a fork of ada's; then nothing is left of it."""
        self.press("Fork")
        self.heading("Agent ada-fork")
        self.press("Sleep")
        self.press("Wake")
        self.press("Pin")
        self.page.get_by_role("button", name="Unpin").wait_for()
        self.page.get_by_label("New name").fill("eve")
        self.press("Rename")
        self.heading("Agent eve")
        self.page.get_by_label("Tokens to keep").fill("5")
        self.press("Rewind")
        self.page.get_by_text(re.compile("^5 tokens")).wait_for()
        with self.page.expect_download() as download:
            self.press("Export")
        assert download.value.suggested_filename == "eve.safetensors"
        self.page.once("dialog", lambda dialog: dialog.accept())
        self.press("Delete")
        self.heading("Agents")
        assert self.page.get_by_role("link", name="eve", exact=True).count() == 0

    def sign_out_and_in(self, key):
        before = list(self.problems)
        self.press("Sign out")
        self.heading("Sign in")
        self.page.get_by_label("Key").fill("wrong")
        self.page.keyboard.press("Enter")
        self.check("Sign in")
        self.page.get_by_label("Key").fill(key)
        self.page.keyboard.press("Enter")
        self.heading("Agents")
        self.problems = before + [problem for problem in self.problems[len(before):] if "401" not in problem]


def visit_all(url):
    problems = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme, width in [("light", 1100), ("dark", 390)]:
            visit = Visit(browser, url, scheme, width)
            visit.heading("Agents")
            assert "key" not in visit.page.url
            for name in visit.views():
                if scheme == "light" and name in PICTURES:
                    visit.page.screenshot(path=PICTURES[name], full_page=True)
            visit.actions()
            visit.sign_out_and_in(url.split("#key=")[1])
            problems += [f"{scheme}, {width} wide: {problem}" for problem in visit.problems]
            visit.context.close()
        browser.close()
    return problems


def main():
    with tempfile.TemporaryDirectory() as directory:
        keys = Path(directory, "api-keys")
        server = subprocess.Popen([sys.argv[1], "serve", "--model", MODEL, "--port", "0", "--store", Path(directory, "store"),
                                   "--api-key-file", keys, "--log", Path(directory, "log")], stdout=subprocess.PIPE, text=True)
        try:
            line = next(line for line in server.stdout if line.startswith("Dashboard"))
            problems = visit_all(line.split(": ", 1)[1].strip())
        finally:
            server.terminate()
            server.wait()
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems; screenshots in {', '.join(PICTURES.values())}")
    return 1 if problems else 0


sys.exit(main())
