from .build import Sources as Sources
from .build import build_site as build_site
from .layer import gather as gather
from .neuronpedia import write_neuronpedia as write_neuronpedia
from .server import make_server as make_server
from .static import write_site as write_site
