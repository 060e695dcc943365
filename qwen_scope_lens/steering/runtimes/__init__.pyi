from .control_vectors import export as export
from .control_vectors import layer_vectors as layer_vectors
from .control_vectors import to_gguf as to_gguf
from .interp_engine import steer_engine as steer_engine
from .lm_eval_model import evaluate as evaluate
from .lm_eval_model import steered_lm as steered_lm
