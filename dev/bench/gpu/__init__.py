"""What only a graphics card can tell, in two calls of at most six minutes: see dev/bench/gpu.sh."""
