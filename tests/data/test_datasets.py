"""Datasets: values, shapes and labels of real and synthetic files, and errors that name the file."""

import numpy as np
import pytest
import torch
from PIL import Image

from ditfast.data import CIFAR10, DATASETS, DataError, Digits, FeatureFolder, ImageFolder, build_dataset
from ditfast.data.folder import cover


def write_image(path, size=(12, 10), color=(255, 0, 127), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)
    return path


@pytest.fixture
def cifar(tmp_path):
    """All six files, 3 records each; byte k of record i is (i + k) % 256."""
    for number, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        records = (np.arange(3)[:, None] + np.arange(3073)).astype(np.uint8)
        records[:, 0] = number
        records.tofile(tmp_path / name)
    return tmp_path


@pytest.fixture
def features(tmp_path):
    """Twelve latents of fast-DiT's layout, so that sorting by number and by name differ; latent i is filled with i."""
    for kind in ("features", "labels"):
        (tmp_path / f"imagenet256_{kind}").mkdir()
    for i in range(12):
        np.save(tmp_path / "imagenet256_features" / f"{i}.npy", np.full((1, 4, 6, 8), i, np.float32))
        np.save(tmp_path / "imagenet256_labels" / f"{i}.npy", np.array([i * 10]))
    return tmp_path


class TestDigits:
    def test_is_the_real_scans_between_minus_one_and_one(self):
        from sklearn.datasets import load_digits

        data, real = Digits("all"), load_digits()
        assert len(data) == 1797
        image, label = data[5]
        assert (image.shape, image.dtype, type(label)) == ((1, 8, 8), torch.float32, int)
        assert torch.equal((image[0] + 1) * 8, torch.from_numpy(real.images[5]).float())
        assert label == real.target[5]
        assert data.images.min() == -1 and data.images.max() == 1

    def test_splits_are_disjoint_and_complete(self):
        parts = torch.cat([Digits("train").images, Digits("heldout").images]).flatten(1)
        whole = Digits("all").images.flatten(1)
        assert len(Digits("heldout")) == 256
        assert sorted(map(tuple, parts.tolist())) == sorted(map(tuple, whole.tolist()))

    def test_every_class_is_held_out(self):
        assert Digits("heldout").labels.bincount(minlength=10).min() >= 15

    def test_unknown_split(self):
        with pytest.raises(DataError, match="'test' is unknown; choose one of train, heldout, all"):
            Digits("test")


class TestImageFolder:
    def test_classes_are_sorted_and_labels_follow(self, tmp_path):
        for name in ("b/x.png", "b/y.jpg", "a/z.PNG", "a/.hidden.png", "c/nested/w.png"):
            write_image(tmp_path / name)
        (tmp_path / "a" / "notes.txt").write_text("no image")
        data = ImageFolder(tmp_path, 8)
        assert data.classes == ["a", "b", "c"] and data.num_classes == 3
        assert [data[i][1] for i in range(len(data))] == [0, 1, 1, 2]

    def test_flat_folder_is_one_class(self, tmp_path):
        write_image(tmp_path / "x.png")
        data = ImageFolder(tmp_path, 8)
        assert data.num_classes == 1 and data[0][1] == 0

    @pytest.mark.parametrize(("channels", "expected"), [(3, (1.0, -1.0, 127 / 127.5 - 1)), (1, (91 / 127.5 - 1,))])
    def test_values(self, tmp_path, channels, expected):
        write_image(tmp_path / "x.png")
        image, _ = ImageFolder(tmp_path, (6, 8), channels)[0]
        assert (image.shape, image.dtype) == ((channels, 6, 8), torch.float32)
        torch.testing.assert_close(image, torch.tensor(expected)[:, None, None].expand(channels, 6, 8))

    @pytest.mark.parametrize("size", [(9, 9), (40, 17), (17, 40), (300, 33), (8, 8), (5, 3)])
    def test_cover_gives_the_size_from_any_image(self, size):
        assert cover(Image.new("RGB", size), (8, 10)).size == (10, 8)

    def test_cover_takes_the_centre_and_averages_areas(self):
        pixels = np.zeros((32, 96), np.uint8)
        pixels[:, 32:64] = 200
        pixels[::2, 32:64] = 100
        assert (np.asarray(cover(Image.fromarray(pixels), (4, 4)))[:, 1:3] == 150).all()

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ([], "has no image"),
            (["a/x.png", "b/notes.txt"], "b has no image"),
            (["a/x.png", "y.png"], r"class folders \(a, ...\) and images \(y.png"),
        ],
    )
    def test_bad_folder(self, tmp_path, files, message):
        for name in files:
            write_image(tmp_path / name) if name.endswith("png") else (tmp_path / name).parent.mkdir()
        with pytest.raises(DataError, match=message):
            ImageFolder(tmp_path, 8)

    def test_unreadable_image_is_named(self, tmp_path):
        write_image(tmp_path / "good.png")
        (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
        with pytest.raises(DataError, match=r"bad.png \(sample 0\)"):
            ImageFolder(tmp_path, 8)[0]

    def test_sixteen_bits_are_refused_not_clipped(self, tmp_path):
        Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(tmp_path / "deep.png")
        with pytest.raises(DataError, match="more than 8 bits"):
            ImageFolder(tmp_path, 8)[0]

    def test_missing_folder(self, tmp_path):
        with pytest.raises(DataError, match="nowhere is missing"):
            ImageFolder(tmp_path / "nowhere", 8)


class TestCIFAR10:
    def test_train_is_the_five_batches_in_order(self, cifar):
        data = CIFAR10(cifar)
        assert len(data) == 15
        assert [data[i][1] for i in (0, 2, 3, 14)] == [0, 0, 1, 4]

    def test_pixels_are_planes_of_rows(self, cifar):
        image, label = CIFAR10(cifar, "test")[2]
        assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.float32, 5)
        byte = (2 + 1 + 2 * 1024 + 5 * 32 + 7) % 256
        assert image[2, 5, 7] == pytest.approx(byte / 127.5 - 1)

    def test_finds_the_unpacked_archive(self, cifar):
        inner = cifar / "cifar-10-batches-bin"
        inner.mkdir()
        (cifar / "test_batch.bin").rename(inner / "test_batch.bin")
        assert len(CIFAR10(cifar, "test")) == 3

    def test_missing_file(self, cifar):
        (cifar / "data_batch_3.bin").unlink()
        with pytest.raises(DataError, match=r"data_batch_3.bin is missing"):
            CIFAR10(cifar)

    def test_truncated_file(self, cifar):
        file = cifar / "data_batch_2.bin"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(DataError, match=r"data_batch_2.bin has 9218 bytes"):
            CIFAR10(cifar)

    def test_label_out_of_range(self, cifar):
        file = cifar / "test_batch.bin"
        data = bytearray(file.read_bytes())
        data[3073] = 10
        file.write_bytes(data)
        with pytest.raises(DataError, match=r"record 1 has label 10"):
            CIFAR10(cifar, "test")


class TestFeatureFolder:
    def test_order_values_and_sizes(self, features):
        data = FeatureFolder(features)
        assert (len(data), data.channels, data.image_size, data.num_classes) == (12, 4, (6, 8), 1000)
        image, label = data[10]
        assert (image.shape, image.dtype, label) == ((4, 6, 8), torch.float32, 100)
        assert (image == 10).all()

    def test_plain_folder_names(self, features):
        for kind in ("features", "labels"):
            (features / f"imagenet256_{kind}").rename(features / kind)
        assert len(FeatureFolder(features)) == 12

    @pytest.mark.parametrize(("gone", "left"), [("features", "labels"), ("labels", "features")])
    def test_missing_partner(self, features, gone, left):
        (features / f"imagenet256_{gone}" / "7.npy").unlink()
        with pytest.raises(DataError, match=rf"{left}/7.npy has no partner .*{gone}/7.npy"):
            FeatureFolder(features)

    def test_no_pair_of_folders(self, features):
        (features / "imagenet256_labels").rename(features / "other")
        with pytest.raises(DataError, match=r"0 pairs of folders.*found imagenet256_features, other"):
            FeatureFolder(features)

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("features", np.zeros((1, 4, 8, 8), np.float32), r"\(1, 4, 6, 8\)"),
            ("features", np.zeros((1, 4, 6, 8), np.int32), "int32"),
            ("features", np.full((1, 4, 6, 8), np.nan, np.float32), "NaN or infinity"),
            ("features", np.array([object()]), "Object arrays"),
            ("labels", np.array([1000]), r"label 1000, expected 0\.\.999"),
            ("labels", np.array([-1]), "label -1"),
            ("labels", np.array([1, 2]), r"expected int64 \(1,\)"),
        ],
    )
    def test_bad_file_is_named(self, features, file, content, message):
        np.save(features / f"imagenet256_{file}" / "3.npy", content, allow_pickle=True)
        data = FeatureFolder(features)
        with pytest.raises(DataError, match=rf"{file}/3.npy.*{message}"):
            data[3]

    def test_truncated_file_is_named(self, features):
        file = features / "imagenet256_features" / "3.npy"
        file.write_bytes(file.read_bytes()[:-4])
        with pytest.raises(DataError, match=r"cannot read .*features/3.npy"):
            FeatureFolder(features)[3]

    @pytest.mark.parametrize(
        ("old", "new"), [(b"'shape': (1,", b"'shape': (1("), (b"'descr'", b"b'escr'"), (b"(1, 4,", b"(9**9")]
    )
    def test_damaged_header_is_named(self, features, old, new):
        file = features / "imagenet256_features" / "3.npy"
        damaged = file.read_bytes().replace(old, new)
        assert damaged != file.read_bytes()
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot read .*features/3.npy"):
            FeatureFolder(features)[3]


class TestBuildDataset:
    def test_every_kind(self, tmp_path, cifar, features):
        write_image(tmp_path / "images" / "x.png")
        paths = {"folder": tmp_path / "images", "cifar10": cifar, "features": features}
        for kind in DATASETS:
            data = build_dataset(kind, paths.get(kind), 8 if kind == "folder" else None)
            image, label = data[0]
            assert image.shape == (data.channels, *data.image_size)
            assert 0 <= label < data.num_classes

    def test_arguments_reach_the_dataset(self, tmp_path):
        write_image(tmp_path / "x.png")
        data = build_dataset("folder", tmp_path, [6, 8], channels=1, flip=True)
        assert (data.image_size, data.channels, data.flip) == ((6, 8), 1, True)
        assert len(build_dataset("digits", split="heldout")) == 256

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"kind": "digit"}, "'digit' is unknown.*did you mean 'digits'"),
            ({"kind": "cifar10"}, "'cifar10' needs path"),
            ({"kind": "folder", "path": "."}, "'folder' needs image_size"),
            ({"kind": "digits", "image_size": 32}, r"no image_size \(32, 32\), it has \(8, 8\)"),
            ({"kind": "digits", "channels": 3}, "no channels 3, it has 1"),
            ({"kind": "digits", "flip": True}, "no flip True, it has False"),
            ({"kind": "digits", "path": "/data"}, "takes no path '/data'"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(DataError, match=message):
            build_dataset(**arguments)

    def test_what_the_dataset_has_may_be_repeated(self):
        assert len(build_dataset("digits", image_size=8, channels=1, num_classes=10, flip=False)) == 1541
