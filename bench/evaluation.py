"""What evaluation costs beside the plain way: heads of a sweep, logistic regressions, extraction of features.

    python bench/evaluation.py heads
    python bench/evaluation.py regressions
    python bench/evaluation.py extraction --images FOLDER_OF_CLASS_FOLDERS [--workers 2]

Both sides take turns in one process on one thread, images are decoded in it, too; a figure is the median of the turns, in seconds of
processor time, so that others at work on the machine disturb less. With worker processes, whose time is not this process's, figures are
seconds of the clock on all cores: run that on a machine without other work. The first turn of each side, in which ours starts the server
that workers fork from, is printed apart. Before Python 3.12.8 each worker of ours imports this script once more, so it imports late.
The plain ways are what users write: a loop over ``nn.Linear`` and
``torch.optim.SGD``, scikit-learn penalty by penalty, torchvision's ImageFolder and a timm network.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 384
PENALTIES = tuple(10 ** (-6 + 5 * i / 9) for i in range(10))
MOST_EXCESS = 1e-4


def in_turns(ways: dict[str, Callable[[], object]], turns: int, by_the_clock: bool = False) -> dict[str, float]:
    """Median seconds of each way, of this process's processor time or by the clock."""
    from massl_fast.benchmarks.timing import in_turn

    found = in_turn(ways, turns, torch.device("cpu"))
    return {name: statistics.median(wall if by_the_clock else processor for wall, processor in times) for name, times in found.items()}


def labelled_rows(count: int, classes: int, decay: float, spread: float) -> tuple[Tensor, Tensor]:
    """Unit rows [n, 384] around a centre per class, whose k-th principal axis has the scale k^-decay, and labels [n]."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, WIDTH + 1) ** -decay
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    centres = torch.randn(classes, WIDTH, generator=generator) * scale
    labels = torch.randint(classes, (count,), generator=generator)
    rows = (centres[labels] + spread * torch.randn(count, WIDTH, generator=generator) * scale) @ axes
    return F.normalize(rows, dim=1), labels


def separate_heads(rows: Tensor, labels: Tensor, rates: tuple[float, ...], classes: int, batch: int) -> None:
    """One epoch of the loop that iBOT and DINOv2 have: a module and an optimizer per head."""
    heads = [nn.Linear(WIDTH, classes) for _ in rates]
    optimizers = [torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9) for head, rate in zip(heads, rates)]
    for some in torch.randperm(len(labels)).split(batch):
        batch_rows, batch_labels = rows[some], labels[some]
        for head, optimizer in zip(heads, optimizers):
            loss = F.cross_entropy(head(batch_rows), batch_labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def heads(turns: int) -> None:
    from massl_fast.evaluation.heads import Sweep, train_heads
    from massl_fast.evaluation.linear import PUBLISHED_RATES

    rows, labels = labelled_rows(10_000, 100, 0.0, 2.0)
    rows *= WIDTH**0.5  # as large as features after a norm
    for batch in (128, 1024):
        rates = tuple(rate * batch / 256 for rate in PUBLISHED_RATES)

        together = functools.partial(train_heads, lambda _: rows, labels, Sweep(rates), classes=100, epochs=1, batch_size=batch)
        ways = {
            "separate": functools.partial(separate_heads, rows, labels, rates, 100, batch),
            "together, fp32": functools.partial(together, products=None),
            "together, bf16 products": functools.partial(together, products=torch.bfloat16),
        }
        found = in_turns(ways, turns)
        print(f"45 heads, 10,000 rows of 384 features, 100 classes, one epoch, batch {batch}:")
        for name, seconds in found.items():
            print(f"    {name:24} {seconds:6.2f} s   {found['separate'] / seconds:4.1f} ×")


def objective(weight: Tensor, rows: Tensor, labels: Tensor, penalty: float) -> float:
    weight = weight.double()
    return (F.cross_entropy(rows.double() @ weight.T, labels) + penalty / 2 * weight.square().sum()).item()


def one_by_one(rows: Tensor, labels: Tensor, tolerance: float) -> list[Tensor]:
    """scikit-learn's weights, penalty by penalty."""
    from sklearn.linear_model import LogisticRegression

    found = []
    for penalty in PENALTIES:
        model = LogisticRegression(C=1 / (penalty * len(rows)), fit_intercept=False, tol=tolerance, max_iter=1000)
        found.append(torch.from_numpy(model.fit(rows.numpy(), labels.numpy()).coef_))
    return found


def regressions(turns: int) -> None:
    """Both sides at the loosest tolerance at which every objective is within 1e-4 of its minimum."""
    from massl_fast.evaluation.heads import fit_logistic

    warnings.simplefilter("ignore")
    for count, classes, decay, spread in ((3_000, 30, 0.0, 2.0), (3_000, 30, 0.7, 1.5), (10_000, 100, 0.7, 1.5)):
        rows, labels = labelled_rows(count, classes, decay, spread)

        ours = functools.partial(fit_logistic, [rows], [labels], PENALTIES, classes=classes)
        theirs = functools.partial(one_by_one, rows, labels)
        least = [objective(weight, rows, labels, penalty) for weight, penalty in zip(ours(tolerance=1e-6).weight[0], PENALTIES)]
        print(f"10 penalties from 1e-6 to 1e-1, {count} rows of 384 features, {classes} classes, axes of scale k^-{decay:g}:")
        ways, excesses = {}, {}
        for name, way in (("fit_logistic", ours), ("scikit-learn, one by one", theirs)):
            for tolerance in (1e-3, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6):
                weights = way(tolerance=tolerance)
                weights = weights.weight[0] if way is ours else weights
                excess = max(objective(weight, rows, labels, p) - best for weight, p, best in zip(weights, PENALTIES, least))
                if excess <= MOST_EXCESS:
                    break
            ways[name] = functools.partial(way, tolerance=tolerance)
            excesses[name] = f"largest excess {excess:.1e} at tolerance {tolerance:g}"
        found = in_turns(ways, turns)
        for name, seconds in found.items():
            print(f"    {name:24} {seconds:6.2f} s   {seconds / found['fit_logistic']:4.1f} ×   {excesses[name]}")


def plain_extraction(images: str, network: nn.Module, batch: int, workers: int) -> Tensor:
    """The loop that users write."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from massl_fast.data.crops import IMAGENET_MEAN, IMAGENET_STD

    steps = [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224), transforms.ToTensor()]
    steps.append(transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD))
    loader = torch.utils.data.DataLoader(ImageFolder(images, transforms.Compose(steps)), batch, num_workers=workers)
    with torch.no_grad():
        return torch.cat([network(batch_images) for batch_images, _ in loader])


def extraction(turns: int, images: str, architecture: str, workers: int) -> None:
    import timm

    from massl_fast.data.crops import IMAGENET_MEAN, IMAGENET_STD
    from massl_fast.data.loaders import open_data
    from massl_fast.evaluation.features import extract_features

    network = timm.create_model(architecture, num_classes=0).eval()
    source = open_data(images, "--images", "train")
    arguments = dict(image_size=224, device="cpu", mean=IMAGENET_MEAN, std=IMAGENET_STD, batch_size=64, num_workers=workers)
    ways = {
        "timm and torchvision": lambda: plain_extraction(images, network, 64, workers),
        "extract_features": lambda: extract_features(network, source, **arguments),
    }
    print(f"{len(source)} images of {images}, {architecture}, {workers} workers:")
    if workers:
        for name, seconds in in_turns(ways, 1, True).items():
            print(f"    {name:24} {seconds:6.2f} s   the first time")
    for name, seconds in in_turns(ways, turns, workers > 0).items():
        print(f"    {name:24} {seconds:6.2f} s   {len(source) / seconds:6.1f} images per {'' if workers else 'processor '}second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("heads", "regressions", "extraction"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--images", help="a folder of class folders")
    parser.add_argument("--architecture", default="vit_tiny_patch16_224")
    parser.add_argument("--workers", type=int, default=0, help="of the extraction, on both sides (default: none, on one thread)")
    args = parser.parse_args()
    if not args.workers:
        torch.set_num_threads(1)
    if args.what == "heads":
        heads(args.turns)
    elif args.what == "regressions":
        regressions(args.turns)
    else:
        extraction(args.turns, args.images, args.architecture, args.workers)


if __name__ == "__main__":
    main()
