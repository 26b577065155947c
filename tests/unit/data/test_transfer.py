"""What is sent to a device arrives as it was; the meta device stands for one, and its copies are counted."""

from typing import NamedTuple

import pytest
import torch
from operations import META, Counted

from gdd_dist.data.transfer import Sender, packed, unpacked

TENSORS = [
    torch.tensor([1, -2, 3]),
    torch.rand(5, 3),
    torch.tensor([True, False]),
    torch.randint(0, 255, (2, 4, 4, 3), dtype=torch.uint8).permute(0, 3, 1, 2),
    torch.zeros(0, 7),
    torch.tensor(2.5, dtype=torch.float64),
]


def test_what_is_packed_comes_out_as_it_was():
    found = unpacked(packed(TENSORS, pinned=False), TENSORS)
    assert [t.dtype for t in found] == [t.dtype for t in TENSORS]
    assert all(torch.equal(a, b) for a, b in zip(found, TENSORS, strict=True))


class Pair(NamedTuple):
    first: torch.Tensor
    second: tuple[torch.Tensor, str] | None


def test_a_batch_arrives_in_one_copy_with_all_that_is_no_tensor():
    there, batch = torch.zeros(3, device=META), Pair(TENSORS[0], (TENSORS[1], "word"))
    with Counted() as counted:
        first, (pair, images), nothing = Sender(META)((7, (batch, there), None))
    assert dict(counted.copies) == {"aten._to_copy.default": 1}
    assert (first, nothing, images is there) == (7, None, True)
    assert isinstance(pair, Pair)
    assert pair.second[1] == "word"
    for sent, own in ((pair.first, TENSORS[0]), (pair.second[0], TENSORS[1])):
        assert (sent.device, sent.dtype, sent.shape) == (META, own.dtype, own.shape)


@pytest.mark.parametrize("batch", [(TENSORS[0], None), (), (torch.zeros(1, device=META),)])
def test_what_is_there_already_stays(batch):
    device = META if batch and batch[0].device == META else torch.device("cpu")
    assert Sender(device)(batch) is batch
