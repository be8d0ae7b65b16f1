"""What building a datastore and its index will take: disk, memory and time, from rates measured on this machine.

`encoding` and `indexing` measure what an entry costs, on a sample and with the code that builds; `prediction` is the
arithmetic from there to a plan; `making` goes from one to the other, and `text` is how a plan reads.
"""

from lightning_knnmt.building.plan.making import make_plan
from lightning_knnmt.building.plan.prediction import Plan
from lightning_knnmt.building.plan.text import to_text

__all__ = ["Plan", "make_plan", "to_text"]
