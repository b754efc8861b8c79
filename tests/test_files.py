import pytest

from ditfast.files import replacing


def test_the_file_takes_the_place_of_the_former_one(tmp_path):
    path = tmp_path / "made" / "file"
    for content in (b"one", b"two"):
        with replacing(path) as file:
            file.write(content)
        assert path.read_bytes() == content


def test_after_an_error_the_former_file_is_there_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    with pytest.raises(OSError, match="full"), replacing(path) as file:
        file.write(b"tw")
        raise OSError("the disk is full")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_to_be_read_before_the_end(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"one")
        file.flush()
        assert not path.exists()
