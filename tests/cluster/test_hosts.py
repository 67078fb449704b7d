"""First light."""

import os
import subprocess
import sys

from conftest import TOKEN


def lepton(ray_hosts, *words, token=TOKEN, timeout=300):
    env = {**os.environ, "RAY_AUTH_TOKEN": token, "RAY_AUTH_MODE": "token"}
    env.pop("RAY_ADDRESS", None)
    return subprocess.run([sys.executable, "-m", "launcher.cli", *words], capture_output=True, text=True, timeout=timeout, env=env)


RECIPE = """
name: {name}
model: {{name_or_path: /mnt/storage/tiny/model, dtype: fp32}}
method: {{kind: lora, r: 4}}
data: {{train: /mnt/storage/tiny/train.jsonl, eval: /mnt/storage/tiny/eval.jsonl, seq_len: 64}}
batch: {{global_batch_size: 8}}
optim: {{lr: 3.0e-3}}
schedule: {{max_steps: 6, epochs: 30}}
output_dir: /mnt/storage/runs
track: {{to: []}}
"""


def test_four_hosts(ray_hosts, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(name="first"))
    try:
        done = lepton(ray_hosts, str(recipe), "--nodes", "4", "--cluster", ray_hosts.address)
        print(done.stdout, done.stderr, done.returncode)
        for words in (
            ["list"],
            ["status", "first"],
            ["logs", "first"],
            ["logs", "first", "--rank", "1"],
            ["status", "first", "--json"],
            ["attach", "first"],
        ):
            done2 = lepton(ray_hosts, *words, "--cluster", ray_hosts.address)
            print(words, done2.returncode, done2.stdout[-3000:], done2.stderr[-2000:])
        print(lepton(ray_hosts, "list", "--cluster", ray_hosts.address, token="wrong" * 10).stderr)
        print(lepton(ray_hosts, "list", "--cluster", ray_hosts.address, token="").stderr)
        print(lepton(ray_hosts, "list", "--cluster", "http://10.77.1.2:8265").stderr)
        print(lepton(ray_hosts, "list", "--cluster", f"http://{ray_hosts.head.address}:6379").stderr)
        assert done.returncode == 0
    finally:
        pass
