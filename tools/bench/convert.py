"""The converter against `cp` of the same bytes on the same disk, in turns.

    python tools/make_model.py /tmp/model && python tools/bench/convert.py /tmp/model [--rounds 3]
                                                                           [--json FILE]

Writes beside the model. Each turn starts and ends with everything written to disk, as the converter
does and `cp` does not of itself: `sync` is part of each time. The source stays in the page cache if
it fits. Prints medians, and their ratio to cp.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="all rounds")
    options = parser.parse_args()
    hf, out = options.model, options.model.with_name(options.model.name + "-bench")
    num_bytes = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
    dist = out.with_name(out.name + "-dist")
    convert = [sys.executable, "-m", "miles_lite.cli", "convert"]
    to_dist = [*convert, "hf-to-dist", "--hf", str(hf), "--out", str(out)]
    to_hf = [*convert, "dist-to-hf", "--dist", str(dist), "--hf-template", str(hf)]
    to_hf += ["--out", str(out)]
    commands = {
        "cp": ["cp", "-r", str(hf), str(out)],
        "hf-to-dist, 1 worker": [*to_dist, "--workers", "1"],
        "hf-to-dist, 2 workers": [*to_dist, "--workers", "2"],
        "dist-to-hf, 2 workers": [*to_hf, "--workers", "2"],
    }
    subprocess.run([*to_dist[:-1], str(dist)], check=True, capture_output=True)
    times: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            begin = time.perf_counter()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            os.sync()
            times[name].append(time.perf_counter() - begin)
            if found := re.search(r"worker ([\d.]+) GB", done.stdout):
                peaks[name] = max(peaks.get(name, 0.0), float(found[1]))
    for folder in (out, dist):
        shutil.rmtree(folder)
    base = statistics.median(times["cp"])
    print(f"{num_bytes / 1e9:.2f} GB, {options.rounds} rounds")
    for name, taken in times.items():
        median = statistics.median(taken)
        memory = f", peak RSS of a worker {peaks[name]:.2f} GB" if name in peaks else ""
        print(
            f"{name:<24}{median:6.1f} s ({min(taken):.1f} to {max(taken):.1f})"
            f"{num_bytes / 1e9 / median:7.2f} GB/s  {base / median:5.2f} of cp{memory}"
        )
    if options.json:
        told = {"bytes": num_bytes, "seconds": times, "peak_gb": peaks, "load": os.getloadavg()}
        options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
