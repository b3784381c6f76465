"""The device that is not there behaves as a GPU would: what mixes, what raises, what comes back."""

from __future__ import annotations

import pytest
import torch

from tests.elsewhere import DEVICE, elsewhere

MIXING = "Expected all tensors to be on the same device"


@pytest.fixture(autouse=True)
def device():
    with elsewhere():
        yield


def ones(*shape, device=DEVICE):
    return torch.ones(shape, device=device)


MIXED = {
    "add": lambda: ones(3) + torch.ones(3),
    "add in place": lambda: ones(3).add_(torch.ones(3)),
    "where": lambda: torch.where(ones(3) > 0, ones(3), torch.ones(3)),
    "product": lambda: ones(2, 3) @ torch.ones(3, 2),
    "cat with nothing": lambda: torch.cat((ones(1, 3), torch.empty(0, 3))),
    "index_select": lambda: ones(3).index_select(0, torch.tensor([1])),
    "index_copy_": lambda: ones(3).index_copy_(0, torch.tensor([1]), ones(1)),
    "gather": lambda: ones(3).gather(0, torch.tensor([1])),
    "embedding": lambda: torch.nn.functional.embedding(torch.tensor([1]), ones(3, 2)),
    "searchsorted": lambda: torch.searchsorted(torch.ones(3), ones(3)),
    "mask": lambda: ones(3).masked_fill(torch.tensor([True, False, True]), 0.0),
    "out": lambda: torch.mm(ones(2, 2), ones(2, 2), out=torch.ones(2, 2)),
    "rows put by index": lambda: ones(3).index_put_((torch.tensor([1]),), torch.ones(1)),
    "a number of the device into a tensor of the CPU": lambda: torch.tensor(1.0).add_(ones(1)[0]),
    "a number of the device with a tensor of the CPU": lambda: torch.ones(3) + ones(1)[0],
}
ALLOWED = {
    "a number of the CPU": (lambda: ones(3) + torch.tensor(2.0), [3.0, 3.0, 3.0]),
    "a number of the CPU in place": (lambda: ones(2).mul_(torch.tensor(2.0)), [2.0, 2.0]),
    "a choice of a number": (lambda: torch.where(ones(2) > 1, ones(2), torch.tensor(5.0)), [5.0, 5.0]),
    "filled with a number": (lambda: ones(2).fill_(torch.tensor(5.0)), [5.0, 5.0]),
    "masked with a number": (lambda: ones(2).masked_fill(ones(2) > 0, torch.tensor(5.0)), [5.0, 5.0]),
    "an index of the CPU": (lambda: torch.arange(4, device=DEVICE)[torch.tensor([3, 1])], [3, 1]),
    "a mask of the CPU": (lambda: torch.arange(2, device=DEVICE)[torch.tensor([False, True])], [1]),
    "a number put by index": (
        lambda: ones(3).index_put_((torch.tensor([1]),), torch.tensor(7.0)),
        [1.0, 7.0, 1.0],
    ),
    "a copy between devices": (lambda: ones(2).copy_(torch.tensor([3.0, 4.0])), [3.0, 4.0]),
    "moved there": (lambda: torch.tensor([3.0]).to(DEVICE), [3.0]),
    "made there from numbers": (lambda: torch.tensor([3.0], device=DEVICE), [3.0]),
    "new beside one": (lambda: ones(3).new_zeros(2), [0.0, 0.0]),
}


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in MIXED.items()])
def test_call_that_mixes_devices_raises(call):
    with pytest.raises(RuntimeError, match=MIXING):
        call()


@pytest.mark.parametrize(("call", "want"), [pytest.param(*pair, id=name) for name, pair in ALLOWED.items()])
def test_call_that_torch_allows_gives_a_tensor_of_the_device(call, want):
    got = call()
    assert got.device == DEVICE
    assert got.tolist() == want


def test_tensor_of_the_cpu_takes_no_index_of_the_device():
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        torch.arange(3)[torch.tensor([1], device=DEVICE)]


def test_values_leave_the_device_by_every_door():
    x = torch.tensor([[1.5, 2.5]], device=DEVICE)
    assert x.cpu().device == torch.device("cpu")
    assert x.tolist() == [[1.5, 2.5]]
    assert (x.sum().item(), float(x[0, 1]), bool((x > 2).any())) == (4.0, 2.5, True)
    copy = torch.zeros(1, 2).copy_(x)
    assert (copy.device, copy.tolist()) == (torch.device("cpu"), [[1.5, 2.5]])


def test_view_shares_memory_strides_and_offset():
    x = torch.zeros(3, 4, device=DEVICE)
    view = x[1:, 1::2]
    view.fill_(7.0)
    assert (view.device, view.stride(), view.storage_offset()) == (DEVICE, (4, 2), 5)
    assert x.cpu().tolist() == [[0] * 4, [0, 7, 0, 7], [0, 7, 0, 7]]
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_in_place_call_returns_the_tensor_itself():
    x = torch.zeros(3, device=DEVICE)
    assert x.add_(1) is x
    assert torch.add(x, 1, out=x) is x
    assert x.to(DEVICE) is x


def test_tensor_set_to_other_memory_has_its_shape():
    x = torch.arange(6.0, device=DEVICE)
    y = torch.empty(0, device=DEVICE)
    y.set_(x.untyped_storage(), 1, (2, 2), (2, 1))
    y[0, 0] = 9
    assert (tuple(y.shape), y.tolist()) == ((2, 2), [[9.0, 2.0], [3.0, 4.0]])
    assert x[1].item() == 9


def test_inference_mode_copies_to_the_device_and_mixes_no_better():
    values = torch.ones(2, 2)
    with torch.inference_mode():
        there = values.to(DEVICE)
        there.fill_(3.0)
        assert (there.device, there.tolist(), values.tolist()) == (DEVICE, [[3.0] * 2] * 2, [[1.0] * 2] * 2)
        assert torch.nn.functional.linear(there, there).device == DEVICE
        with pytest.raises(RuntimeError, match=MIXING):
            torch.einsum("ij,jk->ik", there, values)


def test_code_may_branch_on_values():
    x = torch.tensor([3, 0, 2], device=DEVICE)
    assert x.nonzero().flatten().tolist() == [0, 2]
    assert torch.unique(x).device == DEVICE
    assert torch.bincount(x, minlength=5).tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_result_has_the_cpus_bits(dtype):
    values = torch.randn(33, 17)

    def call(x):
        low = x.clamp(-2, 2).to(dtype)
        return low.float().exp().softmax(-1).transpose(0, 1).contiguous()

    assert torch.equal(call(values.to(DEVICE)).cpu(), call(values))


def test_division_by_a_number_is_by_its_reciprocal_and_by_a_tensor_is_not():
    values = torch.rand(1000) + 0.5
    exact = values / 127.0
    there = values.to(DEVICE)
    by_number = (there / 127.0).cpu()
    assert 0 < (by_number != exact).sum() < 1000
    assert torch.allclose(by_number, exact, rtol=2**-22, atol=0.0)
    assert torch.equal((there / 4.0).cpu(), values / 4.0)
    assert torch.equal((there / there.new_full((), 127.0)).cpu(), exact)
    assert torch.equal((there / torch.tensor(127.0)).cpu(), by_number)
    assert torch.equal(there.div_(127.0).cpu(), by_number)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum(1),
        lambda x: x.sum(),
        lambda x: x.mean(1),
        lambda x: x @ x.t(),
        lambda x: torch.bmm(x[None], x.t()[None]),
    ],
)
def test_sums_run_in_another_order(call):
    values = torch.randn(64, 999)
    got, want = call(values.to(DEVICE)).cpu(), call(values)
    assert not torch.equal(got, want)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-3)
    whole = torch.randint(-9, 9, (64, 999)).float()
    assert torch.equal(call(whole.to(DEVICE)).sign().cpu(), call(whole).sign())


def test_device_is_gone_after_the_block():
    before = torch._C._only_lift_cpu_tensors()
    with elsewhere():
        assert torch._C._only_lift_cpu_tensors()
    assert torch._C._only_lift_cpu_tensors() == before
