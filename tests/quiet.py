"Surroundings of every test and proof, for whoever imports this first: one thread, no network."

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    VLMRLHF_QUIET="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    TRANSFORMERS_NO_ADVISORY_WARNINGS="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
)
