# SPDX-License-Identifier: Apache-2.0
"""Statistics: intervals, scores, and the distillation verdict."""
