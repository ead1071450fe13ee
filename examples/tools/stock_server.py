"""An MCP server of a warehouse: it says how many pieces of an item are in stock. `pip install mcp`"""

from mcp.server import MCPServer

STOCK = {"bolts": 412, "nuts": 388, "screws": 1250, "washers": 97, "hinges": 36, "nails": 2040, "hooks": 58, "keys": 15}

server = MCPServer("stock")


@server.tool()
def count(item: str) -> str:
    """Say how many pieces of an item are in stock."""
    return str(STOCK[item]) if item in STOCK else f"there are no {item}; there are {', '.join(STOCK)}"


if __name__ == "__main__":
    server.run()
