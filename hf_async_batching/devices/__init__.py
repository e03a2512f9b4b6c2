"""One device protocol, three devices: CUDA, the CPU, and a simulation with an adversarial order of execution."""
