"""The null GPU itself: programs see a GPU, and its log tells what they launched."""

import null_gpu

pytestmark = null_gpu.marks

PROGRAM = """
import nullgpu
import torch

nullgpu.log("LOG")
before = nullgpu.launches()
x = torch.ones(1024, 1024, device="cuda", dtype=torch.bfloat16)
y = x @ x
print(torch.cuda.get_device_name(), nullgpu.launches() - before, torch.cuda.max_memory_allocated() >= 2**22)
nullgpu.log(None)
"""


def test_a_program_sees_a_gpu_and_its_log(tmp_path):
    log = tmp_path / "log"
    name, launches, allocated = null_gpu.run_source(PROGRAM.replace("LOG", str(log)), tmp_path)[-1].rsplit(
        " ", 2
    )
    assert "H100" in name
    assert int(launches) == 2
    assert allocated == "True"
    assert len(log.read_text("utf-8").splitlines()) >= 2
