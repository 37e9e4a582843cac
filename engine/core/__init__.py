"""Scheduling policy: which tokens each step computes, in which KV blocks, with which adapters. Standard library only.

Same calls in, same plans out: no clock, no randomness, no threads. Read `plan`, then `sequence`, then `scheduler`.
"""
