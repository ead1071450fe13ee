"""An MCP server of a warehouse tells how many pallets of an item are in stock. `pip install mcp`"""

from mcp.server import MCPServer

STOCK = {
    **{"axles": 4, "bolts": 7, "clamps": 2, "drills": 9, "files": 5, "gears": 1, "hinges": 6, "jacks": 3, "keys": 8},
    **{"lamps": 2, "nails": 7, "pumps": 5, "rivets": 4, "saws": 9, "tiles": 3, "valves": 1, "wires": 8, "yokes": 6},
}

server = MCPServer("stock")


@server.tool()
def count(item: str) -> str:
    """Say how many pallets of an item are in stock."""
    return str(STOCK[item]) if item in STOCK else f"there are no {item}; there are {', '.join(STOCK)}"


if __name__ == "__main__":
    server.run()
