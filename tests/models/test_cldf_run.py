"""M3: readers of volumes, the chain."""

import json

import numpy as np
import pytest
from PIL import Image

from wsss_models import cli
from wsss_models.cldf import cam, data as slices
from wsss_models.cldf.config import Cam, CldfConfig, Data
from wsss_models.data import brats, dicom, flare, volumes
from wsss_models.engine import config as configs
from wsss_models.errors import InputError, UsageError


def save_nifti(path, array):
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.eye(4)), path)


def volume(seed, depth=6, size=24):
    """A bright block in noise on the middle slices: images (H, W, Z) and mask."""
    random = np.random.default_rng(seed)
    mask = np.zeros((size, size, depth), np.int16)
    mask[8:16, 8 + seed : 16 + seed, 2:5] = 1 + seed % 4
    return random.random((size, size, depth)) + 3 * (mask > 0), mask


@pytest.fixture
def brats_folder(tmp_path):
    root = tmp_path / "brats"
    for i in range(4):
        name = f"BraTS2021_0000{i}"
        images, mask = volume(i)
        for j, word in enumerate(("flair", "t1", "t1ce", "t2")):
            save_nifti(root / name / f"{name}_{word}.nii.gz", images * (j + 1))
        save_nifti(root / name / f"{name}_seg.nii.gz", mask)
    return root


def test_brats_volumes(brats_folder):
    cases = brats.read(brats_folder)
    assert [c.name for c in cases] == [f"BraTS2021_0000{i}" for i in range(4)] and [p.name for p in cases[0].images][2].endswith(
        "t1ce.nii.gz"
    )
    images, mask = volumes.read_case(cases[1])
    truth, own = volume(1)
    assert images.shape == (6, 4, 24, 24) and np.array_equal(mask, np.moveaxis(own > 0, 2, 0))
    np.testing.assert_allclose(images[:, 1], 2 * np.moveaxis(truth, 2, 0), rtol=1e-6)
    (brats_folder / "BraTS2021_00001" / "BraTS2021_00001_t2.nii.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(InputError, match=r"volume .*00001_t2.nii.gz: cannot be read as NIfTI"):
        volumes.read_case(cases[1])
    save_nifti(cases[2].images[0], np.zeros((24, 20, 6)))
    with pytest.raises(InputError, match="case BraTS2021_00002: expected images of one size, got 6×24×20 and 6×24×24"):
        volumes.read_case(cases[2])
    with pytest.raises(InputError, match=r"one NIfTI file for each of flair, t9, got none; .* has not one file of t9"):
        brats.read(brats_folder, ("flair", "t9"))


def test_brats_single_slices_with_labels_apart(tmp_path):
    for part, case in (("training", "000001"), ("testing", "000247")):
        for word in ("flair", "t1"):
            save_nifti(tmp_path / part / case / f"brats_train_001_{word}_080_w.nii.gz", np.ones((8, 8)))
    save_nifti(tmp_path / "test_labels" / "000247-label.nii.gz", np.eye(8) * 4)
    save_nifti(tmp_path / "training" / "000001" / "brats_train_001_seg_080_w.nii.gz", np.eye(8) * 2)
    cases = {c.name: c for c in brats.read(tmp_path, ("flair", "t1"))}
    assert {c.part for c in cases.values()} == {"train", "test"}
    for case in cases.values():
        images, mask = volumes.read_case(case)
        assert images.shape == (1, 2, 8, 8) and np.array_equal(mask[0], np.eye(8, dtype=bool).T)


def test_brats_export(tmp_path):
    for word in ("flair", "t1"):
        for kind, name in (("tumor", "BraTS2021_00000-70"), ("normal", "BraTS2021_00000-10")):
            for part in ("training", "validate"):
                folder = tmp_path / word / part / kind
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8), 99, np.uint8)).save(folder / f"{name}{part[0]}.png")
    for part in ("training", "validate"):
        (tmp_path / "flair" / part / "seg").mkdir()
        seg = np.zeros((8, 8), np.uint8)
        seg[2:4] = 64
        Image.fromarray(seg).save(tmp_path / "flair" / part / "seg" / f"BraTS2021_00000-70{part[0]}.png")
    cases = brats.read_export(tmp_path, ("flair", "t1"))
    assert len(cases) == 4 and {c.part for c in cases} == {"train", "validation"}
    assert sum(volumes.read_case(c)[1].sum() if c.masks else 0 for c in cases) == 2 * 16
    (tmp_path / "t1" / "training" / "tumor" / "BraTS2021_00000-70t.png").unlink()
    with pytest.raises(InputError, match="there is no such file, but"):
        brats.read_export(tmp_path, ("flair", "t1"))


def test_flare(tmp_path):
    images, _ = volume(0)
    organs = np.zeros(images.shape)
    organs[4:8], organs[8:12] = 1, 2
    save_nifti(tmp_path / "TrainingImg" / "train_000_0000.nii.gz", images)
    save_nifti(tmp_path / "TrainingMask" / "train_000.nii.gz", organs)
    (case,) = flare.read(tmp_path, "kidney")
    assert case.name == "train_000" and volumes.read_case(case)[1].sum() == (organs == 2).sum()
    with pytest.raises(InputError, match="organ: expected one of liver"):
        flare.read(tmp_path, "heart")
    with pytest.raises(InputError, match="expected train_XXX_0000"):
        flare.read(tmp_path / "TrainingMask", "liver")


def save_dicom(path, pixels):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        ExplicitVRLittleEndian,
        "1.2.840.10008.5.1.4.1.1.2",
        generate_uid(),
    )
    file = Dataset()
    file.file_meta, file.SOPClassUID, file.SOPInstanceUID = meta, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 1, 16, 16, 15, 0
    file.PhotometricInterpretation, file.RescaleIntercept, file.RescaleSlope = "MONOCHROME2", -1000, 1
    file.PixelData = pixels.astype(np.uint16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)


def test_dicom(tmp_path):
    for i in range(3):
        save_dicom(tmp_path / "3" / "DICOM_anon" / f"i000{i},0000b.dcm", np.full((8, 8), 1000 + i))
        mask = Image.fromarray(np.full((8, 8), 255 * (i == 1), np.uint8)).convert("1")
        (tmp_path / "3" / "Ground").mkdir(exist_ok=True)
        mask.save(tmp_path / "3" / "Ground" / f"liver_GT_00{i}.png")
    (case,) = dicom.read(tmp_path)
    images, mask = volumes.read_case(case)
    assert case.name == "3" and images[:, 0, 0, 0].tolist() == [0, 1, 2] and mask.any((1, 2)).tolist() == [False, True, False]
    (tmp_path / "3" / "Ground" / "liver_GT_000.png").unlink()
    with pytest.raises(InputError, match="expected one mask in Ground for each of 3 slices, got 2"):
        dicom.read(tmp_path)
    (tmp_path / "3" / "DICOM_anon" / "i0000,0000b.dcm").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as DICOM"):
        volumes.read_dicom(tmp_path / "3" / "DICOM_anon" / "i0000,0000b.dcm")


def test_scaling():
    volume = np.zeros((2, 1, 4, 4), np.float32)
    volume[0, 0] = np.arange(16).reshape(4, 4) * 10
    found = slices.scaled(volume, Data())
    assert found.min() == -1 and found.max() == 1 and found[0, 0, 0, 2] == pytest.approx(20 / 150 * 2 - 1)
    found = slices.scaled(volume, Data(percentile=90.0))
    low, high = np.percentile(np.arange(1, 16) * 10, [10, 90])
    assert found[0, 0, 2, 0] == pytest.approx((80 - low) / (high - low) * 2 - 1) and found[0, 0, 3, 3] == 1
    hounsfield = slices.scaled(np.array([-1000.0, -160, 40, 240, 3000]).reshape(1, 1, 1, 5), Data(dataset="flare"))
    assert hounsfield.ravel().tolist() == [-1, -1, 0, 1, 1]
    with pytest.raises(UsageError, match="data.percentile"):
        slices.scaled(volume, Data(percentile=20.0))
    with pytest.raises(UsageError, match="cam.stages"):
        cam.LayerCamClassifier(2, Cam(stages=(0,)))


def test_patients_are_not_divided():
    export = [volumes.Case(f"p{i}-{z}", ()) for i in range(4) for z in range(5)]
    found = slices.parts(export, Data(dataset="brats_export", test=1, validation=1), seed=0)
    assert sorted(map(len, found.values())) == [5, 5, 10]
    assert not {n.partition("-")[0] for n in found["train"]} & {n.partition("-")[0] for n in found["test"]}
    named = slices.parts(export, Data(dataset="brats_export", test_cases=("p2",)), seed=0)
    assert {n[:2] for n in named["test"]} == {"p2"}
    with pytest.raises(InputError, match="p9 not among the cases"):
        slices.parts(export, Data(dataset="brats_export", test_cases=("p9",)), seed=0)
    with pytest.raises(InputError, match="expected more than 4 cases"):
        slices.parts(export, Data(dataset="brats_export", test=3, validation=1), seed=0)


SETTINGS = ["device=cpu", "data.size=64", "data.modalities=[flair, t1]", "diffusion.steps=3", "diffusion.batch_size=4"]
SETTINGS += [
    f"{part}.unet.{k}={v}" for part in ("diffusion", "classifier") for k, v in (("base", 16), ("multipliers", [1, 2]), ("blocks", 1))
]
SETTINGS += [f"{part}.unet.{k}={v}" for part in ("diffusion", "classifier") for k, v in (("attention", []), ("head", 8), ("groups", 4))]
SETTINGS += ["classifier.steps=2", "classifier.batch_size=4", "classifier.timesteps=[10, 20]", "cam.steps=2", "cam.batch_size=4"]
SETTINGS += ["cam.attention_steps=2", "cam.width=0.125", "features.timesteps=[1, 10]", "decoder.steps=3", "decoder.background=50"]


def run(*arguments, settings=()):
    return cli.main([*map(str, arguments), *[a for s in (*SETTINGS, *settings) for a in ("--set", s)]])


def test_chain(brats_folder, tmp_path):
    layer = ("cam.source=layercam", "features.cache=true")
    assert run("run", "cldf", "--data", brats_folder, "--out", tmp_path / "run", settings=layer) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = summary["stages"]["test"]["metrics"]
    assert summary["complete"] and found["images"] == 3 and found["test_slices"] == 6
    assert {"mask_dice", "mask_iou_std", "cam_dice", "gradient_dice", "all_dice", "cam_auc", "denoising_loss"} <= set(found)
    first = {p.name: p.read_bytes() for p in (tmp_path / "run" / "masks").glob("*.png")}
    assert len(first) == 6 and (tmp_path / "run" / "test" / "sheet.png").is_file()
    live = ("cam.source=layercam", "features.cache=false")
    assert run("run", "cldf", "--data", brats_folder, "--out", tmp_path / "live", settings=live) == 0
    assert sum(Image.open(p).getextrema()[1] for p in sorted((tmp_path / "live" / "masks").glob("*.png"))) >= 0
    cams = tmp_path / "run" / "cams"
    files = ("cam.source=files", f"cam.folder={cams}", "decoder.prototypes=seeds")
    assert run("run", "cldf", "--data", brats_folder, "--out", tmp_path / "files", settings=files) == 0
    for path in (tmp_path / "files" / "seeds").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "run" / "seeds" / path.name).read_bytes()


def test_chain_with_ame_cam_and_a_damaged_file(brats_folder, tmp_path, capsys):
    assert run("run", "cldf", "--data", brats_folder, "--out", tmp_path / "run") == 0
    (tmp_path / "run" / "test" / "done.json").unlink()
    for path in (tmp_path / "run" / "cams").glob("*.npy"):
        path.write_bytes(b"nothing")
    assert run("run", "cldf", "--data", brats_folder, "--out", tmp_path / "run") != 0
    assert "cannot be read" in (message := capsys.readouterr().err) and "delete it and run stage cams again" in message
    assert run("run", "cldf", "--data", brats_folder, "--out", tmp_path / "small", settings=("data.size=32",)) == 2
    assert "needs at least 64 pixels, got 32" in capsys.readouterr().err


def test_shipped_configuration_and_the_papers_defaults():
    small, paper = configs.load(CldfConfig, "configs/cldf_small.yaml"), configs.load(CldfConfig)
    assert small.data.size == 64 and paper.data.size == 256 and paper.features.timesteps == (1, 10, 50, 100)
    assert (paper.diffusion.lr, paper.diffusion.batch_size, paper.classifier.lr, paper.classifier.batch_size) == (1e-4, 8, 3e-4, 16)
    assert paper.classifier.steps == 100_000 and paper.classifier.timesteps == tuple(range(10, 201, 10))
    assert (paper.decoder.lr, paper.decoder.epochs, paper.decoder.batch_size, paper.decoder.temperature) == (1.0, 5, 4, 0.1)
    assert paper.decoder.background == 5000 and paper.diffusion.ema == 0.9999
