"""Benchmarks of the kernels: ``python -m benchmarks`` lists them, ``python -m benchmarks NAME`` runs one."""
