"""`mobilesam doctor`: facts about this machine, this installation and the current folder. The way in is `run.py`.

A package that can't be imported is a fact here: modules of other rooms are imported where they are used.
"""

from .run import doctor as doctor
