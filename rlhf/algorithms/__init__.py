"""One file per algorithm. The table below is the only list of them."""
