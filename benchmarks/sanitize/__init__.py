"""NVIDIA's compute-sanitizer over small steps of the engine and over each kernel."""
