"""Record and replay the choices of a mixture's routers."""
