from .endpoint import Endpoint as Endpoint
from .generator import Request as Request
from .ledger import Ledger as Ledger
from .ledger import Prices as Prices
from .local import Local as Local
from .local import Push as Push
from .templates import Templates as Templates
