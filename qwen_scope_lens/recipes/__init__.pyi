from .engine import Outcome as Outcome
from .engine import run as run
from .engine import states as states
from .recipe import Recipe as Recipe
from .recipe import names as names
from .recipe import open_recipe as open_recipe
