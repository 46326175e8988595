"""Folders as people have them: litter, deeper folders, odd suffixes, others beside the splits, flat validation images."""

import os
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_stream import PLAIN, encode, photo

from pwkd_jax import data
from pwkd_jax.data import annotations, folder, soundness
from pwkd_jax.errors import UserError

PNG = encode(photo(8, 8), "PNG")


def put(home, *names: str, content: bytes = PNG):
    for name in names:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)
    return home


def plain(home, classes=("cat", "dog"), splits=("train", "test")):
    return put(home, *(f"{s}/{c}/{i}.png" for s in splits for c in classes for i in range(3)))


def load(home, *splits: str):
    return data.load("folder", str(home), *splits)


def refusal(home, *splits: str) -> str:
    with pytest.raises(UserError) as e:
        d = load(home, *splits)
        soundness.check(d.train, d.test, d.num_classes, d.classes, ("data.data_dir", "data.test_split"))
    assert "\n" not in str(e.value)
    return str(e.value)


# Images that were left out.


def test_folders_within_a_class_are_read(tmp_path, capsys):
    home = plain(tmp_path)
    put(home, *(f"train/cat/more/{i}.png" for i in range(50)), "train/dog/a/b/c.PNG", "train/dog/a/._c.png")
    (home / "train/dog/a/loop").symlink_to(home / "train/dog")
    d = load(home)
    np.testing.assert_array_equal(np.bincount(d.train.labels), [53, 4])
    assert capsys.readouterr().err == (
        "warning: split 'train': 51 files lie in deeper folders of their class and are read with it, the first "
        f"{home}/train/cat/more/0.png\n"
    )


def test_images_are_known_by_their_first_bytes(tmp_path, capsys):
    home = plain(tmp_path)
    image = photo(8, 8)
    kinds = {"a.jfif": "JPEG", "b.JPE": "JPEG", "c": "PNG", "d.gif": "GIF", "e.dib": "BMP", "f.pgm": "PPM"}
    for name, kind in kinds.items():
        put(home, f"train/cat/{name}", content=encode(image, kind))
    d = load(home)
    assert np.bincount(d.train.labels).tolist() == [9, 3] and capsys.readouterr().err == ""


def test_what_is_left_out_is_counted_once(tmp_path, capsys):
    home = plain(tmp_path)
    put(home, "train/cat/notes.txt", "train/dog/clip.mp4", "train/list.csv", content=b"BMW, no bitmap")
    put(home, "train/loose.png", "train/loose2.png")
    load(home)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert f"2 files right in {home}/train, in no class's folder, are left out, the first {home}/train/loose.png" in lines[0]
    assert f"3 files that are no images are left out, the first {home}/train/cat/notes.txt" in lines[1]


def test_a_single_class_is_refused(tmp_path):
    assert refusal(plain(tmp_path, ["only"])) == (
        "data.data_dir: there is a single class, 'only', which any network gets right; give images of two or more"
    )


# Folders that nobody asked for.


def test_litter_is_no_data(tmp_path, capsys):
    home = plain(tmp_path)
    put(home, "__MACOSX/train/cat/._0.png", "train/__MACOSX/cat/._0.png", "train/cat/__MACOSX/._0.png", "train/cat/._0.png",
        "train/.DS_Store", "train/cat/.DS_Store", "train/cat/Thumbs.db", ".ipynb_checkpoints/x/a.png",
        content=b"\0\5\x16\7")  # fmt: skip
    assert len(load(home).train) == 6 and folder.scan(str(home))[0].keys() == {"train", "test"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("other", ["checkpoints/epoch1/w.bin", "runs/a/students/x.png", "val/bird/1.png", "unlabelled/1.png"])
def test_folders_beside_the_splits_are_not_read(tmp_path, other):
    d = load(put(plain(tmp_path), other))
    assert (len(d.train), d.classes) == (6, ("cat", "dog"))
    assert not data.many_sizes("folder", str(tmp_path), "test")


def test_other_splits_are_still_known_by_name(tmp_path):
    home = plain(tmp_path, splits=("train", "val"))
    assert refusal(home) == "data.test_split: data set 'folder' has no split 'test'; it has train, val"
    assert len(load(home, "all", "val").train) == 12


@pytest.mark.parametrize("name", ["unknown", "images", "birds"])
def test_a_test_folder_without_classes_is_said_clearly(tmp_path, name):
    home = put(plain(tmp_path, splits=("train",)), f"test/{name}/1.png")
    assert refusal(home) == (
        f"data.data_dir: {home}/test holds none of the classes of {home}/train but '{name}'; images whose class is not known "
        "are no split, so cut one by class: data.train_split='stratified(train, 80%)', "
        "data.test_split='stratified(train, 80%:)'"
    )


def test_no_splits_at_all(tmp_path):
    home = put(tmp_path, "cat/1.png", "dog/1.png")
    assert refusal(home).startswith(
        f"data.data_dir: {home} holds no SPLIT/CLASS folders of images, as in train/cat; move the classes into {home}/train"
    )


def test_a_class_that_training_lacks_is_named(tmp_path):
    home = put(plain(tmp_path), "test/unknown/1.png")
    assert refusal(home) == (
        f"data.data_dir: class 'unknown' is in {home}/test but not in {home}/train; all splits need the same classes, so move "
        "that folder away, or add it to the other"
    )


def test_pipes_and_devices_are_never_read(tmp_path, capsys):
    home = plain(tmp_path)
    os.mkfifo(home / "train/cat/pipe")
    (home / "train/cat/pipe.png").symlink_to("pipe")
    (home / "train/cat/device.png").symlink_to("/dev/zero")
    assert len(load(home).train) == 6
    assert "3 files that are no images are left out" in capsys.readouterr().err


def test_a_header_of_any_size_is_no_obstacle_to_looking_for_sizes(tmp_path):
    """Pillow refuses to open it with an error of its own kind."""
    head = PNG[12:16] + (20000).to_bytes(4, "big") * 2 + PNG[24:29]  # IHDR
    huge = PNG[:12] + head + zlib.crc32(head).to_bytes(4, "big") + PNG[33:]
    home = put(plain(tmp_path), "train/cat/huge.png", content=huge)
    assert not data.many_sizes("folder", str(home))
    assert "huge.png cannot be decoded (Image size (400000000 pixels) exceeds" in refusal(home)


# Flat images with a file of classes.


def test_tiny_imagenet_as_it_unpacks(tmp_path):
    home = put(tmp_path, *(f"train/{c}/images/{c}_{i}.JPEG" for c in ("n1", "n2") for i in range(3)))
    put(home, *(f"val/images/val_{i}.JPEG" for i in range(12)), *(f"test/images/test_{i}.JPEG" for i in range(3)))
    rows = [f"val_{i}.JPEG\tn{1 + i % 2}\t0\t0\t9\t9" for i in range(12)]
    put(home, "val/val_annotations.txt", content="\n".join(rows).encode())
    d = load(home, "train", "val")
    assert d.classes == ("n1", "n2") and d.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    # In the order of their names: val_0, val_1, val_10, val_11, val_2, ...
    assert d.test.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert data.load_split("folder", str(home), "val", streaming=PLAIN)[0].labels.tolist() == d.test.labels.tolist()
    assert "holds none of the classes" in refusal(home, "train", "test")


FORMS = {
    "val_annotations.txt": "b.JPEG\tn2\t0\na.JPEG\tn1\t3\nc.JPEG n2 1",
    "val.txt": "a.JPEG 0\nb.JPEG 1\nc.JPEG 1\n",
    "LOC_val_solution.csv": "ImageId,PredictionString\nc,n2 85 1 499 272\na,n1 1 2 3 4\nb,n2 1 2 3 4\n",
    "imagenet_2012_validation_synset_labels.txt": "n1\nn2\nn2\n",
    "val_ground_truth.txt": "a.JPEG,n1\nb.JPEG,n2\nc.JPEG,n2\n",
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("place", ["val", "."])
def test_flat_validation_images(tmp_path, name, place):
    home = put(plain(tmp_path, ["n1", "n2"], ["train"]), "val/a.JPEG", "val/b.JPEG", "val/c.JPEG")
    put(home, f"{place}/{name}", content=FORMS[name].encode())
    d = load(home, "train", "val")
    assert d.test.labels.tolist() == [0, 1, 1] and d.num_classes == 2


def test_the_ground_truth_of_the_development_kit(tmp_path):
    import scipy.io

    home = put(plain(tmp_path, ["n1", "n2"], ["train"]), "val/a.JPEG", "val/b.JPEG", "val/c.JPEG")
    kit = home / "ILSVRC2012_devkit_t12/data"
    put(home, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", content=b"2\n1\n2\n")
    assert "gives numbers from 1 to 2, whose order only a list of the classes tells; put" in refusal(home, "train", "val")
    rows = np.array([(1, "n2"), (2, "n1")], [("ILSVRC2012_ID", "O"), ("WNID", "O")])
    scipy.io.savemat(kit / "meta.mat", {"synsets": rows})
    assert load(home, "train", "val").test.labels.tolist() == [0, 1, 0]


def test_imagenets_own_validation_images_need_no_file(tmp_path):
    """The list is TFDS's; the first image is a sea snake, n01751748."""
    names = sorted(tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split())
    found = annotations.labels(tmp_path, ["/x/ILSVRC2012_val_00000001.JPEG"], names)
    assert names[found[0]] == "n01751748"


def test_any_single_text_beside_flat_images_is_their_list(tmp_path, capsys):
    home = put(plain(tmp_path, ["n1", "n2"], ["train"]), "val/a.JPEG", "val/b.JPEG")
    put(home, "val/truth of 2012.csv", content=b"a,n2\nb,n1\n")
    put(home, "val/a.xml", content=b"<annotation/>")
    assert load(home, "train", "val").test.labels.tolist() == [1, 0]
    assert capsys.readouterr().err == (
        f"warning: split 'val': 1 files that are no images are left out, the first {home}/val/a.xml\n"
    )


def test_flat_images_whose_classes_nothing_says(tmp_path):
    home = put(plain(tmp_path, ["n1", "n2"], ["train"]), "val/ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000002.JPEG")
    assert refusal(home, "train", "val").startswith(
        f"data.data_dir: {home}/val holds 2 images in no class's folder, and no file says their classes; put val_anno"
    )
    for text, sentence in (
        ("n1\n", "has 1 lines for 2 images; it should have lines of an image's name"),
        ("ILSVRC2012_val_00000001.JPEG n1\n", "gives no class to"),
        ("n1\nn9\n", "the class 'n9', of which there are no training images"),
        ("3\n4\n", "gives numbers from 3 to 4, whose order only a list"),
    ):
        put(home, "val/val_annotations.txt", content=text.encode())
        assert sentence in refusal(home, "train", "val")


@pytest.mark.parametrize(
    "text",
    ["a b.JPEG big cat\nb.JPEG big", "b.JPEG,big\na b.JPEG,big cat", '"a b.JPEG","big cat"\n"b.JPEG","big"',
        "a b\tbig cat\t0\t9\nb\tbig\t0\t9",
     "image,label\na b.JPEG;big cat\nb;big", "big cat\nbig"],
)  # fmt: skip
def test_names_that_hold_spaces(tmp_path, text):
    """Once the first word was the class: of big cat, big."""
    home = put(plain(tmp_path, ["big", "big cat"], ["train"]), "val/a b.JPEG", "val/b.JPEG")
    put(home, "val/val_annotations.txt", content=text.encode())
    assert load(home, "train", "val").test.labels.tolist() == [1, 0]


def test_splits_that_all_lie_flat_name_their_classes(tmp_path):
    home = put(tmp_path, "train/1.png", "train/2.png", "test/1.png", "test/2.png")
    for split in ("train", "test"):
        put(home, f"{split}/{split}.csv", content=b"1.png,big cat,3,4\n2.png,big dog,5,6\n")
    (home / "other/x").mkdir(parents=True)  # without a folder in it, no folder here is a split
    d = load(home)
    assert d.classes == ("big cat", "big dog") and d.train.labels.tolist() == [0, 1]


def test_an_image_of_two_classes_is_refused(tmp_path):
    home = put(plain(tmp_path, ["n1", "n2"], ["train"]), "val/a.JPEG")
    put(home, "val/val_annotations.txt", content=b"a.JPEG n1\na.JPEG n2\n")
    assert f"gives {home}/val/a.JPEG two classes, 'n1' and 'n2'" in refusal(home, "train", "val")


def test_images_that_differ_in_their_suffix_alone(tmp_path):
    home = put(plain(tmp_path, ["n1", "n2"], ["train"]), "val/a.JPEG", "val/a.png")
    put(home, "val/val_annotations.txt", content=b"a.png n2\na.JPEG n1\n")
    assert load(home, "train", "val").test.labels.tolist() == [0, 1]
    put(home, "val/val_annotations.txt", content=b"a n2\na n1\n")
    assert "gives no class to" in refusal(home, "train", "val")
