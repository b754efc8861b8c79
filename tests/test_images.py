"""Bytes, grids and archives of samples, read back from the files."""

import numpy as np
import pytest
import torch
from PIL import Image

from ditfast.images import save_grid, save_npz, to_uint8


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_to_uint8_clamps_and_truncates_as_the_official_sampler():
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 0.999, 1.0, 3.0]).reshape(2, 1, 2, 2)
    assert to_uint8(x).flatten().tolist() == [0, 0, 64, 128, 191, 255, 255, 255]


def test_to_uint8_returns_every_byte_that_the_datasets_read():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(values.float() / 127.5 - 1)[..., 0], values[0])


def test_to_uint8_moves_channels_last():
    x = torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16, requires_grad=True)
    out = to_uint8(x)
    assert (out.shape, out.dtype, out.is_contiguous()) == ((2, 4, 5, 3), torch.uint8, True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_to_uint8_names_the_image_that_diverged(bad):
    x = torch.zeros(4, 1, 2, 2)
    x[2, 0, 1, 1] = bad
    with pytest.raises(ValueError, match="image 2 of 4 holds NaN or infinity"):
        to_uint8(x)


def test_to_uint8_wants_four_dimensions():
    with pytest.raises(ValueError, match=r"\(3, 8, 8\), expected \(N, C, H, W\)"):
        to_uint8(torch.zeros(3, 8, 8))


def test_grid_places_images_row_by_row_on_white(tmp_path, images):
    save_grid(tmp_path / "new" / "grid.png", images, columns=3, scale=2, pad=1)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape == (2 * 7 + 1, 3 * 9 + 1, 3)
    for i in range(5):
        top, left = 1 + i // 3 * 7, 1 + i % 3 * 9
        for dy, dx in ((0, 0), (1, 1)):  # both copies of a pixel enlarged twice
            assert (grid[top + dy : top + 6 : 2, left + dx : left + 8 : 2] == images[i].numpy()).all()
    assert (grid[8:, 19:] == 255).all() and (grid[7] == 255).all() and (grid[:, 9] == 255).all()


def test_grey_grid(tmp_path, images):
    save_grid(tmp_path / "grid.png", images[:2, ..., :1], columns=8, pad=0)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert (grid == np.concatenate([*images[:2, ..., 0].numpy()], axis=1)).all()


def test_npz_has_the_names_and_dtypes_of_the_adm_evaluator(tmp_path, images):
    save_npz(tmp_path / "samples.npz", images, torch.arange(5, dtype=torch.int32))
    with np.load(tmp_path / "samples.npz") as archive:
        assert sorted(archive.files) == ["arr_0", "labels"]
        assert archive["arr_0"].dtype == np.uint8 and (archive["arr_0"] == images.numpy()).all()
        assert archive["labels"].dtype == np.int64 and archive["labels"].tolist() == [0, 1, 2, 3, 4]
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.npz"]


def test_failed_write_keeps_the_former_file(tmp_path, images, monkeypatch):
    save_npz(tmp_path / "samples.npz", images, torch.arange(5))
    former = (tmp_path / "samples.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        save_npz(tmp_path / "samples.npz", images[:1], torch.arange(1))
    assert (tmp_path / "samples.npz").read_bytes() == former
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 3, 4, 2), (0, 4, 4, 3)])
def test_bad_shapes(tmp_path, shape):
    with pytest.raises(ValueError, match="expected uint8"):
        save_grid(tmp_path / "grid.png", np.zeros(shape, np.uint8), 2)


def test_bad_dtype(tmp_path, images):
    with pytest.raises(ValueError, match=r"float32 \(5, 3, 4, 3\), expected uint8"):
        save_npz(tmp_path / "x.npz", images.float(), torch.arange(5))


@pytest.mark.parametrize("options", [{"columns": 0}, {"columns": 2, "scale": 0}, {"columns": 2, "pad": -1}])
def test_bad_layout(tmp_path, images, options):
    with pytest.raises(ValueError, match="expected at least 1, 1 and 0"):
        save_grid(tmp_path / "grid.png", images, **options)


@pytest.mark.parametrize("labels", [torch.arange(4), torch.zeros(5), torch.zeros(5, 1, dtype=torch.int64)])
def test_bad_labels(tmp_path, images, labels):
    with pytest.raises(ValueError, match=r"expected int64 \(5,\)"):
        save_npz(tmp_path / "x.npz", images, labels)
