from .describe import describe as describe
from .packs import Label as Label
from .packs import LabelPack as LabelPack
from .scores import questions as questions
from .scores import score as score
from .search import bm25 as bm25
from .verified import Imported as Imported
from .verified import import_labels as import_labels
