from __future__ import annotations

from types import SimpleNamespace

from sft_job.data.cache import TokenCache
from sft_job.preview.report import set_report


def test_counts_of_a_real_cache(cache: TokenCache) -> None:
    report = set_report("train", cache)
    assert report.name == "train"
    assert report.counts["rows_usable"] == sum(report.rows) == len(cache)
    assert report.counts["rows_rejected"] == 0
    assert report.duplicates == 1
    assert report.trained_share == cache.targets.sum() / cache.lengths.sum()
    assert [file["rows_read"] for file in report.files] == [17, 6]
    assert ("duplicates", "1 (4.3 %)") in report.lines()


def test_what_the_cache_says_is_taken(cache: TokenCache) -> None:
    said = {
        **cache.report,
        "rows_rejected": 3,
        "rejected": {"no text": 2, "overlong": 1, "damaged": 0},
        "duplicates": 7,
        "lengths": {"edges": [0, 10, 20], "counts": [1, 2]},
    }
    report = set_report("code", SimpleNamespace(report=said))  # type: ignore[arg-type]
    assert (report.name, report.duplicates, report.edges, report.rows) == ("code", 7, (0, 10, 20), (1, 2))
    lines = dict(report.lines())
    assert lines["rejected"] == "3 (13.0 %)"
    assert lines["  no text"] == "2"
    assert "  damaged" not in lines
    assert report.bins() == [("0 to 9", 1), ("10 to 19", 2)]
