"""A Chromium without a screen."""

from __future__ import annotations

from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from served import settle

from deployments.proxies import free_port

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
)


class Browser(webdriver.Chrome):
    """Chromium, with short words for what tests ask of the page. profile: an empty folder."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        super().__init__(options, Service(str(DRIVER), port=free_port()))

    def find(self, name: str) -> WebElement:
        return self.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self.find(name).text

    def status(self) -> str:
        return self.find("status").get_attribute("data-state") or ""

    def open(self, url: str) -> None:
        """The page, once it shows figures."""
        self.get(f"{url}/guard/")
        settle(lambda: self.find("figures").is_displayed())

    def complaints(self) -> list[str]:
        """What the console said since the last time: errors, and what the policy blocked."""
        return [one["message"] for one in self.get_log("browser") if one["level"] in ("WARNING", "SEVERE")]

    def media(self, **features: str) -> None:
        """Emulate media features: ``prefers_color_scheme="dark"``."""
        given = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": given})

    def phone(self, width: int = 360, height: int = 740) -> None:
        """A phone's screen, until `desk`."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def desk(self) -> None:
        self.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
