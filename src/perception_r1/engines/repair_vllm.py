"""Mends an environment in which vLLM was installed beside a torch that its companions were not built for.

    python src/perception_r1/engines/repair_vllm.py

It is run by the Python of that environment, as a file: nothing that it may have to mend is imported for it. With builds
that fit each other it does nothing.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

UNUSED = ("torchaudio", "torchcodec")
"""Nothing here needs them, but transformers imports them where they are."""
_FALLBACK = "torchvision_operators"
"""Module that names torchvision's operators where their compiled code does not load; put beside torchvision."""
_BOXES = "Tensor dets, Tensor scores, float iou_threshold"
_POOL = "float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SIZES = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_CONVOLUTION = (
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask"
)
OPERATORS = (
    f"nms({_BOXES}) -> Tensor",
    f"qnms({_BOXES}) -> Tensor",
    f"roi_align(Tensor input, Tensor rois, {_POOL}, int sampling_ratio, bool aligned) -> Tensor",
    f"qroi_align(Tensor input, Tensor rois, {_POOL}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward(Tensor grad, Tensor rois, {_POOL}, {_SIZES}, int sampling_ratio, bool aligned) -> Tensor",
    f"ps_roi_align(Tensor input, Tensor rois, {_POOL}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor map, {_POOL}, int sampling_ratio, {_SIZES}) -> Tensor",
    f"roi_pool(Tensor input, Tensor rois, {_POOL}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, {_POOL}, {_SIZES}) -> Tensor",
    f"ps_roi_pool(Tensor input, Tensor rois, {_POOL}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor map, {_POOL}, {_SIZES}) -> Tensor",
    f"deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, {_CONVOLUTION}) -> Tensor",
    "_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    f"{_CONVOLUTION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
"""What torchvision registers further code for when it is imported. None of them is called for pictures of a prompt."""


def imports(name: str) -> bool:
    """Whether a module can be imported in this environment."""
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


def main() -> None:
    """Remove what is unused and broken, and let torchvision be imported."""
    broken = [name for name in UNUSED if find_spec(name) is not None and not imports(name)]
    if broken:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *broken], check=True)
    found = find_spec("torchvision") if not imports("torchvision") else None
    if found is not None and found.origin is not None:
        start = Path(found.origin)
        fallback = start.parents[1] / f"{_FALLBACK}.py"
        lines = [f"library.define({operator!r})" for operator in OPERATORS]
        head = ["import torch", "", "library = torch.library.Library('torchvision', 'DEF')"]
        fallback.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
        text = start.read_text(encoding="utf-8")
        if _FALLBACK not in text:
            start.write_text(f"import {_FALLBACK}  # its compiled operators do not load\n{text}", encoding="utf-8")
    if not imports("vllm"):
        sys.exit("vLLM is installed but cannot be imported: `python -c 'import vllm'` in its environment says why.")


if __name__ == "__main__":
    main()
