from .folders import Folders as Folders
from .server import make_server as make_server
from .toolbox import Toolbox as Toolbox
