import pytest
import torch
import torch.nn.functional as F

from massl_fast.evaluation import kmeans
from massl_fast.evaluation.kmeans import assign, spherical_kmeans


def groups(num=300, clusters=5, width=8, noise=0.3):
    generator = torch.Generator().manual_seed(1)
    centres = F.normalize(torch.randn(clusters, width, generator=generator), dim=1)
    labels = torch.arange(num) % clusters
    return centres[labels] + noise * torch.randn(num, width, generator=generator), labels


def one_restart_in_float64(features, starting_rows, iterations):
    """Lloyd's iterations, one image and one cluster at a time."""
    rows, centroids = features.double(), starting_rows.double()
    for _ in range(iterations):
        nearest = torch.stack([(centroids @ row).argmax() for row in rows])
        centroids = torch.stack([F.normalize(rows[nearest == k].sum(0), dim=0) for k in range(len(centroids))])
    return centroids, sum((centroids @ row).max() for row in rows)


def test_a_restart_is_lloyds_algorithm(monkeypatch):
    features, _ = groups()
    monkeypatch.setattr(kmeans, "CHUNK_BYTES", 4 * 5 * 64)  # several chunks, with a remainder
    found = spherical_kmeans(features, 5, restarts=1, iterations=6, seed=3)
    start = kmeans._starting_rows(features, 5, "random", torch.Generator().manual_seed(3))
    centroids, objective = one_restart_in_float64(features, start, found.iterations)
    torch.testing.assert_close(found.centroids.double(), centroids, atol=1e-5, rtol=0)
    assert float(found.objectives) == pytest.approx(float(objective), rel=1e-6)


def test_restarts_in_one_batch_are_those_one_by_one():
    features, _ = groups()
    together = spherical_kmeans(features, 7, restarts=3, iterations=20, seed=0)
    generator = torch.Generator().manual_seed(0)
    starts = [kmeans._starting_rows(features, 7, "random", generator) for _ in range(3)]
    objectives = [one_restart_in_float64(features, start, together.iterations)[1] for start in starts]
    torch.testing.assert_close(together.objectives, torch.stack(objectives), rtol=1e-5, atol=0)


@pytest.mark.parametrize("start", ["random", "plus"])
def test_groups_that_lie_apart_are_found(start):
    features, labels = groups(noise=0.05)
    found = spherical_kmeans(features, 5, restarts=5, start=start)
    assignment, _ = assign(features, found.centroids[None])
    assert len({(int(a), int(b)) for a, b in zip(assignment[0], labels)}) == 5


def test_an_empty_cluster_takes_half_of_the_largest():
    features = torch.cat([torch.eye(3)[:1].repeat(20, 1), torch.eye(3)[1:2].repeat(2, 1)])
    features = features + 0.01 * torch.randn(22, 3, generator=torch.Generator().manual_seed(0))
    found = spherical_kmeans(features, 4, restarts=4, start="random")
    assignment, _ = assign(features, found.centroids[None])
    assert found.centroids.isfinite().all() and len(assignment.unique()) >= 3


def test_as_many_clusters_as_equal_images_end_well():
    found = spherical_kmeans(torch.ones(4, 3), 4, restarts=2, start="plus")
    assert found.centroids.isfinite().all()


def test_the_seed_alone_decides():
    features, _ = groups()
    state = torch.random.get_rng_state()
    one, other = (spherical_kmeans(features, 6, restarts=2, seed=5) for _ in range(2))
    assert torch.equal(one.centroids, other.centroids)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_objective_of_faiss_is_reached():
    faiss = pytest.importorskip("faiss", reason="faiss is an oracle only and is not installed here")
    features, _ = groups(noise=0.6)
    theirs = faiss.Kmeans(8, 6, niter=50, nredo=10, spherical=True, seed=0, max_points_per_centroid=10**6)
    theirs.train(features.numpy())
    _, objective = assign(features, torch.from_numpy(theirs.centroids)[None])
    assert float(spherical_kmeans(features, 6, restarts=10).objectives.max()) >= 0.99 * float(objective)


def test_what_cannot_be_clustered_is_refused():
    with pytest.raises(ValueError, match="3 images cannot be put into 4 clusters"):
        spherical_kmeans(torch.ones(3, 2), 4)
    with pytest.raises(ValueError, match="not finite"):
        spherical_kmeans(torch.full((3, 2), torch.nan), 2)
    with pytest.raises(ValueError, match="at least 1"):
        spherical_kmeans(torch.ones(3, 2), 2, restarts=0)
    with pytest.raises(ValueError, match="plus"):
        spherical_kmeans(torch.ones(3, 2), 2, start="best")
