"""The functions of a toolbox behind the Model Context Protocol, on standard input and output."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.errors import ScopeError
from qwen_scope_lens.extras import require
from qwen_scope_lens.mcp.toolbox import Toolbox
from qwen_scope_lens.version import __version__

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer

__all__ = ["TOOLS", "make_server"]

TOOLS = ("about", "read", "feature", "search", "steer", "query")

INSTRUCTIONS = (
    "Features of a Qwen model, found by sparse autoencoders. Call `about` first. `read` shows which"
    " features fire on a text, `search` and `feature` say what they mean, `steer` tests that by"
    " changing them while the model writes, and `query` asks a feature store of a whole corpus in"
    " SQL. Nothing is written or changed."
)


def make_server(toolbox: Toolbox) -> MCPServer[Any]:
    """The server; `make_server(toolbox).run()` serves one client until its input ends.

    A named error of this package reaches the agent in its own words, which say what was expected
    and what to do. The text of any other exception stays in the log, on the error stream.
    """
    mcp = require("mcp.server.mcpserver", "mcp")
    hints = require("mcp.types", "mcp").ToolAnnotations(read_only_hint=True, open_world_hint=False)
    told = require("mcp.server.mcpserver.exceptions", "mcp").ToolError
    server: MCPServer[Any] = mcp.MCPServer(
        "qwen-scope-lens", instructions=INSTRUCTIONS, version=__version__, log_level="WARNING"
    )
    for name in TOOLS:
        server.add_tool(_named(getattr(toolbox, name), told), annotations=hints)
    return server


def _named(tool: Callable[..., Any], told: type[Exception]) -> Callable[..., Any]:
    @functools.wraps(tool)
    def call(*args: Any, **named: Any) -> Any:
        try:
            return tool(*args, **named)
        except ScopeError as error:
            raise told(f"{type(error).__name__}: {error}") from error

    return call
