"""One module per foreign format, importable as `qwen_scope_lens.converters.<name>` and runnable
with `python -m` or through `qsl convert`."""
