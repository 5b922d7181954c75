"""`benchmarks/soak.py` over a tiny model: clients that come, leave and err."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_model, tiny_model

from ultrafuser.modeling.assembly import SpecialistSource, fuse
from ultrafuser.modeling.checkpoint import save_fused

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(3, id="short"), pytest.param(120, marks=pytest.mark.slow, id="long")],
)
def test_the_server_stands_many_clients(tmp_path, tokenizer, seconds):
    folders = [
        save_model(tmp_path / name, tiny_model(seed=seed, max_position_embeddings=2048), tokenizer)
        for seed, name in enumerate("ab")
    ]
    specialists = {Path(folder).name: SpecialistSource(model=folder) for folder in folders}
    save_fused(fuse(specialists, gate_size=8), tmp_path / "fused")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "fused"), "--seconds", str(seconds)]
    command += ["--clients", "64", "--json", str(tmp_path / "metrics.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240 + 4 * seconds)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert metrics["problems"] == metrics["requests/wrong"] == 0
    # Every client had its turn; what it did first follows from the seed, however slow the machine is.
    counts = [metrics[f"requests/{kind}"] for kind in ("good", "leaving", "erring")]
    assert min(counts) > 3
    assert sum(counts) >= 64
    assert metrics["status/400"] > 0
    assert "status/500" not in metrics
