import pytest
import torch

from massl_fast.models.head import ProjectionHead


def test_layers_names_and_initial_weights():
    torch.manual_seed(0)
    head = ProjectionHead(384)
    shapes = {name: tuple(parameter.shape) for name, parameter in head.named_parameters()}
    assert shapes == {
        "mlp.0.weight": (2048, 384),
        "mlp.0.bias": (2048,),
        "mlp.2.weight": (2048, 2048),
        "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048),
        "mlp.4.bias": (256,),
    }
    assert abs(head.mlp[0].weight.std().item() - 0.02) < 1e-3
    assert not head.mlp[2].bias.any()


def test_unit_rows_and_the_smallest_norm():
    head = ProjectionHead(8, hidden_dim=16, out_dim=4).double()
    features = torch.randn(5, 8, dtype=torch.float64)
    embeddings = head(features)
    raw = head.mlp(features)
    assert torch.equal(embeddings, raw / raw.norm(dim=-1, keepdim=True).clamp_min(1e-6))
    with torch.no_grad():
        head.mlp[4].weight.zero_()
    assert torch.equal(head(features), torch.zeros(5, 4, dtype=torch.float64))


def test_normalises_in_float32_under_autocast():
    head = ProjectionHead(8, hidden_dim=16, out_dim=4)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = head(torch.randn(5, 8))
    assert embeddings.dtype == torch.float32
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(5), atol=1e-6)


def test_number_of_layers():
    assert [type(layer).__name__ for layer in ProjectionHead(8, num_layers=1, out_dim=2).mlp] == ["Linear"]
    with pytest.raises(ValueError, match="at least one layer"):
        ProjectionHead(8, num_layers=0)
