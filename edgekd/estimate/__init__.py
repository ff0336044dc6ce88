# SPDX-License-Identifier: Apache-2.0
"""Estimates of latency from a model file and a target's profile: a value, an 80 % band, and how it is known."""
