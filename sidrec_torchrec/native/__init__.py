"""Operators in C++ for CPU, compiled when first used."""
