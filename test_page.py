"""The page, in Debian's Chromium and, where it is there, in Firefox; both headless.

`python3 local.py test` leaves these out, and says so, where there is no Chromium.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from httpx import URL, Response
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import (
    element_to_be_clickable,
    visibility_of_element_located,
)
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

import local
from conftest import (
    HERE,
    TO_READ,
    Document,
    Service,
    Tables,
    parametrize,
    serving,
    soak,
    until,
)

# Of a network that the tests break, of refusals, and of ReDoc, which asks for its maker's logo.
USUAL_MESSAGES = ("net::ERR_", "status of 4", "status of 5", "redoc/logo-mini.svg")
LOGIN_FORM = """document.body.insertAdjacentHTML("beforeend",
    "<form><input name=user><input type=password id=login></form>")"""
LOGIN = "return document.getElementById('login').value"
LANGUAGES = {"en": "This secret was read", "ru": "Секрет уже прочитан"}

# --- A browser ------------------------------------------------------------------------------------


@contextmanager
def window(
    folder: Path, language: str = "en", width: int = 1000, profile: str = ""
) -> Iterator[Chrome]:
    """A browser with a profile of its own."""
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    profile_folder = folder / (profile or secrets.token_hex(4))
    arguments = f"""
        --headless=new --no-sandbox --disable-gpu --disable-background-networking --no-first-run
        --disable-component-update --disable-sync --disable-dev-shm-usage --password-store=basic
        --lang={language} --window-size={width},800 --user-data-dir={profile_folder}
    """
    for argument in arguments.split():
        options.add_argument(argument)
    preferences = {"intl.accept_languages": language, "download.default_directory": str(folder)}
    options.add_experimental_option("prefs", preferences)
    options.add_experimental_option("excludeSwitches", ["enable-automation"])  # it fills in nothing
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = Chrome(options, ChromeService(shutil.which("chromedriver") or "chromedriver"))
    if width < 500:  # a window cannot be that narrow; a telephone's screen can
        resize(browser, width)
    try:
        yield browser
        complain(browser)
    finally:
        browser.quit()


def complain(browser: Chrome) -> None:
    """Of an error on its console, or of another host that it has asked."""
    assert not [
        entry
        for entry in entries(browser, "browser")
        if entry["level"] in ("SEVERE", "WARNING")
        and not any(word in entry["message"] for word in USUAL_MESSAGES)
    ]
    assert asked_hosts(browser) <= {"127.0.0.1"}


def resize(browser: Chrome, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def entries(browser: Chrome, log: str) -> list[Document]:
    found: list[Document] = browser.get_log(log)  # type: ignore[no-untyped-call]  # no types here
    return found


def asked_hosts(browser: Chrome) -> set[str]:
    """The hosts of all requests but those that the page's policy blocked."""
    messages = [
        json.loads(entry["message"])["message"] for entry in entries(browser, "performance")
    ]
    blocked = {one["params"]["requestId"] for one in messages if one["params"].get("blockedReason")}
    sent = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    urls = [one["request"]["url"] for one in sent if one["requestId"] not in blocked]
    return {URL(url).host for url in urls if url.startswith("http")}


# Selenium's own half second between two looks would be most of a test.
waiting = partial(WebDriverWait, timeout=30, poll_frequency=0.05)


def seen(browser: Chrome, name: str) -> WebElement:
    """The element with this id, once it can be seen, on a page that fits its window."""
    element: WebElement = waiting(browser).until(visibility_of_element_located((By.ID, name)))
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    return element


def shown(browser: Chrome, name: str) -> WebElement:
    """The same, once it can be pressed, too."""
    element = seen(browser, name)
    waiting(browser).until_not(lambda one: one.find_elements(By.CSS_SELECTOR, "body.settling"))
    return element


def content(browser: Chrome, name: str) -> str:
    """What the element with this id says, once it can be seen."""
    element = shown(browser, name)
    return str(element.get_property("value") or element.text)


def says(browser: Chrome, *words: str) -> None:
    """Wait until the page shows one of these words."""
    body = (By.TAG_NAME, "body")
    waiting(browser).until(lambda one: any(word in one.find_element(*body).text for word in words))


def go(browser: Chrome, address: str) -> None:
    """As from another page: a new fragment alone would load nothing."""
    browser.get("about:blank")
    browser.get(address)


def fill_in(
    browser: Chrome, service: Service, secret: str | Path, passphrase: str = ""
) -> tuple[str, str]:
    """Create a secret on the page, of a text or of a file. Returns its link and receipt link."""
    go(browser, service.url)
    shown(browser, "passphrase").send_keys(passphrase)
    field = browser.find_element(By.ID, "file" if isinstance(secret, Path) else "secret")
    field.send_keys(str(secret))
    shown(browser, "create").click()
    return content(browser, "link"), content(browser, "receipt-link")


def reveal(browser: Chrome, url: str) -> None:
    go(browser, url)
    shown(browser, "open").click()
    shown(browser, "save")


def was_asked(browser: Chrome) -> bool:
    """Whether the browser itself has asked about leaving."""
    return any('"beforeunload"' in entry["message"] for entry in entries(browser, "performance"))


def set_offline(browser: Chrome, offline: bool) -> None:
    speed = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": offline, **speed})
    until(lambda: browser.execute_script("return navigator.onLine") is not offline)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with window(tmp_path_factory.mktemp("chromium")) as one:
        yield one


@pytest.fixture
def browser(chromium: Chrome, tmp_path: Path) -> Iterator[Chrome]:
    """A window of its own, in a browser that has forgotten the others: to start one takes long."""
    chromium.switch_to.new_window("window")
    chromium.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    try:
        yield chromium
        complain(chromium)
    finally:
        chromium.execute_cdp_cmd(
            "Storage.clearDataForOrigin", {"origin": "*", "storageTypes": "all"}
        )
        chromium.execute_cdp_cmd("Browser.resetPermissions", {})
        chromium.close()
        chromium.switch_to.window(*chromium.window_handles)


@contextmanager
def between(service: Service, meddle: Callable[[str, Response], Response | None]) -> Iterator[str]:
    """A proxy, by its address: what it answers when the service has; None: it hangs up."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            names = ("accept", "content-type", "idempotency-key")
            answer = meddle(
                self.path,
                service.request(
                    self.command,
                    self.path,
                    content=self.rfile.read(int(self.headers.get("content-length", 0))),
                    headers={name: self.headers[name] for name in names if name in self.headers},
                ),
            )
            if answer is None:
                return
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers["content-type"])
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_POST = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


class Firefox:
    """Firefox by Marionette, its own protocol: geckodriver is not in Debian."""

    def __init__(self, folder: Path) -> None:
        self.port = local.free_port()
        preferences = {"marionette.port": self.port, "remote.prefs.recommended": False}
        lines = (f'user_pref("{name}", {json.dumps(preferences[name])});' for name in preferences)
        (folder / "user.js").write_text("\n".join(lines))
        words = ("--headless", "--marionette", "--remote-allow-system-access", "--profile")
        self.process = subprocess.Popen(
            ["firefox-esr", *words, str(folder)],
            env={**os.environ, "HOME": str(folder)},
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def connect(self, to: socket.socket) -> None:
        until(lambda: to.connect_ex(("127.0.0.1", self.port)) == 0)
        self.stream = to.makefile("rwb")
        self.receive()
        self("WebDriver:NewSession", capabilities={})

    def receive(self) -> Any:
        length = b""
        while not length.endswith(b":"):
            length += self.stream.read(1)
        return json.loads(self.stream.read(int(length[:-1])))

    def __call__(self, command: str, **parameters: object) -> Any:
        message = json.dumps([0, 1, command, parameters]).encode()
        self.stream.write(b"%d:%s" % (len(message), message))
        self.stream.flush()
        _, _, error, result = self.receive()
        assert not error, error
        return result.get("value", result)

    def run(self, script: str, *arguments: object) -> Any:
        return self("WebDriver:ExecuteScript", script=script, args=arguments)

    def says(self, words: str) -> None:
        until(lambda: words in self.run("return document.body.innerText"))

    def press(self, name: str, times: int = 1) -> None:
        """The element with this id, once it can be pressed."""
        ready = """const one = document.getElementById(arguments[0]);
            return Boolean(one?.checkVisibility() && !document.body.className)"""
        until(lambda: self.run(ready, name))
        element = self("WebDriver:FindElement", using="css selector", value=f"#{name}")
        press = [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        steps = [{"type": "pointerMove", "origin": element, "x": 0, "y": 0}, *press]
        for _ in range(times - 1):
            steps += [{"type": "pause", "duration": 250}, *press]
        actions = [{"type": "pointer", "id": "finger", "actions": steps}]
        self("WebDriver:PerformActions", actions=actions)


@pytest.fixture
def firefox(tmp_path: Path) -> Iterator[Firefox]:
    one = Firefox(tmp_path)
    try:
        with socket.socket() as connection:
            one.connect(connection)
            yield one
            one.stream.close()
    finally:
        local.end(one.process)


# --- What must not be lost ------------------------------------------------------------------------

pytestmark = pytest.mark.browser
in_firefox = pytest.mark.skipif(not shutil.which("firefox-esr"), reason="there is no Firefox")


MORE_WIDTHS = [pytest.param(width, marks=soak) for width in (320, 390, 768)]


@parametrize("language", LANGUAGES)
@parametrize("width", [360, 1280, *MORE_WIDTHS])
def test_second_tap_of_a_double_one_hits_nothing(
    service: Service, tmp_path: Path, language: str, width: int
) -> None:
    pauses = cycle((0.15, 0.25, 0.4))
    with window(tmp_path, language, width) as browser:
        resize(browser, width)

        def tap_twice(name: str, view: str, asks: bool = False) -> None:
            taps = ActionChains(browser, duration=0).click(shown(browser, name))
            taps.pause(next(pauses)).click().perform()
            shown(browser, "confirm-yes" if asks else f"view-{view}")
            assert browser.find_element(By.ID, f"view-{view}").get_property("hidden") is False
            assert browser.find_element(By.ID, "confirm").get_property("open") is asks

        go(browser, service.url)
        shown(browser, "secret").send_keys("a secret")
        tap_twice("create", "created")
        receipt_link = content(browser, "receipt-link")
        tap_twice("again", "created", asks=True)
        tap_twice("confirm-no", "created")
        for members in ({}, {"secret": "//79", "encoding": "base64"}, TO_READ):
            go(browser, service.create("a line", **members)["url"])
            if members is TO_READ:
                shown(browser, "open-passphrase").send_keys("right")
            tap_twice("open", "shown")
        for button in ("clear", "again"):
            tap_twice(button, "shown", asks=True)
            tap_twice("confirm-no", "shown")
        go(browser, service.create()["url"])
        for answer, view in (("confirm-no", "open"), ("confirm-yes", "notice")):
            tap_twice("destroy", "open", asks=True)
            tap_twice(answer, view)
        go(browser, receipt_link)
        shown(browser, "revoke")
        set_offline(browser, offline=True)
        tap_twice("refresh", "notice")
        set_offline(browser, offline=False)
        tap_twice("retry", "receipt")
        tap_twice("revoke", "receipt", asks=True)
        tap_twice("confirm-yes", "receipt")


def test_page_asks_before_the_link_and_the_receipt_are_gone(
    service: Service, browser: Chrome
) -> None:
    link, _ = fill_in(browser, service, "a secret")
    says(browser, "It opens the secret too")
    for leave in (browser.back, shown(browser, "again").click):
        leave()
        shown(browser, "confirm-no").click()
        assert content(browser, "link") == link
    browser.refresh()  # ChromeDriver says yes to what the browser asks
    assert was_asked(browser)
    fill_in(browser, service, "another secret")
    browser.back()
    shown(browser, "confirm-yes").click()
    shown(browser, "create")


def test_page_asks_before_a_secret_that_was_just_opened_is_gone(
    service: Service, browser: Chrome
) -> None:
    created, another = service.create("only here"), service.create()
    reveal(browser, created["url"])
    for leave in (
        browser.back,
        shown(browser, "again").click,
        lambda: browser.get(another["url"]),  # in the same tab: a new fragment
        shown(browser, "clear").click,
    ):
        leave()
        shown(browser, "confirm-no").click()
        assert content(browser, "shown") == "only here"
        assert browser.current_url == created["url"]
    browser.refresh()
    assert was_asked(browser)
    assert content(browser, "shown") == "only here"
    shown(browser, "copy-secret").click()
    says(browser, "Copied")
    shown(browser, "clear").click()  # no longer asks
    says(browser, "The secret is cleared")
    assert browser.current_url == f"{service.url}/"
    assert service.status(another["secret_key"]).is_success


def test_late_answer_lands_on_no_other_view(service: Service, browser: Chrome) -> None:
    held, release = threading.Event(), threading.Event()

    def hold_reads(path: str, answer: Response) -> Response:
        if b"too late" in answer.content:
            held.set()
            release.wait(30)
        return answer

    first, second = service.create("too late"), service.create("another")
    with between(service, hold_reads) as address:
        go(browser, f"{address}#{first['secret_key']}")
        shown(browser, "open").click()
        assert held.wait(30)
        browser.get(f"{address}#{second['secret_key']}")
        shown(browser, "confirm-yes").click()  # leaving is asked about meanwhile
        shown(browser, "open")
        release.set()
        shown(browser, "open").click()
        assert content(browser, "shown") == "another"
        assert "too late" not in browser.page_source


def test_lost_answer_is_asked_for_again(service: Service, browser: Chrome) -> None:
    losses = iter([None, Response(502, html="<h1>Bad Gateway</h1>")])
    created = service.create("handed out late")

    def lose_two(path: str, answer: Response) -> Response | None:
        is_read = b"handed out late" in answer.content
        return next(losses, answer) if is_read else answer

    with between(service, lose_two) as address:
        go(browser, f"{address}#{created['secret_key']}")
        shown(browser, "open").click()
        says(browser, "asks again by itself")
        assert content(browser, "shown") == "handed out late"
    assert service.actions(created["secret_key"]) == ["created", "read", "replayed", "replayed"]


def test_reload_shows_a_secret_again_until_the_window_is_over(
    tables: Tables, tmp_path: Path, browser: Chrome
) -> None:
    with serving(tables, REPLAY_SECONDS="10") as service, window(tmp_path) as stranger:
        created = service.create("only here", **TO_READ)
        go(browser, created["url"])
        shown(browser, "open-passphrase").send_keys("right\n")
        assert content(browser, "shown") == "only here"
        browser.refresh()
        says(browser, "You opened this secret in this tab")
        go(stranger, created["url"])
        says(stranger, "This secret was read")
        shown(browser, "open-passphrase").send_keys("right\n")
        assert content(browser, "shown") == "only here"
        until(lambda: browser.current_url == f"{service.url}/")
        browser.refresh()
        says(browser, "This secret was read")
        assert "only here" not in browser.page_source


def encrypted_by_chromium(password: bytes) -> bytes:
    """As Chromium on Linux has it where it has no keyring."""
    key = hashlib.pbkdf2_hmac("sha1", b"peanuts", b"saltysalt", 1, 16)
    padding = 16 - len(password) % 16
    encryptor = Cipher(algorithms.AES(key), modes.CBC(b" " * 16)).encryptor()
    return b"v10" + encryptor.update(password + bytes([padding]) * padding)


def test_login_that_chromium_keeps_for_the_site_fills_in_nothing(
    service: Service, tmp_path: Path
) -> None:
    with window(tmp_path, profile="alice"):
        pass
    login = {
        "origin_url": f"{service.url}/",
        "signon_realm": f"{service.url}/",
        "username_value": "alice",
        "password_value": encrypted_by_chromium(b"hunter2"),
        **dict.fromkeys(("date_created", "blacklisted_by_user", "scheme"), 0),
    }
    with closing(sqlite3.connect(tmp_path / "alice/Default/Login Data")) as logins, logins:
        columns, places = ", ".join(login), ", ".join(f":{name}" for name in login)
        logins.execute(f"insert into logins ({columns}) values ({places})", login)  # noqa: S608
    with window(tmp_path, profile="alice") as browser:
        go(browser, service.url)
        shown(browser, "secret").send_keys("a secret")
        # A login form that we add: when it was filled in, so would ours have been.
        browser.execute_script(LOGIN_FORM)
        until(lambda: browser.execute_script(LOGIN) == "hunter2")
        assert browser.find_element(By.ID, "passphrase").get_property("value") == ""
        assert browser.find_element(By.ID, "token").get_property("value") == ""


ADD_LOGIN = """
    const login = Cc["@mozilla.org/login-manager/loginInfo;1"].createInstance(Ci.nsILoginInfo);
    login.init(arguments[0], arguments[0], null, "alice", "hunter2", "", "");
    return Services.logins.addLoginAsync(login).then(() => null);
"""


@in_firefox
def test_firefox_loses_and_fills_in_nothing_either(service: Service, firefox: Firefox) -> None:
    firefox("Marionette:SetContext", value="chrome")
    firefox.run(ADD_LOGIN, service.url)
    firefox("Marionette:SetContext", value="content")
    firefox("WebDriver:Navigate", url=service.url)
    firefox.press("secret")
    firefox.run(LOGIN_FORM)
    until(lambda: firefox.run(LOGIN) == "hunter2")
    assert firefox.run("return ['passphrase', 'token'].map((one) => window[one].value)") == ["", ""]
    firefox("WebDriver:Navigate", url=service.create("in Firefox")["url"])
    firefox.press("open", times=2)
    firefox.press("clear")
    firefox.press("confirm-no", times=2)
    firefox("WebDriver:Back")
    firefox.press("confirm-no")
    assert firefox.run("return document.getElementById('shown').value") == "in Firefox"
    firefox("WebDriver:Refresh")
    firefox.says("this tab shows it again")


def test_revocation_without_an_answer_does_not_say_that_it_read_the_secret(
    service: Service, browser: Chrome
) -> None:
    def lose(path: str, answer: Response) -> Response | None:
        return None if b"secret_deleted" in answer.content else answer

    with between(service, lose) as address:
        go(browser, f"{address}#receipt:{service.create()['receipt_key']}")
        shown(browser, "revoke").click()
        shown(browser, "confirm-yes").click()
        says(browser, "this attempt could not read it")
        shown(browser, "retry").click()
        says(browser, "The secret was deleted unread")


def test_long_text_is_shown_at_once_and_a_longer_one_is_only_saved(
    tables: Tables, tmp_path: Path, browser: Chrome
) -> None:
    browser.set_script_timeout(20)
    with serving(tables, MAX_SECRET_BYTES="2000000") as service:
        reveal(browser, service.create("ab\n" * 87_000)["url"])
        assert len(content(browser, "shown")) == 261_000
        reveal(browser, service.create("a" * 300_000)["url"])
        says(browser, "It is a long text (293 KB)")
        assert not browser.find_element(By.ID, "shown").is_displayed()
        shown(browser, "save").click()
        until(lambda: (tmp_path / "secret.txt").exists())


# --- What a person is told ------------------------------------------------------------------------


@parametrize("language", LANGUAGES)
def test_page_hands_a_secret_to_another_telephone_once(
    service: Service, tmp_path: Path, language: str
) -> None:
    text = "from the page " + "x" * 200
    with window(tmp_path, language, 360) as creator, window(tmp_path, language, 360) as reader:
        link, receipt_link = fill_in(creator, service, text)
        key = link.partition("#")[2]
        go(creator, receipt_link)
        shown(creator, "revoke")
        reader.get(link)
        shown(reader, "open")
        assert reader.find_element(By.TAG_NAME, "html").get_attribute("lang") == language
        assert service.status(key).json()["status"] == "unread"
        shown(reader, "open").click()
        assert content(reader, "shown") == text
        until(lambda: not creator.find_element(By.ID, "revoke").is_displayed(), 2)  # unasked
        says(creator, "Chrome on Linux", "Chrome на Linux")
        go(reader, link)
        says(reader, LANGUAGES[language])
        assert key not in reader.current_url


def test_page_has_every_word_in_every_language(service: Service, browser: Chrome) -> None:
    go(browser, service.url)
    texts = browser.execute_script("return Object.values(TEXTS)")
    for block in texts:
        block["attempts"] = block["attempts"]["one"]
    gaps = [{name: set(re.findall(r"{\w+}", str(one[name]))) for name in one} for one in texts]
    assert gaps[0] == gaps[1]
    used = browser.find_elements(By.CSS_SELECTOR, "[data-text]")
    assert {one.get_attribute("data-text") for one in used} <= gaps[0].keys()


def test_page_guards_a_file_and_keeps_its_name(
    service: Service, browser: Chrome, tmp_path: Path
) -> None:
    (tmp_path / "from").mkdir()
    file = tmp_path / "from" / "Plan ü 🔑.pdf"
    file.write_bytes(bytes(range(256)) * 256)  # the largest, and no text
    link, _ = fill_in(browser, service, file, "right")
    go(browser, link)
    says(browser, "none of your own passwords")
    assert shown(browser, "open-passphrase") == browser.switch_to.active_element
    browser.switch_to.active_element.send_keys("wrong\n")
    says(browser, "4 attempts left")
    browser.switch_to.active_element.send_keys("right\n")  # the wrong one is selected
    assert shown(browser, "shown-what").text == f"It is the file “{file.name}” (64 KB)."
    assert "main" in str(shown(browser, "save").get_attribute("class"))
    shown(browser, "save").click()
    saved = tmp_path / file.name
    until(lambda: saved.exists() and saved.read_bytes() == file.read_bytes())


def test_name_of_a_file_turns_round_no_words(service: Service, browser: Chrome) -> None:
    reveal(browser, service.create(filename="a\u202efdp.<img>.exe")["url"])
    assert shown(browser, "shown-what").text == "It is the file “a\ufffdfdp.<img>.exe” (8 bytes)."
    assert len(browser.find_elements(By.CSS_SELECTOR, "#shown-what > bdi")) == 1


def test_file_that_changed_after_it_was_chosen_is_not_sent(
    service: Service, browser: Chrome, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"chosen")
    go(browser, service.url)
    browser.find_element(By.ID, "file").send_keys(str(file))
    says(browser, "The secret is the file")
    file.write_bytes(b"changed since")
    shown(browser, "create").click()
    says(browser, "This file has changed since")


GIVE = """const clipboardData = new DataTransfer();
    for (const size of arguments[1])
        clipboardData.items.add(new File(["x".repeat(size)], `${size}.txt`));
    const options = {clipboardData, dataTransfer: clipboardData, bubbles: true, cancelable: true};
    document.body.dispatchEvent(arguments[0] === "paste"
        ? new ClipboardEvent("paste", options) : new DragEvent(arguments[0], options));"""


@parametrize("how", ["drop", "paste"])
def test_page_takes_a_file_that_fits(service: Service, browser: Chrome, how: str) -> None:
    go(browser, service.url)
    for sizes, answer in (
        ([65537], "at most 64 KB"),
        ([1, 2], "one file"),
        ([0], "one file"),
        ([5], "5.txt"),
    ):
        browser.execute_script(GIVE, how, sizes)
        says(browser, answer)
    shown(browser, "create").click()
    reveal(browser, content(browser, "link"))
    assert content(browser, "shown") == "xxxxx"


def test_page_offers_the_lifetimes_that_the_service_takes(
    proxied: Service, browser: Chrome
) -> None:
    go(browser, proxied.url)
    lifetimes = Select(shown(browser, "lifetime"))
    assert [one.text for one in lifetimes.options] == ["1 minute", "2 minutes"]
    assert lifetimes.first_selected_option.text == "1 minute"


def test_all_of_a_secret_is_printed_and_copied_as_it_is(service: Service, browser: Chrome) -> None:
    secret = "\r\n".join(f"{number} of 400 lines" for number in range(400))
    reveal(browser, service.create(secret)["url"])
    printed = browser.find_element(By.ID, "printed")
    assert printed.get_property("textContent") == ""  # what extensions read
    browser.execute_script("addEventListener('beforeprint', () => { seen = printed.textContent })")
    browser.execute_cdp_cmd("Page.printToPDF", {})
    assert browser.execute_script("return seen") == secret
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    browser.execute_cdp_cmd("Browser.grantPermissions", permissions)
    for meddle in ("", "navigator.clipboard.writeText = () => Promise.reject()"):
        browser.execute_script(
            f"return navigator.clipboard.writeText('').then(() => {{ {meddle} }})"
        )
        shown(browser, "copy-secret").click()
        says(browser, "Copied")
        assert browser.execute_script("return navigator.clipboard.readText()") == secret


def test_page_opens_links_as_chats_and_mails_leave_them(service: Service, browser: Chrome) -> None:
    created = service.create("by its path")
    key, receipt_key = created["secret_key"], created["receipt_key"]
    for end in [".", ")", ">", '"', "',", "%3E", "%22", "»", "_"]:
        go(browser, created["url"] + end)
        seen(browser, "open")
    for path in ["#receipt:{}).", "%23receipt%3A{}", "receipt/{}", "receipt/{}/"]:
        go(browser, f"{service.url}/{path.format(receipt_key)}")
        seen(browser, "revoke")
    for path in ["#{}", "secret/{}", "%23{}", "secret/{}/", "receipt/{}"]:
        go(browser, f"{service.url}/{path.format(key[:-1])}")
        says(browser, "This link is not whole")
    go(browser, created["url"] + "A")
    says(browser, "This link is not whole")
    for path in ["%23{}", "/#{}", "secret/{}/", "secret#{}", "index.html#{}", "secret/{})."]:
        go(browser, f"{service.url}/{path.format(key)}")
        seen(browser, "open")
    shown(browser, "open").click()
    assert content(browser, "shown") == "by its path"


@parametrize(
    ("answer", "words"),
    [
        (Response(403, html="<h1>Forbidden</h1>"), "refused this (HTTP 403), so nothing"),
        (Response(413, html="<h1>Too Large</h1>"), "(HTTP 413: too large), so nothing"),
        (Response(429, html="<h1>Slow</h1>"), "(HTTP 429: too many requests), so nothing"),
        (Response(502, html="<h1>Bad Gateway</h1>"), "in its place (HTTP 502)"),
        (Response(200, html="<h1>Sign in</h1>"), "perhaps a sign-in page"),
        (Response(500, json={"code": "internal"}), "a fault of its own (HTTP 500)"),
        (None, "No answer came: the connection may be broken"),
    ],
)
def test_page_says_what_came_in_place_of_the_service(
    service: Service, browser: Chrome, answer: Response | None, words: str
) -> None:
    with between(service, lambda path, own: answer if path == "/secret" else own) as address:
        go(browser, address)
        shown(browser, "secret").send_keys("a secret")
        shown(browser, "create").click()
        says(browser, words)
        assert content(browser, "secret") == "a secret"


def test_page_says_that_nothing_was_sent(service: Service, browser: Chrome) -> None:
    go(browser, service.create(**TO_READ)["url"])
    shown(browser, "open-passphrase").send_keys("x" * 1025)
    shown(browser, "open").click()
    says(browser, "at most 1,024 characters")
    shown(browser, "open-passphrase").clear()
    shown(browser, "open-passphrase").send_keys("right")
    set_offline(browser, offline=True)
    shown(browser, "open").click()
    says(browser, "nothing was sent")


def test_pause_after_wrong_passphrases_is_told(service: Service, browser: Chrome) -> None:
    created = service.create(**TO_READ)
    for _ in range(4):
        service.read(created["secret_key"], "wrong")
    go(browser, created["url"])
    shown(browser, "open-passphrase").send_keys("wrong\n")
    says(browser, "Too many wrong passphrases. You can try again in 15 minutes")
    browser.refresh()
    says(browser, "You can try again in 15 minutes")
    go(browser, f"{service.url}/#receipt:{created['receipt_key']}")
    says(browser, "After too many wrong passphrases, none is accepted until")


def test_nothing_is_read_without_a_persons_act(service: Service, browser: Chrome) -> None:
    created = service.create()
    go(browser, created["url"])
    shown(browser, "open")
    browser.execute_script("document.getElementById('open-form').requestSubmit()")
    says(browser, "Press the button yourself")
    assert service.is_stored(created["secret_key"])


def test_page_asks_for_a_token_where_one_is_needed(tables: Tables, browser: Chrome) -> None:
    with serving(tables, API_TOKENS="hunter3") as service:
        go(browser, service.url)
        assert shown(browser, "token") == browser.switch_to.active_element
        shown(browser, "secret").send_keys("a secret")
        for token, answer in (
            ("токен", "only Latin letters"),
            ("hunter4", "valid access token"),
            ("hunter3", "The link is ready"),
        ):
            shown(browser, "token").clear()
            shown(browser, "token").send_keys(token)
            shown(browser, "create").click()
            says(browser, answer)


def test_page_without_its_script_says_that_the_secret_is_untouched(
    service: Service, browser: Chrome
) -> None:
    created = service.create()
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    go(browser, created["url"])
    says(browser, "The secret is untouched")
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})

    def alter(path: str, answer: Response) -> Response:
        return Response(200, html=answer.text.replace('"use strict"', '"use  strict"'))

    with between(service, alter) as address:
        go(browser, f"{address}#{created['secret_key']}")
        says(browser, "The secret is untouched")
    assert "Content Security Policy" in str(entries(browser, "browser"))


def test_receipt_revokes_and_says_when_and_by_what(service: Service, browser: Chrome) -> None:
    browser.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": "Asia/Kolkata"})
    link, receipt_link = fill_in(browser, service, "to revoke")
    assert browser.title == "The link is ready · One-Time Secrets"
    go(browser, receipt_link)
    shown(browser, "revoke").click()
    shown(browser, "confirm-yes").click()
    says(browser, "revoked")
    events = shown(browser, "events")
    assert events.text.count("GMT+5:30") == events.text.count("Chrome on Linux") == 2
    assert "Mozilla/5.0" not in events.text
    events.find_element(By.TAG_NAME, "summary").click()
    assert "Mozilla/5.0" in events.text
    go(browser, link)
    says(browser, "It was deleted on")
    assert browser.title == "This secret was deleted · One-Time Secrets"


@parametrize("path", ["/docs", "/redoc", "/api/v1/docs", "/api/v1/redoc"])
def test_documentation_shows_itself_and_its_example_works(
    service: Service, browser: Chrome, path: str
) -> None:
    go(browser, f"{service.url}{path}")
    says(browser, "Store a secret", "Create Secret")
    if path.endswith("/docs"):
        for button in (".opblock-post .opblock-summary-control", ".try-out__btn", ".execute"):
            waiting(browser).until(element_to_be_clickable((By.CSS_SELECTOR, button))).click()
        status = (By.CSS_SELECTOR, ".live-responses-table .response .response-col_status")
        assert waiting(browser).until(visibility_of_element_located(status)).text == "201"


@soak
def test_picture_of_the_page_for_the_readme(service: Service, browser: Chrome) -> None:
    picture = HERE / "page.png"
    browser.set_window_size(720, 920)
    go(browser, service.url)
    shown(browser, "secret").send_keys("correct horse battery staple")
    assert browser.save_screenshot(str(picture))
    assert picture.stat().st_size < 60_000
