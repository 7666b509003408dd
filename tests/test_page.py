"""The page: complete, safe against what names hold, and without anything from outside."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import quickspike as qs
from quickspike.anatomy import anatomy_of
from quickspike.claims import CLAIMS
from quickspike.data import DataSet
from quickspike.energy import energy_of
from quickspike.errors import DataError
from quickspike.files import OutputError
from quickspike.operations import count_operations
from quickspike.page import Entry, first_sample, sample_of, write_page
from quickspike.searching import Trial
from quickspike.simulation import simulate

VOID = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """Checks that elements nest, and collects texts, ids and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "action"):
                self.addresses.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def entries(
    spiking_digits: Callable[[str], qs.SpikingNetwork], digits: DataSet, digits_test: tuple[Tensor, Tensor], digits_source: nn.Module
) -> list[Entry]:
    made = []
    for name in ("threshold_balancing", "potential_init"):
        snn, data = spiking_digits(name).with_steps(4), [(digits_test[0][:40], digits_test[1][:40])]
        operations = count_operations(snn, data)
        report = qs.evaluate(snn, data, digits_source, (1, 2, 4), device="cpu")
        made.append(Entry(name, report, snn, anatomy_of(snn, data), operations, (energy_of(operations),), first_sample(snn, digits)))
    return made


def test_it_says_what_was_measured(entries: list[Entry], tmp_path: Path) -> None:
    write_page(tmp_path / "a.html", "A title", entries, "quickspike evaluate")
    written = (tmp_path / "a.html").read_text(encoding="utf-8")
    text = " ".join(" ".join(Reader(written).texts).split())
    for entry in entries:
        for value in entry.report.accuracy.values():
            assert f"{value:.2f}" in text
        assert f"{entry.report.reference_accuracy:.2f}" in text
        for site, rate in entry.report.rates.items():
            assert f"{site} {rate:.4f}" in text.replace("  ", " ")
            assert f"{rate:.3f} spikes a step" in text
        assert entry.anatomy is not None
        assert len(entry.anatomy.bad) > 3
        for one in entry.anatomy.bad:
            assert one.advice in text
        for one in entry.anatomy.sites:
            assert f"shares by rate: {', '.join(f'{share:.2f}' for share in one.rates)}" in written
            assert f"{one.silent:.3f} {one.saturated:.3f} {one.outside:.3f}" in text
        assert f"{entry.energies[0].ratio:.2f}" in text
        for caveat in (*entry.energies[0].caveats, *(claim.caveat for claim in CLAIMS.values())):
            assert caveat in text
        assert entry.report.engine in text
    for part in ("A title", "Where the error comes from", "What it costs", "One image: ", "To make it again", "quickspike evaluate"):
        assert part in text


class Joined(nn.Module):
    """A residual connection past two layers, whose rate stands beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.two(torch.relu(self.one(x)))).mean((2, 3)))


def test_a_residual_connection_has_its_rate_and_its_share_of_the_error(digits_test: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    snn, data = qs.convert(Joined(), digits_test[0][:50], steps=4), [(digits_test[0][:50], digits_test[1][:50])]
    report, anatomy = qs.evaluate(snn, data, device="cpu"), anatomy_of(snn, data)
    write_page(tmp_path / "a.html", "t", [Entry("joined", report, snn, anatomy)])
    texts = Reader((tmp_path / "a.html").read_text(encoding="utf-8")).texts
    rate = f"{report.rates[snn.sites[0].name]:.3f}"
    assert [text.strip() for text in texts].count(rate) == 1
    branches = ", ".join(f"{name} {100 * share:.0f} %" for name, share in anatomy.sites[2].branches.items())
    assert branches in texts
    assert snn.sites[0].name in branches


def test_the_front_is_drawn_and_listed(entries: list[Entry], tmp_path: Path) -> None:
    trials = [
        Trial("a <b>", 1, 1, 80.0, 10.0, 2e3, 1.0),
        Trial("a <b>", 4, 4, 89.0, 1.0, 5e3, 2.0),
        Trial("c", 4, 4, 85.0, 5.0, 6e3, 1.0),
        Trial("c", 8, 32, 90.0, 0.0, 90e3, 1.0),
    ]
    write_page(tmp_path / "a.html", "t", [], "", trials, "What was found.")
    written = (tmp_path / "a.html").read_text(encoding="utf-8")
    text = " ".join(" ".join(Reader(written).texts).split())
    assert "What was found." in text
    assert "a <b> 1 1 80.00 +10.00 2.0 1.0 a <b> 4 4 89.00 +1.00 5.0 2.0 c 8 32 90.00 +0.00 90.0 1.0" in text
    assert "4 4 85.00" not in text
    assert (written.count("accuracy against latency"), written.count("accuracy against energy")) == (1, 1)
    write_page(tmp_path / "b.html", "t", entries, "", [dataclasses.replace(one, energy=None) for one in trials])
    assert "accuracy against energy" not in (tmp_path / "b.html").read_text(encoding="utf-8")


def test_nothing_comes_from_outside_and_ids_are_unique(entries: list[Entry], tmp_path: Path) -> None:
    write_page(tmp_path / "a.html", "t", entries)
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert len(page.ids) == len(set(page.ids))
    for address in page.addresses:
        assert address.startswith(("data:", "#")), address
        assert address[0] != "#" or address[1:] in page.ids
    assert all(reference in page.ids for reference in re.findall(r"url\(#([^)]+)\)", text))
    assert "<script" not in text
    assert "@import" not in text
    assert "#010203" not in text


def test_the_same_page_is_made_again(entries: list[Entry], tmp_path: Path) -> None:
    for name in "ab":
        write_page(tmp_path / name, "t", entries)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_names_are_no_markup(entries: list[Entry], tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>&\"'{}"
    report = dataclasses.replace(entries[0].report, rates={evil: 0.5}, provenance={evil: evil})
    write_page(tmp_path / "a.html", evil, [Entry(evil, report)], evil)
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    Reader(text)
    assert "<img src=x" not in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt;&amp;") >= 5


def test_what_is_not_known_is_left_out(entries: list[Entry], tmp_path: Path) -> None:
    report = dataclasses.replace(entries[0].report, reference_accuracy=None)
    write_page(tmp_path / "a.html", "t", [Entry("alone", report)])
    text = " ".join(Reader((tmp_path / "a.html").read_text(encoding="utf-8")).texts)
    for part in ("Where the error", "What it costs", "One image", "source network"):
        assert part not in text
    with pytest.raises(DataError, match="at least one network"):
        write_page(tmp_path / "b.html", "t", [])
    with pytest.raises(OutputError):
        write_page(tmp_path / "a.html" / "b.html", "t", [Entry("alone", report)])


def test_a_sample_holds_the_spikes_of_its_image(
    spiking_digits: Callable[[str], qs.SpikingNetwork], digits_test: tuple[Tensor, Tensor]
) -> None:
    snn, image = spiking_digits("threshold_balancing").with_steps(5), digits_test[0][3]
    found = sample_of(snn, image, image, 7)
    run = simulate(snn, image[None])
    assert found.label == "7"
    some = sample_of(snn, image, image, 7, ("zero", "one"))
    assert (some.label, some.classes[:3], len(some.classes)) == ("7", ("zero", "one", "2"), 10)
    for site, counts in run.spikes.items():
        assert found.spikes[site].shape == (5, counts[0].numel())
        assert torch.equal(found.spikes[site].sum(0), counts[0].flatten())
    torch.testing.assert_close(found.logits, run.logits[:, 0])


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(page: Path, folder: Path, *more: str) -> str:
    """What Chromium says of a page."""
    flags = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--window-size=900,2000"),
    )
    command = [str(BROWSER), *flags, f"--user-data-dir={folder / 'profile'}", *more, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False).stderr


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_it_without_complaint(entries: list[Entry], tmp_path: Path) -> None:
    trials = [Trial("a", steps, steps, 80.0 + steps, 10.0 - steps, 1e3 * steps, 1.0) for steps in (1, 2, 4)]
    write_page(tmp_path / "a.html", "In a browser", entries, "quickspike evaluate", trials)
    light, dark = tmp_path / "light.png", tmp_path / "dark.png"
    assert "CONSOLE" not in browse(tmp_path / "a.html", tmp_path, f"--screenshot={light}")
    assert light.stat().st_size > 20_000
    browse(tmp_path / "a.html", tmp_path, "--blink-settings=preferredColorScheme=0", f"--screenshot={dark}")
    # Paper in the corner: white, or nearly black.
    corners = [Image.open(picture).convert("L").getpixel((2, 2)) for picture in (light, dark)]
    assert corners[0] == 255
    assert corners[1] < 40


@pytest.mark.skipif(BROWSER is None or shutil.which("pdftotext") is None, reason="needs Chromium and poppler's pdftotext")
def test_what_is_printed_holds_settings_and_versions(entries: list[Entry], tmp_path: Path) -> None:
    write_page(tmp_path / "a.html", "On paper", entries, "quickspike evaluate")
    # Also where the reader closed them.
    closed = (tmp_path / "a.html").read_text(encoding="utf-8").replace("<details open>", "<details>")
    (tmp_path / "closed.html").write_text(closed, encoding="utf-8")
    for name in ("a.html", "closed.html"):
        browse(tmp_path / name, tmp_path, f"--print-to-pdf={tmp_path / 'a.pdf'}", "--no-pdf-header-footer")
        printed = subprocess.run(["pdftotext", str(tmp_path / "a.pdf"), "-"], capture_output=True, text=True, check=True).stdout
        assert "calibration_images" in printed
        assert torch.__version__ in printed
