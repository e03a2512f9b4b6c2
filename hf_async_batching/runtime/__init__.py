"""State of the whole process: forks, waiting threads, process exit, caches."""
