"""Programs that make artefacts for experiments; no part of the wheel."""
