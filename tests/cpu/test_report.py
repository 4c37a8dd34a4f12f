"""The report's facts, figures and file: values against independent sums, hostile texts, refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cpu.report_fakes import DIGEST, FINGERPRINT, HOSTILE, fill, hostile_winner, search_records, winner_record

from nsa_autotune.cli.app import main
from nsa_autotune.db.checks import MAX_INT
from nsa_autotune.db.store import TuningStore
from nsa_autotune.errors import InvalidInput, UnknownName
from nsa_autotune.kernels import get_spec
from nsa_autotune.report.axes import LogAxis, fit_axis, octaves, round_values
from nsa_autotune.report.benchmarks import read_speedups
from nsa_autotune.report.build import build_report
from nsa_autotune.report.data import Report, searches, winner_rows
from nsa_autotune.report.figures import roofline_figures, search_figure, speedup_figures
from nsa_autotune.report.page import render_page, write_page
from nsa_autotune.report.text import digits, time_text, tokens_text
from nsa_autotune.search.mirror import group_trials
from nsa_autotune.spec import Problem

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FORWARD = RESULTS / "2026-11-24-h100-80gb-hbm3-forward.json"
DECODE = RESULTS / "2026-11-30-h200-decode.json"
LARGEST_BYTES = 2_000_000  # of the page of the shipped database


class Page(HTMLParser):
    """Tags and attributes of a page, its JSON and all other text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def with_name(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self) -> dict[str, list[dict[str, object]]]:
        found = next(text for text in self.texts if text.startswith('{"'))
        return json.loads(found)  # type: ignore[no-any-return]


@pytest.fixture
def filled() -> Report:
    with TuningStore("sqlite://", import_shipped=False) as store:
        fill(store)
        return build_report(store, benches=(FORWARD,))


def test_rates_are_operations_and_bytes_over_the_median() -> None:
    record = winner_record(problem=Problem(seq_q=65536, seq_k=65536))
    (row,) = winner_rows([record], {"win_attn_fwd": get_spec("win_attn_fwd")}, {"win_attn_fwd": DIGEST})
    pairs = sum(min(t + 1, 512) for t in range(65536)) * 64  # visible keys of every query head
    assert row.rates is not None
    assert row.rates.tflops == pytest.approx(pairs * 4 * 128 / 1000e-6 / 1e12, rel=5e-3)  # the cost rounds the start
    assert row.rates.intensity == pytest.approx(row.rates.tflops / row.rates.tbps)
    assert row.rates.roof_tflops == min(989, row.rates.intensity * 3.35)
    assert row.rates.share == pytest.approx(row.rates.tflops / row.rates.roof_tflops)
    assert (row.tied, row.stale, row.spread) == (1, False, pytest.approx(0.03))


def test_what_is_not_known_is_left_open() -> None:
    specs = {"win_attn_fwd": get_spec("win_attn_fwd")}
    alien = winner_record(fingerprint={**FINGERPRINT, "capability": "3.5"})
    old = winner_record(config={"gone": 1})
    rows = winner_rows([alien, old, hostile_winner()], specs, {})
    assert [row.rates for row in rows] == [None] * 3
    assert all(row.stale for row in rows)


def test_the_best_so_far_only_falls() -> None:
    records = search_records(count=50)
    (search,) = searches(group_trials(records), {"win_attn_fwd": get_spec("win_attn_fwd")}, {"win_attn_fwd": DIGEST})
    times = [record.median_us for record in records if record.median_us]
    assert search.best_so_far[-1][1] == min(times) and search.best_so_far[0][1] == times[0]
    values = [time for _, time in search.best_so_far]
    assert values == sorted(values, reverse=True)
    assert search.failures == (("compile", 5),)
    figure = search_figure(search)
    assert figure is not None and len(figure.marks) == len(values)
    assert figure.marks[-1].y == max(mark.y for mark in figure.marks)  # low on the canvas is fast


def test_a_search_in_which_nothing_works_has_no_figure() -> None:
    records = [replace(r, status="compile", median_us=None, samples_us=()) for r in search_records(count=3)]
    zero = [replace(r, median_us=0.0) for r in search_records(count=3, policy="graph-warm")]
    for search in searches(group_trials([*records, *zero]), {}, {}):
        assert search_figure(search) is None and search.importances is None


def test_speed_ups_are_ratios_of_the_medians_in_the_file() -> None:
    rows = json.loads(FORWARD.read_text())["rows"]
    dense = {
        (row["work"], row["seq"], row["problem"]["d_qk"]): row["median_us"] for row in rows if row["kind"] == "dense"
    }
    found = read_speedups(FORWARD)
    assert len(found) == 27  # 3 kinds of whole forward, 3 lengths, cuDNN twice (d 128, d 192) and flash once
    for item in found:
        d_qk = 192 if "192" in item.shape else 128
        assert item.library_us == pytest.approx(dense[item.library, item.keys.seq, d_qk])
        assert item.ratio == pytest.approx(item.library_us / item.ours_us)


def test_decode_steps_are_compared_in_a_graph_and_eager() -> None:
    lines = json.loads(DECODE.read_text())["lines"]
    steps = {(line["problem"]["batch"], line["problem"]["seq_k"]): line for line in lines if line["work"] == "step"}
    found = [item for item in read_speedups(DECODE) if item.work == "step" and item.library == "cudnn_sdpa"]
    assert len(found) == 2 * len(steps) == 12
    for (_, line), pair in zip(steps.items(), zip(found[::2], found[1::2], strict=True), strict=True):
        for item, how, policy in zip(pair, ("graph", "eager"), ("graph-cold", "eager-cold"), strict=True):
            assert (item.keys.policy, item.ours_us) == (policy, line[how]["median_us"])
            assert item.ratio == pytest.approx(line["speedup_over"][how]["cudnn_sdpa"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "not JSON"),
        ("[1]", "schema 1"),
        ('{"schema": 2}', "schema 1"),
        ('{"schema": 1}', "not a benchmark's"),
        ('{"schema": 1, "rows": []}', "not compared"),
        ('{"schema": 1, "rows": [{"speedup_over": {"x": -1}, "median_us": 1, "problem": {}}]}', "not a benchmark's"),
        ('{"schema": 1, "rows": [{"speedup_over": 3}]}', "not a benchmark's"),
        ('{"schema": 1, "rows": [{"speedup_over": {"x": 1}, "median_us": 1, "problem": {"seq_q": 0}}]}', "not a bench"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_files_that_are_no_benchmarks_are_refused(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=re.escape(sentence)):
        read_speedups(path)


def test_two_runs_of_one_benchmark_are_two_lines(tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    again.write_text(FORWARD.read_text())
    one, two = (
        speedup_figures([s for p in paths for s in read_speedups(p)]) for paths in ([FORWARD], [FORWARD, again])
    )
    assert [len(figure.legend) for figure in one] == [3, 3, 3]
    assert [len(figure.legend) for figure in two] == [6, 6, 6]
    assert all(len(figure.lines) == 1 + len(figure.legend) for figure in (*one, *two))


def test_a_line_looks_alike_in_all_figures() -> None:
    """Also where a figure lacks the lines before it."""
    items = read_speedups(FORWARD)
    (gpu, work) = (items[0].keys.gpu, items[0].work)
    fewer = [replace(s, keys=replace(s.keys, gpu="B200")) for s in items if s.work != work]
    figures = speedup_figures([*items, *fewer])
    assert {figure.title.partition(":")[0] for figure in figures} == {gpu, "B200"}
    looks = {(entry.text, entry.colour, entry.shape) for figure in figures for entry in figure.legend}
    assert len(looks) == len({text for text, _, _ in looks}) > 1


def test_hostile_texts_stay_texts(filled: Report) -> None:
    html = render_page(filled)
    page = Page(html)
    assert "<script>document" not in html and html.count("</script>") == 2 and html.count("</style>") == 1
    assert HOSTILE in page.texts and any(row["keys"]["gpu"] == HOSTILE for row in page.data["winners"])  # type: ignore[index]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


@pytest.mark.parametrize("median_us", [1e-300, 1e300])
def test_any_number_that_may_be_stored_makes_a_page(median_us: float) -> None:
    records = search_records(count=40)
    records[3], records[4] = replace(records[3], median_us=1e300), replace(records[4], median_us=1e-300)
    huge = Problem(seq_q=1, seq_k=MAX_INT)
    wide = winner_record().problem | {"seq_q": MAX_INT, "seq_k": MAX_INT}
    with TuningStore("sqlite://", import_shipped=False) as store:
        store.add_trials(records)
        store.set_winner(winner_record(median_us=median_us, library_median_us=1 / median_us))
        store.set_winner(winner_record("cmp_attn_fwd", huge, median_us=median_us))
        store.set_winner(winner_record("slc_attn_fwd", problem_key='{"x":1}', median_us=median_us))
        store.set_winner(replace(winner_record("gate_sum_fwd"), problem=wide))
        html = render_page(build_report(store))
    page = Page(html)
    assert len(page.data["winners"]) == 4 and "Infinity" not in html and "NaN," not in html
    drawn = [str(a[name]) for _, a in page.tags for name in ("d", "x", "y", "width") if name in a]
    assert len(drawn) > 50 and not any("nan" in text or "inf" in text for text in drawn)


def test_the_page_needs_no_network_and_runs_one_script(filled: Report) -> None:
    page = Page(render_page(filled))
    links = [value for _, a in page.tags for name, value in a.items() if name in ("src", "href", "action", "srcset")]
    assert links and all(link is not None and link.startswith("#") for link in links)
    (policy,) = (a["content"] for a in page.with_name("meta") if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    texts = "".join(page.texts)
    assert not any(word in texts for word in ("url(", "@import", "fetch(", "XMLHttpRequest", "http:", "https:"))


def test_marks_and_rows_name_places_in_the_filters(filled: Report) -> None:
    page = Page(render_page(filled))
    gpus = {item.keys.gpu for item in (*filled.winners, *filled.searches, *filled.speedups)}
    places = [str(a["data-k"]).split(" ") for _, a in page.tags if "data-k" in a]
    assert len(places) > 50 and all(len(place) == 5 for place in places)
    assert {place[0] for place in places} == {str(number) for number in range(len(gpus))}


def test_the_shipped_database_makes_a_small_page(tmp_path: Path) -> None:
    benches = [argument for path in RESULTS.glob("*-forward.json") for argument in ("--bench", str(path))]
    out = tmp_path / "deep" / "out"
    TuningStore(f"sqlite:///{tmp_path / 'x.sqlite'}").close()
    assert main(["report", "--out", str(out), "--db", f"sqlite:///{tmp_path / 'x.sqlite'}", *benches]) == 0
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    assert (out / "index.html").stat().st_size < LARGEST_BYTES
    with TuningStore(f"sqlite:///{tmp_path / 'x.sqlite'}") as store:
        winners = store.winners()
    assert len(page.data["winners"]) == len(winners) == len([a for a in page.with_name("tr") if "data-winner" in a])
    assert sorted(row["median_us"] for row in page.data["winners"]) == sorted(w.median_us for w in winners)  # type: ignore[type-var]
    assert [path.name for path in out.iterdir()] == ["index.html"]
    assert "x.sqlite" in page.texts and str(tmp_path) not in "".join(page.texts)


def test_an_empty_database_says_so() -> None:
    with TuningStore("sqlite://", import_shipped=False) as store:
        page = Page(render_page(build_report(store)))
    assert "Nothing is here yet" in page.texts and not page.with_name("select")


def test_gpus_are_chosen_by_a_part_of_the_name() -> None:
    with TuningStore("sqlite://", import_shipped=False) as store:
        fill(store)
        chosen = build_report(store, gpu="h100", benches=(FORWARD,))
        assert {item.keys.gpu for item in (*chosen.winners, *chosen.speedups)} == {FINGERPRINT["gpu"]}
        with pytest.raises(UnknownName, match=r"Known: .*NVIDIA H100"):
            build_report(store, gpu="B300")


def test_only_reports_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = render_page(Report(database="x", created="2026-11-24T00:00:00+00:00", tool_version="1"))
    write_page(tmp_path, html)
    write_page(tmp_path, html)
    (tmp_path / "index.html").write_text("my own page")
    with pytest.raises(InvalidInput, match="not a report's"):
        write_page(tmp_path, html)
    assert (tmp_path / "index.html").read_text() == "my own page"
    db = f"sqlite:///{tmp_path / 'x.sqlite'}"
    TuningStore(db).close()
    assert main(["report", "--out", str(tmp_path / "index.html"), "--db", db]) == 2
    assert "--out is a folder" in capsys.readouterr().err
    assert main(["report", "--out", str(tmp_path / "new"), "--bench", str(tmp_path / "no.json"), "--db", db]) == 2
    assert "cannot be read" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_roofline_marks_lie_where_their_rates_are(filled: Report) -> None:
    (figure,) = [f for f in roofline_figures(filled.winners, filled.gpus) if f.title == FINGERPRINT["gpu"]]
    rows = [row for row in filled.winners if row.keys.gpu == FINGERPRINT["gpu"] and row.rates is not None]
    assert len(figure.marks) == len(rows) == 4
    by_speed = sorted(figure.marks, key=lambda mark: -mark.y)
    assert [filled.winners[mark.winner or 0] for mark in by_speed] == sorted(rows, key=lambda row: row.rates.tflops)  # type: ignore[union-attr]


def test_axes_and_numbers() -> None:
    axis = LogAxis(1, 100, 0, 200)
    assert (axis.at(1), axis.at(10), axis.at(100)) == (0, 100, 200)
    assert octaves(0.5, 8) == [0.5, 1, 2, 4, 8]
    assert round_values(0.5, 2000) == [1, 10, 100, 1000]
    assert round_values(3, 60) == [5, 10, 20, 50]
    assert round_values(300, 360) == [300, 320, 340, 360]
    one = fit_axis([5.0], 0, 10)
    assert one.at(5) == 5
    assert [digits(value) for value in (0.1234, 9.996, 99.94, 1234)] == ["0.12", "10.0", "99.9", "1234"]
    assert [time_text(value) for value in (12.34, 999.6, 1.5e6)] == ["12.3 µs", "1.00 ms", "1.50 s"]
    assert [tokens_text(value) for value in (1000, 65536, 1 << 20)] == ["1000", "64k", "1M"]
