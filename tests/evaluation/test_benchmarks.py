"""Every protocol on a small benchmark in its official layout: figures that colours decide, what is missing, what is refused, pictures."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from massl_fast.evaluation import segment_crops
from massl_fast.evaluation.attention import Attention, AttentionSettings
from massl_fast.evaluation.backgrounds import Backgrounds, BackgroundsSettings, nine_of
from massl_fast.evaluation.cluster import Cluster, ClusterSettings, scaling
from massl_fast.evaluation.copies import Copies, CopiesSettings, whitened, whitening
from massl_fast.evaluation.correspond import Correspond, CorrespondSettings, View
from massl_fast.evaluation.layouts.objects import read_objects
from massl_fast.evaluation.layouts.scenes import read_scenes
from massl_fast.evaluation.multilabel import Multilabel, MultilabelSettings, drawn_positives
from massl_fast.evaluation.pictures import spread
from massl_fast.evaluation.prompt import CEILING, Prompt, PromptSettings, interior
from massl_fast.evaluation.registry import PROTOCOLS, protocol_named
from massl_fast.evaluation.retrieval import Retrieval, RetrievalSettings
from massl_fast.evaluation.segment import Segment, SegmentSettings
from massl_fast.evaluation.similarity import Similarity, SimilaritySettings
from massl_fast.models.backbone import build_backbone

pytest.importorskip("sklearn")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import small_subjects as small  # noqa: E402


def test_every_protocol_of_the_registry_can_be_imported_and_knows_its_name():
    assert all(protocol_named(name).name == name for name in PROTOCOLS)


def test_retrieval_leaves_broken_images_and_queries_without_positives_out(tmp_path):
    root = small.write_landmarks(tmp_path / "rsmall")
    result = Retrieval(RetrievalSettings(data=str(root), scales=(1.0, 0.5))).run(small.subject_of(pictures=True))
    assert result.results["raw pixels"]["easy_map_percent"] > 75
    assert result.unreadable == ("c2_3.jpg",) and result.published == []
    assert {picture.name.split("_")[0] for picture in result.pictures} == {"retrieval"}
    assert result.data["test"] == {"path": str(root), "queries": 3, "images": 12}


def test_distractors_only_push_positives_down_and_queries_can_be_cut(tmp_path):
    root = small.write_landmarks(tmp_path / "rsmall")
    others = tmp_path / "others"
    for i in range(5):
        small.photo(others / f"jpg/{i}.jpg", small.COLOURS[i % 4], 200 + i)
    (others / "others.txt").write_text("".join(f"{i}.jpg\n" for i in range(5)))
    alone = Retrieval(RetrievalSettings(data=str(root))).run(small.subject_of())
    among = Retrieval(RetrievalSettings(data=str(root), distractors=str(others), crop_queries=True)).run(small.subject_of())
    assert among.results["raw pixels"]["medium_map_percent"] < alone.results["raw pixels"]["medium_map_percent"]
    assert among.data["distractors"]["images"] == 5 and any("cut to their boxes" in text for text in among.departures)


def test_copies_find_their_original_by_block_and_as_own_pairs(tmp_path):
    root = small.write_copydays(tmp_path / "copydays")
    result = Copies(CopiesSettings(data=str(root))).run(small.subject_of(pictures=True))
    row = result.results["raw pixels"]
    assert row["strong_map_percent"] == row["map_percent"] == row["recall_at_1_percent"] == pytest.approx(100)
    assert row["jpegqual_5_map_percent"] == pytest.approx(100) and 0 < row["micro_ap_percent"] <= 100 + 1e-9
    assert result.features == "cls+gem4" and len(result.pictures) > 0
    shutil.copytree(root / "original", tmp_path / "own/mine")
    shutil.copy(root / "strong/201001.jpg", tmp_path / "own/copy of green.jpg")
    (tmp_path / "own/pairs.csv").write_text("copy of green.jpg,mine/201000.jpg\n" + "mine/202000.jpg,mine/202000.jpg\n")
    protocol = Copies(CopiesSettings(data=str(tmp_path / "own")))
    assert "strong_map_percent" not in [figure.key for figure in protocol.figures()]
    assert protocol.run(small.subject_of()).results["raw pixels"]["recall_at_1_percent"] == pytest.approx(100)


def test_whitening_makes_the_second_moment_one_and_keeps_noise_down():
    rows = torch.nn.functional.normalize(
        torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9, 5, 3, 2, 1, 1e-6])
    )
    mean, matrix = whitening(rows)
    moment = matrix.T @ (rows.double().T @ rows.double() / len(rows)) @ matrix
    torch.testing.assert_close(moment.diagonal()[1:], torch.ones(5, dtype=torch.float64))
    assert moment[0, 0] < 1e-3  # below the floor
    torch.testing.assert_close(whitened(rows, mean, matrix).norm(dim=1), torch.ones(500))


def test_clusters_are_the_colours_whatever_the_order_of_the_test_folders(tmp_path):
    train = small.write_classes(tmp_path / "train")
    test = small.write_classes(tmp_path / "test", seed=500)
    shutil.rmtree(test / "red")
    result = Cluster(ClusterSettings(train=str(train), test=str(test), restarts=3, iterations=20)).run(small.subject_of(pictures=True))
    assert result.results["raw pixels"]["ari_percent"] == pytest.approx(100)
    assert result.results["raw pixels"]["purity_percent"] == pytest.approx(100)
    assert len(result.more["clusters"]["teacher"]["objectives"]) == 3 and len(result.pictures) >= 1
    over = Cluster(ClusterSettings(train=str(train), clusters=6, restarts=2, standardize=False)).run(small.subject_of())
    assert any("6 clusters for 3 classes" in text for text in over.departures)
    with pytest.raises(ValueError, match="cannot be put into 30 clusters"):
        Cluster(ClusterSettings(train=str(train), clusters=30)).run(small.subject_of())


def test_scaling_is_scikit_learns():
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    rows = np.random.default_rng(0).normal(3, 2, (40, 5)).astype(np.float32)
    rows[:, 2] = 7
    expected = preprocessing.StandardScaler().fit(rows.astype(np.float64))
    mean, scale = scaling(torch.from_numpy(rows))
    np.testing.assert_allclose(mean, expected.mean_, atol=1e-12)
    np.testing.assert_allclose(scale, expected.scale_, atol=1e-12)


def test_classes_without_positives_are_left_out_and_named(tmp_path):
    root = small.write_voc2007(tmp_path / "VOC2007")
    result = Multilabel(MultilabelSettings(data=str(root), per_class=(1, 4), draws=2)).run(small.subject_of())
    assert any("left out: cow" in note for note in result.notes)
    row = result.results["raw pixels"]
    assert row["map_area_percent"] == pytest.approx(100) and row["n4_percent"] == pytest.approx(100)
    assert set(result.more["average_precision_percent"]["teacher"]) == {"cat", "dog"}
    with pytest.raises(ValueError, match="must be positive"):
        MultilabelSettings(data="x", per_class=(0,))


def test_draws_take_each_class_and_depend_on_the_seed_alone():
    labels = np.array([[1, -1], [1, -1], [-1, 1], [1, 1], [0, 1]])
    one, again, other = (drawn_positives(labels, 2, seed, 0) for seed in (0, 0, 1))
    assert one.tolist() == again.tolist() and len(one) == 4
    assert (labels[one[:2], 0] == 1).all() and (labels[one[2:], 1] == 1).all()
    assert len(drawn_positives(labels, 9, 0, 0)) == 6 and other.shape == (4,)


def test_backgrounds_are_classified_by_a_head_of_the_users_own_classes(tmp_path):
    root = small.write_backgrounds(tmp_path / "bg_challenge")
    train = small.write_classes(tmp_path / "train", ("dog", "fish", "Wheeled Vehicle"))
    result = Backgrounds(BackgroundsSettings(data=str(root), train=str(train), epochs=10, batch=8)).run(small.subject_of())
    row = result.results["raw pixels"]
    assert row["original_percent"] == 100 and row["background_gap_percent"] == 0
    assert any("lacks" in note and "only_fg" in note for note in result.notes)
    assert nine_of(("dog", "chair", "02_anything"), "x").tolist() == [0, -1, 2]
    with pytest.raises(ValueError, match="neither the 1,000 of ImageNet"):
        nine_of(("chair", "table"), "x")


def test_the_challenge_counts_foregrounds_that_no_background_fools(tmp_path):
    root = small.write_backgrounds(tmp_path / "bg_challenge")
    for number, folder in ((0, "00_dog"), (2, "02_wheeled vehicle")):
        for i in range(3):
            # The mask of dogs covers the image, that of vehicles nothing: then only the background speaks.
            small.photo(root / "only_bg_t/val" / folder / f"{i}.JPEG", small.COLOURS[0], 50 + 10 * number + i)
            (root / "fg_mask/val" / folder).mkdir(parents=True, exist_ok=True)
            np.save(root / "fg_mask/val" / folder / f"{i}.npy", np.full((36, 40), number == 0))
    train = small.write_classes(tmp_path / "train", ("dog", "fish", "Wheeled Vehicle"))
    settings = BackgroundsSettings(data=str(root), train=str(train), epochs=10, batch=8, challenge=True)
    row = Backgrounds(settings).run(small.subject_of(batch_size=4)).results["raw pixels"]
    assert row["challenge_percent"] == 50 and row["only_bg_t_percent"] == 50
    np.save(root / "fg_mask/val/00_dog/0.npy", np.ones((3, 3), bool))
    with pytest.raises(ValueError, match=r"0\.npy holds bool \(3, 3\)"):
        Backgrounds(settings).run(small.subject_of())


def test_a_head_from_a_file_names_backgrounds(tmp_path):
    root = small.write_backgrounds(tmp_path / "bg_challenge")
    weight, bias = torch.zeros(1000, 24), torch.zeros(1000)
    bias[[151, 600]] = torch.tensor([1.0, 0.5])  # a chihuahua, whatever is seen
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
    torch.save({"epoch": 3, "state_dict": {"module.linear.weight": weight, "module.linear.bias": bias}}, tmp_path / "head.pth")
    for name in ("head.safetensors", "head.pth"):
        result = Backgrounds(BackgroundsSettings(data=str(root), head=str(tmp_path / name))).run(small.subject_of())
        assert list(result.results) == ["teacher"] and result.results["teacher"]["original_percent"] == 50
    save_file({"weight": weight[:7].contiguous(), "bias": bias[:7].contiguous()}, tmp_path / "seven.safetensors")
    save_file({"weight": weight}, tmp_path / "none.safetensors")
    for name, problem in (("seven", "has 7 classes"), ("none", "one linear layer")):
        with pytest.raises(ValueError, match=problem):
            Backgrounds(BackgroundsSettings(data=str(root), head=str(tmp_path / f"{name}.safetensors"))).prepare(small.subject_of())
    with pytest.raises(ValueError, match="linear head is needed"):
        BackgroundsSettings(data=str(root))


@pytest.mark.parametrize("by", ["object", "class"])
def test_attention_is_compared_at_the_size_of_the_masks(tmp_path, by):
    root = small.write_voc2012(tmp_path / "VOC2012", 2)
    result = Attention(AttentionSettings(data=str(root), by=by)).run(small.subject_of(pictures=True))
    row = result.results["teacher"]
    assert 0 < row["jaccard_void_counted_percent"] <= row["jaccard_percent"] < 100
    assert len(result.pictures) == 2 and result.data["test"]["images"] == 2


def test_a_patch_finds_its_object_and_no_mask_beats_the_ceiling(tmp_path):
    root = small.write_voc2012(tmp_path / "VOC2012", 2)
    for prompts in ("all", "centre", "random"):
        result = Prompt(PromptSettings(data=str(root), prompts=prompts)).run(small.subject_of(pictures=prompts == "all"))
        ceiling = result.results[CEILING]["best_miou_percent"]
        assert ceiling > 80 and result.results["raw pixels"]["best_miou_percent"] <= ceiling
        assert result.results["teacher"]["best_miou_percent"] <= ceiling
    with pytest.raises(ValueError, match="cosines"):
        PromptSettings(data="x", thresholds=(2.0,))


def test_the_most_interior_patch_is_the_farthest_from_the_edge():
    patches = np.array([row * 5 + column for row in range(5) for column in range(5)])
    assert patches[interior(patches, (5, 5)).argmax()] == 12


def test_crowds_are_no_objects_and_objects_may_overlap(tmp_path):
    kind, images = read_objects(small.write_coco(tmp_path), "val")
    objects = images[0].read()
    assert kind == "COCO" and objects.categories.tolist() == [1, 2]
    labels = objects.category_map()
    assert set(np.unique(labels)) == {-1, 0, 1, 2} and labels[0, 25] == 2
    result = Similarity(SimilaritySettings(data=str(tmp_path))).run(small.subject_of())
    assert 0 <= result.results["teacher"]["overlap"] <= 1
    assert sum(result.more["histograms"]["teacher"]["intra"]) > 0
    assert Prompt(PromptSettings(data=str(tmp_path), by="class")).run(small.subject_of()).data["test"]["objects"] == 6


def test_similarities_tell_background_only_where_it_takes_part(tmp_path):
    root = small.write_voc2012(tmp_path / "VOC2012", 2)
    alone = Similarity(SimilaritySettings(data=str(root))).run(small.subject_of())
    assert alone.results["teacher"]["overlap"] is None and any("no pairs" in note for note in alone.notes)
    among = Similarity(SimilaritySettings(data=str(root), background=True)).run(small.subject_of())
    assert among.results["raw pixels"]["overlap"] < 0.2


def test_patches_of_another_colour_are_another_class(tmp_path):
    root = small.write_voc2012(tmp_path / "VOC2012")
    result = Segment(SegmentSettings(data=str(root), costs=(0.01, 1.0), k=(1, 3), iterations=50)).run(small.subject_of(pictures=True))
    row = result.results["raw pixels"]
    assert row["logistic_chosen_miou_percent"] > 80 and row["knn_chosen_miou_percent"] > 80
    assert row["knn_chosen_miou_percent"] <= row["knn_best_miou_percent"]
    assert result.more["heads"]["raw pixels"]["knn"]["best"].startswith("k = ") and result.pictures


def test_a_linear_layer_on_crops_learns_the_colours_of_classes(tmp_path):
    root = small.write_voc2012(tmp_path / "VOC2012")
    (root / "JPEGImages/image 1.jpg").write_bytes(b"broken")
    settings = SegmentSettings(data=str(root), train_like="mmc", steps=25, crops=4, rate=0.05)
    result = Segment(settings).run(small.subject_of(pictures=True))
    row = result.results["raw pixels"]
    assert row["linear_miou_percent"] > 60 and row["linear_pixel_accuracy_percent"] > 80
    assert result.more["losses"][-1] < result.more["losses"][0] and len(result.pictures) == 3
    assert result.unreadable == ("image 1",) and result.published == []
    for said in ("25 steps, 1 of warm-up", "4 crops instead of 16", "32 px", "list train", "half, two thirds", "leaves open"):
        assert any(said in text for text in result.departures), said
    assert Segment(settings).headline.key in row
    with pytest.raises(ValueError, match=r"costs and k of segment belong to train-like capi"):
        SegmentSettings(data="x", train_like="mmc", costs=(1.0,), k=(1,))
    with pytest.raises(ValueError, match=r"steps of segment belong to train-like mmc"):
        SegmentSettings(data="x", steps=3)


def test_the_augmented_list_of_voc_is_taken_where_it_is(tmp_path):
    root = small.write_voc2012(tmp_path / "VOC2012", 2)
    shutil.copytree(root / "SegmentationClass", root / "SegmentationClassAug")
    (root / "ImageSets/Segmentation/trainaug.txt").write_text("image 0\nimage 1\nimage 3\n")
    scenes = read_scenes(root, augmented=True)
    assert scenes.kind == "VOC2012, augmented" and [len(scenes.splits[split]) for split in ("train", "val")] == [3, 2]
    assert scenes.splits["train"][0].mask.parent.name == "SegmentationClassAug" and len(read_scenes(root).splits["train"]) == 2


def test_crops_depend_on_their_number_alone_and_labels_stay_with_their_pixels(tmp_path, monkeypatch):
    scenes = read_scenes(small.write_voc2012(tmp_path / "VOC2012")).splits["train"]
    monkeypatch.setattr(segment_crops, "distorted", lambda pixels, draw: pixels)
    crops = segment_crops.Crops(scenes, 48, 7, range(12), (1, 2, 3))
    again = segment_crops.Crops(scenes, 48, 7, range(1, 12, 2), (1, 2, 3))
    seen = 0
    for item in range(6):
        assert all(torch.equal(one, other) for one, other in zip(again[item][:2], crops[2 * item + 1][:2]))
    for item in range(12):
        pixels, labels, missing = crops[item]
        assert missing == -1 and pixels.shape == (3, 48, 48) and labels.dtype == torch.uint8
        for label in (1, 2):
            inside = pixels[:, labels == label].float()
            if inside.shape[1] > 100:
                seen += 1
                assert (inside.median(1).values - torch.tensor(small.COLOURS[label - 1])).abs().max() < 40
    assert seen > 4


def test_distortion_keeps_the_shape_and_moves_hue_around_its_circle():
    pixels = np.tile(np.array([200, 60, 60], np.uint8), (5, 4, 1))
    found = [segment_crops.distorted(pixels, np.random.default_rng(seed)) for seed in range(100)]
    assert all(one.shape == pixels.shape and one.dtype == np.uint8 for one in found)
    assert any(np.array_equal(one, pixels) for one in found) and len({one.tobytes() for one in found}) > 20
    assert any(one[0, 0, 2] > one[0, 0, 1] for one in found) and any(one[0, 0, 1] > one[0, 0, 2] for one in found)


@pytest.mark.parametrize(
    ("length", "starts"), [(512, [0]), (513, [0, 1]), (853, [0, 341]), (854, [0, 341, 342]), (1200, [0, 341, 682, 688])]
)
def test_windows_cover_the_image_to_its_end(length, starts):
    assert segment_crops.window_starts(length, 512) == starts


def test_blocks_are_as_deep_in_other_networks():
    class Depth(torch.nn.Module):
        def __init__(self, count):
            super().__init__()
            self.blocks = [None] * count

    assert [segment_crops.blocks_of(Depth(count)) for count in (12, 24, 2)] == [[5, 7, 9, 11], [11, 15, 19, 23], [0, 1]]
    assert segment_crops.scaled((1000, 500), 512) == (1024, 512) and segment_crops.scaled((5000, 500), 512, 0.5) == (1024, 102)


def test_views_are_the_same_every_time_and_their_corners_tell_the_place(tmp_path):
    view = View(32, 3, 0)
    image = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1))).convert("RGB")
    assert np.array_equal(view(image, 7), view(image, 7)) and not np.array_equal(view(image, 7), View(32, 3, 1)(image, 7))
    top, left, bottom, right = view.corners(200, 100, 7)
    assert 0 <= top < bottom <= 1 and 0 <= min(left, right) < max(left, right) <= 1
    (_, mirrored, _) = view.drawn(200, 100, 7)
    assert (left > right) == mirrored


def test_correspondence_of_views_has_figures_and_of_classes_pictures(tmp_path):
    train = small.write_classes(tmp_path / "train", count=4)
    (train / "red/broken.jpg").write_bytes(b"nothing")
    result = Correspond(CorrespondSettings(data=str(train))).run(small.subject_of(pictures=True))
    row = result.results["teacher"]
    assert 0 <= row["exact_percent"] <= row["near_percent"] <= 100 and len(result.pictures) == 3
    assert result.unreadable == ("red/broken.jpg",)
    with pytest.raises(ValueError, match="pictures only"):
        Correspond(CorrespondSettings(data=str(train), pairs="class")).run(small.subject_of())
    pairs = Correspond(CorrespondSettings(data=str(train), pairs="class")).run(small.subject_of(pictures=True))
    assert pairs.pictures and pairs.results == {"teacher": {}}


def test_a_convolutional_network_is_refused_where_patches_are_needed_and_pooled_elsewhere(tmp_path):
    network = build_backbone("resnet10t", image_size=32)
    subject = small.subject_of().of({"teacher": network})
    root = small.write_voc2012(tmp_path / "VOC2012", 2)
    kinds = (Attention, AttentionSettings), (Prompt, PromptSettings), (Similarity, SimilaritySettings), (Segment, SegmentSettings)
    for protocol, settings in kinds:
        with pytest.raises(ValueError, match="needs a vision transformer's patch tokens"):
            protocol(settings(data=str(root))).run(subject)
    copies = Copies(CopiesSettings(data=str(small.write_copydays(tmp_path / "copydays")))).run(subject)
    assert copies.features == "pooled"


def test_pictures_are_of_the_median_the_best_and_the_worst():
    assert spread({"a": 0.1, "b": 0.9, "c": 0.5, "d": float("nan")}) == [("median", "c"), ("best", "b"), ("worst", "a")]
    assert spread({"a": 0.1}) == [("median", "a")] and spread({}) == []


def test_two_ranks_give_the_figures_of_one(tmp_path):
    script = [sys.executable, str(HERE / "benchmarks_on_two_ranks.py"), str(tmp_path)]
    answer = subprocess.run(script, capture_output=True, text=True, timeout=250)
    assert answer.returncode == 0, answer.stdout + answer.stderr
