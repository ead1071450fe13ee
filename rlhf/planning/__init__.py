"""What a run will need before it starts: memory, time, and a simulation of many steps. Arithmetic, without torch."""
