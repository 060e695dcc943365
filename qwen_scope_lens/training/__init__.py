"""The paper's training signals on TRL trainers."""
