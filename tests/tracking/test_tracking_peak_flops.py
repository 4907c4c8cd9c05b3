import pytest

from nanochat.tracking.peak_flops import peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Some future GPU", None),
    ],
)
def test_a_peak_is_that_of_the_very_card_or_none(name, peak):
    assert peak_flops(name, "bfloat16") == peak


def test_another_type_has_no_peak_here():
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
