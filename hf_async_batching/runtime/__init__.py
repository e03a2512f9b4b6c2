"""What concerns the whole process: forks, threads that wait, its end, its caches."""
