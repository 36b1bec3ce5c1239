"""Whether the tests for a card run on the CPU instead, to see that they can run: REHEARSE_ON_CPU=1."""

import os

REHEARSAL = "REHEARSE_ON_CPU" in os.environ
