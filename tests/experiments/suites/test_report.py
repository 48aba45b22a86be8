"""Figures as rows and tables."""

import pytest

from experiments.suites import report
from experiments.suites.timing import Figure, KernelFigure, Limits

LIMITS = Limits(read=59e9, flops=0.46e12)
FIGURES = {
    "model": "gpt2-medium",
    "weights": None,
    "cache": None,
    "dtype": "bfloat16",
    "device": "a device",
    "date": "2026-11-25",
}


def figure(suite="decode", case="after 512, batch 8"):
    return Figure(suite, case, 1024, (1.0, 1.1, 1.2), 7.5, flops=1e9, bytes=1e10)


def kernel_figure(kernel, error):
    figure = ("attention", "16384 x 1, forward and backward", 1, (1.0, 1.1, 1.2), 7.5, 1e14, 1e9)
    return KernelFigure(*figure, kernel, error)


def test_a_row_is_the_median_run():
    row = report.row(figure(), LIMITS)
    assert row["tokens_per_second"] == pytest.approx(1024 / 1.1)
    assert row["bound"] == "memory"  # 1e10 bytes at 59 GB/s, against 1e9 FLOPs at 460 GFLOP/s
    assert row["share_of_limit"] == pytest.approx(1e10 / 59e9 / 1.1)
    assert report.line(row) == "decode after 512, batch 8: 930.9 tokens/s"
    assert report.row(kernel_figure("triton", float("nan")), LIMITS)["error"] == "nan"


def test_exact_rows_say_how_many_times_as_long_they_took(capsys):
    slower = Figure("decode", "after 512, batch 8", 1024, (2.2, 2.2, 2.2), 7.5, 1e9, 1e10)
    rows = [report.row(figure(), LIMITS), report.row(slower, LIMITS, "exact")]
    rows.append(report.row(figure("prefill", "512"), LIMITS, "exact"))  # there is no fast one
    report.add_costs(rows)
    assert [row.get("cost") for row in rows] == [None, pytest.approx(2.0), None]
    report.print_tables(FIGURES | {"rows": rows}, LIMITS)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "decode after 512, batch 8, exact" in printed and "x 2.00" in printed


@pytest.mark.parametrize("peer", [False, True])
def test_tables_fit_80_columns_and_show_a_peer_where_there_is_one(capsys, peer):
    models = [report.row(figure(), LIMITS), report.row(figure("compile", "100 layers"), LIMITS)]
    if peer:
        models[0] |= {"peer_tokens_per_second": 12345.6, "ratio": 0.08}
    kernels = [
        report.row(kernel_figure(kernel, 1e-6), LIMITS) for kernel in ("triton", "torch sdpa")
    ]
    report.print_tables(FIGURES | {"rows": models + kernels}, LIMITS)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for text in ("930.9", "7.5 s", "90.9 TFLOP/s", "torch sdpa", "1.0e-06"):
        assert text in printed
    assert ("peer" in printed) == ("x 0.08" in printed) == peer
