# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation: losses, teachers, soft targets, training."""
