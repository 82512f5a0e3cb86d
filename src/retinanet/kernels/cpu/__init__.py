"""Fast paths on a CPU: numba, compiled at first use and kept on disk. Import needs numba."""
