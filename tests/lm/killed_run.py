"""Training runs that kill themselves with SIGKILL after some steps; a script of test_training.py.

Prints how each run ended as a JSON list: 0, or minus the signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

# What finetune would import in every child.
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer  # noqa: F401

from plum.lm import FinetuneConfig, finetune, load_generator
from plum.sid import SidVocabulary


def train(arguments: dict, kill_at: int | None, output: str) -> None:
    torch.set_num_threads(1)
    folder = Path(arguments["inputs"])
    codes = np.load(folder / "codes.npy")
    flat, lengths = np.load(folder / "flat.npy"), np.load(folder / "lengths.npy")
    histories = np.split(flat, np.cumsum(lengths)[:-1])

    def progress(done: int, total: int) -> None:
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    generator = load_generator("scratch:tiny", SidVocabulary((4, 5, 3)), seed=1, max_length=64)
    config = FinetuneConfig(**arguments["config"])
    windows = [history[:-1] for history in histories]
    finetune(generator, windows, histories, codes, output, config, progress=progress)


def main() -> None:
    arguments = json.loads(sys.argv[1])
    endings = []
    for kill_at, output in arguments["runs"]:
        # A fork per run saves the seconds that importing takes; no thread has started yet.
        child = os.fork()
        if child == 0:
            train(arguments, kill_at, output)
            os._exit(0)
        endings.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(endings))


if __name__ == "__main__":
    main()
