"""The page, in Debian's Chromium, headless, by one walk through each view.

`python3 local.py test` leaves these out, and says so, where there is none.
"""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from httpx import URL
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import (
    element_to_be_clickable,
    visibility_of_element_located,
)
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from conftest import HERE, Document, Service, until

# --- A browser ------------------------------------------------------------------------------------


@contextmanager
def window(folder: Path, language: str = "en", width: int = 1000) -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own.

    It must end without an error on its console, and without having asked another host.
    """
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--lang={language}",
        f"--window-size={width},800",
        f"--user-data-dir={folder / secrets.token_hex(4)}",
    ):
        options.add_argument(argument)
    preferences = {"intl.accept_languages": language, "download.default_directory": str(folder)}
    options.add_experimental_option("prefs", preferences)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(
        options, webdriver.ChromeService(shutil.which("chromedriver") or "chromedriver")
    )
    if width < 500:  # a window cannot be that narrow; a telephone's screen can
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        yield browser
        # Chromium reports an error status as an error. ReDoc asks for its maker's logo.
        usual = (
            "status of 403",
            "status of 404",
            "status of 410",
            "status of 503",
            "redoc/logo-mini.svg",
        )
        messages = [
            entry["message"]
            for entry in entries(browser, "browser")
            if entry["level"] in ("SEVERE", "WARNING")
        ]
        assert [one for one in messages if not any(words in one for words in usual)] == []
        assert asked_hosts(browser) <= {"127.0.0.1"}
    finally:
        browser.quit()


def entries(browser: webdriver.Chrome, log: str) -> list[Document]:
    found: list[Document] = browser.get_log(log)  # type: ignore[no-untyped-call]  # Selenium has no types here
    return found


def asked_hosts(browser: webdriver.Chrome) -> set[str]:
    """The hosts of all requests but those that the page's policy blocked."""
    messages = [
        json.loads(entry["message"])["message"] for entry in entries(browser, "performance")
    ]
    blocked = {one["params"]["requestId"] for one in messages if one["params"].get("blockedReason")}
    sent = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    urls = [one["request"]["url"] for one in sent if one["requestId"] not in blocked]
    return {URL(url).host for url in urls if url.startswith("http")}


def shown(browser: webdriver.Chrome, name: str) -> WebElement:
    """The element with this id, once it can be pressed, on a page that fits its window."""
    wait = WebDriverWait(browser, 30)
    element: WebElement = wait.until(visibility_of_element_located((By.ID, name)))
    wait.until_not(lambda one: one.find_elements(By.CSS_SELECTOR, "body.settling"))
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    return element


def content(browser: webdriver.Chrome, name: str) -> str:
    """What the element with this id says, once it can be seen."""
    return str(shown(browser, name).get_property("value") or shown(browser, name).text)


def says(browser: webdriver.Chrome, *words: str) -> None:
    """Wait until the page shows one of these words."""
    body = (By.TAG_NAME, "body")
    WebDriverWait(browser, 30).until(
        lambda one: any(word in one.find_element(*body).text for word in words)
    )


def go(browser: webdriver.Chrome, address: str) -> None:
    """As from another page: a new fragment alone would load nothing."""
    browser.get("about:blank")
    browser.get(address)


def fill_in(
    browser: webdriver.Chrome, service: Service, secret: str | Path, passphrase: str = ""
) -> tuple[str, str]:
    """Create a secret on the page, of a text or of a file. Returns its link and receipt link."""
    go(browser, service.url)
    shown(browser, "passphrase").send_keys(passphrase)
    browser.find_element(By.ID, "file" if isinstance(secret, Path) else "secret").send_keys(
        str(secret)
    )
    shown(browser, "create").click()
    return content(browser, "link"), content(browser, "receipt-link")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    with window(tmp_path) as one:
        yield one


# --- The page -------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("language", ["en", "ru"])
def test_page_hands_a_secret_to_another_telephone_once(
    service: Service, tmp_path: Path, language: str
) -> None:
    text = "from the page " + "x" * 200
    with window(tmp_path, language, 360) as creator, window(tmp_path, language, 360) as reader:
        link, receipt_link = fill_in(creator, service, text)
        key = link.partition("#")[2]
        reader.get(link)
        shown(reader, "open")
        assert reader.find_element(By.TAG_NAME, "html").get_attribute("lang") == language
        assert service.status(key).json()["status"] == "unread"
        shown(reader, "open").click()
        assert content(reader, "shown") == text
        reader.refresh()
        says(reader, "This secret was read", "Секрет уже прочитан")
        assert key not in reader.current_url
        assert text not in reader.page_source
        go(creator, receipt_link)
        says(creator, "127.0.0.1")


@pytest.mark.browser
def test_page_guards_a_file_and_does_not_keep_its_name(
    service: Service, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    file = tmp_path / "taxes-2026.pdf"
    saved = tmp_path / "secret.bin"
    file.write_bytes(bytes(range(256)) * 256)  # the largest, and no text
    link, _ = fill_in(browser, service, file, "right")
    assert file.name not in str(entries(browser, "performance"))  # all that was sent
    go(browser, link)
    assert shown(browser, "open-passphrase") == browser.switch_to.active_element
    browser.switch_to.active_element.send_keys("wrong\n")
    says(browser, "4 attempts left")
    browser.switch_to.active_element.send_keys(
        "right\n"
    )  # in the place of the wrong one, which is selected
    assert "main" in str(shown(browser, "save").get_attribute("class"))
    shown(browser, "save").click()
    until(lambda: saved.exists() and saved.read_bytes() == file.read_bytes())


@pytest.mark.browser
def test_page_takes_a_dropped_file_that_fits(service: Service, browser: webdriver.Chrome) -> None:
    drop = """const dataTransfer = new DataTransfer();
        for (const size of arguments)
            dataTransfer.items.add(new File(["x".repeat(size)], `${size}.txt`));
        document.body.dispatchEvent(
            new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));"""
    go(browser, service.url)
    for sizes, answer in (
        ([65537], "65,536 bytes"),
        ([1, 2], "one file"),
        ([0], "one file"),
        ([5], "5.txt"),
    ):
        browser.execute_script(drop, *sizes)
        says(browser, answer)
    shown(browser, "create").click()
    go(browser, content(browser, "link"))
    shown(browser, "open").click()
    assert content(browser, "shown") == "xxxxx"


@pytest.mark.browser
def test_page_offers_the_lifetimes_that_the_service_takes(
    proxied: Service, browser: webdriver.Chrome
) -> None:
    go(browser, proxied.url)
    lifetimes = Select(shown(browser, "lifetime"))
    assert [one.text for one in lifetimes.options] == ["1 minute", "2 minutes"]
    assert lifetimes.first_selected_option.text == "1 minute"


@pytest.mark.browser
def test_page_prints_all_of_a_secret(service: Service, browser: webdriver.Chrome) -> None:
    secret = "\n".join(f"{number} of 400 lines" for number in range(400))
    go(browser, service.create(secret)["url"])
    shown(browser, "open").click()
    assert content(browser, "shown") == secret
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    printed = shown(browser, "printed")
    assert printed.text == secret
    assert printed.get_property("clientHeight") == printed.get_property("scrollHeight")


@pytest.mark.browser
def test_page_asks_before_the_link_and_the_receipt_are_gone(
    service: Service, browser: webdriver.Chrome
) -> None:
    link, _ = fill_in(browser, service, "a secret")
    says(browser, "It opens the secret too")
    for leave in (browser.back, shown(browser, "again").click):
        leave()
        shown(browser, "confirm-no").click()
        assert content(browser, "link") == link
    browser.refresh()  # ChromeDriver says yes to what the browser asks
    assert '"beforeunload"' in "".join(
        entry["message"] for entry in entries(browser, "performance")
    )
    fill_in(browser, service, "another secret")
    browser.back()
    shown(browser, "confirm-yes").click()
    shown(browser, "create")


@pytest.mark.browser
def test_page_opens_links_as_chats_and_mails_leave_them(
    service: Service, browser: webdriver.Chrome
) -> None:
    created = service.create("by its path")
    for end in (".", ")", ">", '"', "',", "%3E", "%22", "»", "_"):
        go(browser, created["url"] + end)
        shown(browser, "open")
    go(browser, f"{service.url}/#receipt:{created['receipt_key']}).")
    shown(browser, "revoke")
    for broken in (created["url"][:-1], created["url"] + "A"):
        go(browser, broken)
        says(browser, "This link is not complete")
    go(
        browser, f"{service.url}/secret/{created['secret_key']})."
    )  # not the link, but what GET takes
    shown(browser, "open").click()
    assert content(browser, "shown") == "by its path"


@pytest.mark.browser
def test_receipt_revokes_and_says_when_and_by_what(
    service: Service, browser: webdriver.Chrome
) -> None:
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


@pytest.mark.browser
@pytest.mark.parametrize("path", ["/docs", "/redoc", "/api/v1/docs", "/api/v1/redoc"])
def test_documentation_shows_itself_and_its_example_works(
    service: Service, browser: webdriver.Chrome, path: str
) -> None:
    go(browser, f"{service.url}{path}")
    says(browser, "Store a secret", "Create Secret")
    if path.endswith("/docs"):
        for button in (".opblock-post .opblock-summary-control", ".try-out__btn", ".execute"):
            WebDriverWait(browser, 30).until(
                element_to_be_clickable((By.CSS_SELECTOR, button))
            ).click()
        status = (By.CSS_SELECTOR, ".live-responses-table .response .response-col_status")
        assert WebDriverWait(browser, 30).until(visibility_of_element_located(status)).text == "201"


@pytest.mark.soak
@pytest.mark.browser
def test_picture_of_the_page_for_the_readme(service: Service, browser: webdriver.Chrome) -> None:
    picture = HERE / "page.png"
    browser.set_window_size(720, 920)
    go(browser, service.url)
    shown(browser, "secret").send_keys("correct horse battery staple")
    assert browser.save_screenshot(str(picture))
    assert picture.stat().st_size < 60_000
