from .engine import Engine as Engine
from .rows import Wanted as Wanted
