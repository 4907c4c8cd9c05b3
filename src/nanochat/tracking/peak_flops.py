"""What a GPU could do at most, to tell what share of it training uses (MFU, PaLM, arXiv 2204.02311, appendix B)."""

import re

# Dense bf16 FLOPs per second with fp32 accumulation, from the makers' data sheets. The first of these that a GPU's name
# contains as whole words counts, so the more exact ones come first.
BF16_PEAKS = (
    ("B200", 2.25e15),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX A6000", 154.8e12),
    ("MI300X", 1307e12),
)


def peak_flops(gpu: str, dtype: str) -> float | None:
    """The peak of a GPU by its name, or None where nobody has looked it up; then no MFU is better than a wrong one."""
    if dtype != "bfloat16" or "MIG" in gpu:
        return None
    return next((peak for name, peak in BF16_PEAKS if re.search(rf"\b{name}\b", gpu, re.IGNORECASE)), None)
