"""Made tests/golden/checkpoint_v1 with the last kbtrain that wrote format version 1.

``python tests/golden/make_checkpoint_v1.py FOLDER`` there: the run of ``helpers_resume`` without
random layers, its checkpoint of step 4 of 9, and what the uninterrupted run came to. Kept so that
one can see what the fixture is; a newer kbtrain writes a newer format.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from helpers import train_logs, weights
from helpers_resume import make_trainer


def main(target):
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer("deterministic", folder)
        trainer.fit()
        shutil.copytree(Path(folder) / "checkpoint-4", target / "checkpoint-4")
    expected = {
        "loss": train_logs(trainer),
        "weights": [w.tolist() for w in weights(trainer.model)],
    }
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
