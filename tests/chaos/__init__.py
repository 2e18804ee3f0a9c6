"""`make chaos`: a real relay on a real Kafka under load, faults from a seeded schedule, an oracle that saw it all."""

import sys
from pathlib import Path

# As pytest does: what the tests share is imported by its bare name.
sys.path.insert(0, str(Path(__file__).parents[1]))
