"""Reading a corpus."""

import logging

import pytest

from transformer.data.corpus import read_corpus


def test_default_corpus_is_the_standard_library_without_tests(caplog):
    with caplog.at_level(logging.INFO):
        corpus = read_corpus()
    assert not caplog.records
    names = [document.name for document in corpus]
    assert names == sorted(set(names))
    assert {"json/decoder.py", "argparse.py", "asyncio/tasks.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert sum(len(document.text) for document in corpus) > 5e6
    assert all(document.text for document in corpus)


def test_read_corpus_of_files(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "x.txt").write_bytes("naïve\r\n".encode())
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "a.md").write_text("not asked for")
    assert read_corpus(f"{tmp_path}/**/*.txt") == [("a.txt", "A"), ("b/deep/x.txt", "naïve\r\n")]


def test_names_do_not_depend_on_where_it_is_read_from(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for name in "xy":
        (tmp_path / "texts" / f"{name}.txt").write_text(name)
    monkeypatch.chdir(tmp_path)
    expected = [("x.txt", "x"), ("y.txt", "y")]
    assert read_corpus("texts/*.txt") == read_corpus(f"{tmp_path}/texts/*.txt") == expected
    monkeypatch.chdir(tmp_path / "texts")
    assert read_corpus("*.txt") == read_corpus("../texts/*.txt") == expected


def test_what_is_left_out_is_said(tmp_path, caplog):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "d.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [name for name, _ in read_corpus(f"{tmp_path}/**/*.txt")] == ["a.txt", "b.txt", "c.txt"]
    [record] = caplog.records
    for part in (
        "1 link to a folder that is read already",
        "1 path to a file that is read under another name",
        "1 file without text",
    ):
        assert part in record.getMessage()


def test_a_separator_and_a_length_cut_documents(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    (tmp_path / "b.txt").write_text("four")
    path = f"{tmp_path}/*.txt"
    with caplog.at_level(logging.INFO):
        separated = read_corpus(path, separator="\n\n")
        assert [text for _, text in separated] == ["one", "two", "three", "four"]
        both = read_corpus(path, separator="\n\n", document_length=3)
        assert [text for _, text in both] == ["one", "two", "thr", "ee", "fou", "r"]
        assert len(read_corpus(path)) == 2
        assert read_corpus(f"{tmp_path}/b.txt") == [("b.txt", "four")]
    assert not caplog.records


def test_unreadable_corpora_get_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file matches .*nothing-\*"):
        read_corpus(f"{tmp_path}/nothing-*")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"corpus is empty: no file of .*\*\.txt"):
        read_corpus(f"{tmp_path}/*.txt")
    (tmp_path / "some.txt").write_text("some")
    with pytest.raises(ValueError, match=r"separator='\\\\n' stands in no file .* as \$'\\n'"):
        read_corpus(f"{tmp_path}/*.txt", separator="\\n")
    with pytest.raises(ValueError, match="separator=''; it must be a text"):
        read_corpus(f"{tmp_path}/*.txt", separator="")
    with pytest.raises(ValueError, match="document_length=0; it must be at least 1"):
        read_corpus(f"{tmp_path}/*.txt", document_length=0)
    (tmp_path / "latin.txt").write_bytes(b"ab " + "é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: byte 3 is 0xe9"):
        read_corpus(f"{tmp_path}/*.txt")
