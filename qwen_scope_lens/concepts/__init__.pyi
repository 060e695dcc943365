from .concept import Concept as Concept
from .concept import read_examples as read_examples
from .find import Found as Found
from .find import FoundFeature as FoundFeature
from .find import find as find
