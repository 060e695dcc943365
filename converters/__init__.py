"""Converters, one module per file format.

Import them as `qwen_scope_lens.converters.<name>`, or run them with `python -m` or `qsl convert`.
"""
