import base64
import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from vop.image import decode, patch_box, patch_mask
from vop.viz.matches import (
    Picture,
    draw_match,
    draw_overlap,
    matched_patches,
    patch_similarities,
    patch_support,
    position_colors,
)
from vop.viz.plots import histogram
from vop.viz.report import Match, QueryPanel, Report, write_report

VOID = {"meta", "link", "br", "img", "input", "hr"}
LANDSCAPE, PORTRAIT, SQUARE = (224, 149), (149, 224), (224, 224)


class Page(HTMLParser):
    """Elements and text of a page; fails on a tag that is closed out of order or never."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.text, self.open = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def all(self, tag, **attrs):
        wanted = {name.rstrip("_"): value for name, value in attrs.items()}
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def picture(name, scaled_size=LANDSCAPE, seed=0, patches=None, grey=None):
    rng = np.random.default_rng(seed)
    width, height = scaled_size
    rgb = (
        rng.integers(0, 256, (height, width, 3), np.uint8)
        if grey is None
        else np.full((height, width, 3), grey, np.uint8)
    )
    if patches is None:
        patches = rng.normal(size=(256, 6))
        patches /= np.linalg.norm(patches, axis=1, keepdims=True)
    return Picture(name, rgb, scaled_size, patches.astype(np.float32))


def boxes(svg):
    return Page(svg).all("rect")


def example(**changes):
    query = picture("query.jpg", LANDSCAPE, 0)
    found = [picture("tall.jpg", PORTRAIT, 1), picture("square.jpg", SQUARE, 2)]
    panel = QueryPanel(
        query,
        np.random.default_rng(3).uniform(0, 2, 256),
        [Match(found[0], 1, 123.456, 0.62), Match(found[1], 2, 7.125, 0.04)],
    )
    report = Report(
        title="A run",
        radius=0.2,
        summary=[("images", "3")],
        panels=[panel],
        scores=np.array([123.456, 7.125, 3.0]),
        best_scores=np.array([123.456]),
        weakest=[("alone.jpg", 0.5)],
        quarantined=[("broken.jpg", "empty file (0 bytes)")],
        timings=[("embed", 61.0), ("vote", 0.5)],
        metrics={"precision@1": 0.9375},
        chance={"precision@1": 0.25},
        config_yaml="retrieval:\n  radius: 0.2\n",
        versions={"vop": "0.1.0"},
    )
    return dataclasses.replace(report, **changes)


def test_matched_patches_are_each_others_best_hits_inside_both_images():
    query, match = picture("q", LANDSCAPE, 4), picture("m", PORTRAIT, 5)
    radius = 0.1
    inside_query, inside_match = (np.flatnonzero(patch_mask(*p.scaled_size)) for p in (query, match))
    dots = {(p, s): float(query.patches[p] @ match.patches[s]) for p in inside_query for s in inside_match}
    expected = [
        (p, s)
        for (p, s), dot in dots.items()
        if dot > 1 - radius
        and dot == max(dots[p, other] for other in inside_match)
        and dot == max(dots[other, s] for other in inside_query)
    ]
    assert len(expected) > 10

    similarity = patch_similarities(query, match)
    pairs = matched_patches(similarity, radius)
    assert [tuple(pair) for pair in pairs.tolist()] == sorted(expected)

    support = np.zeros(256)
    for (p, _), dot in dots.items():
        support[p] += dot if dot > 1 - radius else 0
    np.testing.assert_allclose(patch_support(similarity, radius), support, rtol=1e-5)


def test_a_similarity_at_the_threshold_is_no_hit():
    similarity = np.full((4, 4), -np.inf, np.float32)
    similarity[0, 1], similarity[2, 3] = 0.5, 0.75
    assert matched_patches(similarity, 0.5).tolist() == [[2, 3]]
    assert patch_support(similarity, 0.5).tolist() == [0, 0, 0.75, 0]


def test_planted_correspondences_have_one_colour_and_the_right_place():
    query = picture("q", LANDSCAPE, patches=np.eye(256), grey=0)
    inside = np.flatnonzero(query.mask)
    target = np.random.default_rng(6).permutation(inside)
    planted = np.zeros((256, 256))
    planted[target] = np.eye(256)[inside]
    match = picture("m", LANDSCAPE, patches=planted, grey=0)

    pairs = matched_patches(patch_similarities(query, match), 0.2)
    assert dict(pairs.tolist()) == dict(zip(inside.tolist(), target.tolist(), strict=True))
    drawn = boxes(draw_match(query, match, pairs, np.ones(len(pairs)), ("a", "b")))
    assert len(drawn) == 2 * len(inside)
    left = {box["data-p"]: box for box in drawn if float(box["x"]) < query.scaled_size[0]}
    right = {box["data-p"]: box for box in drawn if float(box["x"]) > query.scaled_size[0]}
    shift = min(float(box["x"]) for box in right.values())
    for p, s in zip(inside, target, strict=True):
        assert left[str(p)]["fill"] == right[str(p)]["fill"] == left[str(p)]["stroke"] == right[str(p)]["stroke"]
        for box, patch, x_shift in ((left[str(p)], p, 0), (right[str(p)], s, shift)):
            x0, y0, x1, y1 = patch_box(int(patch), LANDSCAPE, LANDSCAPE)
            place = [float(box[key]) for key in ("x", "y", "width", "height")]
            assert place == pytest.approx([x0 + x_shift, y0, x1 - x0, y1 - y0])


def test_colours_are_smooth_and_differ_between_patches():
    colors = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in position_colors(SQUARE, 224)])
    assert len({tuple(c) for c in colors.tolist()}) == 256
    grid = colors.reshape(16, 16, 3)
    assert max(np.abs(np.diff(grid, axis=axis)).max() for axis in (0, 1)) < 90


@pytest.mark.parametrize("scaled_size", [LANDSCAPE, PORTRAIT, SQUARE, (224, 1)])
def test_overlap_map_shows_every_patch_of_the_image_and_darkens_those_without_support(scaled_size):
    query = picture("q", scaled_size)
    support = np.zeros(256, np.float32)
    support[:5] = [0, 1, 4, 0, 9]
    if not query.mask[4]:
        support = np.where(query.mask, 2.0, 0.0)
    drawn = {int(box["data-p"]): box for box in boxes(draw_overlap(query, support, "a"))}
    assert sorted(drawn) == np.flatnonzero(query.mask).tolist()
    for patch, box in drawn.items():
        assert (box["fill"] == "#000000") == (support[patch] == 0)
        assert float(box["x"]) + float(box["width"]) <= scaled_size[0]
        assert float(box["y"]) + float(box["height"]) <= scaled_size[1]


def test_overlap_map_of_a_query_without_support_is_dark():
    drawn = boxes(draw_overlap(picture("q"), np.zeros(256, np.float32), "a"))
    assert {box["fill"] for box in drawn} == {"#000000"}


def test_page_is_well_formed_complete_and_loads_nothing():
    html = write_report(example())
    page = Page(html)
    for _, attrs in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attrs.get(name) or "#").startswith(("#", "data:"))
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    referred = [
        attrs[key][1:] for _, attrs in page.elements for key in ("href", "xlink:href") if attrs.get(key, "")[:1] == "#"
    ]
    assert set(referred) <= set(ids)
    assert all(svg["aria-label"] for svg in page.all("svg", role="img"))
    for text in ("A run", "images 3", "precision@1 0.938", "by chance 0.25", "alone.jpg 0.5", "empty file (0 bytes)",
                 "embed 1 min 01 s", "vote 0.50 s", "radius: 0.2", "vop 0.1.0"):  # fmt: skip
        assert text in page.words


def test_every_match_has_its_rank_score_and_verdict():
    words = Page(write_report(example())).words
    assert re.search(r"#1 score 123\.5 \d+ matched patches ✓ right, overlap 62% tall\.jpg", words)
    assert re.search(r"#2 score 7\.125 \d+ matched patches ✗ wrong, overlap 4% square\.jpg", words)


def test_each_photograph_is_embedded_once_and_reduced():
    large = dataclasses.replace(picture("large.jpg", LANDSCAPE, 8), rgb=np.zeros((800, 1200, 3), np.uint8))
    ones = np.ones(256)
    panels = [QueryPanel(large, ones, [Match(picture("m", SQUARE, 9), 1, 1.0)]), QueryPanel(large, ones, [])]
    photos = Page(write_report(example(panels=panels))).all("image")
    assert len(photos) == 2
    sizes = {decode(base64.b64decode(photo["href"].split(",")[1])).shape for photo in photos}
    assert sizes == {(299, 448, 3), (224, 224, 3)}


def test_names_and_reasons_are_text_never_markup():
    evil = "a b/<script>alert(1)</script> \"Ünïcödé\" & 'x'.jpg"
    query = picture(evil)
    report = example(
        title=evil,
        panels=[QueryPanel(query, np.ones(256), [Match(picture(evil, PORTRAIT, 1), 1, 2.0)])],
        quarantined=[(evil, evil)],
        weakest=[(evil, 1.0)],
        timings=[(evil, 1.0)],
        config_yaml=evil,
        versions={evil: evil},
    )
    page = Page(write_report(report))
    assert len(page.all("script")) == 1
    assert page.words.count(evil) >= 9


def test_quarantine_shows_the_first_200_and_counts_all():
    page = Page(write_report(example(quarantined=[(f"bad-{i}.jpg", "truncated") for i in range(1234)])))
    assert len(re.findall(r"bad-\d+\.jpg", page.words)) == 200
    assert "Quarantined files (1234)" in page.words
    assert "The first 200 of 1234" in page.words


def test_an_empty_report_says_so():
    words = Page(write_report(Report(title="Nothing", radius=0.2))).words
    for text in ("No queries were chosen", "No pair received a vote", "No timings", "every file could be used"):
        assert text in words
    assert "✓ right" not in words


def test_a_query_without_matches_and_without_weight():
    panels = [
        QueryPanel(picture("lonely.jpg"), np.zeros(256)),
        QueryPanel(picture("q"), np.zeros(256), example().panels[0].matches),
    ]
    words = Page(write_report(example(panels=panels, metrics=None, chance={}))).words
    assert "No image received a vote" in words
    assert words.count("0 of 176 patches found support") == 2


def test_the_same_report_gives_the_same_text():
    assert write_report(example()) == write_report(example())


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [1e-3, 1.0, 1e4], list(range(1, 400))])
def test_histogram_bars_count_every_value(values):
    page = Page(histogram(np.array(values, float), "score", "pairs", "alt & text"))
    assert page.all("svg")[0]["aria-label"] == "alt & text"
    bars = [attrs for attrs in page.all("path") if "var(--accent)" in attrs.get("style", "")]
    tops = []
    for bar in bars:
        ys = [float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", bar["d"])]
        tops.append(max(ys) - min(ys))
    log = max(values) > 50 * min(values)
    n = min(30, max(5, round(2 * len(values) ** 0.5)))
    edges = np.geomspace(min(values), max(values), n + 1) if log else n
    counts = np.histogram(values, edges)[0]
    np.testing.assert_allclose(np.array(tops) / max(tops), counts / counts.max(), atol=1e-4)


def test_wrong_shapes_and_values_are_named():
    with pytest.raises(ValueError, match="P a square number"):
        Picture("q", np.zeros((4, 4, 3), np.uint8), (224, 224), np.zeros((255, 8), np.float32))
    with pytest.raises(ValueError, match="must be uint8"):
        Picture("q", np.zeros((4, 4, 3), np.float32), (224, 224), np.zeros((256, 8), np.float32))
    with pytest.raises(ValueError, match=r"must be \(256,\)"):
        write_report(example(panels=[QueryPanel(picture("q"), np.ones(176))]))
    with pytest.raises(ValueError, match="best_scores holds 1 value"):
        example(best_scores=np.array([1.0, np.nan]))
