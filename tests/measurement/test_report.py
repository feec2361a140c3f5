"""The report is one file that asks nothing of the network, and says what was measured."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from nestvec.measurement import measure


@pytest.fixture
def curve(rng):
    vectors = rng.normal(size=(120, 32)) / np.arange(1, 33)
    return measure(
        vectors, dims=(8, 16), baselines=("truncation", "int8", "binary"), dataset="A<b>"
    )


class Reader(HTMLParser):
    """Collects whatever a browser would fetch, and the tags that stay open."""

    def __init__(self):
        super().__init__()
        self.fetched, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        assert tag not in ("script", "link", "iframe", "img")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_opens_offline(curve, tmp_path):
    html = curve.report(tmp_path / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    assert all(target.startswith("#") for target in reader.fetched)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_report_leads_with_the_verdict_and_holds_every_value(curve, tmp_path):
    html = curve.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert f'<p class="verdict">{curve.verdict()}</p>' in html
    for row in curve.select():
        assert f"{row['value']:.3f}" in html
    assert html.count("<svg") == 2


def test_report_escapes_text_and_keeps_markup(curve, tmp_path):
    from markupsafe import Markup

    sections = [("Plain", "1 < 2"), ("Marked", Markup("<em>yes</em>"))]
    html = curve.report(tmp_path / "r.html", sections=sections).read_text(encoding="utf-8")
    assert "1 &lt; 2" in html
    assert "<em>yes</em>" in html
    assert "A&lt;b&gt;" in html
    assert "A<b>" not in html


def test_same_curve_makes_the_same_report(curve, tmp_path):
    pages = [curve.report(tmp_path / f"{i}.html").read_bytes() for i in range(2)]
    assert pages[0] == pages[1]
