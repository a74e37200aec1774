import copy

import pytest
import torch

from massl_fast.models.pair import StudentTeacher
from small_encoders import small_encoder


def encoder(arch="vit_tiny_patch16_224", drop_path=0.0, **model_args):
    if arch.startswith("vit"):
        model_args = {"depth": 2, "embed_dim": 32, "num_heads": 2, **model_args}
    return small_encoder(arch, drop_path=drop_path, model_args=model_args)


def test_the_teacher_starts_as_a_copy_without_gradient_or_drop_path():
    torch.manual_seed(0)
    pair = StudentTeacher(encoder(drop_path=0.9), encoder())
    for student, teacher in zip(pair.student.state_dict().values(), pair.teacher.state_dict().values()):
        assert torch.equal(student, teacher) and student.data_ptr() != teacher.data_ptr()
    assert not any(parameter.requires_grad for parameter in pair.teacher.parameters())
    crops = [torch.randn(8, 3, 32, 32)]
    assert pair.training and pair.student.training and not pair.teacher.training
    assert torch.equal(pair.teacher(crops), pair.teacher(crops))
    assert not torch.equal(pair.student(crops), pair.student(crops))
    pair.eval()
    assert torch.allclose(pair.student(crops), pair.teacher(crops))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
def test_moving_average(as_tensor, momentum):
    torch.manual_seed(0)
    pair = StudentTeacher(encoder().double(), encoder().double())
    with torch.no_grad():
        for parameter in pair.student.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = copy.deepcopy(pair)
    pair.update_teacher_(torch.tensor(momentum, dtype=torch.float64) if as_tensor else momentum)
    for name, parameter in pair.teacher.named_parameters():
        old, student = before.teacher.get_parameter(name), before.student.get_parameter(name)
        assert torch.allclose(parameter, momentum * old + (1 - momentum) * student, rtol=1e-12, atol=1e-14)
        assert torch.equal(pair.student.get_parameter(name), student)


def test_batch_norms_of_the_teacher_keep_their_own_statistics():
    torch.manual_seed(0)
    pair = StudentTeacher(encoder("resnet10t"), encoder("resnet10t"))
    teacher = pair.teacher.backbone
    assert teacher.bn1.training and not teacher.training
    pair.teacher([torch.randn(4, 3, 32, 32) + 3])
    assert teacher.bn1.num_batches_tracked == 1
    statistics = teacher.bn1.running_mean.clone()
    pair.update_teacher_(0.5)
    assert torch.equal(teacher.bn1.running_mean, statistics)
    pair.eval()
    assert not teacher.bn1.training


def test_16_bit_weights_are_refused():
    with pytest.raises(ValueError, match=r"Weights must be float32 .* backbone\.cls_token is torch\.bfloat16"):
        StudentTeacher(encoder().bfloat16(), encoder())
