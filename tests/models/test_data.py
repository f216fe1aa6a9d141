"""Readers on true layouts written here, and what they answer to damaged, missing and hostile files."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from wsss_models.data import ebhi, files, glas, rings, sliding, voc
from wsss_models.errors import InputError
from wsss_models.refine.pictures import mask_image

RED = np.full((4, 6, 3), (200, 0, 0), np.uint8)


def save(path, array=RED):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)
    return path


@pytest.fixture
def voc_root(tmp_path):
    home = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("a", "b"):
        save(home / "JPEGImages" / f"{name}.jpg")
    (home / "SegmentationClassAug").mkdir()
    mask_image(np.array([[0, 15, 255]], np.uint8)).save(home / "SegmentationClassAug" / "a.png")
    lists = home / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "ids.txt").write_text("a\nb\n\n")
    (lists / "sbd.txt").write_text("/JPEGImages/a.jpg /SegmentationClassAug/a.png\n")
    return tmp_path


def test_voc_lists_and_palette_masks(voc_root):
    a, b = voc.read(voc_root, "ids")
    assert (a.name, b.mask, a.labels) == ("a", None, None)
    assert voc.read(voc_root, "sbd") == [a]
    assert files.read_mask(a.mask).tolist() == [[0, 15, 255]]
    with pytest.raises(InputError, match="no such file"):
        voc.read(voc_root, "other")
    with pytest.raises(InputError, match="JPEGImages"):
        voc.read(voc_root / "VOCdevkit" / "VOC2012" / "ImageSets", "ids")


def test_voc_labels(voc_root):
    home = voc.home(voc_root)
    table = {name: np.eye(20, dtype=np.float32)[i] for i, name in enumerate("ab")}
    np.save(home / "cls_labels_onehot.npy", table)
    items = voc.read(voc_root, "ids", labels="cls_labels_onehot.npy")
    assert [item.labels.index(1.0) for item in items] == [0, 1]
    np.save(home / "short.npy", {"a": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match="expected 20 numbers for a"):
        voc.read(voc_root, "ids", labels="short.npy")
    (home / "Annotations").mkdir()
    (home / "Annotations" / "a.xml").write_text("<annotation><object><name>cat</name><part><name>head</name></part></object></annotation>")
    assert voc.read(voc_root, "ids")[0].labels.index(1.0) == 7
    for text, message in (("<a", "cannot be read"), ("<a><object><name>unicorn</name></object></a>", "unicorn")):
        (home / "Annotations" / "a.xml").write_text(text)
        with pytest.raises(InputError, match=message):
            voc.read(voc_root, "ids")


def test_xml_with_entities_is_refused(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><a><object><name>&x;</name></object></a>')
    with pytest.raises(InputError, match="entities"):
        voc.read_xml(path)


@pytest.mark.parametrize(
    "line", ["../../../secret", "/../../secret.jpg", "JPEGImages/../../../secret.jpg", "a\0b", "/JPEGImages/a.jpg ../../x.png"]
)
def test_lists_cannot_leave_the_folder(voc_root, line):
    save(voc_root / "secret.jpg")
    (voc.home(voc_root) / "ImageSets" / "Segmentation" / "evil.txt").write_text(line)
    with pytest.raises(InputError, match="expected a path"):
        voc.read(voc_root, "evil")
    with pytest.raises(InputError, match="expected a path"):
        voc.read(voc_root, "../../../evil.txt")


def test_links_out_of_the_folder(tmp_path):
    save(tmp_path / "elsewhere" / "a.png")
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (root / "images").symlink_to(tmp_path / "elsewhere")
    (root / "deep" / "link").symlink_to(tmp_path / "elsewhere")
    (root / "file.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    assert files.inside(root, "images/a.png").is_file()
    for name in ("deep/link/a.png", "file.png"):
        with pytest.raises(InputError, match="expected a path inside"):
            files.inside(root, name)


class _Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


def test_pickled_labels_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("evil.npy", np.array({"a": _Attack()}, object), allow_pickle=True)
    (tmp_path / "raw.npy").write_bytes(pickle.dumps({"a": _Attack()}))
    np.save("nested.npy", np.array({"a": np.array([_Attack()], object)}, object), allow_pickle=True)
    for name in ("evil.npy", "raw.npy", "nested.npy", "missing.npy"):
        with pytest.raises(InputError, match=name):
            files.read_table(tmp_path / name)
    assert not (tmp_path / "attacked").exists()


def test_pickled_labels_that_are_harmless(tmp_path):
    np.save(tmp_path / "t.npy", {"a": [1, 0], "b": np.ones(2), 3: np.float32(0.5), "c": 1})
    table = files.read_table(tmp_path / "t.npy")
    assert table["a"].tolist() == [1, 0] and table["3"] == 0.5 and table["c"].dtype == np.float32
    for content in ({"a": "text"}, {"a": {"b": 1}}, [1, 2]):
        np.save(tmp_path / "t.npy", np.array(content, object))
        with pytest.raises(InputError, match="t.npy"):
            files.read_table(tmp_path / "t.npy")


def test_masks(tmp_path):
    grey = save(tmp_path / "rgb.png", np.repeat(np.arange(6).reshape(1, 6, 1), 3, 2))
    assert files.read_mask(grey).tolist() == [[0, 1, 2, 3, 4, 5]]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert (files.read_mask(tmp_path / "bits.png") > 0).tolist() == [[True, False]]
    with pytest.raises(InputError, match="colours"):
        files.read_mask(save(tmp_path / "red.png"))
    with pytest.raises(InputError, match="expected 5×1 pixels as its image has, got 6×1"):
        files.read_mask(grey, (1, 5))
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "deep.png")
    grey.write_bytes(grey.read_bytes()[:40])
    for name in ("deep.png", "rgb.png", "missing.png"):
        with pytest.raises(InputError, match=name):
            files.read_mask(tmp_path / name)


def test_glas(tmp_path):
    for name in ("train_10", "train_2", "testB_1", "testA_3"):
        save(tmp_path / f"{name}.bmp")
        save(tmp_path / f"{name}_anno.bmp", [[0, 1, 7, 0, 0, 2]] * 4)
    assert [i.name for i in glas.read(tmp_path, "train")] == ["train_2", "train_10"]
    assert [i.name for i in glas.read(tmp_path, "test")] == ["testA_3", "testB_1"]
    item = glas.read(tmp_path, "testA")[0]
    assert glas.read_label(item)[0].tolist() == [0, 1, 1, 0, 0, 1]
    (tmp_path / "Grade.csv").write_text(
        "name,patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)\ntrain_2, 5, benign, adenomatous\n"
    )
    assert glas.read_grades(tmp_path) == {"train_2": "benign"}
    with pytest.raises(InputError, match="got none"):
        glas.read(tmp_path / "..", "train")
    (tmp_path / "testA_3_anno.bmp").unlink()
    with pytest.raises(InputError, match="no annotation"):
        glas.read_label(glas.read(tmp_path, "testA")[0])


def test_rings(tmp_path):
    for folder, value in (("IMAGES", 9), ("MANUAL GLANDS", 255), ("MANUAL TUMOR", 0)):
        save(tmp_path / "TRAIN" / folder / "P1_A.png", np.full((3, 3), value))
    (item,) = rings.read(tmp_path, "train")
    assert item.name == "P1_A" and rings.read_label(item).all()
    assert not rings.read_label(rings.read(tmp_path, "train", "Manual Tumor")[0]).any()
    with pytest.raises(InputError, match="expected a folder test"):
        rings.read(tmp_path, "test")


def test_ebhi(tmp_path):
    for kind in ("Polyp", "Normal"):
        save(tmp_path / "EBHI-SEG" / kind / "image" / "1.png")
        save(tmp_path / "EBHI-SEG" / kind / "label" / "1.png", [[0, 127, 128, 255, 0, 0]] * 4)
    items = ebhi.read(tmp_path)
    assert [i.name for i in items] == ["Normal/1", "Polyp/1"]
    assert ebhi.read_label(items[0])[0].tolist() == [0, 0, 1, 1, 0, 0]
    with pytest.raises(InputError, match="one per class"):
        ebhi.read(tmp_path / "EBHI-SEG" / "Polyp")


def test_split_is_fixed_and_disjoint():
    a, b = files.split(range(20), (5, 10), seed=1)
    assert len(a) == 5 and len(b) == 10 and not set(a) & set(b) and a == sorted(a)
    assert files.split(range(20), (5, 10), seed=1) == [a, b] != files.split(range(20), (5, 10), seed=2)
    with pytest.raises(InputError, match="at least 30"):
        files.split(range(20), (10, 20), seed=1)


@pytest.mark.parametrize("size", [(7, 11), (4, 4), (3, 9), (1, 1), (8, 4)])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_windows_cover_and_overlap_add_is_the_mean(size, stride):
    places = sliding.windows(size, 4, stride)
    assert len(set(map(str, places))) == len(places)
    image = torch.rand(2, *size, dtype=torch.float64)
    torch.testing.assert_close(sliding.overlap_add(size, places, [image[:, r, c] for r, c in places]), image)
    counted = sum(
        torch.zeros(size).index_put_((torch.arange(size[0])[r, None], torch.arange(size[1])[c]), torch.ones(())) for r, c in places
    )
    assert counted.min() >= 1


def test_starts():
    assert sliding.starts(10, 4, 4) == [0, 4, 6] and sliding.starts(3, 4, 2) == [0] and sliding.starts(8, 4, 4) == [0, 4]
    with pytest.raises(ValueError, match="at least 1"):
        sliding.starts(4, 0, 1)
