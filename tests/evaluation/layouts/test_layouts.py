"""Layouts of DAVIS, VOC, COCO, ADE20K, Cityscapes, Copydays, ImageNet-9, and lists of names."""

import json

import numpy as np
import pytest
from PIL import Image

from massl_fast.evaluation.layouts import coco, copydays, davis, imagenet9, lists, masks, scenes, voc


def photo(path, size=(12, 8), colour=(90, 120, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


LABELS = np.array([[0, 1, 2, 255], [0, 1, 2, 255], [20, 3, 3, 0]], np.uint8)


def test_masks_are_read_whatever_their_mode(tmp_path):
    masks.write_mask(tmp_path / "new" / "palette.png", LABELS)
    Image.fromarray(LABELS).save(tmp_path / "grey.png")
    Image.fromarray(LABELS.astype(np.uint16)).save(tmp_path / "wide.png")
    Image.fromarray(masks.voc_palette()[LABELS]).save(tmp_path / "painted.png")
    for name in ("new/palette.png", "grey.png", "wide.png", "painted.png"):
        found = masks.read_mask(tmp_path / name)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, LABELS, err_msg=name)
    Image.fromarray(LABELS > 0).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(masks.read_mask(tmp_path / "bits.png"), LABELS > 0)
    Image.fromarray(LABELS.astype(np.uint16) * 200).save(tmp_path / "many.png")
    assert masks.read_mask(tmp_path / "many.png").max() == 51000


def test_masks_written_carry_the_palette_of_the_official_ones(tmp_path):
    masks.write_mask(tmp_path / "m.png", LABELS)
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P" and image.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]


def test_a_mask_of_other_colours_and_a_damaged_one_are_refused(tmp_path):
    photo(tmp_path / "photo.png", colour=(1, 2, 3))
    with pytest.raises(ValueError, match="#010203, which is none of VOC's palette"):
        masks.read_mask(tmp_path / "photo.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n")
    for name in ("bad.png", "absent.png"):
        with pytest.raises(ValueError, match="cannot be read"):
            masks.read_mask(tmp_path / name)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "a\\..\\x", "a\0b"])
def test_no_name_leaves_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="no file inside"):
        lists.inside(tmp_path, name, "a list")


def test_names_with_spaces_and_other_alphabets_stay(tmp_path):
    assert lists.inside(tmp_path, "02_wheeled vehicle/日本 é.jpg", "a list") == "02_wheeled vehicle/日本 é.jpg"


def write_davis(root, frames=3, masks_of=None):
    text(root / "ImageSets/2017/val.txt", "swan", "")
    for frame in range(frames):
        photo(root / f"JPEGImages/480p/swan/{frame:05d}.jpg", (4, 3))
    for frame in range(frames) if masks_of is None else masks_of:
        masks.write_mask(root / f"Annotations/480p/swan/{frame:05d}.png", LABELS)
    return root


def test_davis_sequences_are_read_and_a_test_split_has_no_truth(tmp_path):
    (sequence,) = davis.read_sequences(write_davis(tmp_path / "a"), "val")
    assert sequence.name == "swan" and len(sequence.frames) == 3 and sequence.truth().shape == (3, 3, 4)
    (sequence,) = davis.read_sequences(write_davis(tmp_path / "b", masks_of=[0]), "val")
    assert sequence.truth() is None


def test_davis_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="Name the folder DAVIS itself"):
        davis.read_sequences(tmp_path, "val")
    with pytest.raises(ValueError, match="no mask of its first frame"):
        davis.read_sequences(write_davis(tmp_path / "c", masks_of=[1]), "val")
    text(write_davis(tmp_path / "d") / "ImageSets/2017/val.txt", "swan", "goose")
    with pytest.raises(ValueError, match=r"'goose', but .* holds no frames"):
        davis.read_sequences(tmp_path / "d", "val")
    text(tmp_path / "d/ImageSets/2017/val.txt", "../../../etc")
    with pytest.raises(ValueError, match="no file inside"):
        davis.read_sequences(tmp_path / "d", "val")
    with pytest.raises(ValueError, match="no file inside"):
        davis.read_sequences(tmp_path / "d", "../val")


def test_voc_labels_are_the_last_field_of_a_line(tmp_path):
    text(tmp_path / "ImageSets/Main/dog_test.txt", "000001  1", "000002 -1", "000003  0")
    text(tmp_path / "ImageSets/Main/cat_test.txt", "000001 -1", "000002  1", "000003 -1")
    text(tmp_path / "ImageSets/Main/zebra_test.txt", "000001 -1", "000002 -1", "000003 -1")
    found = voc.read_multilabel(tmp_path, "test")
    assert found.classes == ("cat", "dog", "zebra")
    assert found.labels.tolist() == [[-1, 1, -1], [1, -1, -1], [-1, 0, -1]]
    text(tmp_path / "ImageSets/Main/cat_test.txt", "000001 -1", "000003  1", "000002 -1")
    with pytest.raises(ValueError, match="another order"):
        voc.read_multilabel(tmp_path, "test")
    text(tmp_path / "ImageSets/Main/cat_test.txt", "000001 2")
    with pytest.raises(ValueError, match="1, 0 or -1"):
        voc.read_multilabel(tmp_path, "test")
    with pytest.raises(ValueError, match=r"holds no lists CLASS_train.txt"):
        voc.read_multilabel(tmp_path, "train")


def test_voc_masks_are_found_beside_their_images(tmp_path):
    text(tmp_path / "ImageSets/Segmentation/val.txt", "2007_000033")
    photo(tmp_path / "JPEGImages/2007_000033.jpg", (4, 3))
    masks.write_mask(tmp_path / "SegmentationClass/2007_000033.png", LABELS)
    (item,) = voc.read_segmentation(tmp_path, "val")
    np.testing.assert_array_equal(item.class_map(), LABELS)
    with pytest.raises(ValueError, match=r"there is no .*SegmentationObject"):
        voc.read_segmentation(tmp_path, "val", objects=True)


def write_coco(root, annotations, file_name="000000000001.jpg"):
    photo(root / "val2017/000000000001.jpg", (6, 4))
    content = {"images": [{"id": 1, "file_name": file_name, "height": 4, "width": 6}], "annotations": annotations}
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return root


def test_coco_instances_and_crowds_are_told_apart(tmp_path):
    pytest.importorskip("pycocotools")
    whole = {"counts": [0, 24], "size": [4, 6]}
    entries = [
        {"id": 1, "image_id": 1, "category_id": 3, "iscrowd": 0, "segmentation": [[1, 1, 4, 1, 4, 3, 1, 3]]},
        {"id": 2, "image_id": 1, "category_id": 5, "iscrowd": 1, "segmentation": whole},
    ]
    (image,) = coco.read_instances(write_coco(tmp_path, entries), "val")
    instances, categories = image.instances()
    assert categories.tolist() == [3] and instances[0, 1:3, 1:4].all() and instances.sum() == 6
    assert image.crowd().all()


@pytest.mark.parametrize(
    "segmentation",
    [{"counts": [1, 2]}, {"counts": [-1, 25]}, {"counts": "zzz"}, {"counts": [10**12]}, [[1, 2, 3]], [[1e9] * 6], [["a"] * 6], 7, None],
)
def test_segmentations_that_do_not_fit_are_refused(segmentation):
    with pytest.raises(ValueError, match="run lengths"):
        coco.decode_segmentation(segmentation, (4, 6), "annotation 1")


def test_compressed_runs_are_those_of_pycocotools():
    tools = pytest.importorskip("pycocotools.mask")
    generator = np.random.default_rng(0)
    for _ in range(60):
        shape = tuple(generator.integers(1, 60, 2).tolist())
        mask = generator.random(shape) < generator.random()
        counts = tools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        np.testing.assert_array_equal(coco.decode_segmentation({"counts": counts}, shape, "x"), mask)


def test_coco_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        coco.read_instances(tmp_path, "val")
    with pytest.raises(ValueError, match="no file inside"):
        coco.read_instances(write_coco(tmp_path, [], "../../secret.jpg"), "val")
    with pytest.raises(ValueError, match="none is in"):
        coco.read_instances(write_coco(tmp_path, [], "2.jpg"), "val")
    with pytest.raises(ValueError, match="no annotation file of COCO"):
        coco.read_instances(write_coco(tmp_path, [{"image_id": 9, "category_id": 1}]), "val")


def test_scenes_are_told_apart_by_their_folders(tmp_path):
    ade = tmp_path / "ade"
    for split in ("training", "validation"):
        photo(ade / f"images/{split}/a.jpg")
        masks.write_mask(ade / f"annotations/{split}/a.png", LABELS)
    found = scenes.read_scenes(ade)
    assert found.kind == "ADE20K" and found.num_classes == 150
    np.testing.assert_array_equal(found.splits["val"][0].labels()[0], [255, 0, 1, 254])
    city = tmp_path / "city"
    for split in ("train", "val"):
        photo(city / f"leftImg8bit/{split}/ulm/ulm_1_leftImg8bit.png")
        masks.write_mask(city / f"gtFine/{split}/ulm/ulm_1_gtFine_labelTrainIds.png", LABELS)
    found = scenes.read_scenes(city)
    assert found.kind == "Cityscapes"
    np.testing.assert_array_equal(found.splits["train"][0].labels(), LABELS)
    with pytest.raises(ValueError, match="folders of none of VOC2012"):
        scenes.read_scenes(tmp_path)
    (city / "gtFine/val/ulm/ulm_1_gtFine_labelTrainIds.png").unlink()
    with pytest.raises(ValueError, match="has no mask"):
        scenes.read_scenes(city)


def test_copydays_matches_by_prefix_and_takes_the_blocks_that_are_there(tmp_path):
    for name in ("original/200000.jpg", "original/200100.jpg", "strong/200101.jpg", "jpegqual/5/200000.jpg", "jpegqual/30/200000.jpg"):
        photo(tmp_path / name)
    found = copydays.read_copies(tmp_path)
    assert [block.name for block in found.blocks] == ["original", "strong", "jpegqual/5", "jpegqual/30"]
    assert found.blocks[1].originals == (1,) and not found.own_pairs
    photo(tmp_path / "strong/999901.jpg")
    with pytest.raises(ValueError, match="'9999', as no image"):
        copydays.read_copies(tmp_path)
    photo(tmp_path / "original/200001.jpg")
    with pytest.raises(ValueError, match="same 4 characters"):
        copydays.read_copies(tmp_path)


def test_own_pairs_are_a_table_of_copies_and_originals(tmp_path):
    for name in ("my photos/a.jpg", "shared/ä.png", "original/lonely.jpg"):
        photo(tmp_path / name)
    text(tmp_path / "pairs.csv", "copy,original", "shared/ä.png,my photos/a.jpg")
    found = copydays.read_copies(tmp_path)
    assert found.own_pairs and found.originals == ("my photos/a.jpg", "original/lonely.jpg")
    assert found.blocks[0].files == ("shared/ä.png",) and found.blocks[0].originals == (0,)
    for line, said in (("a.jpg", "two columns"), ("../x.jpg,my photos/a.jpg", "no file inside"), ("b.jpg,my photos/a.jpg", "not in")):
        text(tmp_path / "pairs.csv", line)
        with pytest.raises(ValueError, match=said):
            copydays.read_copies(tmp_path)


def test_a_folder_without_copies_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neither pairs.csv"):
        copydays.read_copies(tmp_path)
    photo(tmp_path / "original/200000.jpg")
    with pytest.raises(ValueError, match="no copies"):
        copydays.read_copies(tmp_path)


def test_backgrounds_are_of_the_class_whose_number_their_folder_bears(tmp_path):
    photo(tmp_path / "original/val/02_wheeled vehicle/a.JPEG")
    photo(tmp_path / "original/val/08_fish/b.JPEG")
    (variant,) = imagenet9.read_variants(tmp_path)
    assert variant.labels == (2, 8) and variant.files == ("02_wheeled vehicle/a.JPEG", "08_fish/b.JPEG")
    photo(tmp_path / "only_fg/val/dog/c.JPEG")
    with pytest.raises(ValueError, match="begin with the number of its class"):
        imagenet9.read_variants(tmp_path)
    with pytest.raises(ValueError, match="bg_challenge"):
        imagenet9.read_variants(tmp_path / "original")
