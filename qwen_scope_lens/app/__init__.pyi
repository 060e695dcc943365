from .server import serve as serve
from .workbench import Workbench as Workbench
