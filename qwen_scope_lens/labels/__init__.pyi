from .describe import describe as describe
from .packs import Label as Label
from .packs import LabelPack as LabelPack
