"""Packed tensors come back as they were, and only what becomes smaller is packed."""

import pytest
import torch

from vitlab.models import _packed


def total(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize("share", [0, 0.03, 0.1, 0.5, 0.96, 1])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64]
)
@pytest.mark.parametrize("shape", [(40, 33), (1001,), (8, 3, 7, 7), (0, 5), (), (1,)])
def test_round_trip_is_exact_and_never_larger(share, dtype, shape):
    tensor = torch.where(torch.rand(shape) < share, 100 * torch.randn(shape), 0).to(dtype)
    stored, shapes = _packed.pack({"a": tensor, "b": tensor == 0})
    back = _packed.unpack(stored, shapes)
    assert all(
        back[name].dtype == t.dtype and torch.equal(back[name], t)
        for name, t in [("a", tensor), ("b", tensor == 0)]
    )
    assert total(stored) <= total(back)
    assert ("a" in shapes) == ("a:bits" in stored)


def test_by_hand():
    tensor = torch.zeros(4, 100)
    tensor[0, 1], tensor[3, 99], tensor[2, 0] = 2.0, float("nan"), -0.0
    stored, shapes = _packed.pack({"w": tensor})
    assert (
        shapes == {"w": [4, 100]}
        and stored["w:values"][0] == 2
        and stored["w:values"].isnan().tolist() == [False, True]
    )
    assert stored["w:bits"].tolist() == [0b01000000] + 48 * [0] + [1]


def test_bits_are_the_mask_where_it_was_applied():
    tensor, mask = torch.zeros(400), torch.zeros(400, dtype=torch.bool)
    tensor[:3], mask[:5] = 1.0, True  # two zeros stay: they may be trained
    stored, shapes = _packed.pack({"w": tensor}, {"w": mask})
    assert len(stored["w:values"]) == 5 and torch.equal(
        _packed.bits_to_mask(stored["w:bits"], [400]), mask
    )
    assert torch.equal(_packed.unpack(stored, shapes)["w"], tensor)
    tensor[9] = 1.0  # outside
    stored, shapes = _packed.pack({"w": tensor}, {"w": mask})
    assert len(stored["w:values"]) == 4 and torch.equal(_packed.unpack(stored, shapes)["w"], tensor)


def test_what_does_not_belong_together():
    stored, shapes = _packed.pack({"w": torch.zeros(400)})
    for changed, reason in [
        ({"w:bits": stored["w:bits"][1:]}, r"w of shape \[400\] needs 50 bytes of bits; got 49"),
        ({"w:values": torch.ones(2)}, "w has 2 values for 0 entries"),
    ]:
        with pytest.raises(ValueError, match=reason):
            _packed.unpack(stored | changed, shapes)
    with pytest.raises(ValueError, match="w should be packed, and there is no w:bits"):
        _packed.unpack({"w": torch.zeros(400)}, shapes)
