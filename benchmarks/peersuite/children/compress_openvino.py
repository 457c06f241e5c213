"""Make a folder in openvino's format, with integer weights, of a GGUF file: runs in openvino's own environment.

python compress_openvino.py MODEL.gguf FOLDER int8|int4 GROUP_SIZE
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import nncf  # type: ignore[import-not-found, import-untyped, unused-ignore]
import openvino  # type: ignore[import-not-found, import-untyped, unused-ignore]
import openvino_genai as genai  # type: ignore[import-not-found, import-untyped, unused-ignore]

MODEL = "openvino_model.xml"


def main(source: Path, folder: Path, form: str, group_size: int) -> None:
    """Have the pipeline write the model it reads, then compress that."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        linked = Path(temporary) / "model.gguf"
        linked.symlink_to(source)
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1
        genai.ContinuousBatchingPipeline(str(linked), scheduler, "CPU", {"enable_save_ov_model": True})
        model = openvino.Core().read_model(Path(temporary) / MODEL)
        if form == "int8":
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        else:
            mode = nncf.CompressWeightsMode.INT4_SYM
            model = nncf.compress_weights(model, mode=mode, group_size=group_size, ratio=1.0, all_layers=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        openvino.save_model(model, folder / MODEL)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
