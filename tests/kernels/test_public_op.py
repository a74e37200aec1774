"""The custom op under PyTorch's own checks, compile, autocast and checkpointing; and the sentences of its errors."""

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from massl_fast.kernels import available_backends, memory_cross_entropy, memory_readout

ARGUMENTS = dict(block_size=16, student_temp=0.1, teacher_temp=0.05)


def case(views=3, images=4, width=16, entries=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((views, images, width), (2, images, width), (entries, width))
    return [normalize(torch.randn(*shape, generator=generator), dim=-1).to(dtype) for shape in shapes]


def test_opcheck():
    student, teacher, memory = case()
    op = torch.ops.massl_fast.memory_cross_entropy.default
    number = (student, teacher, memory, None, 16, 0.1, None, 0.05, None, 0, 0, None, "streaming")
    tensors = (
        student,
        teacher,
        memory,
        torch.arange(50),
        16,
        0.0,
        torch.tensor(0.1),
        0.0,
        torch.tensor(0.05),
        0,
        0,
        torch.tensor(3),
        "streaming",
    )
    for arguments in (number, tensors):
        torch.library.opcheck(op, arguments)
    readout = (student.view(-1, 16), memory, None, 16, 0.1, None, 0, 0, None, "streaming")
    torch.library.opcheck(torch.ops.massl_fast.memory_readout.default, readout)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_and_does_not_recompile_for_a_schedule(dynamic):
    torch._dynamo.reset()
    compiles = 0

    def counting(graph, inputs):
        nonlocal compiles
        compiles += 1
        return graph.forward

    def step_of(student, teacher, memory, teacher_temp, step):
        return memory_cross_entropy(student, teacher, memory, block_size=16, student_temp=0.1, teacher_temp=teacher_temp, step=step).loss

    compiled = torch.compile(step_of, backend=counting, fullgraph=True, dynamic=dynamic)
    tensors = case()
    for step in range(4):
        temperature, number = torch.tensor(0.04 + 0.01 * step), torch.tensor(step)
        assert torch.equal(compiled(*tensors, temperature, number), step_of(*tensors, temperature, number))
    assert compiles == 1


def test_temperature_and_step_tensors_equal_numbers():
    tensors = case()
    number = memory_cross_entropy(*tensors, block_size=16, student_temp=0.1, teacher_temp=0.05, step=9)
    tensor = memory_cross_entropy(
        *tensors, block_size=16, student_temp=torch.tensor(0.1), teacher_temp=torch.tensor([0.05]), step=torch.tensor([9])
    )
    torch.testing.assert_close(number, tensor)


def test_gradient_reaches_the_student_alone_and_scales():
    student, teacher, memory = (t.requires_grad_() for t in case())
    (2.5 * memory_cross_entropy(student, teacher, memory, **ARGUMENTS).loss).backward()
    assert teacher.grad is None and memory.grad is None
    plain = student.detach().clone().requires_grad_()
    memory_cross_entropy(plain, teacher, memory, **ARGUMENTS).loss.backward()
    torch.testing.assert_close(student.grad, 2.5 * plain.grad)


def test_autocast_and_checkpointing():
    student, teacher, memory = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = memory_cross_entropy(student, teacher, memory, **ARGUMENTS)
    expected = memory_cross_entropy(*(t.bfloat16() for t in (student, teacher, memory)), **ARGUMENTS)
    assert half.loss.dtype == torch.float32 and torch.equal(half.loss, expected.loss)
    gradients = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        rows = student.clone().requires_grad_()
        run(lambda x: memory_cross_entropy(normalize(x, dim=-1), teacher, memory, **ARGUMENTS).loss, rows).backward()
        gradients.append(rows.grad)
    assert torch.equal(*gradients)


def test_backends_of_a_cpu():
    assert available_backends("cpu", torch.float32)[:2] == ("streaming", "reference")
    assert available_backends("cpu", torch.int32) == ()


def changed(**changes):
    student, teacher, memory = case()
    return dict(student=student, teacher=teacher, memory=memory, **ARGUMENTS) | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda: dict(student=torch.randn(4, 16)), "student must be"),
        (lambda: dict(teacher=torch.randn(2, 5, 16)), "same images"),
        (lambda: dict(memory=torch.randn(50, 8)), "as wide as the memory"),
        (lambda: dict(student=case(dtype=torch.bfloat16)[0]), "memory's dtype"),
        (lambda: dict(memory=torch.zeros(50, 16, dtype=torch.int64)), "memory must be"),
        (lambda: dict(memory=case()[2].to("meta")), "device"),
        (lambda: dict(block_size=0), "block_size"),
        (lambda: dict(block_size=51), "between 1 and the 50 entries"),
        (lambda: dict(student_temp=0.0), "student_temp"),
        (lambda: dict(teacher_temp=float("nan")), "teacher_temp"),
        (lambda: dict(partition=torch.zeros(50, dtype=torch.int64)), "permutation"),
        (lambda: dict(partition=torch.arange(49)), "each of the 50 entries"),
        (lambda: dict(partition=torch.arange(50) + 1), "0 to 49"),
        (lambda: dict(partition=torch.arange(50.0)), "int32 or int64"),
        (lambda: dict(block_reduction="max"), "block_reduction"),
        (lambda: dict(backend="cuda"), "backend must be one of"),
        (lambda: dict(backend="triton"), 'backend "triton" cannot run here'),
        (lambda: dict(student=case()[0][:1], teacher=case()[1][:1]), "no pair"),
    ],
)
def test_mistakes_are_sentences_that_name_the_argument(changes, words):
    with pytest.raises(ValueError, match=words):
        memory_cross_entropy(**changed(**changes()))


def test_readout_keeps_the_shape_of_its_rows():
    student, _, memory = case()
    readout, logsumexp = memory_readout(student, memory, block_size=16, temperature=0.1)
    assert readout.shape == student.shape and logsumexp.shape == student.shape[:-1]
