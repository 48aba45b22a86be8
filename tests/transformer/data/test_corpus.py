"""Reading a corpus and splitting it by document."""

import pytest

from transformer.data.corpus import Document, read_corpus, split

TWO = [Document("a", "abc"), Document("b", "def")]


@pytest.fixture(scope="module")
def standard_library():
    return read_corpus()


def test_default_corpus_is_the_standard_library_without_tests(standard_library):
    names = [document.name for document in standard_library]
    assert names == sorted(set(names))
    assert {"json/decoder.py", "argparse.py", "asyncio/tasks.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert sum(len(document.text) for document in standard_library) > 5e6
    assert all(document.text for document in standard_library)


def test_split_is_by_name_alone(standard_library):
    train, validation = split(standard_library, 0.1)
    assert sorted(train + validation) == standard_library
    # Binomial: 0.1 of about 700 has a standard deviation of 0.011, and the names are fixed.
    assert 0.05 < len(validation) / len(standard_library) < 0.15
    fewer_train, fewer_validation = split(standard_library[::2], 0.1)
    assert set(fewer_train) <= set(train)
    assert set(fewer_validation) <= set(validation)


def test_read_corpus_of_files(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "x.txt").write_bytes("naïve\r\n".encode())
    (tmp_path / "b" / "empty.txt").write_bytes(b"")
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "a.md").write_text("not asked for")
    assert read_corpus(f"{tmp_path}/**/*.txt") == [("a.txt", "A"), ("b/deep/x.txt", "naïve\r\n")]
    assert read_corpus(f"{tmp_path}/a.txt") == [("a.txt", "A")]


def test_read_corpus_names_do_not_depend_on_where_it_is_read_from(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "x.txt").write_text("X")
    monkeypatch.chdir(tmp_path)
    assert read_corpus("texts/*.txt") == read_corpus(f"{tmp_path}/texts/*.txt")
    monkeypatch.chdir(tmp_path / "texts")
    assert read_corpus("*.txt") == read_corpus("./x.txt") == read_corpus("../texts/*.txt")


def test_unreadable_corpora_get_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file matches .*nothing-\*"):
        read_corpus(f"{tmp_path}/nothing-*")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"corpus is empty: no file of .*\*\.txt"):
        read_corpus(f"{tmp_path}/*.txt")
    (tmp_path / "latin.txt").write_bytes(b"ab " + "é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: byte 3 is 0xe9"):
        read_corpus(f"{tmp_path}/*.txt")


def test_impossible_splits_get_clear_errors():
    for fraction in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"validation_fraction is .* between 0 and 1"):
            split(TWO, fraction)
    with pytest.raises(ValueError, match="no document is left for validation: 1 documents"):
        split(TWO[:1], 1e-9)
    with pytest.raises(ValueError, match="no document is left for training: 1 documents"):
        split(TWO[:1], 1 - 1e-9)
