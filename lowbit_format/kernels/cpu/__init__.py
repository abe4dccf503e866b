"""Kernels for CPUs: tables of signed sums looked up by the bits of the planes. See README.md beside this file."""
