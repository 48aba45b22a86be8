"""Rows of numbers in files."""

from experiments.run.metrics import METRICS_FILE, Log, Metrics, read_rows


def test_a_log_is_cut_after_a_step_and_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    texts = ["a", "line\u2028separator", "\ud7ff", "b\n"]
    with Log(path, 0) as log:
        for step, text in enumerate(texts, 1):
            log.write({"step": step, "text": text})
    path.write_bytes(path.read_bytes() + b'{"step": 5, "te')  # killed while it wrote
    with Log(path, 3) as log:
        log.write({"step": 4, "text": "new"})
        log.flush()
        assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    assert [row["text"] for row in read_rows(path)] == [*texts[:3], "new"]


def test_metrics_go_into_all_their_files(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        for step in (1, 2):
            metrics.write({"step": step, "loss": 1.0 / step})
        metrics.write({"step": 2, "validation_loss": 0.75})
        metrics.flush()
    assert len(read_rows(tmp_path / METRICS_FILE)) == 3
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
