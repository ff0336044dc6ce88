# SPDX-License-Identifier: Apache-2.0
"""Soft targets: the teacher's logits, stored."""
